"""One scan into the store: its name there, whether it is to be made, and how a worker of `prepare` makes it.

What is finished is known from the files alone: a scan's JSON file is written last. A scan that cannot be used has a
file `<scan_id>.rejected.json` instead, with its rows and the reasons.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from jaxtyping import Int16

from fmcib_ssl.data.annotations import ScanReport
from fmcib_ssl.data.dicom_files import series_files
from fmcib_ssl.data.mining import build_coarse_map
from fmcib_ssl.data.scans import Scan, ScanSource, files_at, read_scan, source_listing
from fmcib_ssl.data.store import SCANS_FOLDER, STORE_VERSION, StoreError, StoreGrid, StoreSettings
from fmcib_ssl.data.store_files import Record, add_sums, read_record, scan_problem, sidecar_file, write_scan
from fmcib_ssl.io import write_sealed_json
from fmcib_ssl.types import ScanError

logger = logging.getLogger(__name__)

#: Slices of the store's grid that are resampled at a time; as fast as all at once, and floats of a whole body would
#: need gigabytes.
_SLAB = 32
_MAX_HU = np.iinfo(np.int16).max


class TableScan(NamedTuple):
    """A scan of a table.

    Attributes:
        scan_id: its name in the store.
        source: where it is.
        indices: positions of its rows in the table.
        rows: digest of all that they say.
    """

    scan_id: str
    source: ScanSource
    indices: tuple[int, ...]
    rows: str


class ScanTask(NamedTuple):
    """A scan to be prepared, with its usable and its rejected rows, and what its header says."""

    scan: TableScan
    lesions: list[Record]
    rejected: list[Record]
    report: ScanReport | ScanError | None

    @property
    def sidecar(self) -> Record:
        """What the scan's JSON file says of its rows."""
        return {"rows": self.scan.rows, "lesions": self.lesions, "rejected": self.rejected}


def scan_id_of(source: ScanSource, root: Path) -> str:
    """Name of a scan in the store: its own for people, and ten digits that tell it from others of that name.

    A function of the path below `root` and of the series, so that a moved archive keeps its names.
    """
    # Not `resolve`: a link is a name that the user gave.
    path, root = (Path(os.path.abspath(p)) for p in (source.path, root))  # noqa: PTH100
    relative = path.relative_to(root) if path.is_relative_to(root) else path
    name = re.sub(r"(\.(nii|img|hdr|nrrd|nhdr|mha|mhd))?(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", plain).strip("._-")[:40] or "scan"
    which = "\n".join([relative.as_posix(), source.series_uid or "", *([source.affine] if source.affine else [])])
    return f"{readable}-{hashlib.sha256(which.encode()).hexdigest()[:10]}"


def state_of(folder: Path, settings: StoreSettings, scan: TableScan, *, contents: bool) -> str:
    """What a store has of a scan: "finished", "rows changed", "rejected", "its files have changed", "not prepared".

    A scan whose files are gone from their place stays as it is: raw archives are moved to tape.

    Args:
        folder: of the store, which is claimed.
        settings: of the store.
        scan: to look at.
        contents: read what is finished and compare its check sums; else sizes are compared.
    """
    file = sidecar_file(folder, scan.scan_id)
    sidecar = read_record(file)
    if not sidecar:
        rejected = read_record(rejection_file(folder, scan.scan_id))
        return "rejected" if rejected.get("rows") == scan.rows else "not prepared"
    if (sidecar.get("version"), sidecar.get("settings")) != (STORE_VERSION, asdict(settings)):
        return "not prepared"
    problem = scan_problem(folder, scan.scan_id, contents=contents)
    if problem is None and "sums" not in sidecar["sizes"]:
        problem, sidecar = add_sums(folder, scan.scan_id, sidecar), read_record(file)
    if problem is not None:
        logger.warning("%s is damaged and made anew: %s", file.with_suffix(".b2nd"), problem)
        file.unlink()  # should this run be stopped, the next one need not look again
        return "not prepared"
    known = sidecar["source"]
    try:
        listing = source_listing(scan.source.path)
    except OSError:
        listing = known["listing"]
    if listing != known["listing"]:
        if _checksum(_source_files(scan.source)) != known["sha256"]:
            return "its files have changed"
        write_sealed_json(file, {**sidecar, "source": {**known, "listing": listing}})  # copied, or touched
    return "finished" if sidecar["rows"] == scan.rows else "rows changed"


