"""Pictures: that they show what they say is read from their pixels and axes; how they look, people judge."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from fmcib_ssl.evaluation import figures
from fmcib_ssl.evaluation.figures import (
    LUNG_WINDOW_HU,
    ContactRow,
    contact_sheet,
    training_curves,
)
from fmcib_ssl.types import Preprocessing


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into their axes."""
    saved: list[Figure] = []
    save = figures.save_figure

    def keep(figure: Figure, *args: object, **kwargs: object) -> Path:
        saved.append(figure)
        return save(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(figures, "save_figure", keep)
    return saved


def contact_row(size: tuple[int, int, int] = (8, 10, 12)) -> ContactRow:
    """A patch whose value tells the voxel: 100 z + 10 y + x."""
    z, y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    patch = (100 * z + 10 * y + x)[None].to(torch.int16)
    view = patch.float() / 1000
    return ContactRow("scan.nii.gz, row 3", patch, (view, view + 1), (view + 2, view + 3))


def test_the_contact_sheet_shows_the_planes_through_the_centre_with_the_head_up(
    drawn: list[Figure], tmp_path: Path
) -> None:
    row = contact_row()
    path = contact_sheet([row, row], tmp_path / "new" / "sheet.png")
    assert imread(path).shape[2] in (3, 4)
    axes = drawn[0].axes
    assert len(axes) == 14
    images = [np.asarray(ax.images[0].get_array()) for ax in axes[:7]]
    volume = row.patch_hu[0].numpy()
    np.testing.assert_array_equal(images[0], volume[4])
    np.testing.assert_array_equal(images[1], volume[::-1, 5])
    np.testing.assert_array_equal(images[2], volume[::-1, :, 6])
    for shift, image in enumerate(images[3:]):
        np.testing.assert_allclose(image, volume[4] / 1000 + shift, rtol=1e-6)


def test_the_cross_points_at_the_voxel_of_the_annotated_point(drawn: list[Figure], tmp_path: Path) -> None:
    row = contact_row()
    contact_sheet([row], tmp_path / "sheet.png")
    center_value = row.patch_hu[0, 4, 5, 6].item()
    for ax in drawn[0].axes[:3]:
        ends = np.concatenate([np.column_stack(line.get_data()) for line in ax.lines])
        column, line_row = ends.mean(0)
        assert np.asarray(ax.images[0].get_array())[round(line_row), round(column)] == center_value
        assert not (np.abs(ends - [column, line_row]).max(1) < 0.5).any()  # the point itself stays free
    assert all(not ax.lines for ax in drawn[0].axes[3:])


def test_patch_and_views_are_shown_in_one_window(drawn: list[Figure], tmp_path: Path) -> None:
    pre = Preprocessing((8, 10, 12), hu_offset=500, hu_scale=200)
    contact_sheet([contact_row()], tmp_path / "sheet.png", pre)
    limits = [ax.images[0].get_clim() for ax in drawn[0].axes]
    assert limits[0] == LUNG_WINDOW_HU
    window = pre.normalize(torch.tensor(LUNG_WINDOW_HU)).tolist()
    assert limits[3][1] == pytest.approx(window[1])
    assert limits[3][0] <= window[0]


def test_a_sheet_needs_lesions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one lesion"):
        contact_sheet([], tmp_path / "sheet.png")


def test_curves_draw_the_columns_that_hold_numbers(drawn: list[Figure], tmp_path: Path) -> None:
    steps = np.arange(100)
    table = pd.DataFrame(
        {
            "epoch": 0,
            "step": steps,
            "train/loss": np.where(steps % 2, np.nan, 4 - steps / 50),
            "train/positive_cosine": steps / 100,
            "train/alignment": np.nan,
            "lr": 0.001,
            "note": "text",
        }
    )
    table.to_csv(tmp_path / "metrics.csv", index=False)
    assert training_curves(tmp_path / "metrics.csv", tmp_path / "curves.png").is_file()
    axes = drawn[0].axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Loss", "Cosine similarity", "Learning rate"]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes)
    x, y = axes[0].lines[0].get_data()
    np.testing.assert_array_equal(x, steps[::2])
    np.testing.assert_allclose(np.asarray(y, float), 4 - steps[::2] / 50)
    # on a straight line a centred running mean is the line itself, away from the ends
    x, y = axes[1].lines[1].get_data()
    np.testing.assert_allclose(np.asarray(y, float)[5:-5], steps[5:-5] / 100, atol=0.006)


def test_curves_of_a_single_step_and_of_nothing(tmp_path: Path) -> None:
    pd.DataFrame({"step": [0], "train/loss": [1.0]}).to_csv(tmp_path / "one.csv", index=False)
    assert training_curves(tmp_path / "one.csv", tmp_path / "one.png").is_file()
    pd.DataFrame({"step": [0], "other": [1.0]}).to_csv(tmp_path / "none.csv", index=False)
    with pytest.raises(ValueError, match=r"none\.csv holds no numbers to draw; wanted any of train/loss"):
        training_curves(tmp_path / "none.csv", tmp_path / "none.png")
    pd.DataFrame({"train/loss": [1.0]}).to_csv(tmp_path / "no_step.csv", index=False)
    with pytest.raises(ValueError, match="no column 'step'; it has train/loss"):
        training_curves(tmp_path / "no_step.csv", tmp_path / "none.png")


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    contact_sheet([contact_row()], tmp_path / "sheet.png")
    assert dict(mpl.rcParams) == before
