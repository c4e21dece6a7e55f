"""DICOM files: which of a folder form one series, the values of their tags, and their stored pixel values.

Numbers are parsed from the raw text of a tag, so that an error can show what is not a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from fmcib_ssl.data.geometry import FloatArray
from fmcib_ssl.types import Array, ScanError

_SUFFIXES = (".dcm", ".dicom", ".ima")
#: CT Image Storage, its enhanced and its legacy converted form.
_CT_STORAGE = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
#: Uncompressed transfer syntaxes; None is a file without meta information.
_NATIVE = (
    *(None, uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian),
    *(uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian),
)
#: Tags that describe how voxels are stored.
_STORED_AS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_TAGS = [
    *(*_STORED_AS, "SamplesPerPixel", "PhotometricInterpretation"),
    *("SOPClassUID", "Modality", "SeriesInstanceUID", "FrameOfReferenceUID", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


class DicomFile(NamedTuple):
    """A file and its header."""

    path: Path
    header: Dataset
    damage: str  # what is wrong with it, or empty

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID; empty if it has none."""
        return text(self.header, "SeriesInstanceUID")


def is_dicom(path: Path) -> bool:
    """Whether a file is read as DICOM: by its suffix, or by its first bytes, since archives often omit suffixes."""
    if path.suffix.lower() in _SUFFIXES or not path.is_file():
        return path.suffix.lower() in _SUFFIXES
    with path.open("rb") as file:
        return _starts_as_dicom(file.read(132))


