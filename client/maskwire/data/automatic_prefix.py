"""The symbol that some tokenizers put before a text, as if the text began with a space.

SentencePiece-like tokenizers (Metaspace, Prepend) encode "46" as "▁46", and ByteLevel with `add_prefix_space`
as "Ġ46". Where a text continues another one, such as "46" after "12+34=", the symbol would insert a space.
"""

from __future__ import annotations

from typing import Any


class AutomaticPrefix:
    """Finds the prefix of a tokenizer, and encodes texts without it."""

    def __init__(self, loaded: Any) -> None:
        """Find the prefix of `loaded`, a Tokenizer of the package `tokenizers`."""
        self._loaded = loaded
        self._added = loaded.get_added_tokens_decoder()
        self.symbol = "".join(self._pieces("a"))[:-1]
        """The prefix; empty if the tokenizer adds none."""
        # Metaspace and ByteLevel add no prefix before a space; the normalizer Prepend does.
        self._before_space = "".join(self._pieces(" a")).startswith(self.symbol * 2)

    def _pieces(self, text: str) -> list[str]:
        """Return the parts of a text that the model encodes one by one. The first contains the prefix."""
        normalizer, splitter = self._loaded.normalizer, self._loaded.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if splitter is None else [piece for piece, _ in splitter.pre_tokenize_str(text)]

    def remove(self, text: str, encoding: Any, first: int, last: int) -> list[int]:
        """Return the ids from `first` up to `last` of a text, as if it were encoded without the prefix."""
        ids: list[int] = encoding.ids[first:last]
        if not self.symbol or not ids or ids[0] in self._added:
            return ids
        words = encoding.word_ids[first:last]
        begins_with_space = encoding.offsets[first][0] > 0 or text.startswith((" ", self.symbol))
        if begins_with_space and not self._before_space:
            return ids  # the symbol stands for a space of the text
        for id_, word, place in zip(ids, words, encoding.offsets[first:last], strict=True):
            if word != 0 and id_ in self._added:
                text = text[: place[0]]  # neither the normalizer nor the pre-tokenizer gets added tokens
                break
        piece = "".join(self._pieces(text)[:1]).removeprefix(self.symbol)
        begin = [token.id for token in self._loaded.model.tokenize(piece)] if piece else []
        return begin + [id_ for id_, word in zip(ids, words, strict=True) if word != 0]
