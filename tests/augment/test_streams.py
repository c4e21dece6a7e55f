"""Random numbers against a plain implementation with NumPy's wrapping integers, and against what chance allows."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from scipy import stats

from fmcib_ssl.augment.streams import _words, derived_seeds, normals, uniforms


def lowbias32(x: int) -> int:
    """Wellons' function, with Python's integers."""
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


SEEDS = [0, 1, 2**31, 2**32 - 1, 2**40 + 5, 2**62 + 2**31 + 3]


def test_uniform_numbers_are_the_hash_of_seed_and_counter() -> None:
    found = uniforms(torch.tensor(SEEDS), 50)
    expected = [[(((word(seed, i) + 2**31) % 2**32) + 0.5) / 2**32 for i in range(50)] for seed in SEEDS]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-15)


def test_normal_numbers_are_box_and_mullers() -> None:
    for num in (1, 6, 7):
        half = (num + 1) // 2
        found = normals(torch.tensor(SEEDS), num)
        assert found.shape == (len(SEEDS), num)
        for seed, row in zip(SEEDS, found.tolist(), strict=True):
            u = [(word(seed, i) // 256 + 0.5 * (i < half)) / 2**24 for i in range(2 * half)]
            radius = [math.sqrt(-2 * math.log(u[i])) for i in range(half)]
            pairs = [
                (r * math.cos(2 * math.pi * v), r * math.sin(2 * math.pi * v))
                for r, v in zip(radius, u[half:], strict=True)
            ]
            expected = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
            np.testing.assert_allclose(row, expected[:num], atol=2e-5)


def test_normal_numbers_are_standard_normal_and_without_memory() -> None:
    found = normals(torch.arange(8), 125_000).double().numpy()
    assert stats.kstest(found.ravel(), "norm").pvalue > 1e-3
    assert 4.5 < np.abs(found).max() < 6.2
    one_std = 1 / math.sqrt(found.shape[1])
    image = found.reshape(8, 50, 50, 50)
    for axis in (1, 2, 3):  # neighbours
        a, b = np.delete(image, 0, axis), np.delete(image, -1, axis)
        assert abs(np.mean(a * b)) < 5 * one_std / math.sqrt(8)
    half = found.shape[1] // 2  # the two numbers of a pair
    assert abs(np.mean(found[:, :half] * found[:, half:])) < 5 * one_std
    assert abs(np.mean(found[:, :half] ** 2 * found[:, half:] ** 2) - 1) < 0.02
    between_seeds = np.corrcoef(found)[np.triu_indices(8, 1)]
    assert np.abs(between_seeds).max() < 5 * one_std


def test_torch_hashes_as_numpy_does() -> None:
    # Other devices than the CPU take torch's wrapping integers.
    low, high = torch.tensor(SEEDS).view(torch.int32).view(-1, 2).unbind(1)
    counter = torch.arange(1000, dtype=torch.int32)
    found = _words(low, high, counter)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy(), _words(low.numpy(), high.numpy(), counter.numpy()))


def test_neighbouring_seeds_give_uniform_numbers_that_have_nothing_in_common() -> None:
    found = uniforms(torch.arange(20_000), 6).numpy()
    for column in found.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    # Five standard deviations of a correlation, over pairs of columns and of consecutive seeds.
    assert np.abs(np.corrcoef(found.T)[np.triu_indices(6, 1)]).max() < 5 / math.sqrt(20_000)
    assert abs(np.corrcoef(found[1:, 0], found[:-1, 0])[0, 1]) < 5 / math.sqrt(20_000)
    assert len(np.unique(found)) > found.size - 10  # by chance 2 of 120,000 32-bit numbers are alike
    bits = (found * 2**32).astype(np.uint64)
    for bit in range(32):
        assert abs(((bits >> np.uint64(bit)) & np.uint64(1)).mean() - 0.5) < 2.5 / math.sqrt(bits.size)


def test_names_give_other_seeds() -> None:
    seeds = torch.arange(1000)
    found = {name: derived_seeds(seeds, name) for name in ("noise", "smooth", "geometry", "a", "b")}
    everything = torch.cat([seeds, *found.values()]).tolist()
    assert len(set(everything)) == len(everything)
    assert torch.equal(found["noise"], derived_seeds(seeds, "noise"))
    one = [word(7, zlib.crc32(b"noise") // 2 * 2 % 2**32 + i) for i in range(2)]
    assert int(derived_seeds(torch.tensor([7]), "noise")) % 2**64 == one[0] * 2**32 + one[1]


def test_a_number_does_not_depend_on_what_else_is_drawn() -> None:
    seeds = torch.tensor(SEEDS)
    for generate in (uniforms, normals):
        together = generate(seeds, 1000)
        for row, seed in enumerate(SEEDS):
            assert torch.equal(generate(torch.tensor([seed]), 1000)[0], together[row])
    assert torch.equal(uniforms(seeds, 10), uniforms(seeds, 1000)[:, :10])
    assert normals(seeds[:0], 5).shape == (0, 5)
