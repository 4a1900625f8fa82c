"""Randomness that is a function of what it is for, not of what was drawn before.

Every number is a hash of a seed, a path of names and a coordinate, computed in integers: the same on every
device, worker and batch order, and no draw disturbs another. The global generators of torch and numpy are
never touched.

The hash is two rounds of a 32-bit finaliser (multiply and xor-shift with constants below 2^31, so that
products of 32-bit words stay inside a signed 64-bit integer), keyed by 64 bits of BLAKE2b of seed and path.
"""

import hashlib
import json
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

WORD = 0xFFFFFFFF
_BLOCK = 1 << 22  # coordinates hashed at once when a whole range is scanned


class Stream:
    """A named source of random numbers: the same seed and path give the same numbers everywhere."""

    def __init__(self, seed: int, *path: str | int) -> None:
        self.seed = seed
        self.path = path

    def child(self, *path: str | int) -> "Stream":
        """Return an independent stream for a part of this one's purpose."""
        return Stream(self.seed, *self.path, *path)

    @cached_property
    def keys(self) -> tuple[int, int]:
        """Two 32-bit words; JSON keeps ("a", "b") and ("ab",) apart."""
        purpose = json.dumps([self.seed, *self.path]).encode()
        digest = hashlib.blake2b(purpose, digest_size=8, person=b"vestige").digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def __repr__(self) -> str:
        return f"Stream{(self.seed, *self.path)!r}"


def _mix(word: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Map 32-bit words one to one: an input bit flips every output bit about half the time (in place)."""
    word ^= word >> 16
    word *= 0x21F0AAAD
    word &= WORD
    word ^= word >> 15
    word *= 0x735A2D97
    word &= WORD
    word ^= word >> 15
    return word


def bits(stream: Stream, coordinate: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Return 32 uniform bits for each non-negative 64-bit coordinate, as int64 in [0, 2^32)."""
    first, second = stream.keys
    word = _mix((coordinate & WORD) ^ first)
    word ^= coordinate >> 32
    word += second
    word &= WORD
    return _mix(word)


def signs(stream: Stream, coordinate: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return +1 or -1 with equal probability, float32."""
    return ((bits(stream, coordinate) >> 31) * 2 - 1).to(torch.float32)


def integers(stream: Stream, coordinate: Int[Tensor, "*batch"], limit: int) -> Int[Tensor, "*batch"]:
    """Return integers in [0, limit), uniform up to `limit / 2^32`; `limit` below 2^31."""
    return (bits(stream, coordinate) * limit) >> 32


def gaussians(stream: Stream, coordinate: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return standard normal float32 numbers: the inverse distribution function of 52 random bits.

    The inverse is evaluated in float64 on the CPU, whatever the device, because the special functions of two
    devices need not round alike.
    """
    high, low = bits(stream.child("high"), coordinate), bits(stream.child("low"), coordinate)
    whole = ((high << 20) | (low >> 12)).cpu()
    uniform = (whole.to(torch.float64) + 0.5) / 2.0**52
    return torch.special.ndtri(uniform).to(torch.float32).to(coordinate.device)


def permutation(stream: Stream, size: int) -> Int[Tensor, " size"]:
    """Return a random order of `size` coordinates."""
    return _rank(stream, torch.arange(size)).argsort()


def _rank(stream: Stream, coordinate: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return distinct 63-bit numbers in random order: the hash above, the coordinate (below 2^32) in the low half."""
    return ((bits(stream, coordinate) >> 1) << 32) | coordinate


def permutation_head(stream: Stream, count: int, size: int) -> Int[Tensor, " count"]:
    """Return `count` distinct coordinates out of `size`, every subset equally likely, in ascending order.

    They are the coordinates with the smallest hashes, a tie going to the smaller coordinate; hash and
    coordinate share one 63-bit integer, so `size` may be up to 2^32.
    """
    best = torch.empty(0, dtype=torch.int64)
    for start in range(0, size, _BLOCK):
        coordinate = torch.arange(start, min(size, start + _BLOCK))
        best = torch.cat([best, _rank(stream, coordinate)])
        if len(best) > count:
            best = best.topk(count, largest=False).values
    return (best & WORD).sort().values
