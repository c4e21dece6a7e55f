"""Maps: their places against scikit-learn, and which columns colour them how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.preprocessing import StandardScaler

from fmcib_ssl.evaluation import embedding_maps
from fmcib_ssl.evaluation.embedding_maps import (
    columns_to_color,
    is_measurement,
    map_of_columns,
    principal_components,
    umap_places,
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    saved: list[Figure] = []
    save = embedding_maps.save_figure

    def keep(figure: Figure, path: Path) -> Path:
        saved.append(figure)
        return save(figure, path)

    monkeypatch.setattr(embedding_maps, "save_figure", keep)
    return saved


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
    places = umap_places(features)
    assert trustworthiness(features, places, n_neighbors=5, metric="cosine") > 0.9
    np.testing.assert_array_equal(places, umap_places(features))


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
    places = {"PCA": (where, ("component 1", "component 2")), "UMAP": (where, ("", ""))}
    map_of_columns(places, table[["texture", "diameter_mm", "site", "margin"]], tmp_path / "maps.png")
    panels = [axes for axes in drawn[0].axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels][::4] == ["PCA, by texture", "UMAP, by texture"]
    for offset in (0, 4):
        texture, diameter, site, margin = panels[offset : offset + 4]
        for axes, kind in zip(texture.collections, (1, 2, 3, 4), strict=True):
            np.testing.assert_allclose(axes.get_offsets(), where[table["texture"] == kind])
        assert texture.get_legend().get_texts()[0].get_text() == f"1 ({(table.texture == 1).sum()})"
        np.testing.assert_allclose(diameter.collections[0].get_array(), table["diameter_mm"])
        texts = [text.get_text() for text in site.get_legend().get_texts()]
        assert len(texts) == 8 and texts[-1].startswith("4 others (")
        assert sum(len(part.get_offsets()) for part in site.collections) == 60
        assert to_hex(margin.collections[0].get_facecolor()[0]) == "#d5dae0"
        assert len(margin.collections[0].get_offsets()) == table["margin"].isna().sum()
