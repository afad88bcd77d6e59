"""Counter-based random numbers: each draw is a function of its purpose, not of earlier draws.

A key is a hash of (purpose, seed, lineage, step, row), and the i-th number of a key is a hash of the key and
i. Therefore the draws of a step are the same bits on every device, however its batch is split, and there is
no generator state to save.

SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the i-th
output is mix(key + i * golden), where mix is David Stafford's variant 13 of MurmurHash3's finaliser.
torch's int64 multiplication wraps around like that of uint64. Only the right shift needs a mask.
"""

from __future__ import annotations

import enum
import hashlib
import struct

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


class Purpose(enum.IntEnum):
    """The purpose of a draw. Draws for different purposes are independent."""

    TIME = 1
    PERMUTATION = 2
    COINS = 3
    MASK = 4
    AUGMENT = 5
    RANDOM_ID = 6
    CRITIC_SAMPLE = 7
    TEMPERATURE = 8
    DROPOUT = 9
    EVALUATION_OFFSET = 10
    EVALUATION_SECOND_OFFSET = 11
    WEIGHTS = 12
    GENERATION_TOKEN = 13
    GENERATION_ORDER = 14
    GENERATION_NOISE = 15
    CHAIN_ORDER = 20


def _hash(purpose: Purpose, parts: tuple[int, ...]) -> hashlib.blake2b:
    return hashlib.blake2b(struct.pack(f"<{1 + len(parts)}q", purpose, *parts), digest_size=8)


def key(purpose: Purpose, *parts: int) -> int:
    """The 64-bit key for a purpose and the integers `parts`, as a signed integer."""
    return int.from_bytes(_hash(purpose, parts).digest(), "little", signed=True)


def keys(purpose: Purpose, *parts: int, rows: range | list[int]) -> Tensor:
    """One key per row, a hash of (purpose, *parts, row), as an int64 tensor of shape [b]."""
    common, pack = _hash(purpose, parts), struct.Struct("<q").pack
    found = []
    for row in rows:
        each = common.copy()
        each.update(pack(row))
        found.append(each.digest())
    return torch.tensor(struct.unpack(f"<{len(found)}q", b"".join(found)), dtype=torch.int64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def bits(keys_b: Tensor, n: int) -> Tensor:
    """The first n random numbers of 64 bits of each key, as an int64 tensor of shape [b, n]."""
    counter_n = torch.arange(1, n + 1, dtype=torch.int64, device=keys_b.device) * _GOLDEN
    return _mix(keys_b[:, None] + counter_n)


def nth(keys_b: Tensor, i: int) -> Tensor:
    """The i-th number of each key, for i >= 1: int64, of shape [b]. It can serve as a new key."""
    return _mix(keys_b + torch.tensor(i, dtype=torch.int64, device=keys_b.device) * _GOLDEN)


def uniform(keys_b: Tensor, n: int) -> Tensor:
    """The first n uniform numbers in [0, 1) of each key, with 53 random bits: fp64, of shape [b, n]."""
    return _shift_right(bits(keys_b, n), 11).to(torch.float64) * 2.0**-53


def uniform_scalar(purpose: Purpose, *parts: int) -> float:
    """One uniform number in [0, 1) for a purpose and the integers `parts`."""
    return float(uniform(torch.tensor([key(purpose, *parts)]), 1))
