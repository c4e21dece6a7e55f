"""The dataset over scans: the same key gives the same sample, wherever and whenever it is asked."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch.utils.data import DataLoader

from fmcib_ssl.data.annotations import LesionTable, check_annotations, read_annotations
from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.mining import Near
from fmcib_ssl.data.scans import ScanSource
from fmcib_ssl.data.volumes import VolumePatches, covering_grid
from fmcib_ssl.types import Preprocessing, SampleKey, ScanError

PATCH = Preprocessing(patch_size_zyx=(16, 18, 20))


def write_body(path: Path, size_xyz: tuple[int, int, int] = (60, 50, 30), seed: int = 0) -> None:
    """Noisy soft tissue in air, 2 x 2 x 3 mm, turned about; its middle at LPS (0, 0, 0)."""
    rng = np.random.default_rng(seed)
    hu = np.full(size_xyz[::-1], -1000, np.int16)
    hu[:, 4:-4, 4:-4] = 40
    image = sitk.GetImageFromArray(hu + rng.integers(-20, 20, hu.shape).astype(np.int16))
    image.SetSpacing((2, 2, 3))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in size_xyz])
    image.SetOrigin([-v for v in middle])
    sitk.WriteImage(image, str(path))


@pytest.fixture
def lesions(tmp_path: Path) -> LesionTable:
    write_body(tmp_path / "a.nii.gz", seed=1)
    write_body(tmp_path / "b.nrrd", seed=2)
    lines = ["a.nii.gz,-30,-10,5", "b.nrrd,20,10,-10", "a.nii.gz,30,20,-12", "b.nrrd,-40,0,0"]
    (tmp_path / "lesions.csv").write_text("\n".join(["image_path,coordX,coordY,coordZ", *lines]))
    return check_annotations(read_annotations(tmp_path / "lesions.csv"), PATCH).usable


def test_a_sample(lesions: LesionTable) -> None:
    dataset = VolumePatches(lesions, PATCH)
    sample = dataset[1]
    assert len(dataset) == 4
    for name in ("positive", "negative"):
        assert sample[name].dtype == torch.int16
        assert sample[name].shape == (1, 16, 18, 20)
    assert sample["lesion"] == 1
    assert sample["negative_from_other_scan"] is False
    assert torch.equal(sample["positive"], dataset.positive(1))
    assert torch.equal(sample["positive"], dataset.patch_at(lesions.scan_of(1), lesions.centers_lps_mm[1]))
    image = sitk.ReadImage(str(lesions.scan_of(1).path))
    value = image.EvaluateAtPhysicalPoint(lesions.centers_lps_mm[1].tolist(), sitk.sitkLinear)
    assert abs(int(sample["positive"][0, 8, 9, 10]) - value) <= 0.5
    with pytest.raises(IndexError):
        dataset[4]


def equal(a: dict[str, object], b: dict[str, object]) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_a_sample_depends_on_its_key_alone(lesions: LesionTable) -> None:
    keys = [SampleKey(epoch, index) for epoch in range(3) for index in range(4)]
    dataset = VolumePatches(lesions, PATCH, seed=7, cache_scans=1)
    samples = {key: dataset[key] for key in keys}
    again = VolumePatches(lesions, PATCH, seed=7, cache_scans=3)
    for key in keys[::-1]:
        assert equal(samples[key], again[key])
    assert equal(dataset[2], samples[SampleKey(0, 2)])
    assert not torch.equal(samples[SampleKey(0, 1)]["negative"], samples[SampleKey(1, 1)]["negative"])
    other_seed = VolumePatches(lesions, PATCH, seed=8)
    assert not torch.equal(samples[SampleKey(0, 1)]["negative"], other_seed[1]["negative"])
    workers = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=2)  # forked after scans were decoded here
    for key, sample in zip(keys, workers, strict=True):
        assert equal(samples[key], sample)


def test_the_same_in_another_process(lesions: LesionTable, tmp_path: Path) -> None:
    dataset = VolumePatches(lesions, PATCH, seed=3)
    expected = dataset[SampleKey(5, 2)]
    code = (
        "import pickle, sys, torch; from fmcib_ssl.types import SampleKey\n"
        "dataset = pickle.load(open(sys.argv[1], 'rb')); torch.save(dataset[SampleKey(5, 2)], sys.argv[2])"
    )
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(dataset))
    assert (tmp_path / "dataset.pkl").stat().st_size < 20_000  # no scan travels
    subprocess.run([sys.executable, "-c", code, tmp_path / "dataset.pkl", tmp_path / "sample.pt"], check=True)
    assert equal(expected, torch.load(tmp_path / "sample.pt"))


def test_negatives_overlap_no_lesion_of_the_scan(lesions: LesionTable) -> None:
    split = lesions.select([0])  # the other lesion of the scan belongs to another split, and is a lesion still
    dataset = VolumePatches(split, PATCH)
    extent = np.array(PatchGrid((0, 0, 0), PATCH.patch_size_zyx).extent_mm_xyz)
    centers: list[np.ndarray] = []
    cut = dataset.patch_at
    dataset.patch_at = lambda scan, center: [centers.append(np.array(center)), cut(scan, center)][1]  # type: ignore[method-assign]
    for epoch in range(200):
        sample = dataset[SampleKey(epoch, 0)]
        negative = centers[-1]
        for lesion in lesions.centers_lps_mm[[0, 2]]:
            assert (np.abs(negative - lesion) >= extent).any()
        assert sample["negative"].float().mean() > -520  # half in the body
    assert len({tuple(center) for center in centers}) > 150


@pytest.mark.parametrize("mining", ["uniform", "near", "hard", Near(20, 40)])
def test_strategies_draw_in_the_scan(lesions: LesionTable, mining: str | Near) -> None:
    dataset = VolumePatches(lesions, PATCH, mining=mining, per_lesion=3)
    negative = dataset[1]["negative"]
    assert negative.shape == (3, 1, 16, 18, 20)
    assert negative.dtype == torch.int16
    assert not torch.equal(negative[0], negative[1])
    assert equal(dataset[1], VolumePatches(lesions, PATCH, mining=mining, per_lesion=3)[1])
    assert VolumePatches(lesions, PATCH, mining=mining, per_lesion=0)[1]["negative"].shape == (0, 1, 16, 18, 20)
    assert dataset.title(1) == "b.nrrd, row 2"


@pytest.mark.parametrize("seed", range(8))
def test_the_map_covers_the_scan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    direction, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    geometry = ScanGeometry((31, 22, 13), (1.1, 0.7, 5.0), (-10.0, 20.0, 30.0), tuple(map(tuple, direction.tolist())))
    grid = covering_grid(geometry, 2.0)
    lowest, highest = geometry.bounds_lps_mm()
    first = np.array(grid.origin_lps_mm) - grid.spacing_mm / 2
    np.testing.assert_allclose(first, lowest)
    beyond = first + np.array(grid.size_xyz) * grid.spacing_mm - highest
    assert (beyond >= -2e-3).all()
    assert (beyond < grid.spacing_mm).all()


def test_the_cache_is_bounded(lesions: LesionTable) -> None:
    dataset = VolumePatches(lesions, PATCH, cache_scans=1)
    for index in range(4):
        dataset[index]
        assert len(dataset._cache) == 1
    with pytest.raises(ValueError, match="cache_scans=0"):
        VolumePatches(lesions, PATCH, cache_scans=0)


def crowded(tmp_path: Path, second: bool) -> LesionTable:
    """A scan that lesions fill, and if wanted one that has room."""
    write_body(tmp_path / "full.nrrd", size_xyz=(20, 20, 8))
    lines = ["full.nrrd,0,0,0"]
    if second:
        write_body(tmp_path / "room.nrrd", seed=5)
        lines.append("room.nrrd,-30,-10,5")
    (tmp_path / "crowded.csv").write_text("\n".join(["image_path,coordX,coordY,coordZ", *lines]))
    return check_annotations(read_annotations(tmp_path / "crowded.csv"), PATCH).usable


def test_a_scan_without_room_borrows_from_another(tmp_path: Path) -> None:
    table = crowded(tmp_path, second=True)
    dataset = VolumePatches(table, PATCH)
    samples = [dataset[SampleKey(epoch, 0)] for epoch in range(3)]
    assert all(sample["negative_from_other_scan"] and sample["lesion"] == 0 for sample in samples)
    assert not torch.equal(samples[0]["negative"], samples[1]["negative"])
    assert equal(samples[2], VolumePatches(table, PATCH)[SampleKey(2, 0)])
    assert dataset[1]["negative_from_other_scan"] is False


def test_no_room_anywhere_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no scan has room.*16 x 18 x 20 mm.*smaller patch"):
        VolumePatches(crowded(tmp_path, second=False), PATCH)[0]


def test_a_scan_that_breaks_after_the_check(lesions: LesionTable) -> None:
    path = lesions.scan_of(1).path
    path.write_bytes(path.read_bytes()[:-5000])
    refusing = VolumePatches(lesions, PATCH)
    assert refusing[0]["lesion"] == 0
    with pytest.raises(ScanError, match=r"b\.nrrd: cannot be decoded.*\(row 2 of .*lesions\.csv\)"):
        refusing[1]
    with pytest.raises(ScanError, match=r"row 2 of"):
        list(DataLoader(refusing, batch_size=None, sampler=[1], num_workers=1))

    skipping = VolumePatches(lesions, PATCH, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"Skipping the lesions of a scan: .*b\.nrrd") as warned:
        samples = [skipping[SampleKey(epoch, 1)] for epoch in range(20)]
        skipping[3]
    assert len(warned) == 1
    assert {sample["lesion"] for sample in samples} == {0, 2}
    assert torch.equal(samples[0]["positive"], skipping.positive(samples[0]["lesion"]))
    with pytest.warns(UserWarning, match="Skipping"):
        assert equal(samples[9], VolumePatches(lesions, PATCH, on_bad_row="skip")[SampleKey(9, 1)])

    lesions.scan_of(0).path.unlink()
    with (
        pytest.warns(UserWarning, match="Skipping"),
        pytest.raises(ScanError, match="none of its scans can be decoded"),
    ):
        VolumePatches(lesions, PATCH, on_bad_row="skip")[0]


def test_real_tumours(real_data: Path) -> None:
    table = read_annotations(real_data / "ct" / "annotations.csv", image_root=real_data)
    dataset = VolumePatches(check_annotations(table, Preprocessing()).usable, Preprocessing())
    for index in range(2):
        mask = sitk.ReadImage(str(real_data / table.rows["mask_path"].iloc[index]))
        tumour = dataset.patch_at(ScanSource(table.scan_of(index).path), table.centers_lps_mm[index])
        sample = dataset[index]
        assert torch.equal(sample["positive"], tumour)
        assert mask.EvaluateAtPhysicalPoint(table.centers_lps_mm[index].tolist(), sitk.sitkNearestNeighbor) > 0
        assert sample["positive"][0, 20:30, 20:30, 20:30].float().mean() > -300
        assert not sample["negative_from_other_scan"]
