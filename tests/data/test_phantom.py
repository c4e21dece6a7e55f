"""The phantom archive: real files, the same every time, and no short cut from size or brightness to the class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from scipy.spatial.distance import pdist
from sklearn.metrics import roc_auc_score

from fmcib_ssl.data.phantom import MIN_DISTANCE_MM, ORIENTATIONS, draw_scan, make_archive, render

NUM_SCANS = 14


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("phantom"), NUM_SCANS, seed=1, progress=False)


@pytest.fixture(scope="module")
def table(archive: Path) -> pd.DataFrame:
    return pd.read_csv(archive)


def test_the_table_names_files_that_exist_and_points_inside_them(archive: Path, table: pd.DataFrame) -> None:
    assert list(table.columns) == [
        "image_path", "PatientID", "coordX", "coordY", "coordZ", "diameter_mm", "label", "split",
    ]  # fmt: skip
    assert table.PatientID.nunique() == NUM_SCANS
    assert set(table.split) == {"train", "test"} and table.groupby("PatientID").split.nunique().max() == 1
    for path, rows in table.groupby("image_path"):
        image = sitk.ReadImage(str(archive.parent / str(path)))
        for point in rows[["coordX", "coordY", "coordZ"]].to_numpy():
            index = np.array(image.TransformPhysicalPointToContinuousIndex(point))
            assert (index > 0).all() and (index < np.array(image.GetSize()) - 1).all()


def test_scans_are_ct_in_hu_and_vary_in_orientation_and_spacing(archive: Path, table: pd.DataFrame) -> None:
    images = [sitk.ReadImage(str(archive.parent / path)) for path in table.image_path.unique()]
    hu = sitk.GetArrayFromImage(images[0])
    assert hu.dtype == np.int16
    air, lung, _, fat, soft, _, bone = np.histogram(hu, [-1024, -950, -700, -200, -40, 150, 300, 3072])[0] / hu.size
    assert air > 0.1 and 0.08 < lung < 0.5 and 0.03 < fat < 0.3 and 0.15 < soft < 0.6 and 0.005 < bone < 0.1
    orientations = {sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(i.GetDirection()) for i in images}
    assert len(orientations) >= 4
    spacings = np.array([sorted(image.GetSpacing()) for image in images])
    assert (spacings[:, 2] > 1.05 * spacings[:, 1]).all()  # slices are thicker than pixels are wide
    assert len(np.unique(spacings[:, 2])) == NUM_SCANS


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_lesion_is_where_the_table_says_in_every_orientation(orientation: str) -> None:
    chest, lesions = draw_scan(0, 3)
    lesion = lesions[0]
    chest.orientation, chest.noise_hu = orientation, 1.0
    with_lesion = render(chest, [lesion], np.random.default_rng(0))
    without = render(chest, [], np.random.default_rng(0))
    changed = np.abs(sitk.GetArrayFromImage(with_lesion).astype(float) - sitk.GetArrayFromImage(without)) > 200
    z, y, x = np.argwhere(changed).mean(0)
    found = np.array(with_lesion.TransformContinuousIndexToPhysicalPoint((x, y, z)))
    assert np.linalg.norm(found - np.add(lesion.center_lps_mm, chest.origin_lps)) < 2.0


def test_a_scan_is_a_function_of_seed_and_number(archive: Path, tmp_path: Path) -> None:
    def arrays(seed: int, num_scans: int) -> list[np.ndarray]:
        path = make_archive(tmp_path / str(seed), num_scans, seed=seed, num_workers=2, progress=False)
        return [hu_of(path, number) for number in range(num_scans)]

    def hu_of(path: Path, number: int) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path.parent / f"scans/phantom_{number:04d}.nii.gz")))

    np.testing.assert_equal(arrays(1, 3), [hu_of(archive, number) for number in range(3)])
    again = pd.read_csv(tmp_path / "1" / "annotations.csv")
    pd.testing.assert_frame_equal(again, pd.read_csv(archive).head(len(again)))
    assert not np.array_equal(arrays(2, 1)[0], hu_of(archive, 0))


def test_a_complete_archive_is_left_alone_and_a_broken_off_one_is_finished(tmp_path: Path) -> None:
    table = make_archive(tmp_path, 2, progress=False)
    scans = sorted((tmp_path / "scans").iterdir())
    assert [scan.name for scan in scans] == ["phantom_0000.nii.gz", "phantom_0001.nii.gz"]  # no half files
    for path in (table, *scans):
        os.utime(path, (1, 1))
    scans[1].unlink()
    make_archive(tmp_path, 2, progress=False)
    assert table.stat().st_mtime == scans[0].stat().st_mtime == 1
    assert scans[1].stat().st_mtime > 1


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    make_archive(tmp_path / "phantom", 1, progress=False)
    with pytest.raises(ValueError, match=r"'seed': 0.*not.*'seed': 7.*delete that folder or give another"):
        make_archive(tmp_path / "phantom", 1, seed=7, progress=False)
    (tmp_path / "annotations.csv").write_text("image_path\n")
    with pytest.raises(ValueError, match="it is no phantom archive"):
        make_archive(tmp_path, 1, progress=False)
    with pytest.raises(ValueError, match="num_scans=0: a phantom archive needs 1 or more"):
        make_archive(tmp_path / "new", 0)


def test_neither_size_nor_mean_nor_place_tells_the_class() -> None:
    """Over many lesions, within four standard errors of an AUC of a half; and lesions of a scan keep apart."""
    drawn = [draw_scan(5, number) for number in range(600)]
    lesions = [lesion for _, own in drawn for lesion in own]
    labels = np.array([lesion.label for lesion in lesions])
    standard_error = np.sqrt(1 / 12 * (1 / labels.sum() + 1 / (1 - labels).sum()))
    columns = {
        "diameter": [lesion.diameter_mm for lesion in lesions],
        "mean": [lesion.mean_hu for lesion in lesions],
        **{axis: [lesion.center_lps_mm[k] for lesion in lesions] for k, axis in enumerate("xyz")},
        "distance": [float(np.linalg.norm(lesion.center_lps_mm)) for lesion in lesions],
    }
    for name, column in columns.items():
        assert abs(roc_auc_score(labels, column) - 0.5) < 4 * standard_error, name
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels))
    for chest, own in drawn[:40]:
        centers = np.array([lesion.center_lps_mm for lesion in own])
        assert pdist(centers).min(initial=np.inf) > MIN_DISTANCE_MM
        assert (chest.depth_in_lung(*centers.T) > 0).all()


def test_both_classes_are_painted_equally_bright_and_unequally_rough() -> None:
    """The same lesion painted as either class: the mean in its middle agrees, the spread does not."""
    means, spreads = [], []
    for number in range(5):
        chest, lesions = draw_scan(5, number)
        lesion = lesions[0]
        chest.orientation, chest.offset_hu = "LPS", 0.0
        x, y, z = (axis - center for axis, center in zip(chest.axes(), lesion.center_lps_mm, strict=True))
        middle = np.sqrt(x**2 + y**2 + z**2) < 0.7 * lesion.diameter_mm / 2
        pair = [
            sitk.GetArrayFromImage(render(chest, [lesion._replace(label=label)], np.random.default_rng(0)))[middle]
            for label in (0, 1)
        ]
        means.append([hu.mean() - lesion.mean_hu for hu in pair])
        spreads.append([hu.std() for hu in pair])
    assert np.abs(means).max() < 40
    assert np.abs(np.mean(means, axis=0)).max() < 10
    assert (np.diff(spreads) > 0).mean() > 0.9
