"""A CT from an NRRD or MetaImage file: decoded by ITK, and its geometry compared with what the header says.

What a header leaves out ITK fills with voxels of 1 mm, an origin of 0 and axes along LPS; here such a file is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from fmcib_ssl.data.geometry import ScanGeometry, check_agreement, checked_geometry, numbers_text
from fmcib_ssl.types import ScanError

#: What can be read, for messages.
FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or DICOM (folder of slices, enhanced CT)"
#: Longest header that is looked at, bytes: fields of a Slicer segmentation may be long.
_MAX_HEADER = 1 << 20
_NUMBER = re.compile(r"[-+]?(?:nan|inf|\d*\.?\d+(?:e[-+]?\d+)?)", re.IGNORECASE)
_MILLIMETRES = ("", "mm", "millimeter", "millimeters", "millimetre", "millimetres")
#: Signs that bring the axes of an NRRD's space to LPS.
_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
#: The names that MetaImage has for each part of the geometry; the first is the usual one.
_META_NAMES = {
    "spacing": ("ElementSpacing", "ElementSize"),
    "origin": ("Offset", "Position", "Origin"),
    "direction": ("TransformMatrix", "Rotation", "Orientation"),
}


def read_itk_header(path: Path) -> ScanGeometry:
    """Geometry of a file, without its voxels.

    Raises:
        ScanError: not an image, 2D, 4D, colour, a header that leaves its geometry out, or says another than ITK reads.
    """
    return _open(path)[1]


def read_itk_volume(path: Path, *, layered: bool = False) -> tuple[npt.NDArray[Any], ScanGeometry]:
    """Values of a file, `(z, y, x)`, and its geometry; `(z, y, x, layers)` if it has several values a voxel.

    Args:
        path: the file.
        layered: accept several values a voxel.

    Raises:
        ScanError: as `read_itk_header`, and for damaged data.
    """
    reader, geometry = _open(path, layered=layered)
    return decoded(reader, path), geometry


def _open(path: Path, *, layered: bool = False) -> tuple[Any, ScanGeometry]:
    """A reader that stands before the voxels of a file, and the file's geometry."""
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
    axes = np.reshape(reader.GetDirection(), (3, 3))
    geometry = checked_geometry(path, size, reader.GetSpacing(), reader.GetOrigin(), axes)
    if image_io != "GDCMImageIO":
        stated = _nrrd_geometry(path, size) if image_io == "NrrdImageIO" else _meta_geometry(path, size)
        check_agreement(path, {"header": stated, "geometry as ITK reads it": geometry}, "; save it anew")
    return reader, geometry


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


def _nrrd_geometry(path: Path, size: Any) -> ScanGeometry:
    fields = header_fields(path)
    missing = [name for name in ("space", "space directions", "space origin") if name not in fields]
    if missing:
        raise ScanError(path, f"has no geometry: its header lacks {_quoted(missing)}; save it with them")
    if (space := fields["space"].lower()) not in _SPACES:
        raise ScanError(
            path,
            f"has the space {fields['space']!r}, which does not say left from right; save it as {next(iter(_SPACES))}",
        )
    _require_millimetres(path, "space units", re.findall(r'"([^"]*)"', fields.get("space units", "")))
    columns = [_numbers(vector) for vector in re.findall(r"\(([^)]*)\)", fields["space directions"])]
    origin = _numbers(fields["space origin"])
    if [len(vector) for vector in (*columns, origin)] != [3] * 4:
        raise ScanError(path, f"has the space directions {fields['space directions']!r}, not three of three numbers")
    signs = np.array(_SPACES[space])
    matrix = np.eye(4)
    matrix[:3] = (np.array([*columns, origin]) * signs).T
    return ScanGeometry.of(size, matrix)


def _meta_geometry(path: Path, size: Any) -> ScanGeometry:
    fields = header_fields(path)
    parts = {}
    for part, names in _META_NAMES.items():
        given = [fields[name.lower()] for name in names if name.lower() in fields]
        parts[part] = _numbers(given[0]) if given else []
    missing = [_META_NAMES[part][0] for part, numbers in parts.items() if not numbers]
    if missing:
        raise ScanError(path, f"has no geometry: its header lacks {_quoted(missing)}; add what is right")
    _require_millimetres(path, "DistanceUnits", [fields.get("distanceunits", "")])
    if [len(numbers) for numbers in parts.values()] != [3, 3, 9]:
        raise ScanError(path, f"has the geometry {', '.join(map(numbers_text, parts.values()))} in its header")
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(parts["direction"], (3, 3)).T * parts["spacing"]
    matrix[:3, 3] = parts["origin"]
    return ScanGeometry.of(size, matrix)


def _require_millimetres(path: Path, field: str, units: list[str]) -> None:
    if other := [unit for unit in units if unit.strip().lower() not in _MILLIMETRES]:
        raise ScanError(path, f"is in {other[0]!r} ({field}), not in mm; save it in mm")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


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
        return (
            "its direction matrix is sheared (gantry tilt?), not a rotation; resample it to a rectangular volume first"
        )
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    last = re.sub(r"^(\[nrrd\] \w+: |\w+\(0x[0-9a-f]+\): )+", "", last).strip()
    return f"it is cut off ({last})" if re.match(r"expected \d+ bytes|fread got only", last) else last
