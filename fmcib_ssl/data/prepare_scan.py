"""One scan into the store: read it, bring it to its grid, write it. What a worker of `prepare` does."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from jaxtyping import Int16

from fmcib_ssl.data.dicom_files import series_files
from fmcib_ssl.data.mining import build_coarse_map
from fmcib_ssl.data.scans import Scan, ScanSource, read_scan
from fmcib_ssl.data.store import STORE_VERSION, StoreError, StoreGrid, StoreSettings
from fmcib_ssl.data.store_files import write_scan
from fmcib_ssl.types import ScanError

#: Slices of the store's grid that are resampled at a time; as fast as all at once, and floats of a whole body would
#: need gigabytes.
_SLAB = 32
#: Headers whose voxels may stand in another file: what names it.
_DETACHED = {
    ".mhd": re.compile(rb"^ElementDataFile *= *(.+?)\s*$", re.MULTILINE),
    ".nhdr": re.compile(rb"^data ?file: *(.+?)\s*$", re.MULTILINE | re.IGNORECASE),
}


class ScanTask(NamedTuple):
    """A scan to be prepared: its name in the store, where it is, what its JSON file says besides what reading tells."""

    scan_id: str
    source: ScanSource
    sidecar: Mapping[str, Any]


def prepare_scan(folder: Path, settings: StoreSettings, task: ScanTask) -> int | tuple[str, str]:
    """Read a scan, and write it to the store in `folder`.

    Returns:
        Its compressed size in bytes; or, whatever is wrong with the scan, the reason and what to do.

    Raises:
        StoreError: the store cannot be written; the next scan would fare no better.
    """
    try:
        listing = source_listing(task.source.path)  # before reading: a change while it is read shows next time
        files = source_files(task.source)
        sha256 = checksum(files)
        num_bytes = sum(file.stat().st_size for file in files)
        scan = read_scan(*task.source)
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
                "scan_id": task.scan_id,
                "source": str(task.source.path),
                "series_uid": task.source.series_uid,
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
        return write_scan(folder, task.scan_id, hu, coarse_map, sidecar)
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
    highest = np.iinfo(np.int16).max
    for z in range(depth):
        below, above = (np.maximum(values[k[z]], padding_hu).astype(np.float32) for k in (z0, z1))
        plane = below + (above - below) * dz[z]
        plane = plane[y0] + (plane[y1] - plane[y0]) * dy[:, None]
        left = plane.take(x0, axis=1)
        hu[z] = np.minimum(np.rint(left + (plane.take(x1, axis=1) - left) * dx), highest)
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
    highest = np.iinfo(np.int16).max
    for first in range(0, depth, _SLAB):
        part = hu[first : first + _SLAB]
        filter_.SetSize((width, height, len(part)))
        filter_.SetOutputOrigin((x, y, z + first * grid.spacing_mm))
        slab = filter_.Execute(image)  # the view below does not keep it alive
        part[:] = np.clip(np.rint(sitk.GetArrayViewFromImage(slab)), settings.padding_hu, highest)
    return hu


def source_files(source: ScanSource) -> list[Path]:
    """The files whose bytes are a scan: slices of a series, a header and its detached voxels; sorted by name."""
    if source.series_uid is not None and source.path.is_dir():
        return series_files(source.path, source.series_uid)
    return _files_at(source.path)


def _files_at(path: Path) -> list[Path]:
    """All files of a folder, or a file with what belongs to it."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    files = [path]
    if pattern := _DETACHED.get(path.suffix.lower()):
        with path.open("rb") as file:
            named = pattern.search(file.read(1 << 16))
        if named and (voxels := path.parent / named[1].decode("utf-8", "replace")).is_file():
            files.append(voxels)
    return files


def source_listing(path: Path) -> str:
    """Digest of the names, sizes and modification times of a scan's files, in a folder of everything in it.

    Cheap: no file is opened. It may change without the scan; then `checksum` tells.

    Raises:
        OSError: there is no such file.
    """
    lines = [f"{file.name} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in _files_at(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def checksum(files: list[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other; of one file what `sha256sum` says."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()
