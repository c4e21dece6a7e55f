"""DICOM series that cannot be read right are refused, with what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from odd_dicom import (
    CORONAL,
    ORIGIN,
    ct_hu,
    ct_series,
    encode,
    file_of,
    rotated,
    save,
    set_raw,
    store,
    write,
)
from pydicom.dataset import Dataset

from fmcib_ssl.data.scans import read_header, read_scan
from fmcib_ssl.types import ScanError

Spoil = Callable[[list[Dataset]], object]


def all_slices(spoil: Callable[[Dataset], object]) -> Spoil:
    return lambda slices: [spoil(one) for one in slices]


def drift(angle: float = 0.0, jump: float = 0.0) -> Spoil:
    """Move slices sideways, and the second half of them apart."""

    def move(slices: list[Dataset]) -> None:
        for k, one in enumerate(slices):
            x, y, z = (float(v) for v in one.ImagePositionPatient)
            later = max(0, k - len(slices) // 2)
            one.ImagePositionPatient = [x, round(y + 2.5 * k * np.tan(np.radians(angle)), 4), z + jump * later]

    return move


def set_all(**tags: object) -> Spoil:
    return all_slices(lambda one: [setattr(one, keyword, value) for keyword, value in tags.items()])


def remove_all(keyword: str) -> Spoil:
    return all_slices(lambda one: delattr(one, keyword))


def only_imager_spacing(one: Dataset) -> None:
    one.ImagerPixelSpacing = one.PixelSpacing
    del one.PixelSpacing


def localizer(slices: list[Dataset]) -> None:
    slices.append(ct_series(ct_hu((1, 8, 10)), np.array([[0.0, 0, 0]]), orientation=CORONAL)[0])


SPOILS: dict[str, tuple[Spoil, str]] = {
    "no orientation": (remove_all("ImageOrientationPatient"), r"has no ImageOrientationPatient"),
    "no position": (remove_all("ImagePositionPatient"), r"has no ImagePositionPatient"),
    "no spacing": (remove_all("PixelSpacing"), r"has no PixelSpacing: where its voxels lie"),
    "spacing of 0": (set_all(PixelSpacing=[0, 0]), r"has the PixelSpacing '0\.0\\\\0\.0': both must be above 0 mm"),
    "imager spacing": (all_slices(only_imager_spacing), r"has no PixelSpacing"),
    "decimal comma": (
        all_slices(lambda one: set_raw(one, "PixelSpacing", "DS", b"0,75\\0,5 ")),
        r"has the PixelSpacing '0,75\\\\0,5', which is not 2 numbers \(with a decimal point\)",
    ),
    "nan": (
        all_slices(lambda one: set_raw(one, "ImagePositionPatient", "DS", b"0\\nan\\0 ")),
        r"ImagePositionPatient.*which is not 3 numbers",
    ),
    "metres": (set_all(PixelSpacing=[7e-4, 7e-4]), r"has a spacing of \(0\.0007, 0\.0007, 2\.5\) mm.*another unit"),
    "sheared rows": (
        set_all(ImageOrientationPatient=[-1, 0, 0, np.sin(np.radians(0.07)).round(6), -1, 0]),
        r"sheared, or not of length 1; rows and columns are 90\.07 degrees apart",
    ),
    "half a vector": (set_all(ImageOrientationPatient=[0.5, 0, 0, 0, 1, 0]), r"not of length 1.*0\.5000 and 1\.0000"),
    "gantry tilt": (drift(angle=15), r"gantry tilt of 15\.0 degrees: the slices drift sideways by 3\.3 mm"),
    "slice missing": (lambda s: s.pop(3), r"missing or not equally spaced: 5\.00 mm from slice 3 to 4.*2\.50 mm else"),
    "slice twice": (lambda s: s.append(s[2]), r"duplicate slices at -45\.00 mm along .*dcm and .*dcm"),
    "steps that grow": (drift(jump=0.3), r"not equally spaced.*lies 0\.\d\d mm from its place on a regular grid"),
    "slice turned": (
        lambda s: setattr(s[3], "ImageOrientationPatient", list(rotated(9))),
        r"differ in orientation \(by 9\.0 degrees\).*localizer",
    ),
    "slice shifted": (
        lambda s: setattr(s[3], "ImagePositionPatient", [-9.2, 20, -42.5]),
        r"shifted: .*dcm lies 0\.80 mm off the regular grid.*0\.5 mm are allowed",
    ),
    "localizer": (localizer, r"its slices differ in orientation.*is a localizer among them\?"),
    "no pixels": (all_slices(lambda one: store(one, np.zeros((0, 10)))), r"has 10 x 0 pixels, not a CT slice"),
    "other size": (lambda s: store(s[3], np.zeros((9, 9))), r"differ in size .*is a localizer among them\?"),
    "other spacing": (lambda s: setattr(s[3], "PixelSpacing", [0.8, 0.8]), r"differ in spacing"),
    "one slice": (lambda s: s.__delitem__(slice(1, None)), r"holds one DICOM slice; a volume needs at least two"),
    "no rescale in the first": (
        lambda s: [s[0].__delattr__(keyword) for keyword in ("RescaleSlope", "RescaleIntercept")],
        r"dcm has no RescaleSlope and RescaleIntercept, .*dcm has: what its values mean",
    ),
    "slope of 0": (set_all(RescaleSlope=0), r"has a RescaleSlope of 0"),
    "not HU": (set_all(RescaleType="Z_EFF"), r"has values of the RescaleType Z_EFF, not HU"),
    "colour": (set_all(PhotometricInterpretation="PALETTE COLOR"), r"is a colour image \(PALETTE COLOR\)"),
    "PET": (set_all(Modality="PT"), r"is of modality PT, not CT"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_refused_by_its_headers(tmp_path: Path, name: str) -> None:
    spoil, message = SPOILS[name]
    slices = ct_series(ct_hu())
    spoil(slices)
    folder = write(tmp_path / "a", slices)
    for read in (read_header, read_scan):
        with pytest.raises(ScanError, match=message):
            read(folder)


def test_long_drifts_are_seen(tmp_path: Path) -> None:
    """Steps of 1.0 and then 1.09 mm: each is near the mean, the slices are up to 1.1 mm from their place."""
    steps = np.r_[0, np.full(25, 1.0), np.full(25, 1.09)]
    at = ORIGIN + np.cumsum(steps)[:, None] * [0, 0, 1]
    folder = write(tmp_path / "a", ct_series(ct_hu((51, 4, 4)), at))
    with pytest.raises(ScanError, match=r"slice 26 lies 1\.1\d mm from its place"):
        read_header(folder)


def test_the_slice_that_gives_the_axes_is_turned(tmp_path: Path) -> None:
    """By little more than rounding: half a degree would move the far end of the stack by 0.9 mm."""
    slices = ct_series(ct_hu((40, 4, 4)))
    slices[0].ImageOrientationPatient = list(rotated(0.1, "x"))
    with pytest.raises(ScanError, match=r"its slices differ in orientation \(by 0\.1 degrees\)"):
        read_header(write(tmp_path / "a", slices))


def test_without_any_rescale(tmp_path: Path) -> None:
    def without_tags(slices: list[Dataset]) -> list[Dataset]:
        for one in slices:
            del one.RescaleSlope, one.RescaleIntercept
        return slices

    folder = write(tmp_path / "stored", without_tags(ct_series(ct_hu())))
    with pytest.raises(ScanError, match=r"has no RescaleSlope and RescaleIntercept, and stored values from .* not HU"):
        read_scan(folder)
    hu = ct_hu()  # HU as they are, which some tools write
    folder = write(tmp_path / "hu", without_tags(ct_series(hu, signed=True, intercept=0)))
    np.testing.assert_array_equal(read_scan(folder).hu, hu)


@pytest.mark.parametrize("instance", [1, 4, 6])
@pytest.mark.parametrize("name", ["{}.dcm", "IM{:04}"])
@pytest.mark.parametrize("compressed", [False, True])
def test_slices_that_are_cut_off(tmp_path: Path, instance: int, name: str, compressed: bool) -> None:
    """At the ends of the stack the others look like a whole series."""
    slices = ct_series(ct_hu())
    if compressed:
        slices = [encode(one, "JPEG2000") for one in slices]
    folder = write(tmp_path / "a", slices, name)
    victim = file_of(folder, instance)
    whole = victim.read_bytes()
    for length in (len(whole) - 20, len(whole) // 2, 600, 300, 140, 10, 0):
        victim.write_bytes(whole[:length])
        with pytest.raises(ScanError, match=r"cut off|no pixel data|is empty|no DICOM file|damaged") as raised:
            read_header(folder)
        assert raised.value.path == str(victim)
    dataset = pydicom.dcmread(folder / name.format(0 if victim.name != name.format(0) else 1))
    del dataset.PixelData
    save(dataset, victim)
    with pytest.raises(ScanError, match=r"has no pixel data") as raised:
        read_scan(folder)
    assert raised.value.path == str(victim)
