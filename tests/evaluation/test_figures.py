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

from fmcib_ssl.evaluation.figures import (
    WINDOWS_HU,
    ContactRow,
    SalientLesion,
    SheetLesion,
    contact_sheet,
    lesion_sheet,
    retrieval_sheet,
    saliency_sheet,
    training_curves,
)
from fmcib_ssl.evaluation.probes import nearest_lesions
from fmcib_ssl.types import Preprocessing


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
    with pytest.raises(ValueError, match=r"none\.csv holds no numbers to draw; it should have any of train/loss"):
        training_curves(tmp_path / "none.csv", tmp_path / "none.png")
    pd.DataFrame({"train/loss": [1.0]}).to_csv(tmp_path / "no_step.csv", index=False)
    with pytest.raises(ValueError, match="no column 'step'; it has train/loss"):
        training_curves(tmp_path / "no_step.csv", tmp_path / "none.png")


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
    assert limits[0] == WINDOWS_HU["lung"]
    window = pre.normalize(torch.tensor(WINDOWS_HU["lung"])).tolist()
    assert limits[3][1] == pytest.approx(window[1])
    assert limits[3][0] <= window[0]


def test_a_sheet_of_lesions_in_their_scans(drawn: list[Figure], tmp_path: Path) -> None:
    """Planes meet in the point with the head up; the cross points at its voxel."""
    hu = np.random.default_rng(0).integers(-1000, 400, (31, 20, 25)).astype(np.int16)
    lesions = [SheetLesion("one", hu), SheetLesion("two $x^ of \\frac$", hu[::-1])]
    assert imread(lesion_sheet(lesions, tmp_path / "new folder" / "sheet.png", 2.0)).shape[1] > 1400
    panels = drawn[0].axes
    assert len(panels) == 8
    expected = [hu[15], hu[15], np.flipud(hu[:, 10, :]), np.flipud(hu[:, :, 12])]
    for axes, plane in zip(panels[:4], expected, strict=True):
        shown = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(shown, plane)
        column, row = np.concatenate([np.column_stack(line.get_data()) for line in axes.lines]).mean(0)
        assert shown[round(row), round(column)] == hu[15, 10, 12]
    for draw in (lambda path: lesion_sheet([], path, 1.0), lambda path: contact_sheet([], path)):
        with pytest.raises(ValueError, match="at least one lesion"):
            draw(tmp_path / "none.png")


def test_the_retrieval_sheet_shows_the_middle_of_the_patches_it_names(drawn: list[Figure], tmp_path: Path) -> None:
    features, patients = np.random.default_rng(0).normal(size=(5, 4)), np.arange(5)
    found = nearest_lesions(features, patients, [2], 3)

    def read(row: int) -> torch.Tensor:
        return torch.full((1, 5, 6, 7), 100 * row, dtype=torch.int16) + torch.arange(5)[None, :, None, None]

    retrieval_sheet([2], found, read, lambda row: f"lesion {row}", tmp_path / "sheet.png")
    panels = drawn[0].axes
    for axes, row in zip(panels, [2, *found.rows[0].tolist()], strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), np.full((6, 7), 100 * row + 2))
        assert axes.texts[0].get_text().startswith(f"lesion {row}")
    assert f"cosine {found.cosines[0, 0]:.3f}" in panels[1].texts[0].get_text()


def test_the_saliency_sheet_lays_the_falls_over_the_planes(drawn: list[Figure], tmp_path: Path) -> None:
    falls = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
    lesion = SalientLesion("lesion 1", torch.zeros(1, 6, 8, 8, dtype=torch.int16), falls)
    saliency_sheet([lesion, lesion], tmp_path / "sheet.png")
    over = [np.asarray(axes.images[1].get_array()) for axes in drawn[0].axes[:5] if len(axes.images) == 2]
    np.testing.assert_array_equal(over[0], falls[3])
    np.testing.assert_array_equal(over[1], falls[::-1, 4])


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    contact_sheet([contact_row()], tmp_path / "sheet.png")
    assert dict(mpl.rcParams) == before
