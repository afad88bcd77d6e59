"""A 4-gram model of bytes: how much text resembles other text, whoever wrote it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

ORDER = 4
MOST_BYTES = 400_000  # of text to count: more changes little


class FourGram:
    """Interpolated Witten-Bell (Bell, Witten 1991), from four bytes down to a uniform one.

    p(c | h) = (N(h c) + T(h) p(c | h')) / (N(h) + T(h)), where h' is h without its first byte, N counts and
    T(h) is how many different bytes followed h: the probability of meeting a new one is T/(N + T).
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        self._counts: list[Counter[bytes]] = [Counter() for _ in range(ORDER + 1)]
        left = MOST_BYTES
        for text in texts:
            part = text[: max(0, left)]
            left -= len(part)
            for n in range(1, ORDER + 1):
                self._counts[n].update(part[i : i + n] for i in range(len(part) - n + 1))
        self._followed: Counter[bytes] = Counter()
        self._kinds: Counter[bytes] = Counter()
        for counts in self._counts[1:]:
            for gram, count in counts.items():
                self._followed[gram[:-1]] += count
                self._kinds[gram[:-1]] += 1

    def probability(self, history: bytes, byte: int) -> float:
        """The probability of a byte after at most three others."""
        p = 1 / 256
        for n in range(len(history) + 1):
            context = history[len(history) - n :]
            followed, kinds = self._followed[context], self._kinds[context]
            if followed:
                p = (self._counts[n + 1][context + bytes([byte])] + kinds * p) / (followed + kinds)
        return p

    def bits_per_byte(self, texts: Iterable[bytes]) -> float:
        """The mean over all bytes of the texts."""
        bits, count = 0.0, 0
        for text in texts:
            for i, byte in enumerate(text):
                bits -= math.log2(self.probability(text[max(0, i - ORDER + 1) : i], byte))
                count += 1
        return bits / count
