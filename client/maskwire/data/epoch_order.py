"""The order of rows drawn without replacement: one random permutation of the rows per epoch.

A Feistel network with any round function permutes the numbers below a power of four. A result that is not
below the number of rows is permuted again until it is ("cycle walking", Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"). Each number is computed independently, so no permutation is stored.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of splitmix64

Numbers = npt.NDArray[np.uint64]


class EpochOrder:
    """An order with each row once per epoch. Each epoch has a new order, and a batch may span two epochs."""

    def __init__(self, rows: int, seed: int) -> None:
        """Make the order of `rows` rows, at least 1, from a seed."""
        self._rows, self._seed = rows, seed
        self._half_bits = max(1, ((rows - 1).bit_length() + 1) // 2)

    def batch(self, step: int, size: int) -> npt.NDArray[np.int64]:
        """Return the row numbers of a step, of shape [size]. Raises ValueError for a step below 1."""
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}: steps count from 1")
        first = (step - 1) * size
        found = []
        while size:
            epoch, place = divmod(first, self._rows)
            part = min(size, self._rows - place)
            found.append(self._permuted(epoch, np.arange(place, place + part, dtype=np.uint64)))
            first, size = first + part, size - part
        return np.concatenate(found)

    def _permuted(self, epoch: int, places: Numbers) -> npt.NDArray[np.int64]:
        keys = np.frombuffer(hashlib.sha512(f"{self._seed} {epoch}".encode()).digest(), dtype="<u8")
        places = self._feistel(places, keys)
        while (outside := places >= self._rows).any():
            places[outside] = self._feistel(places[outside], keys)
        return places.astype(np.int64)

    def _feistel(self, numbers: Numbers, keys: Numbers) -> Numbers:
        bits = np.uint64(self._half_bits)
        mask = np.uint64(2**self._half_bits - 1)
        left, right = numbers >> bits, numbers & mask
        for key in keys[:_ROUNDS]:
            left, right = right, left ^ (_mixed(right + key) & mask)
        return (left << bits) | right


def _mixed(numbers: Numbers) -> Numbers:
    """Mix the bits of numbers by the finalizer of splitmix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    return numbers ^ (numbers >> np.uint64(31))
