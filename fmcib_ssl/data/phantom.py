"""A small archive of synthetic chest CTs, written as real files.

The scans go through the same reader as a hospital's: NIfTI, anisotropic spacing, stored along different axes.
Each holds lesions of two classes that differ in texture and margin and in nothing else: diameter, mean HU and
place are drawn from the same distributions, so a probe that tells them apart has seen how a lesion looks.

Everything about scan `n` is a function of `(seed, n)`: a longer archive begins with the scans of a shorter one.

Shapes are distances to a border, in mm, and a voxel takes the share of a tissue that its distance says. So borders are
as blurred as the scanner's, and no scan is painted on a finer grid than its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk
from scipy import ndimage
from tqdm import tqdm

from fmcib_ssl.data.processes import KILLED, run_jobs
from fmcib_ssl.io import write_atomically

_Array = npt.NDArray[np.float32]
_Axes = tuple[_Array, _Array, _Array]

_AIR_HU, _FAT_HU, _MUSCLE_HU, _BLOOD_HU, _MARROW_HU, _CORTEX_HU = -1000, -100, 45, 110, 180, 550
ORIENTATIONS = ("LPS", "RAS", "LAS", "LPI", "PSL", "SRA")
MIN_DISTANCE_MM = 34.0  # between the centres of two lesions of a scan
_BORDER_MM = 14.0  # between a lesion's centre and the first and last slice
_LESIONS_PER_SCAN = (1, 3)  # fewest and most
_VERSION = 1  # of what is drawn: scans of two versions are not mixed in one archive
_HELD_OUT = (2, 4)  # scan numbers modulo 5 that are the test set: two fifths of the patients


def draw_scan(seed: int, number: int) -> tuple[_Chest, list[_Lesion]]:
    """What scan `number` of an archive shows; nothing is rendered yet."""
    rng = np.random.default_rng([seed, number, 0])
    chest = _Chest(rng)
    return chest, _draw_lesions(chest, int(rng.integers(*_LESIONS_PER_SCAN, endpoint=True)), rng)


def make_archive(
    folder: Path | str, num_scans: int = 120, seed: int = 0, *, num_workers: int = 1, progress: bool = True
) -> Path:
    """Write an archive of phantom scans and its table of lesions, or finish one that was begun.

    Scans that are there already are left as they are.

    Args:
        folder: where the scans go; made if absent.
        num_scans: one scan a patient.
        seed: of everything that is drawn.
        num_workers: processes; 1 works in this one. More are spawned, so the calling script needs the
            usual `if __name__ == "__main__":`.
        progress: show a progress bar.

    Returns:
        The table, `annotations.csv`: `image_path` (relative to it), `PatientID`, `coordX`, `coordY`, `coordZ`
        (LPS mm), `diameter_mm`, `label` (0 or 1), `split` ("train" or "test", by patient).

    Raises:
        ValueError: the numbers make no archive, or the folder holds something else: an archive made with
            other parameters, or a table that no phantom made.
    """
    if num_scans < 1:
        raise ValueError(f"num_scans={num_scans}: a phantom archive needs 1 or more")
    folder = Path(folder)
    table = folder / "annotations.csv"
    parameters = {"version": _VERSION, "num_scans": num_scans, "lesions_per_scan": list(_LESIONS_PER_SCAN)}
    _claim(folder, {**parameters, "seed": seed})
    (folder / "scans").mkdir(exist_ok=True)
    missing = [n for n in range(num_scans) if not (folder / _scan_name(n)).is_file()]
    num_workers = num_workers if 1 < num_workers < len(missing) else 0
    jobs = run_jobs(partial(_write_scan, folder, seed), missing, num_workers, _killed)
    interval_s = 0.5 if sys.stderr.isatty() else 30
    for _ in tqdm(jobs, "phantom scans", len(missing), unit="scan", disable=not progress, mininterval=interval_s):
        pass
    if not table.is_file():
        rows = [row for n in range(num_scans) for row in _table_rows(seed, n)]
        write_atomically(table, pd.DataFrame(rows).to_csv(index=False))
    return table


def _killed(number: int) -> None:
    raise OSError(f"scan {number}: {KILLED}")


def _claim(folder: Path, parameters: dict[str, object]) -> None:
    """Mark the folder as this archive's, or refuse one that is not."""
    manifest = folder / "phantom.json"
    if not manifest.is_file():
        if (folder / "annotations.csv").exists():
            reason = "has an annotations.csv but no phantom.json: it is no phantom archive"
            raise ValueError(f"{folder} {reason}; give another folder")
        write_atomically(manifest, json.dumps(parameters))
    elif (existing := json.loads(manifest.read_text())) != parameters:
        reason = f"holds a phantom archive made with {existing}, not {parameters}"
        raise ValueError(f"{folder} {reason}: delete that folder or give another one")


