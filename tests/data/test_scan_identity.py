"""A scan is its resolved path and its series: rows may write it in any way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import odd_dicom
import pytest
import SimpleITK as sitk
from prepared import run, write_table

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.store import Store
from fmcib_ssl.types import Preprocessing, SampleKey

PATCH = Preprocessing(patch_size_zyx=(16, 16, 16))
#: LPS mm, and the HU of a cube there that nothing else in the scan has.
LESIONS = {(-30.0, -20.0, -20.0): 2000, (30.0, 20.0, 20.0): 2100}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Soft tissue, 1 mm, centred at 0, with two marked lesions, under three names."""
    hu = np.full((90, 100, 120), -1000, np.int16)
    hu[:, 4:-4, 4:-4] = 40
    for (x, y, z), value in LESIONS.items():
        i, j, k = int(x + 60), int(y + 50), int(z + 45)
        hu[k - 2 : k + 3, j - 2 : j + 3, i - 2 : i + 3] = value
    image = sitk.GetImageFromArray(hu)
    image.SetOrigin((-60, -50, -45))
    (tmp_path / "P1").mkdir()
    sitk.WriteImage(image, str(tmp_path / "P1" / "ct.nii.gz"))
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "P1" / "ct.nii.gz")
    (tmp_path / "P2").symlink_to(tmp_path / "P1")
    return tmp_path


@pytest.mark.parametrize("other", ["link.nii.gz", "P2/ct.nii.gz", "P1/../P1/ct.nii.gz", "./P1//ct.nii.gz"])
def test_no_negative_holds_a_lesion_that_another_name_annotates(archive: Path, other: str) -> None:
    rows = [f"{name},{x},{y},{z}" for name, (x, y, z) in zip(("P1/ct.nii.gz", other), LESIONS, strict=True)]
    table = write_table(archive, rows)
    assert table.scan_of(0) == table.scan_of(1)
    run(table, archive / "store")
    patches = LesionPatches(Store(archive / "store"), PATCH.patch_size_zyx)
    assert patches.lesions["scan_id"].nunique() == 1
    for epoch in range(60):
        for lesion, value in enumerate(LESIONS.values()):
            pair = patches[SampleKey(epoch, lesion)]
            assert (pair["positive"] == value).sum() == 5**3
            assert pair["negative"].max() < 1000, f"negative {epoch} of lesion {lesion} holds a lesion"


def test_names_do_not_depend_on_the_order_of_the_rows(archive: Path) -> None:
    rows = [f"{name},{x},{y},{z}" for name, (x, y, z) in zip(("link.nii.gz", "P1/ct.nii.gz"), LESIONS, strict=True)]
    tables = [write_table(archive, order) for order in (rows, rows[::-1])]
    assert len({table.scan_of(i) for table in tables for i in range(2)}) == 1


def test_a_series_that_some_rows_name(tmp_path: Path) -> None:
    odd_dicom.write(tmp_path / "one", odd_dicom.ct_series(odd_dicom.ct_hu(), series="1.2.7"))
    for series in ("1.2.7", "1.2.8"):
        odd_dicom.write(tmp_path / "two", odd_dicom.ct_series(odd_dicom.ct_hu(), series=series), series + "-{}.dcm")
    point = ",".join(str(v) for v in np.add(odd_dicom.ORIGIN, (1, 1, 5)))
    rows = [f"{folder},{point},{uid}" for folder in ("one", "two") for uid in ("", "1.2.7", "1.2.8")]
    table = write_table(tmp_path, rows, "image_path,coordX,coordY,coordZ,series_uid")
    one, two = table.scans[:3], table.scans[3:]
    assert one[0] == one[1] and one[0] != one[2], "the folder holds one series, which a row need not name"
    assert len(set(two)) == 3, "it cannot be told which of two is meant"
