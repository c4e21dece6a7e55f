"""A CT from an NRRD or MetaImage file: decoded by ITK, and its geometry compared with what the header says.

What a header leaves out ITK fills with voxels of 1 mm, an origin of 0 and axes along LPS; here such a file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from fmcib_ssl.data.geometry import RESAMPLE, ScanGeometry, check_agreement, check_geometry, numbers_text
from fmcib_ssl.types import ScanError

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
