"""Random masks keyed by (seed, source, tensor, element): the same wherever a block starts.

An element's 31 random bits are 8 upper ones and 23 lower ones. The upper ones are a byte of the
tensor's own sequence of PCG64DXSM (O'Neill 2014; as numpy has it), which can be entered at any
place; nearly always they are enough to tell whether an element stays. Where they are not, the
lower bits are mixed from the element's index by triple32 (Wellons, hash-prospector, public domain),
half of a 64-bit key being added before it and half after its first round. Both are worked out in
host memory, so that they are the same for every device.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Bits = np.ndarray[Any, np.dtype[np.uint8]]  # (n,) ones and zeros
Limits = np.ndarray[Any, np.dtype[np.int32]]
Words = np.ndarray[Any, np.dtype[np.uint32]]
Index = np.ndarray[Any, np.dtype[np.int64]]

ONE = 2**31  # of a probability
_LOWER = 23  # of the 31 bits, those that are seldom needed
_BEFORE = ((17, 0xED5AD4BB),)  # the word of the key's upper half is added between
_AFTER = ((11, 0xAC4C1B51), (15, 0x31848BAB))
_LAST = 14


class _Thread(threading.local):
    """One generator for each thread, for making one takes longer than entering it anywhere."""

    def __init__(self) -> None:
        self.sequence = np.random.PCG64DXSM(0)


_here = _Thread()


class Key(NamedTuple):
    """What stands for a tensor of a source under a seed."""

    state: int  # 128 bits: where the sequence of upper bits starts
    increment: int  # 128 bits, odd: which sequence it is
    lower: int  # 64 bits: the key of the lower bits


def key_of(seed: int, source: str, tensor: str) -> Key:
    """Return the key of a tensor of a source under a seed."""
    text = f"{seed}\0{source}\0{tensor}".encode()
    digest = hashlib.blake2b(text, digest_size=40).digest()
    parts = digest[:16], digest[16:32], digest[32:]
    state, increment, lower = (int.from_bytes(part, "little") for part in parts)
    return Key(state, increment | 1, lower)


def keep_mask(key: Key, start: int, n: int, probability: float) -> Bits:
    """Return (n,) ones with the given probability, from the tensor's flat index `start`."""
    return keep_below(key, start, n, min(round(probability * ONE), ONE - 1))


def keep_below(key: Key, start: int, n: int, limits: Limits | int) -> Bits:
    """Return the same where an element's limit, of its own if limits is (n,), is p 2^31."""
    upper = _upper_bits(key, start, n)
    whole = limits >> _LOWER
    edge = whole if isinstance(whole, int) else whole.astype(np.uint8)
    kept: Bits = np.less(upper, edge).view(np.uint8)
    if not isinstance(limits, int) or limits % 2**_LOWER:
        at = np.flatnonzero(np.equal(upper, edge))
        rest = (limits if isinstance(limits, int) else limits[at]) % 2**_LOWER
        kept[at] = _lower_bits(key, at + start) < rest
    return kept


def keep_where(key: Key, start: int, limits: Tensor) -> Tensor:
    """Return (n,) ones and zeros on the device of the (n,) int32 limits."""
    if limits.device.type == "cpu":
        return torch.from_numpy(keep_below(key, start, len(limits), limits.numpy()))
    index = np.arange(start, start + len(limits))
    numbers = _upper_bits(key, start, len(index)).astype(np.int32) << _LOWER
    numbers += _lower_bits(key, index).astype(np.int32)
    return torch.lt(torch.as_tensor(numbers, device=limits.device), limits).byte()


def _upper_bits(key: Key, start: int, n: int) -> Bits:
    """Return (n,) bytes: those of the sequence, from its word start // 8, the lowest byte first."""
    first = start // 8
    sequence = _here.sequence
    sequence.state = {
        "bit_generator": "PCG64DXSM",
        "state": {"state": key.state, "inc": key.increment},
        "has_uint32": 0,
        "uinteger": 0,
    }
    words = sequence.advance(first).random_raw((start + n + 7) // 8 - first)
    return words.astype("<u8", copy=False).view(np.uint8)[start % 8 :][:n]


def _lower_bits(key: Key, index: Index) -> Words:
    """Return (m,) 23 further bits of the elements of these indices."""
    word, high = index.astype(np.uint32), (index >> 32).astype(np.uint32)
    word += np.uint32(key.lower % 2**32)
    high += np.uint32(key.lower >> 32)
    _stir(word, _BEFORE)
    word += high
    _stir(word, _AFTER)
    word ^= word >> _LAST
    word &= np.uint32(2**_LOWER - 1)
    return word


def _stir(word: Words, rounds: tuple[tuple[int, int], ...]) -> None:
    """Carry bits down by shifts and up by multiplications, in place."""
    for shift, factor in rounds:
        word ^= word >> shift
        word *= np.uint32(factor)
