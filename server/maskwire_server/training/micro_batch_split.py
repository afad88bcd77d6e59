"""Micro-batches: how the sequences of a logical batch are divided into parts that fit the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Part = tuple[list[int], int]
"""Sequences of a logical batch, and the columns of the longest of them."""


def split(lengths: Iterable[int], budget: int) -> Iterator[Part]:
    """Split into parts of consecutive sequences: at most `budget` positions with padding, or one sequence."""
    start = stop = longest = 0
    for length in lengths:
        if stop > start and max(longest, length) * (stop + 1 - start) > budget:
            yield list(range(start, stop)), longest
            start, longest = stop, 0
        stop, longest = stop + 1, max(longest, length)
    if stop > start:
        yield list(range(start, stop)), longest


def split_by_length(
    lengths: Sequence[int], chosen: Iterable[int], budget: int, smallest: int
) -> Iterator[Part]:
    """Split the chosen sequences, longest first, into parts of at most `budget` positions.

    Once a part has `smallest` positions, it ends before a sequence shorter than 3/4 of its longest. Each
    sequence added from then on has at most a quarter of padding, and parts are large enough to compute
    efficiently. A single sequence may exceed `budget`. Sequences of equal length keep their order.
    """
    part: list[int] = []
    for row in sorted(chosen, key=lambda row: -lengths[row]):
        longest = lengths[part[0]] if part else 0
        full = longest * (len(part) + 1) > budget
        short = 4 * lengths[row] < 3 * longest and longest * len(part) >= smallest
        if part and (full or short):
            yield part, longest
            part = []
        part.append(row)
    if part:
        yield part, lengths[part[0]]
