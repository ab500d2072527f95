"""Random masks keyed by (seed, source, tensor, element): no stream, so nothing shifts them.

An element's 31 random bits are 8 upper ones and 23 lower ones. Four elements in a row share a word
that their place is mixed to, a byte each, which is nearly always enough to tell whether an element
stays; where it is not, the lower bits come from the element's own word. Words are mixed by triple32
(Wellons, hash-prospector, public domain), half of a 64-bit key being added before it and half after
its first round. The same on every device, in every order, in any block.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_BEFORE = ((17, 0xED5AD4BB),)  # the word of the key's upper half is added between
_AFTER = ((11, 0xAC4C1B51), (15, 0x31848BAB))
_LAST = 14
_LOWER = 23  # of the 31 bits, those that are seldom needed
_SEGMENT = 2**33  # elements whose words int32 can count, and share an upper word of their place
_LEAST = 64  # elements of scratch that the smallest run takes


def keep_mask(key: tuple[int, int], start: int, probability: float, rows: Tensor) -> Tensor:
    """Return (n,) ones and zeros, ones with the given probability, in the memory of two rows.

    `start` is the tensor's flat index of the first element; rows is (2, n), floating.
    """
    return keep_below(key, start, min(round(probability * 2**31), 2**31 - 1), rows)


def keep_below(key: tuple[int, int], start: int, limits: Tensor | int, rows: Tensor) -> Tensor:
    """Return the same where an element's limit, of its own if limits is (n,), is p 2^31."""
    begin, stop = start, start + rows.shape[1]
    while begin < stop:
        end = min(stop, (begin // _SEGMENT + 1) * _SEGMENT)
        part = slice(begin - start, end - start)
        limit = limits if isinstance(limits, int) else limits[part]
        _keep(key, begin, limit, rows[:, part])
        begin = end
    return rows[1]


def key_of(seed: int, source: str, tensor: str) -> tuple[int, int]:
    """Return the two 32-bit words that stand for a tensor of a source under a seed."""
    text = f"{seed}\0{source}\0{tensor}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _keep(key: tuple[int, int], start: int, limits: Tensor | int, rows: Tensor) -> None:
    """Make the ones and zeros of a run within a segment, in the second row."""
    (spare, mask), n = rows, rows.shape[1]
    if n < _LEAST:
        spare = torch.empty(_LEAST, dtype=rows.dtype, device=rows.device)
    parts = spare.view(torch.uint8)
    size = 4 * ((start % 4 + n + 3) // 4)  # bytes of the words
    upper = _upper_bits(key, start, parts[: 2 * size].view(torch.int32))[start % 4 :][:n]
    ties, least = parts[size:][:n], parts[2 * size :][:n]
    if isinstance(limits, int):
        torch.lt(upper, limits >> _LOWER, out=mask)
        if limits % 2**_LOWER == 0:
            return
        torch.eq(upper, limits >> _LOWER, out=ties)
    else:
        shifted = mask.view(torch.int32)[:n]
        least.copy_(torch.bitwise_right_shift(limits, _LOWER, out=shifted))
        torch.lt(upper, least, out=mask)
        torch.eq(upper, least, out=ties)
    at = _places(ties)
    rest = (limits if isinstance(limits, int) else limits.gather(0, at)) % 2**_LOWER
    mask.scatter_(0, at, torch.lt(_lower_bits(key, at + start), rest).to(mask.dtype))


def _upper_bits(key: tuple[int, int], start: int, words: Tensor) -> Tensor:
    """Return bytes of elements from the last multiple of 4, in the first half of the words."""
    word, spare = words.view(2, -1).unbind()
    first = start // 4
    torch.arange(len(word), dtype=torch.int32, out=word)
    _mix(word.add_(_int32(first + key[0])), _int32((first >> 32) + key[1]), spare)
    return word.view(torch.uint8)


def _lower_bits(key: tuple[int, int], index: Tensor) -> Tensor:
    """Return (m,) 23 further bits of the elements of these int64 indices, by a key of their own."""
    low = ((index & 0xFFFFFFFF) + ~key[0]) & 0xFFFFFFFF
    word = torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)
    high = (index >> 32).to(torch.int32).add_(_int32(~key[1]))
    return _mix(word, high, torch.empty_like(word)).bitwise_and_(2**_LOWER - 1)


def _mix(word: Tensor, high: Tensor | int, spare: Tensor) -> Tensor:
    """Mix 32-bit words, and what is added to them, so that every bit depends on all, in place."""
    _stir(word, spare, _BEFORE)
    word.add_(high)
    _stir(word, spare, _AFTER)
    _fold(word, spare, _LAST)
    return word


def _stir(word: Tensor, spare: Tensor, rounds: tuple[tuple[int, int], ...]) -> None:
    """Carry bits down by shifts and up by multiplications, in place."""
    for shift, factor in rounds:
        _fold(word, spare, shift)
        word.mul_(_int32(factor))


def _fold(word: Tensor, spare: Tensor, shift: int) -> None:
    """Add the upper bits to the lower ones, in place."""
    torch.bitwise_right_shift(word, shift, out=spare)
    word.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))


def _places(ones: Tensor) -> Tensor:
    """Return (m,) int64 where the bytes are 1; numpy finds the few in host memory much faster."""
    if ones.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(ones.numpy().view(np.bool_)))
    return ones.nonzero().flatten()


def _int32(value: int) -> int:
    """Wrap an integer to 32 bits with a sign."""
    return (value + 2**31) % 2**32 - 2**31
