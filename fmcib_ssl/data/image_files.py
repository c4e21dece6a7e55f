"""A CT from a NIfTI, NRRD or MetaImage file: its geometry and its voxels.

A NIfTI header is read by nibabel and the voxels by hand, not by ITK: of contradicting transforms ITK silently takes
one, it reads NaN as 0, fills truncated data with zeros, and does not support NIfTI-2.

NRRD and MetaImage are read by ITK. For missing fields ITK assumes voxels of 1 mm, an origin of 0 and axes along LPS;
such files are refused here.
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
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from fmcib_ssl.data.geometry import ScanGeometry, check_geometry, numbers_text
from fmcib_ssl.types import Array, ScanError

#: Which transform of a NIfTI header to use if its two contradict each other.
Affine = Literal["sform", "qform"]
#: Supported formats, for messages.
_FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or DICOM (folder of slices, enhanced CT)"

_NIFTI = re.compile(r"\.(nii|hdr|img)(\.gz)?$", re.IGNORECASE)
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # metre, millimetre, micrometre; anything else counts as mm
#: Two transforms may put a corner voxel this far apart, mm: rounding.
_MAX_CONFLICT_MM = 0.1
#: Longest NRRD or MetaImage header that is read, bytes: fields of a Slicer segmentation may be long.
_MAX_HEADER = 1 << 20
_MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres")
#: NRRD spaces that ITK converts to LPS, by the initials of their names.
_SPACES = ("lps", "ras", "las")
#: Fields of a MetaImage's geometry with their aliases, the usual name first, and how many numbers each has.
_META_NAMES = {
    ("ElementSpacing", "ElementSize"): 3,
    ("Offset", "Position", "Origin"): 3,
    ("TransformMatrix", "Rotation", "Orientation"): 9,
}


def is_nifti(path: Path) -> bool:
    """Whether a file is read as NIfTI: by its name."""
    return _NIFTI.search(path.name) is not None


def open_nifti(path: Path, affine: Affine | None) -> tuple[ScanGeometry, Callable[[], Array]]:
    """Geometry of a NIfTI file, and a function that reads its scaled values `(z, y, x)` and checks a gzip checksum.

    Args:
        path: the file.
        affine: which transform to use if the header's two contradict each other; None refuses such a file.

    Raises:
        ScanError: not a NIfTI file, truncated, not one volume, no geometry, or two that contradict each other; when the
            values are read, damaged data.
    """
    if ".nii" not in path.name.lower():
        raise ScanError(
            path, "is one of a pair of files (Analyze 7.5, or NIfTI's .hdr with .img); convert it to .nii.gz"
        )
    with _opened(path) as file:
        head = file.read(540)
    if Nifti1Header.may_contain_header(head):
        header = Nifti1Header(head[:348], check=False)
    elif Nifti2Header.may_contain_header(head):
        header = Nifti2Header(head, check=False)
    else:
        raise ScanError(path, f"cannot be read: its content is not what its name says; use {_FORMATS}")
    size = tuple(int(n) for n in header.get_data_shape())
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if len(size) != 3 or min(size) < 2:
        kind = "2D" if len(size) <= 3 else f"{len(size)}D"
        raise ScanError(path, f"is a {kind} image of size {size}, not a volume")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ScanError(path, "has several values a voxel (colour or complex numbers), not one HU value")
    geometry = _geometry(path, header, size, affine)
    offset = max(int(header["vox_offset"]), int(header["sizeof_hdr"]) + 4)
    count = int(np.prod(size, dtype=np.int64))
    _check_length(path, offset + count * dtype.itemsize)

    def read_values() -> Array:
        with _opened(path) as file:
            # At once: `GzipFile.read` takes up to 1.5 times the CPU and memory.
            data = gzip.decompress(path.read_bytes()) if isinstance(file, gzip.GzipFile) else file.read()
        if (num_bytes := len(data) - offset) < count * dtype.itemsize:
            raise ScanError(path, f"is cut off: {num_bytes} of {count * dtype.itemsize} bytes of voxels; copy it again")
        values: Array = np.frombuffer(data, dtype, count, offset).reshape(size[::-1])
        slope, intercept = header.get_slope_inter()
        if slope is not None and (slope, intercept) != (1, 0):
            values = values.astype(np.float32)
            values *= np.float32(slope)
            values += np.float32(intercept)
        return values

    return geometry, read_values


def _check_length(path: Path, expected: int) -> None:
    """Refuse a truncated file, without unzipping one that has the expected length."""
    with _opened(path) as file:
        raw = getattr(file, "fileobj", file)
        num_bytes = raw.seek(0, 2)
        if raw is not file:
            # The last four bytes of a gzip file are its uncompressed length. In a truncated file they are noise, with
            # several members they are the last one's length: then the whole file has to be read.
            raw.seek(-4, 2)
            num_bytes = int.from_bytes(raw.read(4), "little")
            if num_bytes == expected % 2**32:
                return
            raw.seek(0)
            num_bytes = sum(map(len, iter(lambda: file.read(1 << 22), b"")))
    if num_bytes < expected:
        raise ScanError(path, f"is cut off: {num_bytes} of {expected} bytes; copy it again")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file, unzipped if its content is gzip, regardless of its name."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if zipped else file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(path, f"is cut off or damaged ({error}); copy it again") from error


def _geometry(path: Path, header: Any, size: tuple[int, ...], affine: Affine | None) -> ScanGeometry:
    """The geometry of a NIfTI file, if its header has one and does not contradict itself."""
    transforms = {}
    if header["sform_code"] > 0:
        transforms["sform"] = header.get_sform()
    if header["qform_code"] > 0 and affine != "sform":
        if header["pixdim"][0] not in (-1, 1):
            header["pixdim"][0] = 1  # direction of the slices: by the standard any other value means 1
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
        check_geometry(path, stated["sform"])  # a sheared sform is refused even beside a valid qform
    geometry = check_geometry(path, stated[affine or ("sform" if "sform" in stated else "qform")])
    if affine is None and "sform" in stated:
        if "qform" not in stated:  # its voxel size is pixdim
            stated["voxel size (pixdim)"] = replace(geometry, spacing_mm_xyz=tuple(voxel_mm.tolist()))
        (one, first), (other, second) = stated.items()
        distance_mm = np.linalg.norm(first.corners_lps_mm() - second.corners_lps_mm(), axis=1).max()
        if not distance_mm <= _MAX_CONFLICT_MM:
            texts = (
                f"{name}: voxels of {numbers_text(g.spacing_mm_xyz, ' x ')} mm, the first at "
                f"({numbers_text(g.origin_lps_mm)}), the last at ({numbers_text(g.corners_lps_mm()[-1])}) LPS mm"
                for name, g in stated.items()
            )
            reason = f"its {one} and {other} are up to {distance_mm:.1f} mm apart ({'; '.join(texts)})"
            raise ScanError(path, reason + remedy)
    return geometry


def open_itk(path: Path) -> tuple[ScanGeometry, Callable[[], Array]]:
    """Geometry of an NRRD or MetaImage file, and a function that decodes its values `(z, y, x)`.

    Raises:
        ScanError: not an image, 2D, 4D, colour, a header without a complete geometry; when decoded, damaged data.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetNumberOfThreads(1)
    image_io = sitk.ImageFileReader.GetImageIOFromFileName(str(path))
    # Before it is opened: reading VTK leaves the whole process in the locale "C".
    if image_io not in ("", "NrrdImageIO", "MetaImageIO"):
        name = image_io.removesuffix("ImageIO")
        raise ScanError(path, f"is a {name} file, whose geometry is not known to be right; use {_FORMATS}")
    reader.ReadImageInformation()
    size = reader.GetSize()
    if len(size) != 3 or min(size) < 2:
        hint = "; for DICOM name the folder of the series, not one slice" if len(size) == 3 else ""
        kind = "2D" if len(size) == 2 or min(size) < 2 else f"{len(size)}D"
        raise ScanError(path, f"is a {kind} image of size {size}, not a volume{hint}")
    if (components := reader.GetNumberOfComponents()) != 1:
        raise ScanError(path, f"has {components} values a voxel (colour, vectors, overlapping segments), not one")
    _check_header(path, is_nrrd=image_io == "NrrdImageIO")
    direction = np.reshape(reader.GetDirection(), (3, 3))
    geometry = check_geometry(path, ScanGeometry.of(size, reader.GetSpacing(), reader.GetOrigin(), direction))
    return geometry, lambda: sitk.GetArrayFromImage(reader.Execute())


