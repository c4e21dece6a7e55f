"""Curves against scikit-learn, and that pictures show the numbers they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from fmcib_ssl.evaluation import probe_figures
from fmcib_ssl.evaluation.figures import Palette
from fmcib_ssl.evaluation.metrics import calibration
from fmcib_ssl.evaluation.probe_figures import (
    calibration_curves,
    interval_plot,
    label_fractions,
    mean_roc,
    mean_roc_curves,
    survival_curves,
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    saved: list[Figure] = []
    save = probe_figures.save_figure

    def keep(figure: Figure, path: Path, *, svg: bool) -> Path:
        saved.append(figure)
        return save(figure, path, svg=svg)

    monkeypatch.setattr(probe_figures, "save_figure", keep)
    return saved


def test_the_mean_curve_has_the_mean_area_of_the_folds(drawn: list[Figure], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(0, 2, 500), rng.integers(0, 4, 500)
    scores = labels + rng.normal(size=500) + 10 * folds  # models of two folds share no scale
    labels[folds == 3] = 1  # and one fold lacks a class
    curve = mean_roc(labels, scores, folds)
    areas = [roc_auc_score(labels[folds == k], scores[folds == k]) for k in range(3)]
    assert np.trapezoid(curve[1], curve[0]) == pytest.approx(np.mean(areas), abs=0.005)
    assert abs(roc_auc_score(labels, scores) - np.mean(areas)) > 0.05  # put together they would have another
    with pytest.raises(ValueError, match="no fold holds both classes"):
        mean_roc(np.ones(4), np.arange(4), np.zeros(4))
    mean_roc_curves({"ours": curve}, tmp_path / "roc.png", Palette(), "Texture")
    np.testing.assert_array_equal(drawn[0].axes[0].lines[1].get_ydata(), curve[1])


def test_intervals_stand_where_they_are(drawn: list[Figure], tmp_path: Path) -> None:
    rows = pd.DataFrame({"name": ["a", "b"], "value": [0.8, 0.6], "low": [0.7, 0.5], "high": [0.85, 0.7]})
    interval_plot({"AUC": rows, "again": rows[::-1]}, tmp_path / "plot.png", Palette(), "AUC", zero=True)
    for axes, order in zip(drawn[0].axes, (["a", "b"], ["b", "a"]), strict=True):
        assert [text.get_text() for text in axes.get_yticklabels()] == order
        zero, *lines = axes.lines
        assert zero.get_xdata() == [0, 0]
        by_name = rows.set_index("name").loc[order]
        for place, (_, row) in enumerate(by_name.iterrows()):
            bar, dot = lines[2 * place : 2 * place + 2]
            assert list(bar.get_xdata()) == [row.low, row.high]
            assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (row.value, place)
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top


def test_calibration_fractions_and_survival_show_their_numbers(drawn: list[Figure], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = calibration(rng.integers(0, 2, 300), rng.uniform(size=300))
    calibration_curves({"ours": found}, tmp_path / "calibration.png", Palette())
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("ours")]
    np.testing.assert_array_equal(line.get_ydata(), found.observed)

    rows = pd.DataFrame({"name": "ours", "fraction": [1.0, 0.1], "value": [0.9, 0.8], "low": 0.7, "high": 0.95})
    label_fractions(rows, tmp_path / "fractions.png", Palette(), "AUC")
    assert list(drawn[1].axes[0].lines[0].get_xdata()) == [10, 100]
    assert list(drawn[1].axes[0].lines[0].get_ydata()) == [0.8, 0.9]

    half = {"name": "high risk", "num": 3, "num_events": 1, "times": [0.0, 2.0], "survival": [1.0, 0.5]}
    survival_curves([half], tmp_path / "survival.png")
    assert drawn[2].axes[0].lines[0].get_drawstyle() == "steps-post"
    assert list(drawn[2].axes[0].lines[0].get_ydata()) == [1.0, 0.5]


def test_a_series_has_one_colour_in_all_figures_and_every_axis_a_name(drawn: list[Figure], tmp_path: Path) -> None:
    """Whatever the order; and `$` in a name is no formula."""
    palette, names = Palette(), ["$ours", "random_{$", "voxels"]
    rows = pd.DataFrame({"name": names, "value": 0.8, "low": 0.7, "high": 0.9, "fraction": 1.0})
    interval_plot({"AUC": rows}, tmp_path / "a.png", palette, "AUC")
    less = rows.iloc[:2].assign(name=["random_{$ less voxels", "$ours less voxels"], features=["random_{$", "$ours"])
    interval_plot({"$": less}, tmp_path / "b.png", palette, "difference in AUC", zero=True)
    label_fractions(rows[::-1], tmp_path / "c.png", palette, "AUC")
    colors = [line.get_color() for line in drawn[0].axes[0].lines[::2]]
    assert len(set(colors)) == 3
    assert [line.get_color() for line in drawn[1].axes[0].lines[1::2]] == [colors[1], colors[0]]
    assert [line.get_color() for line in drawn[2].axes[0].lines] == colors[::-1]
    assert [figure.axes[0].get_xlabel() for figure in drawn[:2]] == ["AUC", "difference in AUC"]
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
