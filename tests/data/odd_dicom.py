"""DICOM files as scanners, archives and tools write them; what is right follows from DICOM's own equations."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from scipy.spatial.transform import Rotation

SHAPE = (6, 8, 10)  # slices, rows, columns
SPACING = (2.5, 0.75, 0.5)  # between slices, rows, columns
ORIGIN = np.array([-10.0, 20.0, -50.0])
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PRONE = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
ENHANCED_CT, RTDOSE = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.481.2"


def ct_hu(shape: tuple[int, ...] = SHAPE, low: int = -1000) -> np.ndarray:
    hu: np.ndarray = np.random.default_rng(0).integers(low, 1500, shape)
    return hu


def rotated(degrees: float, axis: str = "z") -> tuple[float, ...]:
    """An upright slice turned about an axis of the patient."""
    return tuple(Rotation.from_euler(axis, degrees, degrees=True).as_matrix()[:, :2].T.ravel().tolist())


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    return np.cross(orientation[:3], orientation[3:])


def positions(num: int = SHAPE[0], step: float = SPACING[0], orientation: Sequence[float] = UPRIGHT) -> np.ndarray:
    return ORIGIN + step * np.arange(num)[:, None] * normal_of(orientation)


def ct_series(
    hu: np.ndarray,
    at: np.ndarray | None = None,
    *,
    orientation: Sequence[float] = UPRIGHT,
    spacing: tuple[float, float] = SPACING[1:],
    slope: float = 1,
    intercept: float = -1024,
    signed: bool = False,
    bits: int = 16,
    series: str = "1.2.7",
    modality: str = "CT",
) -> list[Dataset]:
    """One dataset a slice, which a test may spoil before it is written."""
    at = positions(len(hu), orientation=orientation) if at is None else at
    slices = []
    for k, values in enumerate(hu):
        one = Dataset()
        one.SOPClassUID, one.SOPInstanceUID = uid.CTImageStorage, f"{series}.{k + 1}"
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = "1.2.3", series, "1.2.4"
        one.PatientID, one.PatientName, one.PatientBirthDate, one.PatientSex = "P1", "P^1", "", "O"
        one.StudyDate, one.StudyTime, one.AccessionNumber, one.StudyID = "20200101", "120000", "", "1"
        one.ReferringPhysicianName, one.Manufacturer, one.PositionReferenceIndicator = "", "test", ""
        one.Modality, one.SeriesNumber, one.InstanceNumber, one.ImageType = modality, 1, k + 1, ["ORIGINAL", "PRIMARY"]
        one.ImagePositionPatient = [f"{v:.10g}" for v in at[k]]
        one.ImageOrientationPatient = [f"{v:.10g}" for v in orientation]
        one.PixelSpacing, one.SliceThickness = list(spacing), 2.5
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = slope, intercept, "HU"
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        store(one, np.rint((values - intercept) / slope), signed, bits)
        slices.append(one)
    return slices


def store(one: Dataset, stored: np.ndarray, signed: bool = False, bits: int = 16) -> None:
    """Put stored values into a slice."""
    allocated = 32 if bits > 16 else 16
    one.Rows, one.Columns = stored.shape[-2:]
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = allocated, bits, bits - 1, int(signed)
    one.PixelData = stored.astype(np.int64).astype(f"<{'ui'[signed]}{allocated // 8}").tobytes()


def write(folder: Path, slices: Sequence[Dataset], name: str = "{}.dcm") -> Path:
    """A folder of slices, whose names say nothing about their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(np.random.default_rng(1).permutation(len(slices))):
        save(slices[i], folder / name.format(number))
    return folder


def save(one: Dataset, path: Path, syntax: str = uid.ExplicitVRLittleEndian) -> Path:
    if not hasattr(one, "file_meta"):
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, one, enforce_file_format=True)
    return path


def file_of(folder: Path, instance: int) -> Path:
    """The file of a slice, by its number in the series from 1."""
    return next(f for f in folder.iterdir() if pydicom.dcmread(f, force=True).InstanceNumber == instance)


