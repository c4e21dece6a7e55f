"""The page and the terminal's table, read back by parsers that are not ours."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread, imsave
from pages import parse

from fmcib_ssl.evaluation.metrics import Estimate
from fmcib_ssl.evaluation.report import results_table, write_report
from fmcib_ssl.evaluation.report_results import ReportFigure, Section

ROWS = pd.DataFrame(
    [
        {"features": "pretrained", "AUC": Estimate(0.94, 0.9, 0.97), "dim": 128},
        {"features": "raw <voxels>", "AUC": 0.61234, "dim": 64},
    ]
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    imsave(path, np.linspace(0, 1, 12).reshape(3, 4))
    return path


def test_the_page_holds_everything_it_shows(picture: Path, tmp_path: Path) -> None:
    sections = [
        Section("Numbers", "First.\n\nSecond & <last>.", ROWS),
        Section("Pictures", figures=[ReportFigure(picture, 'A "picture"')]),
    ]
    path = write_report(tmp_path / "new" / "report.html", "What was learned", sections, "run 1")
    original = imread(picture)
    picture.unlink()
    page = parse(path)
    assert page.cells == [
        "features", "AUC", "dim", "pretrained", "0.94 (0.90 to 0.97)", "128", "raw <voxels>", "0.612", "64",
    ]  # fmt: skip
    for text in ("What was learned", "run 1", "First.", "Second & <last>.", 'A "picture"'):
        assert text in page.text
    (address,) = page.addresses
    head, data = address.split(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(imread(io.BytesIO(base64.b64decode(data))), original)
    assert not re.search(r"https?://|<script|@import|url\(", path.read_text())


def test_the_page_is_legible_in_the_dark(tmp_path: Path) -> None:
    """Ink and muted text keep the contrast that WCAG asks of body text, on both papers."""

    def luminance(color: str) -> float:
        channels = np.array([int(color[k : k + 2], 16) for k in (0, 2, 4)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    page = write_report(tmp_path / "report.html", "Title", []).read_text()
    schemes = re.findall(r":root \{([^}]*)\}", page)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = {name: luminance(value) for name, value in re.findall(r"--(\w+): #(\w{6})", scheme)}
        for paper in ("paper", "band"):
            for ink in ("ink", "muted"):
                low, high = sorted((colors[paper], colors[ink]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


def test_a_missing_figure_leaves_no_half_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        write_report(tmp_path / "r.html", "T", [Section("S", figures=[ReportFigure(tmp_path / "absent.png", "")])])
    assert not (tmp_path / "r.html").exists()


def test_the_terminals_table_reads_back() -> None:
    text = results_table(ROWS)
    assert text.splitlines()[1].replace(" ", "").strip("-") == ""
    assert not any(line.endswith(" ") for line in text.splitlines())
    table = pd.read_csv(io.StringIO(text), sep=r"\s{2,}", engine="python", skiprows=[1])
    assert list(table.columns) == ["features", "AUC", "dim"]
    assert table.AUC.tolist() == ["0.94 (0.90 to 0.97)", "0.612"]
    assert table.dim.tolist() == [128, 64]
