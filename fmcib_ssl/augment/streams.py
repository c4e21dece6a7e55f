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

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_LOW_BITS = 0xFFFFFFFF


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant


_FIRST, _SECOND = _signed(0x7FEB352D), _signed(0x846CA68B)
_WEYL = _signed(0x9E3779B9)


def _mix(x: Tensor) -> Tensor:
    """Scramble int32 in place; one to one. The masks make the shifts logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= _FIRST
    x ^= (x >> 15) & 0x1FFFF
    x *= _SECOND
    x ^= (x >> 16) & 0xFFFF
    return x


def _hash(seeds: Int64[Tensor, " n"], first: int, num: int) -> Tensor:
    """int32 `(n, num)`: the numbers `first` to `first + num - 1` of each seed's sequence."""
    low, high = _keys(seeds)
    counter = torch.arange(first, first + num, dtype=torch.int32, device=seeds.device)
    x = _mix(counter ^ low[:, None])
    x += high[:, None]
    return _mix(x)


def _keys(seeds: Int64[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Two words for each seed, in which similar seeds have nothing in common; no two seeds have the same two.

    Without this step the second number of seed 0 would be the first of seed 1.
    """
    low, high = _to_int32(seeds), _to_int32(seeds >> 32)
    high = high ^ _mix(low + _WEYL)
    low = low ^ _mix(high + _WEYL)
    high = high ^ _mix(low + _WEYL)
    return low, high


def _to_int32(numbers: Tensor) -> Tensor:
    """The lower 32 bits, wrapped: a cast of what does not fit is not the same on all devices."""
    low = numbers & _LOW_BITS
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def derived_seeds(seeds: Int64[Tensor, " n"], name: str) -> Int64[Tensor, " n"]:
    """Seeds for one purpose, independent of those for another name."""
    words = _hash(seeds, _signed(zlib.crc32(name.encode())) // 2 * 2, 2).long()
    return (words[:, 0] << 32) | (words[:, 1] & _LOW_BITS)


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
    words = ((words >> 8) & 0xFFFFFF).float()
    radius = words[:, :half].add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = words[:, half:].mul_(2 * math.pi * 2.0**-24)
    found = torch.empty_like(words)
    torch.cos(angle, out=found[:, :half])
    torch.sin(angle, out=found[:, half:])
    found[:, :half] *= radius
    found[:, half:] *= radius
    return found[:, :num]
