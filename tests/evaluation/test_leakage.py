"""Each check fires on what it is for and stays silent on clean data."""

from __future__ import annotations

import numpy as np
import pytest

from fmcib_ssl.evaluation.labels import Labels, Split, cross_validation
from fmcib_ssl.evaluation.leakage import (
    _border_layers,
    _same_images,
    check_duplicates,
    check_patch_borders,
    check_patients,
)
from fmcib_ssl.evaluation.probes import Protocol
from fmcib_ssl.types import Preprocessing

NUM = 120
IDS = np.array([f"l{k}" for k in range(NUM)])
SPLIT = [Split("split", np.arange(60), np.arange(90, NUM), np.arange(60, 90))]
PREPROCESSING = Preprocessing((6, 8, 8))


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 0.6, (NUM, 6 * 8 * 8)).astype(np.float32)


def setup(y: np.ndarray) -> Protocol:
    labels = Labels("y", "binary", y, np.arange(NUM), ("0", "1"))
    return Protocol(labels, IDS, cross_validation("binary", y, IDS, num_folds=3), "3 folds")


def test_patients() -> None:
    clean = check_patients(SPLIT, IDS)
    assert (clean.found, clean.refuses) == (False, True)
    patients = IDS.copy()
    patients[[5, 95, 96]] = "same"
    found = check_patients(SPLIT, patients)
    assert found.found
    assert "1 patients are on more than one side of the split, such as same; 2 test lesions" in found.message
    assert found.refuses
    patients[[5, 95, 96]] = [*IDS[[5, 95]], "l70"]
    assert check_patients(SPLIT, patients).found  # validation and test


def test_the_same_image_on_two_sides() -> None:
    x = images()
    assert not check_duplicates("x", x, SPLIT, IDS).found
    x[7] = x[3]  # on one side
    assert not check_duplicates("x", x, SPLIT, IDS).found
    x[100] = x[3] + np.random.default_rng(1).normal(0, 1e-3, x.shape[1])  # as after another rounding
    found = check_duplicates("x", x, SPLIT, IDS)
    assert found.found
    assert found.refuses
    assert "x: 2 pairs of lesions on different sides are the same image, such as l3, l100" in found.message


def test_an_image_that_is_only_alike_is_another() -> None:
    x = images()
    x[100] = x[3] + np.random.default_rng(1).normal(0, 0.05, x.shape[1])
    assert not check_duplicates("x", x, SPLIT, IDS).found


def test_an_encoder_that_gives_everything_the_same_is_told_apart() -> None:
    found = check_duplicates("x", np.ones((NUM, 32), dtype=np.float32), SPLIT, IDS)
    assert found.found
    assert "an encoder that gives everything the same features" in found.message
    assert not check_duplicates("x", np.ones((NUM, 2), dtype=np.float32), SPLIT, IDS).found


def test_pairs_are_those_of_a_loop_whatever_the_chunks() -> None:
    x = np.random.default_rng(0).normal(size=(40, 20))
    x[[5, 17, 39]] = x[2]
    z = (x - x.mean(0)) / x.std(0)
    expected = [(i, j) for i in range(40) for j in range(i + 1, 40) if np.sqrt(np.square(z[i] - z[j]).mean()) < 0.02]
    for chunk in (7, 1024):
        assert [tuple(pair) for pair in _same_images(x, chunk=chunk).tolist()] == expected


def test_layers_of_padding_and_repeated_layers() -> None:
    voxels = images().reshape(NUM, 6, 8, 8)
    voxels[0, :2] = 0  # padding at the first two of z
    voxels[1, -3:] = voxels[1, -3]  # two of three repeat
    voxels[2, :, :, 0] = 0
    voxels[3, :, 3] = 0  # inside: no border
    padded, repeated = _border_layers(voxels, 0.0)
    assert padded[0].tolist() == [2, 0, 0, 0, 0, 0]
    assert padded[2].tolist() == [0, 0, 0, 0, 1, 0]
    assert padded[[1, 3]].sum() == 0
    assert repeated[1].tolist() == [0, 2, 0, 0, 0, 0]
    assert repeated[[0, 2, 3]].sum() == 0


@pytest.mark.parametrize("fill", ["padding", "repeated_layers"])
def test_borders_that_follow_the_label_are_measured(fill: str) -> None:
    y = np.arange(NUM) % 2
    voxels = images().reshape(NUM, 6, 8, 8)
    for k in np.flatnonzero(y == 0):
        voxels[k, -2:] = 0 if fill == "padding" else voxels[k, -3]
    found = {f.check: f for f in check_patch_borders(voxels.reshape(NUM, -1), PREPROCESSING, setup(y))}
    assert {name for name, finding in found.items() if finding.found} == {fill}
    assert found[fill].value == pytest.approx(1.0)
    assert found[fill].refuses is (fill == "padding")
    assert ("data.padding=edge" in found[fill].message) is (fill == "padding")
    # the same borders, and a label that has nothing to do with them
    other = np.random.default_rng(3).permutation(y)
    silent = check_patch_borders(voxels.reshape(NUM, -1), PREPROCESSING, setup(other))
    assert not any(finding.found for finding in silent)