def rejection_file(folder: Path, scan_id: str) -> Path:
    """What a store holds of a scan that cannot be used."""
    return folder / SCANS_FOLDER / f"{scan_id}.rejected.json"


def reject(folder: Path, scan: TableScan, rejected: list[Record]) -> None:
    """Leave a scan out of the store, with what is wrong with its rows."""
    # Of an earlier version of its files; of a scan that is gone they may be all that is left, though damaged.
    for suffix in ("json", "cells", "sums", "b2nd") if scan.source.path.exists() else ("json",):
        (folder / SCANS_FOLDER / f"{scan.scan_id}.{suffix}").unlink(missing_ok=True)
    write_sealed_json(rejection_file(folder, scan.scan_id), {"rows": scan.rows, "rejected": rejected})


def prepare_scan(folder: Path, settings: StoreSettings, task: ScanTask) -> tuple[str, str] | None:
    """Read a scan, and write it to the store in `folder`.

    Returns:
        Nothing; or, whatever is wrong with the scan, the reason and what to do.

    Raises:
        StoreError: the store cannot be written; the next scan would fare no better.
    """
    scan_id, source = task.scan.scan_id, task.scan.source
    try:
        listing = source_listing(source.path)  # before reading: a change while it is read shows next time
        files = _source_files(source)
        sha256 = _checksum(files)
        num_bytes = sum(file.stat().st_size for file in files)
        scan = read_scan(*source)
        summary = scan.summary
        assert summary is not None  # read from a file
        grid = StoreGrid.of(scan.geometry, settings.spacing_mm)
        hu = resample(scan, grid, settings)
        coarse_map = build_coarse_map(hu, grid.spacing_mm)
        sidecar = {
            "version": STORE_VERSION,
            "settings": asdict(settings),
            "source": {"listing": listing, "sha256": sha256, "num_files": len(files), "num_bytes": num_bytes},
            "scan": {
                "scan_id": scan_id,
                "source": str(source.path),
                "series_uid": source.series_uid,
                "sha256": sha256,
                "shape_zyx": grid.shape_zyx,
                "origin_lps_mm": grid.origin_lps_mm,
                "source_size_xyz": scan.geometry.size_xyz,
                "source_spacing_mm_xyz": scan.geometry.spacing_mm_xyz,
                "source_origin_lps_mm": scan.geometry.origin_lps_mm,
                "source_direction": np.ravel(scan.geometry.direction).tolist(),
                "hu_min": summary.hu_min,
                "hu_max": summary.hu_max,
                "body_volume_ml": coarse_map.body_volume_ml,
            },
            **task.sidecar,
        }
        write_scan(folder, scan_id, hu, coarse_map, sidecar)
        rejection_file(folder, scan_id).unlink(missing_ok=True)
        return None
    except StoreError:
        raise
    except ScanError as error:
        return error.reason or str(error), error.remedy or "repair or leave out the scan"
    except MemoryError:
        return "needs more memory than there is", "prepare it with num_workers=1, or coarser voxels"
    except Exception as error:  # whatever a library makes of a broken file, the night goes on
        return f"{type(error).__name__}: {error}", "repair or leave out the scan"


def resample(scan: Scan, grid: StoreGrid, settings: StoreSettings) -> Int16[np.ndarray, "z y x"]:
    """The scan on a grid, rounded to int16 HU.

    At a voxel's centre the value is the one that `crop_patch` gives there: what lies outside the scan's outermost
    voxels is padding, and what is below it in the scan is raised to it before interpolating.
    """
    axes = np.abs(np.array(scan.geometry.direction))
    if settings.interpolation == "linear" and np.allclose(axes, axes.round(), atol=1e-6):
        return _resample_along_axes(scan, grid, settings.padding_hu)
    return _resample_oblique(scan, grid, settings)