def set_raw(dataset: Dataset, keyword: str, vr: str, value: bytes) -> None:
    """A value that pydicom would not write."""
    tag = Tag(keyword)
    dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)


def encode(one: Dataset, how: str) -> Dataset:
    """Another transfer syntax: "implicit", "big", "deflated", "bare" (no preamble), "rle", "JPEG2000", "JPEG"."""
    plain = {"implicit": uid.ImplicitVRLittleEndian, "deflated": uid.DeflatedExplicitVRLittleEndian}
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = plain.get(how, uid.ExplicitVRLittleEndian)
    if how == "big":
        one.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
        one.PixelData = np.frombuffer(one.PixelData, "<u2").astype(">u2").tobytes()
    elif how == "rle":
        one.compress(uid.RLELossless, generate_instance_uid=False)
    elif how.startswith("JPEG"):
        dtype = np.int16 if one.PixelRepresentation else np.uint16
        image = sitk.GetImageFromArray(np.frombuffer(one.PixelData, dtype).reshape(1, one.Rows, one.Columns))
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(how)
        with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
            writer.SetFileName(file.name)
            writer.Execute(image)
            encoded = pydicom.dcmread(file.name)
        one.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID
        one["PixelData"] = encoded["PixelData"]
    return one


def strip_preamble(path: Path) -> None:
    """Leave a data set without preamble and meta information, as old archives have it."""
    dataset = pydicom.dcmread(path)
    pydicom.dcmwrite(path, Dataset(dataset), implicit_vr=True, little_endian=True)


def enhanced(slices: Sequence[Dataset], order: Sequence[int] | None = None) -> Dataset:
    """The slices as one enhanced CT, its frames in some order; place, size and rescale stand in functional groups."""
    first = slices[0]
    order = range(len(slices)) if order is None else order
    one = Dataset()
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "Rows", "Columns"):
        setattr(one, keyword, first[keyword].value)
    for keyword in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"):
        setattr(one, keyword, first[keyword].value)
    one.SOPClassUID, one.SOPInstanceUID, one.PhotometricInterpretation = ENHANCED_CT, "1.2.9", "MONOCHROME2"
    one.NumberOfFrames, one.InstanceNumber = len(order), 1
    shared = Dataset()
    shared.PlaneOrientationSequence = [part(first, "ImageOrientationPatient")]
    shared.PixelMeasuresSequence = [part(first, "PixelSpacing", "SliceThickness")]
    one.SharedFunctionalGroupsSequence = [shared]
    one.PerFrameFunctionalGroupsSequence = []
    for i in order:
        own = Dataset()
        own.PlanePositionSequence = [part(slices[i], "ImagePositionPatient")]
        own.PixelValueTransformationSequence = [part(slices[i], "RescaleSlope", "RescaleIntercept", "RescaleType")]
        one.PerFrameFunctionalGroupsSequence.append(own)
    one.PixelData = b"".join(slices[i].PixelData for i in order)
    return one


def part(one: Dataset, *keywords: str) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        setattr(item, keyword, one[keyword].value)
    return item


def assert_read_right(scan: Any, hu: np.ndarray, at: np.ndarray, orientation: Sequence[float] = UPRIGHT) -> None:
    """Every voxel has its value at the place that DICOM's equation gives it (PS3.3 C.7.6.2.1.1)."""
    assert scan.hu.shape == hu.shape
    row, column = np.indices(hu.shape[1:])
    in_plane = column[..., None] * SPACING[2] * np.array(orientation[:3])
    in_plane = in_plane + row[..., None] * SPACING[1] * np.array(orientation[3:])
    index = scan.geometry.to_index_xyz(np.asarray(at)[:, None, None] + in_plane)
    nearest = np.rint(index).astype(int)
    np.testing.assert_allclose((index - nearest) * scan.geometry.spacing_mm_xyz, 0, atol=0.01)
    x, y, z = np.moveaxis(nearest, -1, 0)
    np.testing.assert_allclose(scan.hu[z, y, x], hu, atol=1e-3)