def _check_header(path: Path, *, is_nrrd: bool) -> None:
    """Refuse an NRRD or MetaImage file whose geometry is incomplete or not in mm."""
    with path.open("rb") as file:
        head = file.read(_MAX_HEADER)
    if is_nrrd:
        text = re.split(rb"\r?\n\r?\n", head, maxsplit=1)[0]
        lines = re.findall(rb"^([^#:\r\n]+):=? ?([^\r\n]*)", text, re.MULTILINE)
    else:
        text = re.split(rb"^ElementDataFile", head, maxsplit=1, flags=re.MULTILINE)[0]
        lines = re.findall(rb"^([^=\r\n]+)=([^\r\n]*)", text, re.MULTILINE)
    fields = {key.decode("latin-1").strip().lower(): value.decode("utf-8", "replace").strip() for key, value in lines}
    if is_nrrd:
        missing = [name for name in ("space", "space directions", "space origin") if name not in fields]
    else:
        counts = {names: [len(fields.get(name.lower(), "").split()) for name in names] for names in _META_NAMES}
        missing = [names[0] for names, count in _META_NAMES.items() if count not in counts[names]]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise ScanError(path, f"has no geometry: its header lacks {names}; save it with what is right")
    space = fields.get("space", "lps").lower()
    if ("".join(word[0] for word in space.split("-")) if "-" in space else space) not in _SPACES:
        reason = f"has the space {space!r}, which does not say left from right"
        raise ScanError(path, f"{reason}; save it as left-posterior-superior")
    field = "space units" if is_nrrd else "DistanceUnits"
    for unit in re.findall(r'[^"]*[^"\s][^"]*', fields.get(field.lower(), "")):
        if unit.strip().lower() not in _MILLIMETRES:
            raise ScanError(path, f"is in {unit!r} ({field}), not in mm; save it in mm")


@contextmanager
def rejecting(path: Path) -> Iterator[None]:
    """Any error of a library becomes a rejection of this file."""
    name = str(path)[:200]
    try:
        yield
    except (ScanError, ImportError):
        raise
    except MemoryError as error:
        raise ScanError(name, "needs more memory than there is", "read it on a larger machine") from error
    except OSError as error:
        raise ScanError(name, f"cannot be opened: {error.strerror or error}") from error
    except Exception as error:
        raise ScanError(name, f"cannot be read ({type(error).__name__}: {_shortened(error)})") from error


def _shortened(error: Exception) -> str:
    """An error in one sentence; those of SimpleITK span many lines."""
    text = str(error).rsplit("ERROR: ", 1)[-1].strip()
    if "Unable to determine ImageIO reader" in text:
        return f"its content is not what its name says, or not a format we read; use {_FORMATS}"
    last = re.sub(r"^(\[nrrd\] \w+: |\w+\(0x[0-9a-f]+\): )+", "", text.splitlines()[-1] if text else "").strip()
    cut_off = re.match(r"expected \d+ bytes|fread got only", last) or "MetaImageIO" in text
    return f"it is cut off ({last})" if cut_off else last