def _starts_as_dicom(head: bytes) -> bool:
    """With a preamble, or without one if the first tag is of group 2 or 8, little endian."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00")


def series_at(path: Path, series_uid: str | None, any_modality: bool) -> list[DicomFile]:
    """The files of one series, in the order of their names.

    Args:
        path: a folder, or a file.
        series_uid: which series; None if there is only one, or only one CT.
        any_modality: accept modalities other than CT.

    Raises:
        ScanError: no images, several series without `series_uid`, another modality, truncated or damaged files.
    """
    files = _files_at(path)
    series: dict[str, list[DicomFile]] = {}
    for file in filter(_is_image, files):
        series.setdefault(file.series_uid, []).append(file)
    # Whether an unreadable file is a slice of this series can only be guessed from its name.
    unreadable = [file for file in files if file.damage and not _is_image(file)]
    if not series:
        for file in unreadable:
            if file.path == path or is_dicom(file.path):
                raise ScanError(file.path, file.damage)
        nothing = "is a folder without DICOM slices (folders inside it are not searched)"
        raise ScanError(path, nothing if path.is_dir() else "is a DICOM file without an image")
    modalities = {name: _modality(images[0].header) for name, images in sorted(series.items())}
    listing = ", ".join(f"{name} ({kind}, {len(series[name])} files)" for name, kind in modalities.items())
    if series_uid is None:
        ct = [name for name, kind in modalities.items() if kind == "CT"]
        names = list(series) if any_modality or not ct else ct
        if len(names) > 1:
            reason = f"holds {len(series)} DICOM series; name one in a column `series_uid`: {listing}"
            raise ScanError(path, reason, f"name the series in a column series_uid, such as series_uid={min(names)}")
        series_uid = names[0]
    if series_uid not in series:
        raise ScanError(path, f"has no series {series_uid!r}; it holds {listing}", "correct series_uid")
    if not any_modality and modalities[series_uid] != "CT":
        remedy = "leave it out; if its values are HU all the same, write modality=any: `any` in a column `modality`"
        raise ScanError(path, f"is of modality {modalities[series_uid]}, not CT", remedy)
    patterns = {_pattern(file.path) for file in series[series_uid]}
    for file in unreadable:
        if file.path.suffix.lower() in _SUFFIXES or _pattern(file.path) in patterns:
            raise ScanError(file.path, file.damage, "copy it again; remove it if it is no slice of the series")
    for file in series[series_uid]:
        if file.damage:
            raise ScanError(file.path, file.damage, "copy it again")
    return series[series_uid]


def series_files(folder: Path, series_uid: str) -> list[Path]:
    """The files of a series in the order of their names, damaged ones too."""
    return [file.path for file in _files_at(folder) if _is_image(file) and file.series_uid == series_uid]


def _modality(header: Dataset) -> str:
    return text(header, "Modality") or ("CT" if header.get("SOPClassUID") in _CT_STORAGE else "(none given)")


def _pattern(path: Path) -> str:
    return re.sub(r"\d+", "#", path.name)


def _is_image(file: DicomFile) -> bool:
    """Whether it is a slice of a series, damaged or not."""
    return ("SeriesInstanceUID" if file.damage else "Rows") in file.header


def _files_at(path: Path) -> list[DicomFile]:
    """All files of a folder, or one file, each with what is wrong with it."""
    # macOS leaves a `._slice.dcm` beside each slice.
    files = [file for file in path.iterdir() if not file.name.startswith(".")] if path.is_dir() else [path]
    return [_read_header(file) for file in sorted(files) if not file.is_dir()]


def _read_header(path: Path) -> DicomFile:
    """A header with what is wrong with its voxels, none of which is read."""
    header = Dataset()
    try:
        with path.open("rb") as file:
            head = file.read(132)
            if not _starts_as_dicom(head):
                return DicomFile(path, header, "is no DICOM file" if head else "is empty (0 bytes)")
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
            kind = header.get("SOPClassUID", header.file_meta.get("MediaStorageSOPClassUID"))
            if kind is None and "Rows" not in header:
                return DicomFile(path, header, "is cut off, or no DICOM file")
            is_image = "Rows" in header or kind in _CT_STORAGE
            return DicomFile(path, header, _damage(file, header) if is_image else "")
    except OSError as error:
        return DicomFile(path, header, f"cannot be opened: {error.strerror}")
    except Exception as error:  # whatever pydicom makes of it
        return DicomFile(path, header, f"is damaged: {type(error).__name__}: {error}")


def _damage(file: BinaryIO, header: Dataset) -> str:
    """What is wrong with the pixel data of a file that is open at its beginning."""
    if header.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        return ""  # it was inflated as a whole, which fails for a truncated file
    implicit, little = header.original_encoding
    start = file.read(8 if implicit else 12)
    if start[:4] != (b"\xe0\x7f\x10\x00" if little else b"\x7f\xe0\x00\x10"):
        return "has no pixel data: it is cut off, or was saved without"
    length = int.from_bytes(start[-4:], "little" if little else "big")
    if length != 0xFFFFFFFF:
        frames = int(text(header, "NumberOfFrames") or 1)
        bits = frames * int(header.Rows) * int(header.Columns) * int(header.get("BitsAllocated", 16))
        needed = max(length, bits * int(header.get("SamplesPerPixel", 1)) // 8)
        missing = max(file.tell() + length - os.fstat(file.fileno()).st_size, needed - length)
        return f"is cut off: {missing} bytes of its pixel data are missing" if missing > 0 else ""
    while len(item := file.read(8)) == 8:
        if item[:4] == b"\xfe\xff\xdd\xe0":  # the end of a sequence of compressed frames
            return ""
        file.seek(int.from_bytes(item[4:], "little"), os.SEEK_CUR)
    return "is cut off: its pixel data has no end"


def text(dataset: Dataset, keyword: str) -> str:
    """The raw text of a tag without padding; empty if there is none."""
    if keyword not in dataset:
        return ""
    element = dataset.get_item(keyword)
    if isinstance(element.value, bytes) and element.VR not in ("FD", "FL"):
        return element.value.decode("latin-1").strip(" \0\r\n")
    value = dataset[keyword].value
    parts = [] if value is None else [value] if isinstance(value, str) else np.atleast_1d(value).tolist()
    return "\\".join(map(str, parts))


def numbers(dataset: Dataset, keyword: str, count: int, path: Path) -> FloatArray | None:
    """The numbers of a tag, None if it is absent or empty.

    Raises:
        ScanError: they are not as many, or no finite numbers.
    """
    if not (written := text(dataset, keyword)):
        return None
    try:
        values = np.array([float(part) for part in written.split("\\")])
    except ValueError:
        values = np.array([np.nan])
    if len(values) != count or not np.isfinite(values).all():
        expected = "a number" if count == 1 else f"{count} numbers"
        raise ScanError(path, f"has the {keyword} {written!r}, which is not {expected} (with a decimal point)")
    return values


def read_stored_values(file: Path, frames: Collection[int], scratch: Path) -> Iterator[Array]:
    """Stored values `(rows, columns)` of some frames of a file, before any rescale; MONOCHROME1 is not inverted.

    Args:
        file: a DICOM file.
        frames: indices, from 0.
        scratch: folder for temporary files that SimpleITK decompresses.

    Raises:
        ScanError: damaged, or an unsupported encoding.
    """
    whole = pydicom.dcmread(file, force=True)
    rows, columns, allocated, stored, high_bit, signed = (int(whole[keyword].value) for keyword in _STORED_AS)
    little, syntax = whole.original_encoding[1], whole.file_meta.get("TransferSyntaxUID")
    if allocated not in ((8, 16, 32) if little else (16, 32)) or not 0 < stored == high_bit + 1 <= allocated:
        raise ScanError(file, f"has {stored} bits stored of {allocated} allocated, which is not read")
    compressed = whole["PixelData"].is_undefined_length
    if not compressed and syntax not in _NATIVE:
        raise ScanError(file, f"is in the transfer syntax {syntax.name}, which is not read")
    dtype = np.dtype(f"{'<' if little else '>'}{'i' if signed else 'u'}{allocated // 8}")
    lowest, highest = (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
    for frame in frames:
        if compressed:
            values = _decompressed(whole, frame, scratch)
        else:
            values = np.frombuffer(whole.PixelData, dtype, rows * columns, frame * rows * columns * dtype.itemsize)
        if values.min() < lowest or values.max() > highest:
            value = values[(values < lowest) | (values > highest)][0]
            raise ScanError(file, f"has the stored value {value}, which does not fit its {stored} bits (BitsStored)")
        yield values.reshape(rows, columns)


def _decompressed(dataset: Dataset, frame: int, scratch: Path) -> Array:
    """One frame, decoded by SimpleITK from a file with that frame alone, without rescale and inversion."""
    plain = Dataset()
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    plain.SOPClassUID, plain.SOPInstanceUID = uid.CTImageStorage, uid.generate_uid()
    for keyword in _STORED_AS:
        setattr(plain, keyword, dataset[keyword].value)
    plain.SamplesPerPixel, plain.PhotometricInterpretation = 1, "MONOCHROME2"
    count = int(text(dataset, "NumberOfFrames") or 1)
    encoded = pydicom.encaps.get_frame(dataset.PixelData, frame, number_of_frames=count)
    plain.PixelData = pydicom.encaps.encapsulate([encoded])
    plain.save_as(scratch / "frame.dcm", enforce_file_format=True)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(scratch / "frame.dcm"))
    reader.SetImageIO("GDCMImageIO")
    reader.SetNumberOfThreads(1)
    return np.asarray(sitk.GetArrayFromImage(reader.Execute()))