def _scan_name(number: int) -> str:
    return f"scans/phantom_{number:04d}.nii.gz"


def _write_scan(folder: Path, seed: int, number: int) -> None:
    chest, lesions = draw_scan(seed, number)
    path = folder / _scan_name(number)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")  # an interrupt leaves no half file under its name
    sitk.WriteImage(render(chest, lesions, np.random.default_rng([seed, number, 1])), str(unfinished))
    unfinished.replace(path)


def _table_rows(seed: int, number: int) -> Iterator[dict[str, object]]:
    chest, lesions = draw_scan(seed, number)
    for lesion in lesions:
        x, y, z = np.round(np.add(lesion.center_lps_mm, chest.origin_lps), 3).tolist()
        yield {
            "image_path": _scan_name(number),
            "PatientID": f"phantom_{number:04d}",
            "coordX": x,
            "coordY": y,
            "coordZ": z,
            "diameter_mm": round(lesion.diameter_mm, 1),
            "label": lesion.label,
            "split": "test" if number % 5 in _HELD_OUT else "train",
        }


class _Lesion(NamedTuple):
    """A lesion of a phantom, in the phantom's own frame: LPS millimetres from the middle of the chest."""

    center_lps_mm: tuple[float, float, float]
    diameter_mm: float
    mean_hu: float
    label: int  # 0: homogeneous, smooth margin; 1: heterogeneous, irregular and spiculated margin


class _Chest:
    """The shape of a random chest, and how a random scanner shows it. Lengths in mm, intensities in HU."""

    def __init__(self, rng: np.random.Generator) -> None:
        in_plane, slices = rng.uniform(1.15, 1.45), rng.uniform(1.6, 2.6)
        self.body_x = rng.uniform(138, 156)  # half axes of the body
        self.body_y = rng.uniform(96, 112)
        self.fat = rng.uniform(7, 18)  # thickness under the skin
        self.wall = rng.uniform(26, 34)  # from the skin to the lung
        self.mediastinum = rng.uniform(20, 28)  # half its width
        self.height = rng.uniform(88, 104)  # of the slab that was scanned
        self.heart = (rng.uniform(14, 24), rng.uniform(-34, -22), rng.uniform(-34, -18))  # centre
        self.liver_top = rng.uniform(-44, -26)  # z of the diaphragm's dome
        self.rib_phase = rng.uniform(0, 26)
        self.lung_hu = rng.uniform(-880, -810)
        self.spacing_xyz = (in_plane, in_plane, slices)
        # Where the middle of the chest lies in the scanner's frame.
        self.origin_lps = (rng.uniform(-20, 20), rng.uniform(-220, -140), rng.uniform(-900, 300))
        self.orientation = str(rng.choice(ORIENTATIONS))  # of the stored axes
        self.edge = rng.uniform(1.2, 2.2)  # width over which a sharp border is blurred
        self.noise_hu = rng.uniform(10, 30)
        self.noise_grain = rng.uniform(0.4, 0.9)  # in-plane standard deviation of the noise's correlation, pixels
        self.offset_hu = rng.uniform(-15, 15)  # of the scanner's calibration

    def axes(self) -> _Axes:
        """Coordinates of the voxels along x, y and z, shaped to broadcast to `(z, y, x)`."""
        low = (-self.body_x - 10, -self.body_y - 10, -self.height / 2)
        high = (self.body_x + 10, self.body_y + 24, self.height / 2)
        x, y, z = (
            np.arange(start, stop, step).astype(np.float32)
            for start, stop, step in zip(low, high, self.spacing_xyz, strict=True)
        )
        return x[None, None, :], y[None, :, None], z[:, None, None]

    def depth_under_skin(self, x: _Array, y: _Array) -> _Array:
        """Distance to the skin, negative outside the body."""
        radius = (np.abs(x / self.body_x) ** 2.6 + np.abs(y / self.body_y) ** 2.6) ** (1 / 2.6)
        return np.asarray((1 - radius) * min(self.body_x, self.body_y), np.float32)

    def depth_in_lung(self, x: _Array, y: _Array, z: _Array) -> _Array:
        """Distance to the lung's border, negative outside the lungs."""
        waist = self.mediastinum + 0.012 * np.maximum(-y - 20, 0) ** 1.5  # the mediastinum widens to the front
        in_cage = np.minimum(self.depth_under_skin(x, y) - self.wall, np.abs(x + 4) - waist)
        off_spine = np.hypot(x, y - 0.60 * self.body_y) - 31
        depth = np.minimum(in_cage, off_spine) - 0.10 * np.maximum(z, 0)
        domes = ((-62, 4, self.liver_top - 50), (70, 82, 50)), ((66, 10, self.liver_top - 66), (60, 72, 56))
        for center, half_axes in ((self.heart, (50, 40, 42)), *domes):  # heart and diaphragm
            offset = [(p - c) / h for p, c, h in zip((x, y, z), center, half_axes, strict=True)]
            radius = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2)
            depth = np.minimum(depth, (radius - 1) * min(half_axes))
        return np.asarray(depth, np.float32)


