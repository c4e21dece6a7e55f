"""The picture against the voxels that it shows."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from fmcib_ssl.evaluation import lesion_sheet as module
from fmcib_ssl.evaluation.lesion_sheet import SheetLesion, lesion_sheet


def test_planes_meet_in_the_point_with_the_head_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (31, 20, 25)).astype(np.int16)
    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path, dpi: figures.append(figure) or Path(path))
    lesion_sheet([SheetLesion("one", hu), SheetLesion("two", hu[::-1])], tmp_path / "sheet.png", 1.0)
    drawn = [axes.images[0].get_array() for axes in figures[0].axes]
    assert len(drawn) == 8
    expected = [hu[15], hu[15], np.flipud(hu[:, 10, :]), np.flipud(hu[:, :, 12])]
    for panel, plane in zip(drawn[:4], expected, strict=True):
        np.testing.assert_array_equal(panel, plane)
    for axes in figures[0].axes[:4]:  # the arms of the cross point at the voxel of the point, and leave it free
        shown = axes.images[0].get_array()
        rows = {line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1]}
        columns = {line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]}
        ((row,), (column,)) = rows, columns
        assert shown[int(row), int(column)] == hu[15, 10, 12]


def test_one_picture_for_many_lesions(tmp_path: Path) -> None:
    lesions = [
        SheetLesion(f"lesion {i} $x^ of \\frac$", np.full((20, 20, 20), -1000 + 100 * i, np.int16)) for i in range(5)
    ]
    path = lesion_sheet(lesions, tmp_path / "new folder" / "sheet.png", 2.0)
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > 1400
    assert 0.3 * width < height < width
    with pytest.raises(ValueError, match="at least one lesion"):
        lesion_sheet([], tmp_path / "sheet.png", 1.0)
