"""A CT from a NIfTI, NRRD or MetaImage file: what its header says of where the voxels lie, and the voxels.

A NIfTI header is read by nibabel and the voxels by hand. ITK is not asked: where a file says two things it takes one
without a word; it reads NaN as 0, fills what is cut off with zeros, and does not know NIfTI-2.

NRRD and MetaImage are decoded by ITK, and their geometry compared with what the header says. What a header leaves out
ITK fills with voxels of 1 mm, an origin of 0 and axes along LPS; here such a file is refused.
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
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from fmcib_ssl.data.geometry import RESAMPLE, ScanGeometry, check_agreement, check_geometry, numbers_text
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


#: What can be read, for messages.
FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or DICOM (folder of slices, enhanced CT)"
#: Longest header that is looked at, bytes: fields of a Slicer segmentation may be long.
_MAX_HEADER = 1 << 20
_NUMBER = re.compile(r"[-+]?(?:nan|inf|\d*\.?\d+(?:e[-+]?\d+)?)", re.IGNORECASE)
_MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres")
#: Signs that bring the axes of an NRRD's space, by the initials of its name, to LPS.
_SPACES = {"lps": (1, 1, 1), "ras": (-1, -1, 1), "las": (1, -1, 1)}
#: The names that a header has for each part of the geometry; the first is the usual one.
_NRRD_NAMES = (("space",), ("space directions",), ("space origin",))
_META_NAMES = (
    ("ElementSpacing", "ElementSize"),
    ("Offset", "Position", "Origin"),
    ("TransformMatrix", "Rotation", "Orientation"),
)


def open_itk(path: Path, *, layered: bool = False) -> tuple[ScanGeometry, Callable[[], npt.NDArray[Any]]]:
    """Geometry of a file, and what decodes its values `(z, y, x)`; `(z, y, x, layers)` of several values a voxel.

    Args:
        path: the file; DICOM too, to say what it is.
        layered: accept several values a voxel.

    Raises:
        ScanError: not an image, 2D, 4D, colour, a header that leaves its geometry out, or says another than ITK reads;
            when decoded, damaged data.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetNumberOfThreads(1)
    image_io = sitk.ImageFileReader.GetImageIOFromFileName(str(path))
    # Before it is opened: reading VTK leaves the whole process in the locale "C".
    if image_io not in ("", "NrrdImageIO", "MetaImageIO", "GDCMImageIO"):
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
    if (components := reader.GetNumberOfComponents()) != 1 and not layered:
        raise ScanError(path, f"has {components} values a voxel (colour or vectors), not one HU value")
    direction = np.reshape(reader.GetDirection(), (3, 3))
    geometry = check_geometry(path, ScanGeometry.of(size, reader.GetSpacing(), reader.GetOrigin(), direction))
    if image_io != "GDCMImageIO":
        stated = _stated_geometry(path, size, is_nrrd=image_io == "NrrdImageIO")
        check_agreement(path, {"header": stated, "geometry as ITK reads it": geometry}, "; save it anew")
    return geometry, lambda: decoded(reader, path)


def header_fields(path: Path) -> dict[str, str]:
    """What the text header of an NRRD or a MetaImage file says, under names in lower case."""
    with path.open("rb") as file:
        head = file.read(_MAX_HEADER)
    if head.startswith(b"NRRD"):
        text = re.split(rb"\r?\n\r?\n", head, maxsplit=1)[0]
        lines = re.findall(rb"^([^#:\r\n]+):=? ?([^\r\n]*)", text, re.MULTILINE)
    else:
        text = re.split(rb"^ElementDataFile", head, maxsplit=1, flags=re.MULTILINE)[0]
        lines = re.findall(rb"^([^=\r\n]+)=([^\r\n]*)", text, re.MULTILINE)
    return {key.decode("latin-1").strip().lower(): value.decode("utf-8", "replace").strip() for key, value in lines}


def _stated_geometry(path: Path, size: Any, *, is_nrrd: bool) -> ScanGeometry:
    """The geometry in the header's own words.

    Raises:
        ScanError: a part of it is missing, is not what it should be, or is not in mm.
    """
    fields, parts, missing = header_fields(path), [], []
    for names in _NRRD_NAMES if is_nrrd else _META_NAMES:
        given = [fields[name.lower()] for name in names if name.lower() in fields]
        parts.append(given[0] if given else "")
        if not given or not (is_nrrd or _numbers(given[0])):
            missing.append(f"`{names[0]}`")
    if missing:
        raise ScanError(path, f"has no geometry: its header lacks {', '.join(missing)}; save it with what is right")
    space = "".join(word[0] for word in parts[0].split("-")).lower() if "-" in parts[0] else parts[0].lower()
    if is_nrrd and space not in _SPACES:
        reason = f"has the space {parts[0]!r}, which does not say left from right"
        raise ScanError(path, f"{reason}; save it as left-posterior-superior")
    field = "space units" if is_nrrd else "DistanceUnits"
    for unit in re.findall(r'[^"]*[^"\s][^"]*', fields.get(field.lower(), "")):
        if unit.strip().lower() not in _MILLIMETRES:
            raise ScanError(path, f"is in {unit!r} ({field}), not in mm; save it in mm")
    if is_nrrd:
        columns = [_numbers(vector) for vector in re.findall(r"\(([^)]*)\)", parts[1])]
        origin = _numbers(parts[2])
        if [len(vector) for vector in (*columns, origin)] != [3] * 4:
            raise ScanError(path, f"has the space directions {parts[1]!r}, not three of three numbers")
        return ScanGeometry.from_affine(size, (np.array([*columns, origin]) * _SPACES[space]).T)
    spacing, origin, direction = map(_numbers, parts)
    if (len(spacing), len(origin), len(direction)) != (3, 3, 9):
        raise ScanError(path, f"has the geometry {', '.join(map(numbers_text, (spacing, origin, direction)))}")
    return ScanGeometry.from_affine(size, np.c_[np.reshape(direction, (3, 3)).T * spacing, origin])


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def decoded(reader: Any, path: Path) -> npt.NDArray[Any]:
    """The voxels that a SimpleITK reader gives, `(z, y, x)`."""
    try:
        values: npt.NDArray[Any] = sitk.GetArrayFromImage(reader.Execute())
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
