"""A CT from a NIfTI, NRRD or MetaImage file: what its header says of where the voxels lie, and the voxels.

A NIfTI header is read by nibabel and the voxels by hand. ITK is not asked: where a file says two things it takes one
without a word; it reads NaN as 0, fills what is cut off with zeros, and does not know NIfTI-2.

NRRD and MetaImage are read by ITK. What a header leaves out it fills with voxels of 1 mm, an origin of 0 and axes along
LPS; here such a file is refused.
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

from fmcib_ssl.data.geometry import RESAMPLE, ScanGeometry, check_geometry, numbers_text
from fmcib_ssl.types import Array, ScanError

#: Which of the two transforms of a NIfTI header is right, where they contradict each other.
Affine = Literal["sform", "qform"]
#: What can be read, for messages.
FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or DICOM (folder of slices, enhanced CT)"

_NIFTI = re.compile(r"\.(nii|hdr|img)(\.gz)?$", re.IGNORECASE)
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # metre, millimetre, micrometre; anything else counts as mm
#: Two statements about one voxel's place may differ by this much, mm: rounding.
_MAX_CONFLICT_MM = 0.1
#: Longest NRRD or MetaImage header that is looked at, bytes: fields of a Slicer segmentation may be long.
_MAX_HEADER = 1 << 20
_MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres")
#: Spaces of an NRRD that ITK brings to LPS, by the initials of their names.
_SPACES = ("lps", "ras", "las")
#: The parts of a MetaImage's geometry by all names that they have, the usual one first, and how many numbers each is.
_META_NAMES = {
    ("ElementSpacing", "ElementSize"): 3,
    ("Offset", "Position", "Origin"): 3,
    ("TransformMatrix", "Rotation", "Orientation"): 9,
}


def is_nifti(path: Path) -> bool:
    """Whether a file is read as NIfTI: by its name."""
    return _NIFTI.search(path.name) is not None


def open_nifti(path: Path, affine: Affine | None) -> tuple[ScanGeometry, Callable[[], Array]]:
    """Geometry of a NIfTI file, and what reads its values `(z, y, x)`, scaled; of a gzip file its checksum is tested.

    Args:
        path: the file.
        affine: which transform to take where the header's two contradict each other; None refuses such a file.

    Raises:
        ScanError: not a NIfTI file, cut off, not one volume, no geometry, or two that contradict each other; when its
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
        raise ScanError(path, f"cannot be read: its content is not what its name says; use {FORMATS}")
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
            file.seek(offset)
            data = file.read()  # to its end, where the checksum is
        if len(data) < count * dtype.itemsize:
            raise ScanError(path, f"is cut off: {len(data)} of {count * dtype.itemsize} bytes of voxels; copy it again")
        values: Array = np.frombuffer(data, dtype, count).reshape(size[::-1])
        slope, intercept = header.get_slope_inter()
        if slope is not None and (slope, intercept) != (1, 0):
            values = values.astype(np.float32)
            values *= np.float32(slope)
            values += np.float32(intercept)
        return values

    return geometry, read_values


def _check_length(path: Path, expected: int) -> None:
    """Refuse a file that is cut off, without unzipping one that is as long as expected."""
    with _opened(path) as file:
        raw = getattr(file, "fileobj", file)
        num_bytes = raw.seek(0, 2)
        if raw is not file:
            # The last four bytes of a gzip file are its uncompressed length; of one cut short they are noise, and of
            # several members they are the last one's: then only reading it tells.
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
    """Where the voxels of a NIfTI file lie, if its header says it, and says one thing only."""
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
    """Geometry of an NRRD or MetaImage file, and what decodes its values `(z, y, x)`.

    Raises:
        ScanError: not an image, 2D, 4D, colour, a header that leaves its geometry out; when decoded, damaged data.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetNumberOfThreads(1)
    image_io = sitk.ImageFileReader.GetImageIOFromFileName(str(path))
    # Before it is opened: reading VTK leaves the whole process in the locale "C".
    if image_io not in ("", "NrrdImageIO", "MetaImageIO"):
        name = image_io.removesuffix("ImageIO")
        raise ScanError(path, f"is a {name} file, whose geometry is not known to be right; use {FORMATS}")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ScanError(path, f"cannot be read: {shortened(error)}") from error
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
    return geometry, lambda: decoded(reader, path)


def _check_header(path: Path, *, is_nrrd: bool) -> None:
    """Refuse an NRRD or MetaImage file of which a part of the geometry is missing, or is not in mm."""
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


def decoded(reader: Any, path: Path) -> Array:
    """The voxels that a SimpleITK reader gives, `(z, y, x)`."""
    try:
        values: Array = sitk.GetArrayFromImage(reader.Execute())
    except (RuntimeError, MemoryError) as error:
        raise ScanError(path, f"cannot be decoded: {shortened(error)}") from error
    return values


def shortened(error: BaseException) -> str:
    """What SimpleITK has to say, in a sentence."""
    text = str(error).rsplit("ERROR: ", 1)[-1]
    if "Unable to determine ImageIO reader" in text:
        return f"its content is not what its name says, or not a format we read; use {FORMATS}"
    if "MetaImageIO" in text and "cannot be read" in text:
        return "it is cut off, or the file that holds its voxels is missing"
    if "orthonormal" in text:
        return f"its direction matrix is sheared (gantry tilt?), not a rotation; {RESAMPLE}"
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    last = re.sub(r"^(\[nrrd\] \w+: |\w+\(0x[0-9a-f]+\): )+", "", last).strip()
    return f"it is cut off ({last})" if re.match(r"expected \d+ bytes|fread got only", last) else last
