"""Random numbers against a plain implementation with Python's integers, and against what chance allows."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from scipy import stats

from fmcib_ssl.augment.views import derived_seeds, normals, uniforms

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**40 + 5, 2**62 + 2**31 + 3]


def lowbias32(x: int) -> int:
    """Wellons' function."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def word(seed: int, counter: int) -> int:
    low, high = seed % 2**32, seed // 2**32 % 2**32
    high ^= lowbias32((low + 0x9E3779B9) % 2**32)
    low ^= lowbias32((high + 0x9E3779B9) % 2**32)
    high ^= lowbias32((low + 0x9E3779B9) % 2**32)
    return lowbias32((lowbias32(counter ^ low) + high) % 2**32)


def test_numbers_are_the_hash_of_seed_and_counter() -> None:
    uniform = [[(((word(seed, i) + 2**31) % 2**32) + 0.5) / 2**32 for i in range(50)] for seed in SEEDS]
    np.testing.assert_allclose(uniforms(torch.tensor(SEEDS), 50).numpy(), uniform, rtol=0, atol=1e-15)
    for num in (1, 6, 7):  # Box and Muller's transform
        half = (num + 1) // 2
        for seed, values in zip(SEEDS, normals(torch.tensor(SEEDS), num).tolist(), strict=True):
            u = [(word(seed, i) // 256 + 0.5 * (i < half)) / 2**24 for i in range(2 * half)]
            polar = [(math.sqrt(-2 * math.log(u[i])), 2 * math.pi * u[half + i]) for i in range(half)]
            expected = [r * math.cos(v) for r, v in polar] + [r * math.sin(v) for r, v in polar]
            np.testing.assert_allclose(values, expected[:num], atol=2e-5)
    words = [word(7, zlib.crc32(b"noise") // 2 * 2 % 2**32 + i) for i in range(2)]
    assert int(derived_seeds(torch.tensor([7]), "noise")) % 2**64 == words[0] * 2**32 + words[1]


def test_normal_numbers_are_standard_normal_and_without_memory() -> None:
    found = normals(torch.arange(8), 125_000).double().numpy()
    assert stats.kstest(found.ravel(), "norm").pvalue > 1e-3
    assert 4.5 < np.abs(found).max() < 6.2
    five_stds = 5 / math.sqrt(found.size)
    image = found.reshape(8, 50, 50, 50)
    for axis in (1, 2, 3):  # neighbours
        assert abs(np.mean(np.delete(image, 0, axis) * np.delete(image, -1, axis))) < five_stds
    first, second = np.split(found, 2, axis=1)  # the two numbers of a pair
    assert abs(np.mean(first * second)) < 2 * five_stds and abs(np.mean(first**2 * second**2) - 1) < 0.02
    assert np.abs(np.corrcoef(found)[np.triu_indices(8, 1)]).max() < five_stds * math.sqrt(8)


def test_neighbouring_seeds_and_other_names_have_nothing_in_common() -> None:
    found = uniforms(torch.arange(20_000), 6).numpy()
    for column in found.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    # Five standard deviations of a correlation, over pairs of columns and of consecutive seeds.
    assert np.abs(np.corrcoef(found.T)[np.triu_indices(6, 1)]).max() < 5 / math.sqrt(20_000)
    assert abs(np.corrcoef(found[1:, 0], found[:-1, 0])[0, 1]) < 5 / math.sqrt(20_000)
    assert len(np.unique(found)) > found.size - 10  # by chance 2 of 120,000 32-bit numbers are alike
    seeds = torch.arange(1000)
    derived = [derived_seeds(seeds, name) for name in ("noise", "smooth", "geometry", "a", "b")]
    assert len(torch.cat([seeds, *derived]).unique()) == 6000


def test_a_number_does_not_depend_on_what_else_is_drawn() -> None:
    for generate in (uniforms, normals):
        together = generate(torch.tensor(SEEDS), 1000)
        alone = torch.cat([generate(torch.tensor([seed]), 1000) for seed in SEEDS])
        assert torch.equal(alone, together)
    assert torch.equal(uniforms(torch.tensor(SEEDS), 10), uniforms(torch.tensor(SEEDS), 1000)[:, :10])
