"""A CT from a NIfTI file: what its header says of where the voxels lie, and the voxels.

The header is read by nibabel and the voxels by hand. ITK is not asked: where a file says two things it takes one
without a word; it reads NaN as 0, fills what is cut off with zeros, and does not know NIfTI-2.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from fmcib_ssl.data.geometry import ScanGeometry, check_agreement, check_geometry, numbers_text
from fmcib_ssl.data.itk import FORMATS
from fmcib_ssl.types import ScanError

#: Which of the two transforms of a NIfTI header is right, where they contradict each other.
Affine = Literal["sform", "qform"]

_NAME = re.compile(r"\.(nii|hdr|img)(\.gz)?$", re.IGNORECASE)
_ANALYZE_SIZES = (b"\x5c\x01\0\0", b"\0\0\x01\x5c")  # the first field of Analyze and of NIfTI-1: 348
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # metre, millimetre, micrometre; anything else counts as mm
_CHUNK_BYTES = 1 << 22


def is_nifti(path: Path) -> bool:
    """Whether a file is read as NIfTI: by its name."""
    return _NAME.search(path.name) is not None


def header_and_voxels(path: Path) -> tuple[Path, Path]:
    """The file that holds the header, and the one that holds the voxels: the same but for a pair."""

    def other(extension: str) -> Path:
        return path.with_name(re.sub(r"(hdr|img)((\.gz)?)$", rf"{extension}\2", path.name, flags=re.IGNORECASE))

    return (other("hdr"), path) if re.search(r"\.img(\.gz)?$", path.name, re.IGNORECASE) else (path, other("img"))


def open_nifti(path: Path, affine: Affine | None) -> tuple[ScanGeometry, Callable[[], npt.NDArray[Any]]]:
    """Geometry of a NIfTI file, and what reads its values `(z, y, x)`, scaled; of a gzip file its checksum is tested.

    Args:
        path: the file; of a pair either of the two.
        affine: which transform to take where the header's two contradict each other; None refuses such a file.

    Raises:
        ScanError: not a NIfTI file, cut off, not one volume, no geometry, or two that contradict each other; when its
            values are read, damaged data.
    """
    header_file, voxel_file = header_and_voxels(path)
    with _opened(header_file) as file:
        head = file.read(544)
    if Nifti1Header.may_contain_header(head):
        header, paired = Nifti1Header(head[:348], check=False), head[344:347] == b"ni1"
    elif Nifti2Header.may_contain_header(head):
        header, paired = Nifti2Header(head[:540], check=False), head[4:7] == b"ni2"
    elif head[:4] in _ANALYZE_SIZES:
        raise ScanError(path, "is an Analyze 7.5 file, which does not say left from right; convert it to NIfTI")
    else:
        raise ScanError(path, f"cannot be read: its content is not what its name says; use {FORMATS}")
    size = tuple(int(n) for n in header.get_data_shape())
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if len(size) != 3 or min(size) < 2:
        kind = "2D" if len(size) <= 3 else f"{len(size)}D"
        raise ScanError(path, f"is a {kind} image of size {size}, not a volume")
    if header.get_data_dtype().kind not in "iuf":
        raise ScanError(path, "has several values a voxel (colour or complex numbers), not one HU value")
    voxel_file, offset = voxel_file if paired else header_file, int(header["vox_offset"])
    if not paired:
        offset = max(offset, int(header["sizeof_hdr"]) + 4)
    geometry = _geometry(path, header, size, affine)
    needed = offset + int(np.prod(size, dtype=np.int64)) * header.get_data_dtype().itemsize
    if (num_bytes := _num_bytes(voxel_file, needed)) < needed:
        raise ScanError(path, f"is cut off: {num_bytes} of {needed} bytes; copy it again")
    return geometry, lambda: _read_values(path, voxel_file, offset, header, size)


def _num_bytes(path: Path, expected: int) -> int:
    """Bytes of a file when unzipped, without unzipping one that is as long as expected."""
    with _opened(path) as file:
        raw = getattr(file, "fileobj", file)
        length: int = raw.seek(0, 2)
        if raw is file:
            return length
        # The last four bytes of a gzip file are its uncompressed length; of one cut short they are noise, and of
        # several members they are the last one's: then only reading it tells.
        raw.seek(-4, 2)
        is_expected = int.from_bytes(raw.read(4), "little") == expected % 2**32
        raw.seek(0)
        return expected if is_expected else sum(map(len, iter(lambda: file.read(_CHUNK_BYTES), b"")))


def _read_values(path: Path, file: Path, offset: int, header: Any, size: tuple[int, ...]) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = np.empty(size[::-1], header.get_data_dtype())
    buffer, filled = values.reshape(-1).view(np.uint8), 0
    with _opened(file) as stream:
        stream.read(offset)
        while num_read := stream.readinto(buffer[filled : filled + _CHUNK_BYTES]):
            filled += num_read
        while stream.read(_CHUNK_BYTES):  # to its end, where the checksum is
            pass
    if filled < len(buffer):
        raise ScanError(path, f"is cut off: {filled} of {len(buffer)} bytes of voxels; copy it again")
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1, 0):
        values = values.astype(np.float32)
        values *= np.float32(slope)
        values += np.float32(intercept)
    return values


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file, unzipped if its content (whatever its name) is gzip's."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if zipped else file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(path, f"is cut off or damaged ({error}); copy it again") from error
    except OSError as error:
        raise ScanError(path, f"cannot be opened: {error.strerror or error}") from error


def _geometry(path: Path, header: Any, size: tuple[int, ...], affine: Affine | None) -> ScanGeometry:
    """Where the voxels lie, if the header says it, and says one thing only."""
    transforms = {}
    if header["sform_code"] > 0:
        transforms["sform"] = header.get_sform()
    if header["qform_code"] > 0 and affine != "sform":
        if header["pixdim"][0] not in (-1, 1):
            header["pixdim"][0] = 1  # the sense of the slices: the standard takes anything else as 1
        transforms["qform"] = header.get_qform()
    if not transforms:
        reason = "has no geometry: the codes of its sform and its qform are 0, so nothing says how the patient lies"
        raise ScanError(path, f"{reason} in it; convert the scan from DICOM again")
    if affine is not None and affine not in transforms:
        raise ScanError(path, f"has no {affine} (its code is 0), which the column `affine` asks for")
    mm = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    remedy = f"; convert it again, or say in a column `affine` of the table which is right: {' or '.join(transforms)}"
    voxel_mm = np.abs(header["pixdim"][1:4].astype(np.float64)) * mm
    if affine is None and not (np.isfinite(voxel_mm) & (voxel_mm > 0)).all():
        raise ScanError(path, f"has no geometry: pixdim says voxels of {numbers_text(voxel_mm, ' x ')} mm{remedy}")
    to_lps = np.diag([-mm, -mm, mm, 1])
    stated = {name: ScanGeometry.from_affine(size, to_lps @ matrix) for name, matrix in transforms.items()}
    if "sform" in stated and abs(np.linalg.det(np.nan_to_num(stated["sform"].direction))) > 1e-3:
        check_geometry(path, stated["sform"])  # a sheared one is refused, whatever stands beside it
    geometry = check_geometry(path, stated[affine or ("sform" if "sform" in stated else "qform")])
    if affine is None and "sform" in stated:
        if "qform" not in stated:  # whose voxel size it is
            stated["voxel size (pixdim)"] = replace(geometry, spacing_mm_xyz=tuple(voxel_mm.tolist()))
        check_agreement(path, stated, remedy)
    return geometry
