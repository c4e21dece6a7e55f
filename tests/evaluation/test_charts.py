"""Curves and maps against scikit-learn, and that pictures show the numbers they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from fmcib_ssl.evaluation.charts import (
    Palette,
    calibration_curves,
    columns_to_color,
    interval_plot,
    is_measurement,
    label_fractions,
    map_of_columns,
    mean_roc,
    mean_roc_curves,
    point_colors,
    principal_components,
    survival_curves,
    training_curves,
    umap_layout,
)
from fmcib_ssl.evaluation.metrics import calibration


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


def test_places_are_the_pca_of_standardised_features() -> None:
    features = np.random.default_rng(0).normal(size=(40, 6)) * [1, 10, 100, 3, 0, 1]
    places, shares = principal_components(features)
    oracle = PCA(2).fit(StandardScaler().fit_transform(features))
    expected = oracle.transform(StandardScaler().fit_transform(features))
    np.testing.assert_allclose(np.abs(places), np.abs(expected), atol=1e-8)
    np.testing.assert_allclose(shares, oracle.explained_variance_ratio_)


@pytest.mark.slow
def test_umap_keeps_neighbours_and_gives_the_same_map_again() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(6, 20))[rng.integers(0, 6, 90)] + 0.2 * rng.normal(size=(90, 20))).astype(np.float32)
    places = umap_layout(features)
    assert trustworthiness(features, places, n_neighbors=5, metric="cosine") > 0.9
    np.testing.assert_array_equal(places, umap_layout(features))


def lesions(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "lesion_id": [f"l{k}" for k in range(n)],
            "scan_id": "one",
            "center_z": rng.normal(size=n),
            "texture": rng.integers(1, 5, n).astype(float),
            "diameter_mm": rng.uniform(3, 30, n),
            "site": [f"site {k % 11}" for k in range(n)],
            "nodule_id": np.arange(n) % 4,
            "comment": [f"text {k}" for k in range(n)],
            "always": 1,
            "rare": [1.0, 2.0] + [np.nan] * (n - 2),
            "margin": np.where(np.arange(n) % 4 == 0, None, np.arange(n) % 2),
        }
    )


def test_columns_that_say_something_are_found() -> None:
    table = lesions()
    assert columns_to_color(table) == ["texture", "margin", "diameter_mm"]
    assert columns_to_color(table, limit=1) == ["texture"]
    assert [is_measurement(table[name]) for name in ("texture", "diameter_mm", "site")] == [False, True, False]


def test_classes_measurements_and_what_is_missing(drawn: list[Figure], tmp_path: Path) -> None:
    table = lesions()
    where = np.random.default_rng(1).normal(size=(60, 2))
    layouts = {"PCA": (where, ("component 1", "component 2")), "UMAP": (where, ("", ""))}
    names = ["texture", "diameter_mm", "site", "margin"]
    map_of_columns(layouts, table[names], tmp_path / "maps.png")
    panels = [axes for axes in drawn[0].axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels][::4] == ["PCA, by texture", "UMAP, by texture"]
    for offset in (0, 4):
        texture, diameter, site, margin = panels[offset : offset + 4]
        for axes, name in zip((texture, diameter, site, margin), table[names], strict=True):
            (points,) = axes.collections
            np.testing.assert_allclose(points.get_offsets(), where)
            assert [to_hex(color) for color in points.get_facecolor()] == point_colors(table[name])[0]
        assert texture.get_legend().get_texts()[0].get_text() == f"1 ({(table.texture == 1).sum()})"
    colors, legend = point_colors(table["site"])
    assert len(legend) == 8 and set(colors) == set(legend.values()) and list(legend)[-1].startswith("4 others (")
    colors, legend = point_colors(table["margin"])
    assert list(legend.items())[-1] == ("missing (15)", "#d5dae0") and colors[::4] == ["#d5dae0"] * 15
    by_size = np.array(point_colors(table["diameter_mm"])[0])[np.argsort(table["diameter_mm"])]
    assert by_size[0] == by_size[1] == to_hex(colormaps["viridis"](0.0)) != by_size[30]