def _draw_lesions(chest: _Chest, num_lesions: int, rng: np.random.Generator) -> list[_Lesion]:
    """Place lesions in the lungs, a third of them against the lung's border. The class is drawn last."""
    lesions: list[_Lesion] = []
    half = np.array([chest.body_x, chest.body_y, chest.height / 2 - _BORDER_MM], np.float32)
    for _ in range(num_lesions):
        diameter = rng.uniform(11, 20)
        low, high = (0.2, 0.5) if rng.random() < 1 / 3 else (0.6, np.inf)
        points = rng.uniform(-half, half, (4096, 3)).astype(np.float32)
        depth = chest.depth_in_lung(*points.T)
        legal = (depth > low * diameter) & (depth < high * diameter)
        for other in lesions:
            legal &= np.linalg.norm(points - np.array(other.center_lps_mm), axis=1) > MIN_DISTANCE_MM
        if not legal.any():
            raise ValueError(f"no room for lesion {len(lesions) + 1} of {num_lesions} in a phantom; ask for fewer")
        x, y, z = points[np.argmax(legal)].tolist()
        lesions.append(_Lesion((x, y, z), diameter, rng.uniform(-200, 0), int(rng.integers(2))))
    return lesions


def render(chest: _Chest, lesions: list[_Lesion], rng: np.random.Generator) -> sitk.Image:
    """Paint a chest and scan it.

    Args:
        chest: anatomy and scanner.
        lesions: what to put into the lungs.
        rng: draws ribs' and vessels' courses, the lesions' texture and the noise.

    Returns:
        int16 image in HU, its axes stored in `chest.orientation`.
    """
    x, y, z = chest.axes()
    lung = _coverage(chest.depth_in_lung(x, y, z), chest.edge)
    volume = np.broadcast_to(_trunk(chest, x, y), lung.shape).copy()
    _paint_bones(volume, chest, x, y, z)
    _paint_blood(volume, chest, x, y, z)
    # dependent lung is denser, and its parenchyma is not even
    texture = ndimage.zoom(_smooth_noise(rng, tuple(-(-n // 4) for n in volume.shape), 0.7), 4, order=1)
    parenchyma = chest.lung_hu + 0.35 * y + 18 * texture[: lung.shape[0], : lung.shape[1], : lung.shape[2]]
    volume += lung * (parenchyma - volume)
    for side in (-1, 1):
        _paint_vessels(volume, chest, side, rng)
    for lesion in lesions:
        _paint_lesion(volume, lung, chest, lesion, rng)

    noise = ndimage.gaussian_filter(rng.standard_normal(volume.shape, np.float32), (0, *[chest.noise_grain] * 2))
    volume += noise * np.float32(chest.noise_hu / noise.std()) + np.float32(chest.offset_hu)
    image = sitk.GetImageFromArray(np.clip(np.rint(volume), -1024, 3071).astype(np.int16))
    image.SetSpacing(chest.spacing_xyz)
    first_voxel = (x.flat[0], y.flat[0], z.flat[0])
    image.SetOrigin([float(a + b) for a, b in zip(first_voxel, chest.origin_lps, strict=True)])
    return sitk.DICOMOrient(image, chest.orientation)


def _coverage(depth: _Array, edge: float) -> _Array:
    """Share of a voxel that lies inside, from its distance to the border, both mm."""
    return np.asarray(np.clip(depth / np.float32(edge) + np.float32(0.5), 0, 1), np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> _Array:
    """Gaussian noise of standard deviation 1, correlated over `sigma` voxels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma)
    return np.asarray(noise / noise.std(), np.float32)


def _blend(target: _Array, coverage: _Array, value: float | _Array) -> None:
    target += coverage * (np.asarray(value, np.float32) - target)


def _trunk(chest: _Chest, x: _Array, y: _Array) -> _Array:
    """What is the same in every slice: skin, fat, muscle, fat of the mediastinum, shoulder blades, couch."""
    depth, edge = chest.depth_under_skin(x, y), chest.edge
    plane = np.full(depth.shape, _AIR_HU, np.float32)
    _blend(plane, _coverage(depth, edge), 20)
    _blend(plane, _coverage(depth - 2, edge), _FAT_HU)
    _blend(plane, _coverage(depth - chest.fat, edge), _MUSCLE_HU)
    pericardial = 24 - np.hypot(x + 3, 0.6 * (y + 0.1 * chest.body_y))
    _blend(plane, _coverage(pericardial, 6), _FAT_HU + 10)
    for side in (-1, 1):
        across, along = x - side * 0.60 * chest.body_x, y - 0.60 * chest.body_y
        blade = np.abs(along + side * 0.55 * across) - 3.0
        _blend(plane, _coverage(np.minimum(-blade, 24 - np.abs(across)), edge) * (depth > chest.fat), _MARROW_HU + 60)
    couch = 2 - np.abs(y - (chest.body_y + 14 - 0.0006 * x**2))
    _blend(plane, _coverage(couch, edge), -250)
    return plane


def _paint_bones(volume: _Array, chest: _Chest, x: _Array, y: _Array, z: _Array) -> None:
    """Ribs that fall towards the front, a spine with discs, a breastbone."""
    edge = chest.edge
    ring = np.abs(chest.depth_under_skin(x, y) - chest.wall + 6)
    course = (z + 0.42 * y + 0.05 * np.abs(x) + chest.rib_phase) % 26 - 13
    rib = np.sqrt((ring / 4.2) ** 2 + (course / 6.5) ** 2)
    rib += 4 * (np.abs(x) < 30)  # cartilage and muscle where the ribs do not reach
    _blend(volume, _coverage((1 - rib) * 4.2, edge), _CORTEX_HU)
    _blend(volume, _coverage((0.55 - rib) * 4.2, edge), _MARROW_HU)

    spine_y = 0.60 * chest.body_y
    body = 19 - np.hypot(x, 1.15 * (y - spine_y))
    disc = np.abs((z + chest.rib_phase) % 26 - 13) - 9.5  # positive between two vertebrae
    canal = 8.5 - np.hypot(x, y - spine_y - 25)
    arch = 5 - np.abs(np.hypot(0.9 * x, y - spine_y - 25) - 14)
    process = np.minimum(4 - np.abs(x), np.minimum(y - spine_y - 34, spine_y + 60 - y))
    vertebra = np.maximum(np.maximum(body, arch), process)
    _blend(volume, _coverage(vertebra, edge) * _coverage(-disc, edge), _CORTEX_HU - 150)
    _blend(volume, _coverage(np.minimum(body - 3, -disc - 2), 2 * edge), _MARROW_HU)
    _blend(volume, _coverage(np.minimum(body, disc), edge), 80.0)
    _blend(volume, _coverage(canal, edge), 25.0)
    sternum = 1 - np.sqrt((x / 19) ** 2 + ((y + chest.body_y - chest.wall + 9) / 6) ** 2)
    _blend(volume, _coverage(6 * sternum, edge), _CORTEX_HU - 200)


def _paint_blood(volume: _Array, chest: _Chest, x: _Array, y: _Array, z: _Array) -> None:
    """Heart, aorta (ascending and descending), and the air of the trachea's two main branches."""
    half_axes, center = np.array([45.0, 35.0, 38.0]), np.array(chest.heart)
    window, points = _window((x, y, z), center - half_axes - 4, center + half_axes + 4)
    radius = np.sqrt(sum(((p - c) / h) ** 2 for p, c, h in zip(points, center, half_axes, strict=True)))
    _blend(volume[window], _coverage((1 - radius) * 35, 4), _BLOOD_HU)
    spine_y = 0.60 * chest.body_y
    for center_x, center_y, size in ((19.0, spine_y - 19, 11.5), (-6.0, -16.0, 14.0)):
        _blend(volume, _coverage(size - np.hypot(x - center_x, y - center_y), chest.edge), _BLOOD_HU + 40.0)
    for side in (-1, 1):
        bronchus = 5.5 - np.hypot(x - side * (6 + 0.5 * np.maximum(20 - z, 0)), y - 14)
        _blend(volume, _coverage(np.minimum(bronchus, z + 4), chest.edge), _AIR_HU)


def _paint_vessels(volume: _Array, chest: _Chest, side: int, rng: np.random.Generator) -> None:
    """A tree of tubes that grows from the hilum and ends at the lung's border."""
    axes = chest.axes()
    root = np.array([side * (chest.mediastinum + 2), 6, rng.uniform(-8, 12)])
    branches = [(root, np.array([side, dy, dz]), 3.6) for dy in (-0.9, 0.1, 1.0) for dz in (-0.9, 0.9)]
    while branches:
        start, direction, radius = branches.pop()
        direction = direction / np.linalg.norm(direction)
        end = start + direction * (5 + 4 * radius)
        _paint_tube(volume, axes, start, end, radius, edge=chest.edge)
        if radius > 0.75 and chest.depth_in_lung(*end) > 2:
            turns = rng.normal(0, 0.42, (2, 3))
            branches += [(end, direction + turn, radius * rng.uniform(0.66, 0.86)) for turn in turns]


def _paint_tube(volume: _Array, axes: _Axes, start: _Array, end: _Array, radius: float, *, edge: float) -> None:
    low, high = np.minimum(start, end) - radius - edge, np.maximum(start, end) + radius + edge
    window, points = _window(axes, low, high)
    along = end - start
    offset = [p - s for p, s in zip(points, start.astype(np.float32), strict=True)]
    share = np.clip(sum(o * a for o, a in zip(offset, along, strict=True)) / (along @ along), 0, 1)
    distance = np.sqrt(sum((o - share * a) ** 2 for o, a in zip(offset, along, strict=True)))
    # a tube thinner than a voxel fills only part of it
    coverage = _coverage(radius - distance, edge) * min(1.0, 1.2 * radius / edge)
    patch = volume[window]
    np.maximum(patch, patch + coverage * (_MUSCLE_HU - patch), out=patch)


def _window(axes: _Axes, low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[tuple[slice, ...], tuple[_Array, ...]]:
    """The part `(z, y, x)` of the grid between two corners `(x, y, z)`, and its coordinates along x, y, z."""
    bounds = zip(axes, np.asarray(low), np.asarray(high), strict=True)
    x, y, z = (slice(*np.searchsorted(axis.ravel(), (a, b)).tolist()) for axis, a, b in bounds)
    return (z, y, x), (axes[0][:, :, x], axes[1][:, y, :], axes[2][z])


def _paint_lesion(volume: _Array, lung: _Array, chest: _Chest, lesion: _Lesion, rng: np.random.Generator) -> None:
    """Put a lesion into the lung. Both classes are lobulated; see the constants for what sets them apart."""
    radius, center = lesion.diameter_mm / 2, np.array(lesion.center_lps_mm)
    reach = 1.9 * radius + 4
    window, axes = _window(chest.axes(), center - reach, center + reach)
    offset = [np.asarray(p - c, np.float32) for p, c in zip(axes, center, strict=True)]
    distance = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2)

    def field(grain_mm: float) -> _Array:
        """Smooth noise on a 1 mm lattice, so that its grain does not depend on the scan's voxels."""
        size = int(np.ceil(2 * reach)) + 4
        lattice = _smooth_noise(rng, (size,) * 3, grain_mm)
        points = np.broadcast_arrays(*[o + size / 2 for o in reversed(offset)])
        return np.asarray(ndimage.map_coordinates(lattice, points, order=1), np.float32)

    surface = radius * (1 + 0.10 * field(5.0))
    if lesion.label == 0:
        edge, grain_hu = rng.uniform(1.0, 2.5), rng.uniform(10, 40)
    else:
        edge, grain_hu = rng.uniform(2.0, 4.0), rng.uniform(110, 240)
        surface = surface * (0.96 + rng.uniform(0.10, 0.20) * field(2.0))
        surface = surface + radius * _spicules(offset, distance, rng)
    coverage = _coverage(surface - distance, max(edge, chest.edge))
    contrast = coverage * (lesion.mean_hu - chest.lung_hu + grain_hu * field(1.7))
    # the margin must not show in the mean: inside the nominal sphere every lesion has the mean it was given
    core = distance < 0.7 * radius
    contrast += coverage * (lesion.mean_hu - chest.lung_hu - contrast[core].mean()) / coverage[core].mean()
    patch = volume[window]
    patch += lung[window] * (coverage * (chest.lung_hu - patch) + contrast)


def _spicules(offset: list[_Array], distance: _Array, rng: np.random.Generator) -> _Array:
    """How far thin rays reach beyond the surface, in radii."""
    directions = rng.normal(size=(int(rng.integers(7, 14)), 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rays = np.zeros(distance.shape, np.float32)
    for direction in directions:
        cosine = sum(o * d for o, d in zip(offset, direction, strict=True)) / np.maximum(distance, 1e-3)
        ray = rng.uniform(0.3, 0.8) * np.exp((cosine - 1) / 0.02)
        rays = np.maximum(rays, ray)
    return rays