def _resample_along_axes(scan: Scan, grid: StoreGrid, padding_hu: int) -> Int16[np.ndarray, "z y x"]:
    """Linear, where the scan's axes are the grid's, in any order and sense: three times as fast as the general way.

    The grid's voxels have their centres within the scan then, so there is no padding.
    """
    origin, (depth, height, width) = np.array(grid.origin_lps_mm), grid.shape_zyx
    scan_axis = [int(np.argmax(np.abs(row))) for row in scan.geometry.direction]  # index axis that runs along x, y, z
    values = scan.hu.transpose([2 - scan_axis[lps] for lps in (2, 1, 0)])
    neighbours = []
    for lps, size in ((2, depth), (1, height), (0, width)):
        points = origin + np.eye(3)[lps] * grid.spacing_mm * np.arange(size)[:, None]
        last = values.shape[2 - lps] - 1
        index = np.clip(scan.geometry.to_index_xyz(points)[:, scan_axis[lps]], 0, last)
        low = np.minimum(index.astype(int), max(last - 1, 0))
        neighbours.append((low, np.minimum(low + 1, last), (index - low).astype(np.float32)))
    (z0, z1, dz), (y0, y1, dy), (x0, x1, dx) = neighbours

    hu: npt.NDArray[np.int16] = np.empty(grid.shape_zyx, dtype=np.int16)
    for z in range(depth):
        below, above = (np.maximum(values[k[z]], padding_hu).astype(np.float32) for k in (z0, z1))
        plane = below + (above - below) * dz[z]
        plane = plane[y0] + (plane[y1] - plane[y0]) * dy[:, None]
        left = plane.take(x0, axis=1)
        hu[z] = np.minimum(np.rint(left + (plane.take(x1, axis=1) - left) * dx), _MAX_HU)
    return hu


def _resample_oblique(scan: Scan, grid: StoreGrid, settings: StoreSettings) -> Int16[np.ndarray, "z y x"]:
    """With any direction, and any interpolation, by ITK."""
    image = scan.as_itk(settings.padding_hu)
    interpolator = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}.get(settings.interpolation)
    if interpolator is None:  # the coefficients once, not once a slab
        image = sitk.BSplineDecomposition(sitk.Cast(image, sitk.sitkFloat32))
        interpolator = sitk.sitkBSplineResampler
    filter_ = sitk.ResampleImageFilter()
    filter_.SetNumberOfThreads(1)  # the processes are the parallelism
    filter_.SetInterpolator(interpolator)
    filter_.SetDefaultPixelValue(settings.padding_hu)
    filter_.SetOutputPixelType(sitk.sitkFloat32)  # into int16 ITK truncates; we round
    filter_.SetOutputSpacing([grid.spacing_mm] * 3)
    depth, height, width = grid.shape_zyx
    x, y, z = grid.origin_lps_mm
    hu: npt.NDArray[np.int16] = np.empty(grid.shape_zyx, dtype=np.int16)
    for first in range(0, depth, _SLAB):
        part = hu[first : first + _SLAB]
        filter_.SetSize((width, height, len(part)))
        filter_.SetOutputOrigin((x, y, z + first * grid.spacing_mm))
        slab = filter_.Execute(image)  # the view below does not keep it alive
        part[:] = np.clip(np.rint(sitk.GetArrayViewFromImage(slab)), settings.padding_hu, _MAX_HU)
    return hu


def _source_files(source: ScanSource) -> list[Path]:
    """The files whose bytes are a scan: slices of a series, a header and its detached voxels; sorted by name."""
    if source.series_uid is not None and source.path.is_dir():
        return series_files(source.path, source.series_uid)
    return files_at(source.path)


def _checksum(files: list[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other; of one file what `sha256sum` says."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()
