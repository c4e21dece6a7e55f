"""Random numbers that are a function of a seed and a place, on any device.

A generator with a state gives other numbers on a GPU than on a CPU, and other ones again in another batch. Here a
number is a hash of (seed, counter) in wrapping 32-bit arithmetic, which every device does alike.

Source: counter-based generators as in Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; the mixing
function is `lowbias32` of Wellons 2018, applied twice, with one half of a key before each; the key is the seed after
three rounds of a Feistel network.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

#: int32, on the CPU as NumPy's arrays: of a few numbers it takes a fifth of torch's time.
Words = Any


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant


_FIRST, _SECOND = _signed(0x7FEB352D), _signed(0x846CA68B)
_WEYL = _signed(0x9E3779B9)


def _mix(x: Words) -> Words:
    """Scramble in place; one to one. The masks make the shifts logical."""
    for shift, factor in ((16, _FIRST), (15, _SECOND), (16, 1)):
        high = x >> shift
        high &= 2 ** (32 - shift) - 1
        x ^= high
        if factor != 1:
            x *= factor
    return x


def _hash(seeds: Int64[Tensor, " n"], first: int, num: int) -> Tensor:
    """int32 `(n, num)`: the numbers `first` to `first + num - 1` of each seed's sequence."""
    # A view, not a cast: what a cast makes of numbers that do not fit differs between devices.
    low, high = seeds.contiguous().view(torch.int32).view(-1, 2).unbind(1)
    counter = torch.arange(first, first + num, dtype=torch.int32, device=seeds.device)
    if seeds.device.type == "cpu":
        return torch.from_numpy(_words(low.numpy(), high.numpy(), counter.numpy()))
    words: Tensor = _words(low, high, counter)
    return words


def _words(low: Words, high: Words, counter: Words) -> Words:
    low, high = _keys(low, high)
    x = _mix(counter ^ low[:, None])
    x += high[:, None]
    return _mix(x)


def _keys(low: Words, high: Words) -> tuple[Words, Words]:
    """Two words for each seed, in which similar seeds have nothing in common; no two seeds have the same two.

    Without this step the second number of seed 0 would be the first of seed 1.
    """
    high = high ^ _mix(low + _WEYL)
    low = low ^ _mix(high + _WEYL)
    high = high ^ _mix(low + _WEYL)
    return low, high


def derived_seeds(seeds: Int64[Tensor, " n"], name: str) -> Int64[Tensor, " n"]:
    """Seeds for one purpose, independent of those for another name."""
    words = _hash(seeds, _signed(zlib.crc32(name.encode())) // 2 * 2, 2).long()
    return (words[:, 0] << 32) | (words[:, 1] & 0xFFFFFFFF)


def uniforms(seeds: Int64[Tensor, " n"], num: int) -> Float[Tensor, "n num"]:
    """Numbers within (0, 1), float64, `num` for each seed."""
    words = _hash(seeds, 0, num).to(torch.float64)
    return (words + (2**31 + 0.5)) / 2**32


def normals(seeds: Int64[Tensor, " n"], num: int) -> Float[Tensor, "n num"]:
    """Standard normal numbers, float32, `num` for each seed, on the seeds' device.

    Box and Muller's transform of 24-bit uniform numbers, so none lies beyond 6 standard deviations.
    """
    half = (num + 1) // 2
    words = _hash(seeds, 0, 2 * half)
    words = (words >> 8).bitwise_and_(0xFFFFFF).float()
    radius = words[:, :half].add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = words[:, half:].mul_(2 * math.pi * 2.0**-24)
    normal = torch.empty_like(words)
    torch.cos(angle, out=normal[:, :half])
    torch.sin(angle, out=normal[:, half:])
    normal[:, :half] *= radius
    normal[:, half:] *= radius
    return normal[:, :num]
