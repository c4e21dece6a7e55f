"""Patches from a store against slices of the arrays that went into it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import body, make_store
from torch.utils.data import DataLoader

import fmcib_ssl.data
from fmcib_ssl.data.mining import Near
from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.store import Store, StoreError, StoreSettings
from fmcib_ssl.types import PatchPair, Preprocessing, SampleKey

SIZE = (16, 18, 20)
SCANS = {"a": body((60, 90, 100), 1), "b": body((70, 80, 90), 2), "ü ö": body((50, 70, 80), 3)}
LESIONS = [("a", 20.4, 30.5, 60.0), ("b", 3.0, 20.0, 20.0), ("a", 40.6, 70.2, 30.0), ("ü ö", 25.0, 30.0, 40.0)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("stores") / "store", SCANS, LESIONS)


def cut(hu: np.ndarray, voxel: tuple[int, ...], **how: Any) -> np.ndarray:
    """The patch by padding the whole scan."""
    padded = np.pad(hu, [(n, n) for n in SIZE], **(how or {"constant_values": -1024}))
    return padded[tuple(slice(v - n // 2 + n, v - n // 2 + 2 * n) for v, n in zip(voxel, SIZE, strict=True))]


def equal(a: PatchPair, b: PatchPair) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)  # type: ignore[literal-required]


def find(hu: np.ndarray, patch: np.ndarray) -> list[tuple[int, ...]]:
    """Where in a scan a patch was cut, by its middle voxels: all places of one value, then of its neighbours."""
    middle = tuple(n // 2 for n in patch.shape)
    padded = np.pad(hu, 1, constant_values=-1024)
    places = np.argwhere(hu == patch[middle]) + 1
    for offset in np.ndindex(3, 3, 3):
        step = np.array(offset) - 1
        places = places[padded[tuple((places + step).T)] == patch[tuple(middle + step)]]
    return [tuple(place) for place in (places - 1).tolist()]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(None, [0, 1, 0, 2]), (["P", "Q", "Q", "P"], [0, 1, 1, 0]), (["a", None, None, "a"], [0, 2, 1, 0])],
)
def test_lesions_of_a_patient_share_a_number(
    tmp_path: Path, names: list[str | None] | None, expected: list[int]
) -> None:
    """Without a name the scan stands for the patient."""
    columns = {} if names is None else {"PatientID": names}
    dataset = LesionPatches(make_store(tmp_path / "store", SCANS, LESIONS, **columns), SIZE, mining="uniform")
    assert [dataset[index]["patient"] for index in range(4)] == expected


def test_edges_are_repeated_where_that_is_chosen(store: Store) -> None:
    dataset = LesionPatches(store, SIZE, padding="edge", mining="uniform")
    for index, voxel in enumerate([(20, 31, 60), (3, 20, 20), (41, 70, 30), (25, 30, 40)]):
        hu = SCANS[LESIONS[index][0]]
        np.testing.assert_array_equal(dataset.positive(index)[0], cut(hu, voxel, mode="edge"))
        assert dataset[index]["negative"].shape == (1, *SIZE)
    scan_id = LESIONS[1][0]
    scan = sorted(SCANS).index(scan_id)
    far = dataset.patch_at(scan, np.array([-50, 20, 20]))  # all of it below the scan
    assert (far[0] == far[0, 0]).all()
    np.testing.assert_array_equal(far[0, 0], cut(SCANS[scan_id], (0, 20, 20), mode="edge")[0])


def test_positives_are_the_voxels_round_the_lesion(store: Store) -> None:
    dataset = LesionPatches(store, SIZE)
    assert len(dataset) == 4
    for index, (scan_id, *_) in enumerate(LESIONS):
        voxel = [(20, 31, 60), (3, 20, 20), (41, 70, 30), (25, 30, 40)][index]
        expected = cut(SCANS[scan_id], voxel)
        sample = dataset[SampleKey(3, index)]
        assert sample["positive"].dtype == sample["negative"].dtype == torch.int16
        assert sample["positive"].shape == sample["negative"].shape == (1, *SIZE)
        np.testing.assert_array_equal(sample["positive"][0], expected)
        np.testing.assert_array_equal(dataset.positive(index)[0], expected)
        assert sample["lesion"] == index
        assert dataset.title(index) == f"{scan_id}, row {index + 1}"
    assert (dataset.positive(1)[0, :5] == -1024).all()  # five slices below the scan


def test_a_store_says_what_stands_outside_its_scans(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SCANS, LESIONS, StoreSettings(spacing_mm=1.5, padding_hu=-2000))
    dataset = LesionPatches(store, SIZE)
    assert (dataset.positive(1)[0, :5] == -2000).all()
    assert dataset.preprocessing == Preprocessing(SIZE, 1.5, -2000)


@pytest.mark.parametrize("mining", ["background", "near", "hard", "uniform", Near(20, 45)])
def test_negatives_are_places_of_the_scan_that_share_no_voxel_with_a_lesion(store: Store, mining: str) -> None:
    # One lesion of scan "a" is not selected, and is a lesion still.
    dataset = LesionPatches(store, SIZE, mining=Near(20, 60) if mining == "near" else mining, select=[0], seed=2)
    assert len(dataset) == 1
    voxels = set()
    for epoch in range(60):
        sample = dataset[SampleKey(epoch, 0)]
        negative = sample["negative"][0].numpy()
        assert not sample["negative_from_other_scan"]
        [voxel] = find(SCANS["a"], negative)
        np.testing.assert_array_equal(negative, cut(SCANS["a"], voxel))
        voxels.add(voxel)
        apart = [(np.abs(np.subtract(voxel, lesion)) >= SIZE).any() for lesion in [(20, 31, 60), (41, 70, 30)]]
        assert all(apart) or mining == "uniform"
        if isinstance(mining, Near):
            assert 17 < np.linalg.norm(np.subtract(voxel, (20, 31, 60))) < 48
    assert len(voxels) > 50


def test_a_sample_depends_on_its_key_alone(store: Store) -> None:
    keys = [SampleKey(epoch, index) for epoch in range(3) for index in range(4)]
    dataset = LesionPatches(store, SIZE, seed=7)
    samples = {key: dataset[key] for key in keys}
    again = pickle.loads(pickle.dumps(dataset))
    for key in keys[::-1]:
        assert equal(samples[key], again[key])
    assert equal(dataset[2], samples[SampleKey(0, 2)])
    negatives = [sample["negative"] for sample in samples.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(negatives) for b in negatives[:i])
    assert not torch.equal(samples[SampleKey(0, 1)]["negative"], LesionPatches(store, SIZE, seed=8)[1]["negative"])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_same_samples(store: Store, context: str) -> None:
    dataset = LesionPatches(store, SIZE, seed=7)
    keys = [SampleKey(epoch, index) for epoch in range(3) for index in range(4)]
    expected = [dataset[key] for key in keys]
    loader = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=2, multiprocessing_context=context)  # type: ignore[arg-type]
    assert all(equal(a, b) for a, b in zip(expected, loader, strict=True))


def test_several_negatives_and_none(store: Store) -> None:
    three = LesionPatches(store, SIZE, negatives_per_lesion=3)[0]["negative"]
    assert three.shape == (3, 1, *SIZE)
    assert len({find(SCANS["a"], patch[0].numpy())[0] for patch in three}) == 3
    none = LesionPatches(store, SIZE, negatives_per_lesion=0)[0]["negative"]
    assert none.shape == (0, 1, *SIZE)
    assert none.dtype == torch.int16


def test_a_scan_without_room_borrows_from_another_and_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    scans = {"crop": body((16, 24, 24)), "room": SCANS["a"], "crop 2": body((16, 24, 24))}
    lesions = [("crop", 8.0, 12.0, 12.0), ("room", 20.0, 30.0, 60.0), ("crop 2", 8.0, 12.0, 12.0)]
    store = make_store(tmp_path / "store", scans, lesions)
    dataset = LesionPatches(store, SIZE)
    samples = [dataset[SampleKey(epoch, index)] for index in range(3) for epoch in range(4)]
    assert [sample["negative_from_other_scan"] for sample in samples] == [True] * 4 + [False] * 4 + [True] * 4
    for sample in samples:
        assert find(SCANS["a"], sample["negative"][0].numpy())
    assert equal(samples[3], LesionPatches(store, SIZE)[SampleKey(3, 0)])
    read, coarse_map = list[str](), store.coarse_map
    monkeypatch.setattr(store, "coarse_map", lambda scan_id: [read.append(scan_id), coarse_map(scan_id)][1])
    assert dataset[SampleKey(9, 0)]["negative_from_other_scan"] and "crop 2" not in read  # known to have no place
    near = LesionPatches(store, SIZE, mining=Near(1, 30))  # in the other scan there is nothing to be near to
    far = [find(SCANS["a"], near[SampleKey(epoch, 0)]["negative"][0].numpy())[0] for epoch in range(8)]
    assert max(np.linalg.norm(np.subtract(voxel, (8, 12, 12))) for voxel in far) > 50
    with pytest.raises(StoreError, match=r"no scan has room.*16 x 18 x 20 mm.*smaller patch.*negatives_per_lesion=0"):
        LesionPatches(make_store(tmp_path / "full", {"crop": scans["crop"]}, lesions[:1]), SIZE)[0]


def test_what_cannot_be(store: Store) -> None:
    with pytest.raises(IndexError, match="lesion 4 of 4"):
        LesionPatches(store, SIZE)[4]
    with pytest.raises(ValueError, match=r"patch_size=\(16, 18\)"):
        LesionPatches(store, (16, 18))
    with pytest.raises(StoreError, match="no lesion is selected of the 4"):
        LesionPatches(store, SIZE, select=np.zeros(4, bool))
    with pytest.raises(ValueError, match="mining='easy' is not one of 'uniform', 'background', 'near', 'hard'"):
        LesionPatches(store, SIZE, mining="easy")
    with pytest.raises(ValueError, match="negatives_per_lesion=-1, seed=0: must not be negative"):
        LesionPatches(store, SIZE, negatives_per_lesion=-1)
    assert fmcib_ssl.data.LesionPatches is LesionPatches
    assert LesionPatches(store.path, SIZE, select=LESIONS_OF_A).lesions["scan_id"].tolist() == ["a", "a"]


LESIONS_OF_A = np.array([lesion[0] == "a" for lesion in LESIONS])


def test_training_from_a_store_needs_no_reader_of_scans(store: Store) -> None:
    code = (
        "import sys\n"
        "from fmcib_ssl.augment import PublishedViews\n"
        "from fmcib_ssl.data import LesionPatches\n"
        "from fmcib_ssl.data.loader import LesionDataModule\n"
        "data = LesionDataModule(LesionPatches(sys.argv[1], (16, 18, 20)), PublishedViews((16, 18, 20)))\n"
        "assert len(next(iter(data.train_dataloader()))['lesion']) == 4\n"
        "assert 'SimpleITK' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(store.path)], check=True)
