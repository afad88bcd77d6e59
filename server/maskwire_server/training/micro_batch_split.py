"""Micro-batches: how the sequences of a logical batch are divided into parts that fit the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Part = tuple[list[int], int]
"""The indices of some sequences of a logical batch, and the number of columns of the longest of them."""


def split(lengths: Iterable[int], budget: int) -> Iterator[Part]:
    """Split sequences of these `lengths` into parts of consecutive sequences.

    A part has at most `budget` positions, padding included, or is a single sequence.
    """
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

    Once a part has `smallest` positions, a sequence shorter than 3/4 of the longest in the part starts the
    next part. Sequences that are added after that have at most a quarter of padding, and parts are large
    enough to be computed efficiently. A single sequence may exceed `budget`. Sequences of equal length keep
    their order.
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
