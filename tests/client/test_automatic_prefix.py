"""A text that continues another one is encoded without the prefix that the tokenizer puts before texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from maskwire.cli.generation_text import decode_row, read_prompts
from maskwire.data.prepare import prepare
from maskwire.data.tokenizer_codec import FileCodec
from maskwire.results import ModelInfo
from maskwire.v1.values import TokenizerDescription

TEXTS = ["12+34=46", "46 apples and 34 more", "the cat sat on the mat", "it's 7+5=12", "more apples = 12"] * 4
_SPLIT = pre_tokenizers.WhitespaceSplit()
_DIGITS = pre_tokenizers.Digits(individual_digits=False)


def metaspace(scheme: str) -> pre_tokenizers.Metaspace:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


def byte_level(prefix: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix)


def llama() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def llama_decoder() -> Any:
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


KINDS: dict[str, tuple[Any, Any, Any, Any]] = {
    # model and trainer, normalizer, pre-tokenizer, decoder
    "always": ("unigram", None, metaspace("always"), decoders.Metaspace()),
    "first": ("bpe", None, metaspace("first"), decoders.Metaspace()),
    "split": ("unigram", None, pre_tokenizers.Sequence([_SPLIT, metaspace("always")]), decoders.Metaspace()),
    "digits": ("bpe", None, pre_tokenizers.Sequence([metaspace("always"), _DIGITS]), decoders.Metaspace()),
    "prepend": ("bpe", llama(), None, llama_decoder()),
    "bytes with a prefix": ("bytes", None, byte_level(True), decoders.ByteLevel()),
    "never": ("bpe", None, metaspace("never"), decoders.Metaspace(prepend_scheme="never")),
    "bytes": ("bytes", None, byte_level(False), decoders.ByteLevel()),
    "wordpiece": (
        "wordpiece",
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    ),
    "no pre-tokenizer": ("bpe", None, None, decoders.Fuse()),
}
WITH_PREFIX = [*KINDS][:6]
WITHOUT = [*KINDS][6:]


def made(kind: str) -> Tokenizer:
    model, normalizer, splitter, decoder = KINDS[kind]
    options: dict[str, Any] = {
        "vocab_size": 60,
        "special_tokens": ["<unk>", "[MASK]"],
        "show_progress": False,
    }
    if model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(**options, unk_token="<unk>")
    elif model == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(**options)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if model == "bytes" else []
        trainer = trainers.BpeTrainer(
            **options | {"vocab_size": 60 + len(alphabet)}, initial_alphabet=alphabet
        )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def pairs(
    folder: Path, tokenizer: Tokenizer, rows: list[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """The ids of prompts and responses as `prepare` writes them, without the end id."""
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    meta = prepare(
        path, folder / "out", prompt_field="q", response_field="a", tokenizer=folder / "tokenizer.json"
    )
    ids = np.fromfile(folder / "out" / "tokens.bin", dtype="<u2")
    documents = np.split(ids, np.load(folder / "out" / "documents.npy")[:-1])
    prompts = np.load(folder / "out" / "prompts.npy")
    found = [(row[:size].tolist(), row[size:].tolist()) for row, size in zip(documents, prompts, strict=True)]
    assert all(response[-1] == meta.end_id for _, response in found)
    return [(prompt, response[:-1]) for prompt, response in found]


def codec_and_model(tokenizer: Tokenizer) -> tuple[FileCodec, ModelInfo]:
    codec = FileCodec(TokenizerDescription("sha256:1", tokenizer.to_str().encode()))
    size = tokenizer.get_vocab_size()
    return codec, ModelInfo(size, tokenizer.token_to_id("[MASK]"), None, 64, 1, "", True, False)


PARTS = [
    ("12+34=", "46"),
    ("the cat", " sat on the mat"),
    ("the c", "at sat"),
    ("12", "+34=46"),
    ("12+34=", "46 apples and 34 more"),
]


@pytest.mark.parametrize("kind", [*WITH_PREFIX, "never", "bytes"])
def test_a_prompt_and_its_continuation_decode_to_the_text(tmp_path: Path, kind: str) -> None:
    tokenizer = made(kind)
    codec, model = codec_and_model(tokenizer)
    for (prompt, response), (first, later) in zip(pairs(tmp_path, tokenizer, PARTS), PARTS, strict=True):
        # The decoder of ByteLevel does not remove the prefix of the whole text.
        assert tokenizer.decode(prompt + response).removeprefix(" ") == first + later
        (row,) = read_prompts([f"{first}~{later}"], [], gap="~", length=None, model=model, codec=codec)
        assert row.ids == (*prompt, model.mask_id, *response), "generation encodes as prepare does"
        without_gap = np.array([id_ for id_ in row.ids if id_ != model.mask_id])
        assert (decode_row(without_gap, model, codec) or "").removeprefix(" ") == first + later


@pytest.mark.parametrize("kind", WITH_PREFIX)
def test_only_the_prefix_of_the_first_word_is_left_out(tmp_path: Path, kind: str) -> None:
    tokenizer = made(kind)
    symbol = "Ġ" if kind.startswith("bytes") else "▁"
    ((_, response), (_, spaced), (_, alone)) = pairs(
        tmp_path, tokenizer, [("12", "46 apples"), ("12", " 46 apples"), ("", "46 apples")]
    )
    bare, after_space, whole = (
        "".join(tokenizer.id_to_token(id_) for id_ in ids) for ids in (response, spaced, alone)
    )
    assert bare == f"46{symbol}apples"
    assert after_space == whole == f"{symbol}46{symbol}apples", (
        "without a prompt the response is the first text"
    )
    assert alone == tokenizer.encode("46 apples", add_special_tokens=False).ids


@pytest.mark.parametrize("kind", WITHOUT)
def test_tokenizers_without_a_prefix_encode_every_part_as_before(tmp_path: Path, kind: str) -> None:
    tokenizer = made(kind)
    codec, model = codec_and_model(tokenizer)

    def plain(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    assert pairs(tmp_path, tokenizer, PARTS) == [(plain(first), plain(later)) for first, later in PARTS]
    (row,) = read_prompts(["12+34=~46"], [], gap="~", length=None, model=model, codec=codec)
    assert row.ids == (*plain("12+34="), model.mask_id, *plain("46"))


@pytest.mark.parametrize("kind", WITH_PREFIX)
def test_an_added_token_at_the_begin_of_a_part_is_kept(kind: str) -> None:
    tokenizer = made(kind)
    tokenizer.add_tokens(["<tab>"])
    codec, _ = codec_and_model(tokenizer)
    assert codec.encode("<tab>46", continued=True) == codec.encode("<tab>46")
    later = codec.encode("46 <tab>", continued=True)
    assert later[-1] == tokenizer.token_to_id("<tab>")
    assert tokenizer.decode([*codec.encode("12"), *later[:-1]]).strip() == "1246"
