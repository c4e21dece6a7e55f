"""Published data sets, converted to the table that this package reads: `image_path`, a point in LPS mm, labels.

Of tables paths become relative to the folder of the data set (`image_root`). Columns that number the authors' rows or
repeat the geometry are dropped, all others are kept.

MedMNIST's volumes are 8-bit grey values, so HU come back only as far as the window of the data set is known; `DATASETS`
says which is taken, docs/medmnist.md why. Source: Yang et al., MedMNIST v2, Scientific Data 10, 41, 2023,
doi:10.1038/s41597-022-01721-8.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk
from tqdm import tqdm

from fmcib_ssl.data.annotations import COORDINATE_COLUMNS, CROPPED_COLUMN, MASK_COLUMN, PATH_COLUMN
from fmcib_ssl.data.geometry import FloatArray
from fmcib_ssl.data.tables import AnnotationsError, read_table, require_columns
from fmcib_ssl.io import write_atomically
from fmcib_ssl.types import Array

_logger = logging.getLogger(__name__)

#: A crop is suspect if its mask, as a ball, is this many times as wide as the nodule's stated diameter.
_SUSPECT_RATIO = 2.0

#: How tables are recognised: a column and a pattern of its first cell; the first match counts.
_LOOKS_LIKE = (
    ("deeplesion", "File_name", r"^\d{6}_\d\d_\d\d_\d+\.png$"),
    ("deeplesion", "Volume_fn", r"^\d{6}_\d\d_\d\d_\d+-\d+\.nii"),
    ("lidc_crops", "file", r"^LIDC-IDRI-\d+_R_\d+\.nii"),
    ("lung1", "PatientID", r"^LUNG1-\d+$"),
    ("luna16", "seriesuid", r"^[\d.]+$"),
    ("luna16", PATH_COLUMN, r"[\d.]{20,}\.mhd$"),
    ("dlcs", "ct_nifti_file", r"^DLCS_"),
    ("luna25", "SeriesInstanceUID", r"^[\d.]+$"),
    ("c4kc_kits", "patient_id", r"^KiTS-"),
    ("colorectal_liver", "Patient-ID", r"^CRLM-"),
    ("nsclc_radiogenomics", "Case ID", r"^(R01|AMC)-"),
)

_DEEPLESION_SPLITS = {1: "train", 2: "val", 3: "test"}
_DEEPLESION_RAW = ("File_name", "Key_slice_index", "Slice_range", "Measurement_coordinates", "Spacing_mm_px_")
_DEEPLESION_DERIVED = ("Volume_fn", *(f"{what}_{axis}" for what in ("centroid", "spacing") for axis in "xyz"))


def deeplesion(path: Path | str) -> pd.DataFrame:
    """DeepLesion, for the NIfTI files that its authors' `DL_save_nifti.py` writes.

    Takes `DL_info.csv`, or a table derived from it by the foundation-cancer-image-biomarker project (`pretrain.csv`,
    `task1_*.csv`), whose `coordX, coordY, coordZ` are *not* used: they are the point `(row, column, slice counted from
    the other end)`, and fit only a loader that computes the index before it reorients the scan.

    Both tables count pixels from 1 and name the key slice by its number in the series. The files hold
    `array[row, column, slice]` with an affine that puts it at LPS `(s * column, s * row, -s_z * slice)`, so the point
    is `(s (column - 1), s (row - 1), -s_z (key - first))`. The files' origin is made up: the point is of no use for
    volumes made from the original DICOM.

    Added are `PatientID`, `split` (the authors') and `diameter_mm` (RECIST's long axis).

    Source:
        Yan et al., DeepLesion, Journal of Medical Imaging 2018, and the DL_save_nifti.py published with it.
    """
    rows = _table_of("deeplesion", path)
    if "File_name" in rows:
        require_columns(path, rows, _DEEPLESION_RAW)
        diameters = _numbers(rows, "Measurement_coordinates", 8, path)
        column, row = recist_center(diameters.reshape(-1, 4, 2)).T
        first, last = _numbers(rows, "Slice_range", 2, path).astype(int).T
        series = rows["File_name"].str.rsplit("_", n=1).str[0]
        # The converter gives every file of a series the spacing of the series' first row.
        spacings = pd.DataFrame(_numbers(rows, "Spacing_mm_px_", 3, path), rows.index)
        spacing = spacings.groupby(series).transform("first").to_numpy(dtype=np.float64)
        files = [f"{name}_{a:03d}-{b:03d}.nii.gz" for name, a, b in zip(series, first, last, strict=True)]
        slices = _number(rows, "Key_slice_index", path).astype(int) - first
        axes = np.linalg.norm(np.diff(diameters.reshape(-1, 2, 2, 2), axis=2)[:, :, 0], axis=-1)
        long_axis_mm = axes.max(axis=1) * spacing[:, 0]
    else:
        require_columns(path, rows, _DEEPLESION_DERIVED)
        column, row, from_end = (_number(rows, f"centroid_{axis}", path) for axis in "xyz")
        spacing = np.stack([_number(rows, f"spacing_{axis}", path) for axis in "xyz"], axis=1)
        files = rows["Volume_fn"].tolist()
        ranges = rows["Volume_fn"].str.extract(r"_(\d+)-(\d+)\.nii\.gz$")
        _refuse(path, rows["Volume_fn"], ranges.isna().any(axis=1), "<series>_<first>-<last>.nii.gz")
        first, last = ranges.to_numpy(dtype=int).T
        slices = last - first + 1 - from_end.astype(int)  # `centroid_z` is last - key + 1
        long_axis_mm = np.maximum(*(_number(rows, f"lesion_diameters_{axis}", path) for axis in "xy"))
    _refuse(path, pd.Series(files, rows.index), (slices < 0) | (slices > last - first), "a key slice within the file")
    points = np.stack([spacing[:, 1] * (column - 1), spacing[:, 0] * (row - 1), -spacing[:, 2] * slices], axis=1)
    dropped = {*_DEEPLESION_RAW, *_DEEPLESION_DERIVED, *(f"lesion_diameters_{axis}" for axis in "xyz")}
    dropped |= {"bbox", "Bounding_boxes", "Lesion_diameters_Pixel_", "Image_size", "Train_Val_Test"}
    table = _plain(rows, files, points, dropped)
    table["PatientID"] = [name.split("_")[0] for name in files]
    if "Train_Val_Test" in rows:
        table["split"] = rows["Train_Val_Test"].map(_DEEPLESION_SPLITS)
    table["diameter_mm"] = long_axis_mm
    return table


def recist_center(ends: npt.ArrayLike) -> FloatArray:
    """Where the two diameters of a lesion cross; the mean of their ends if they do not.

    Args:
        ends: `(lesions, 4, 2)`: both ends of the long axis, then both of the short one.

    Returns:
        `(lesions, 2)`.
    """
    p, q, r, s = np.moveaxis(np.asarray(ends, dtype=np.float64), 1, 0)
    along, across, between = q - p, s - r, r - p
    area = _cross(along, across)
    with np.errstate(divide="ignore", invalid="ignore"):
        t, u = _cross(between, across) / area, _cross(between, along) / area
    crosses = (area != 0) & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    crossing = p + np.where(crosses, t, 0)[:, None] * along
    return np.asarray(np.where(crosses[:, None], crossing, (p + q + r + s) / 4))


def luna16(path: Path | str, image_root: Path | str | None = None) -> pd.DataFrame:
    """LUNA16's `annotations.csv`, and the tables of the malignancy task made from LUNA16 and LIDC-IDRI.

    The points are LPS mm, the world coordinates of the `.mhd` files.

    Args:
        path: a table with `seriesuid`, or with `image_path` ending in `<seriesuid>.mhd`.
        image_root: the folder with `subset0` to `subset9`; finds each series in them. Without it files are named as if
            they all lay in one folder.
    """
    rows = _table_of("luna16", path)
    require_columns(path, rows, ("seriesuid" if PATH_COLUMN not in rows else PATH_COLUMN, *COORDINATE_COLUMNS))
    if PATH_COLUMN in rows:
        names = [PurePosixPath(p).name for p in rows[PATH_COLUMN].astype(str)]
        _refuse(path, rows[PATH_COLUMN], [not re.fullmatch(r"[\d.]+\.mhd", name) for name in names], "<seriesuid>.mhd")
    else:
        names = [f"{uid}.mhd" for uid in rows["seriesuid"]]
    files = names
    if image_root is not None:
        root = Path(image_root)
        paths = {file.name: file.relative_to(root).as_posix() for file in sorted(root.rglob("*.mhd"))}
        files = [paths.get(name, name) for name in names]
        if absent := len(set(names) - set(paths)):
            _logger.warning("%s: %d of %d series are not under %s", path, absent, len(set(names)), root)
    table = _plain(rows, files, _points(rows, COORDINATE_COLUMNS, path))
    table["seriesuid"] = [name.removesuffix(".mhd") for name in names]
    return table


def lung1(path: Path | str) -> pd.DataFrame:
    """NSCLC-Radiomics (LUNG1) as the foundation-cancer-image-biomarker project lists it: a tumour a patient.

    The points are LPS mm. Scans are named `LUNG1-001/CT.nrrd`, ..., from the folder that holds the patients' folders.
    """
    rows = _table_of("lung1", path)
    require_columns(path, rows, (PATH_COLUMN, "PatientID", *COORDINATE_COLUMNS))
    _refuse(path, rows["PatientID"], ~rows["PatientID"].astype(str).str.match("LUNG1-"), "LUNG1-<number>")
    files = [str(PurePosixPath(*PurePosixPath(p).parts[-2:])) for p in rows[PATH_COLUMN].astype(str)]
    return _plain(rows, files, _points(rows, COORDINATE_COLUMNS, path))


def lidc_crops(path: Path | str) -> pd.DataFrame:
    """Nodules of LIDC-IDRI, each cropped to a file of its own, as `voi_index.csv` lists them.

    The points are the centroids of the masks, LPS mm. Every file has a row; `suspect` is true if the mask is far from
    the size that the table states for the nodule.
    """
    rows = _table_of("lidc_crops", path)
    required = ("file", "patient_id", "lps_x", "lps_y", "lps_z", "mask_voxels", "sx", "sy", "sz", "diameter_mm")
    require_columns(path, rows, required)
    files = [f"image/{file}" for file in rows["file"]]
    geometry = ("file", "lps_x", "lps_y", "lps_z", "nx", "ny", "nz", "sx", "sy", "sz", "dir_xx")
    table = _plain(rows, files, _points(rows, ("lps_x", "lps_y", "lps_z"), path), set(geometry))
    table = table.rename(columns={"patient_id": "PatientID"})
    table[MASK_COLUMN] = [f"nodule_mask/{file}" for file in rows["file"]]
    table[CROPPED_COLUMN] = True
    names = ("mask_voxels", "sx", "sy", "sz", "diameter_mm")
    voxels, sx, sy, sz, diameter_mm = (_number(rows, name, path) for name in names)
    ratio = (6 * voxels * (sx * sy * sz) / np.pi) ** (1 / 3) / diameter_mm
    return table.assign(suspect=(ratio > _SUSPECT_RATIO) | (ratio < 1 / _SUSPECT_RATIO))


class _Columns(NamedTuple):
    """Where a table with a lesion a row and points in LPS mm has what this package needs.

    Attributes:
        image: the scan's path, with names of columns in braces.
        patient: becomes `PatientID`.
        renamed: other columns.
        event: becomes `event`, 1 where a column has a value.
        edges: of a box round the lesion, mm; the longest becomes `diameter_mm`.
        point: the coordinates.
    """

    image: str
    patient: str
    renamed: dict[str, str]
    event: tuple[str, str] | None = None
    edges: tuple[str, ...] = ()
    point: tuple[str, str, str] = ("coordX", "coordY", "coordZ")


#: Tables of TumorImagingBench (data/eval), whose points its loaders read as LPS mm, and that of the LUNA25 challenge.
_TABLES = {
    "dlcs": _Columns(
        "{ct_nifti_file}", "patient-id", {"benchmark_split": "split", "Malignant_lbl": "malignancy"},
        edges=("w", "h", "d"),
    ),
    "luna25": _Columns(
        "{SeriesInstanceUID}.mha", "PatientID", {"label": "malignancy"}, point=("CoordX", "CoordY", "CoordZ")
    ),
    "c4kc_kits": _Columns("{Series UID}", "patient_id", {}, event=("vital_status", "dead")),
    "colorectal_liver": _Columns("{Series UID}", "Patient-ID", {}, event=("vital_status", "1")),
    "nsclc_radiogenomics": _Columns("{Case ID}.nrrd", "Case ID", {}, event=("Survival Status", "Dead")),
}  # fmt: skip


def columns_table(source: str, path: Path | str) -> pd.DataFrame:
    """A table that needs nothing but its columns found, `_TABLES`."""
    rows, how = _table_of(source, path), _TABLES[source]
    needed = {*re.findall(r"{(.+?)}", how.image), how.patient, *how.renamed, *how.edges, *how.point}
    require_columns(path, rows, sorted(needed | ({how.event[0]} if how.event else set())))
    files = [how.image.format_map(row) for row in rows.to_dict("records")]
    table = _plain(rows, files, _points(rows, how.point, path), {*how.point, "mask_path"})
    table["PatientID"] = rows[how.patient].astype(str)
    if how.event:
        table["event"] = (rows[how.event[0]].astype(str) == how.event[1]).astype(int)
    if how.edges:
        table["diameter_mm"] = np.max([_number(rows, edge, path) for edge in how.edges], axis=0)
    return table.rename(columns=how.renamed)


def _table_of(source: str, path: Path | str) -> pd.DataFrame:
    """Read a table, unless it looks like that of another data set."""
    rows = read_table(path)
    first = rows.head(1).astype(str)
    for other, column, pattern in _LOOKS_LIKE:
        if column in first and not first.empty and re.search(pattern, str(first[column].iloc[0])):
            if other != source:
                reason = f"looks like a table of {other} ({column} is {first[column].iloc[0]!r})"
                raise AnnotationsError(f"{path}: {reason}, not of {source}: give source={other}")
            break
    return rows


def _plain(
    rows: pd.DataFrame, files: list[str], points_lps_mm: FloatArray, dropped: set[str] | None = None
) -> pd.DataFrame:
    """Path and point first, then every column that is kept."""
    head = {PATH_COLUMN: files, **dict(zip(COORDINATE_COLUMNS, points_lps_mm.T, strict=True))}
    left_out = {*head, *(dropped or ()), *(name for name in rows if str(name).startswith("Unnamed: "))}
    return pd.DataFrame(head, index=rows.index).join(rows[[name for name in rows if name not in left_out]])


def _points(rows: pd.DataFrame, columns: tuple[str, str, str], path: Path | str) -> FloatArray:
    return np.stack([_number(rows, column, path) for column in columns], axis=1)


def _number(rows: pd.DataFrame, column: str, path: Path | str) -> FloatArray:
    numbers = pd.to_numeric(rows[column], errors="coerce").to_numpy(dtype=np.float64)
    _refuse(path, rows[column], ~np.isfinite(numbers), "a number")
    return np.asarray(numbers)


def _numbers(rows: pd.DataFrame, column: str, count: int, path: Path | str) -> FloatArray:
    """A column whose cells hold several numbers, `(rows, count)`."""
    parts = rows[column].astype(str).str.split(",", expand=True).apply(pd.to_numeric, errors="coerce")
    bad = parts.isna().any(axis=1) if parts.shape[1] == count else pd.Series(True, rows.index)
    _refuse(path, rows[column], bad, f"{count} numbers with commas between them")
    return np.asarray(parts, dtype=np.float64)


def _refuse(path: Path | str, values: pd.Series[str], bad: npt.ArrayLike, expected: str) -> None:
    if indices := np.flatnonzero(np.asarray(bad)).tolist():
        first = f"row {values.index[indices[0]]}: {values.name or 'the file'} is {values.iloc[indices[0]]!r}"
        raise AnnotationsError(f"{path}: {first}; expected {expected} ({len(indices)} such rows)")


def _cross(a: FloatArray, b: FloatArray) -> FloatArray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


#: Importers by their name on the command line; `luna16` can also look for the files.
IMPORTERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "deeplesion": deeplesion,
    "luna16": luna16,
    "lung1": lung1,
    "lidc_crops": lidc_crops,
    **{source: partial(columns_table, source) for source in _TABLES},
}


class _DataSet(NamedTuple):
    """Kind of label, HU that the grey values 0 and 255 are taken for, names of classes."""

    task: Literal["binary", "multiclass"]
    window_hu: tuple[float, float]
    classes: tuple[str, ...]


DATASETS = {
    # No window is published; this one the first author took for lung nodules, at 1 mm and 8 bits too (DenseSharp).
    "nodulemnist3d": _DataSet("binary", (-1024, 400), ("benign", "malignant")),
    # "An abdominal window", without its bounds; these are customary ones, level 40 and width 400.
    "organmnist3d": _DataSet(
        "multiclass",
        (-160, 240),
        ("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart", "lung-right",
         "lung-left", "spleen", "pancreas"),
    ),
    # A mask of the gland, no CT: shown as soft tissue in the fat that lies round it.
    "adrenalmnist3d": _DataSet("binary", (-100, 40), ("normal", "hyperplasia")),
}  # fmt: skip


def import_medmnist(
    file: Path, output: Path, *, window_hu: tuple[float, float] | None = None, edge_mm: float = 50.0
) -> pd.DataFrame:
    """Write the volumes of a MedMNIST file as NIfTI below `output`, and `lesions.csv`; existing volumes are kept.

    The table has `image_path`, `cropped` (true: the middle of a volume is its lesion), `split`, `label`, `label_name`
    and `volume` (data set, size, split and row of the file). No patient is named by MedMNIST.

    Args:
        file: `nodulemnist3d.npz` (28 voxels an edge), `nodulemnist3d_64.npz` and so on, as the package names them.
        output: folder; made if there is none.
        window_hu: HU of the grey values 0 and 255, if not those of `DATASETS`.
        edge_mm: of the cube that a volume is taken for; with the edge of an encoder's patch in mm the volume fills it.

    Raises:
        AnnotationsError: no such file, or not one of these data sets.
    """
    dataset = file.stem.partition("_")[0]
    if dataset not in DATASETS:
        raise AnnotationsError(f"{file}: is none of {', '.join(f'{name}.npz' for name in DATASETS)}")
    low, high = window_hu or DATASETS[dataset].window_hu
    if not -1024 <= low < high <= 32767 or edge_mm <= 0:
        raise AnnotationsError(
            f"window_hu={low:g},{high:g} edge_mm={edge_mm:g}: give the HU of 0 and of 255, from -1024"
        )
    splits, rows = _read_medmnist(file, DATASETS[dataset].classes), []
    (output / "scans").mkdir(parents=True, exist_ok=True)
    for split, images, labels in splits:
        for number in tqdm(range(len(images)), split, unit="volume", disable=None):
            path = f"scans/{split}_{number:04d}.nii.gz"
            if not (output / path).is_file():
                image = sitk.GetImageFromArray(np.rint(low + images[number].astype(np.float32) * ((high - low) / 255)))
                image.SetSpacing([edge_mm / images.shape[1]] * 3)
                partial = output / "scans" / f".{split}_{number:04d}.nii.gz"
                sitk.WriteImage(sitk.Cast(image, sitk.sitkInt16), str(partial))
                partial.replace(output / path)
            rows.append({
                "image_path": path,
                "cropped": True,
                "split": split,
                "label": int(labels[number]),
                "label_name": DATASETS[dataset].classes[labels[number]],
                "volume": f"{dataset}_{images.shape[1]}/{split}/{number:04d}",
            })  # fmt: skip
    table = pd.DataFrame(rows)
    write_atomically(output / "lesions.csv", table.to_csv(index=False))
    return table


def _read_medmnist(file: Path, classes: Sequence[str]) -> list[tuple[str, Array, Array]]:
    """Splits with their volumes and labels."""
    if not file.is_file():
        raise AnnotationsError(f"{file}: there is no such file; get it from https://doi.org/10.5281/zenodo.10519652")
    splits = []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for split in ("train", "val", "test"):
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
                if images.dtype != np.uint8 or images.ndim != 4 or len(set(images.shape[1:])) != 1:
                    raise ValueError(f"{split}_images is {images.dtype} {images.shape}, no 8-bit cubes")
                if labels.shape != (len(images), 1) or not np.isin(labels, np.arange(len(classes))).all():
                    raise ValueError(f"{split}_labels should be ({len(images)}, 1) of 0 to {len(classes) - 1}")
                splits.append((split, images, labels[:, 0].astype(np.int64)))
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise AnnotationsError(f"{file} is damaged, or not one of MedMNIST's: {error}; download it again") from error
    return splits
