"""Random masks keyed by (seed, source, tensor, element): no stream, so nothing shifts them.

An element's 31 random bits are its index, mixed with a 64-bit key by two rounds of the finaliser
of MurmurHash3 (Appleby, public domain). The same on every device, in every order, in any block.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
_LAST = 16


def keep_mask(key: tuple[int, int], start: int, probability: float, rows: Tensor) -> Tensor:
    """Return (n,) ones and zeros, ones with the given probability, in the memory of two rows.

    `start` is the tensor's flat index of the first element; rows is (2, n), floating.
    """
    return keep_below(key, start, min(round(probability * 2**31), 2**31 - 1), rows)


def keep_below(key: tuple[int, int], start: int, limits: Tensor | int, rows: Tensor) -> Tensor:
    """Return the same where an element's limit, of its own if limits is (n,), is p 2^31."""
    begin, stop = start, start + rows.shape[1]
    while begin < stop:  # runs that int32 can count, within which the index's upper word stays
        end = min(stop, (begin // 2**31 + 1) * 2**31)
        part = slice(begin - start, end - start)
        limit = limits if isinstance(limits, int) else limits[part]
        run = rows[:, part]
        torch.lt(_random_bits(key, begin, run), limit, out=run[1])
        begin = end
    return rows[1]


def key_of(seed: int, source: str, tensor: str) -> tuple[int, int]:
    """Return the two 32-bit words that stand for a tensor of a source under a seed."""
    text = f"{seed}\0{source}\0{tensor}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _random_bits(key: tuple[int, int], start: int, rows: Tensor) -> Tensor:
    """Return (n,) 31 random bits for each element, in the memory of the first row."""
    n = rows.shape[1]
    word, spare = rows[0].view(torch.int32)[:n], rows[1].view(torch.int32)[:n]
    torch.arange(n, dtype=torch.int32, out=word)
    _scramble(word.add_(_int32(start + key[0])), spare)
    _scramble(word.add_(_int32((start >> 32) + key[1])), spare)
    return word.bitwise_and_(0x7FFFFFFF)


def _scramble(word: Tensor, spare: Tensor) -> None:
    """Mix 32-bit words so that every bit depends on every other, in place."""
    for shift, factor in _MIX:
        _fold(word, spare, shift)
        word.mul_(_int32(factor))
    _fold(word, spare, _LAST)


def _fold(word: Tensor, spare: Tensor, shift: int) -> None:
    """Add the upper bits to the lower ones, in place."""
    torch.bitwise_right_shift(word, shift, out=spare)
    word.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))


def _int32(value: int) -> int:
    """Wrap an integer to 32 bits with a sign."""
    return (value + 2**31) % 2**32 - 2**31
