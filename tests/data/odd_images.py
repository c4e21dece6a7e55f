"""CT files as hospitals and converters write them, odd ones included, and where their voxels are by plain arithmetic.

Written by nibabel, or byte by byte; never by what reads them in the package.
"""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

#: Directions of the scans whose axes are the patient's, in any order and sense.
AXIS_ORIENTATIONS = [
    np.eye(3)[:, list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
SIZE = (20, 24, 16)  # i, j, k
#: From indices i, j, k to RAS mm: voxels of 0.8 x 0.9 x 2.5 mm, turned by 10 degrees about z.
AFFINE_RAS = np.array([[0.787846, -0.156283, 0, -30], [0.138919, 0.886327, 0, 45], [0, 0, 2.5, -120], [0, 0, 0, 1.0]])
MARK = (6, 15, 9)
MARK_HU = 1500


def chest(size: tuple[int, int, int] = SIZE, dtype: Any = np.int16) -> np.ndarray:
    """HU `(i, j, k)`: air round a body of fat and soft tissue with a lung and a spine, noise, and one voxel marked."""
    rng = np.random.default_rng(0)
    i, j, k = np.indices(size)
    radius = np.hypot((i / (size[0] - 1) - 0.5) * 2, (j / (size[1] - 1) - 0.5) * 2)
    hu = np.select([radius < 0.25, radius < 0.6, radius < 0.75, radius < 0.9], [-850, 40, 50, -100], -1000)
    hu = np.where((radius >= 0.5) & (radius < 0.75) & (i > size[0] * 0.8), 400, hu) + 0 * k
    hu = (hu + rng.normal(0, 12, size)).round()
    hu[MARK] = MARK_HU
    return np.maximum(hu, -1024).astype(dtype)


def moved(affine: np.ndarray, x: float = 0.0, shear: float = 0.0, z: float = 1.0) -> np.ndarray:
    """An affine shifted along x by mm, sheared as by gantry tilt, or with other slices."""
    matrix = affine.copy()
    matrix[0, 3] += x
    matrix[1, 2] += shear * matrix[2, 2]
    matrix[2, 2] *= z
    return matrix


def write_nifti(
    path: Path,
    voxels: np.ndarray | None = None,
    sform: tuple[np.ndarray, int] | None = (AFFINE_RAS, 1),
    qform: tuple[np.ndarray, int] | None = (AFFINE_RAS, 1),
    fields: dict[str, Any] | None = None,
    header_class: Any = nibabel.Nifti1Header,
) -> Path:
    """A NIfTI file that says just this.

    Each transform is a matrix and a code, or None; `fields` overrides single fields of the header, wrong ones too.
    """
    voxels = chest() if voxels is None else voxels
    header = header_class()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    for matrix, _ in filter(None, (sform, qform)):
        header["pixdim"][1:4] = np.linalg.norm(matrix[:3, :3], axis=0)
    header.set_sform(*(sform or (None, 0)))
    header.set_qform(*(qform or (None, 0)))
    header["vox_offset"] = header["sizeof_hdr"] + 4
    for name, value in (fields or {}).items():
        header[name] = value
    data = (
        header.binaryblock + bytes(4) + voxels.astype(voxels.dtype.newbyteorder(header.endianness)).tobytes(order="F")
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


NRRD_GEOMETRY = {
    "space": "left-posterior-superior",
    "space directions": "(-0.787846,-0.138919,0) (0.156283,-0.886327,0) (0,0,2.5)",
    "space origin": "(30,-45,-120)",
}


def write_nrrd(
    path: Path, voxels: np.ndarray | None = None, keys: dict[str, str] | None = None, **fields: str | None
) -> Path:
    """An NRRD file at the place of `AFFINE_RAS`; a field that is None is left out, `_` stands for a blank."""
    voxels = chest() if voxels is None else voxels
    names = {np.dtype(np.int16): "short", np.dtype(np.uint8): "uchar", np.dtype(np.float32): "float"}
    header: dict[str, str | None] = {
        "type": names[voxels.dtype],
        "dimension": str(voxels.ndim),
        "sizes": " ".join(map(str, voxels.shape)),
        "endian": "little",
        "encoding": "raw",
        **NRRD_GEOMETRY,
        **{name.replace("_", " "): value for name, value in fields.items()},
    }
    lines = ["NRRD0004", *(f"{name}: {value}" for name, value in header.items() if value is not None)]
    lines += [f"{key}:={value}" for key, value in (keys or {}).items()]
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + voxels.tobytes(order="F"))
    return path


META_GEOMETRY = {
    "TransformMatrix": "-0.984808 -0.173648 0 0.173648 -0.984808 0 0 0 1",
    "Offset": "30 -45 -120",
    "ElementSpacing": "0.8 0.9 2.5",
}


def write_mhd(path: Path, voxels: np.ndarray | None = None, **fields: str | None) -> Path:
    """A MetaImage file and its voxels at the place of `AFFINE_RAS`; a field that is None is left out."""
    voxels = chest() if voxels is None else voxels
    header: dict[str, str | None] = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        **META_GEOMETRY,
        "DimSize": " ".join(map(str, voxels.shape)),
        "ElementType": "MET_SHORT",
        **fields,
        "ElementDataFile": path.with_suffix(".raw").name,
    }
    path.write_text("\n".join(f"{name} = {value}" for name, value in header.items() if value is not None) + "\n")
    path.with_suffix(".raw").write_bytes(voxels.tobytes(order="F"))
    return path
