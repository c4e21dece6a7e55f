"""The page from a run folder, a table of features and an evaluation, read back by a parser that is not ours."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imsave
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import trustworthiness
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from stores import make_store
from torch import nn

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.evaluation import report_features, report_maps, report_results
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.figures import Palette
from fmcib_ssl.evaluation.metrics import Estimate
from fmcib_ssl.evaluation.probes import nearest_lesions
from fmcib_ssl.evaluation.report import report_all, results_table, write_report
from fmcib_ssl.evaluation.report_features import FeatureOptions, agreement, linear_readout, occlusion
from fmcib_ssl.evaluation.report_maps import columns_to_color, point_colors
from fmcib_ssl.evaluation.report_results import ReportFigure, Section, answer, result_sections
from fmcib_ssl.models import export_encoder, small_resnet
from fmcib_ssl.types import Preprocessing

captum = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="needs captum")
REPO = Path(__file__).resolve().parents[2]
SIZE = (8, 8, 8)
ENCODER = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 8, 8, 8]}
NUM_SCANS = 12


ROWS = pd.DataFrame(
    [
        {"features": "pretrained", "AUC": Estimate(0.94, 0.9, 0.97), "dim": 128},
        {"features": "raw <voxels>", "AUC": 0.61234, "dim": 64},
    ]
)


class Page(HTMLParser):
    """Collects addresses, headings and text, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object")
        assert tag != "script" or not dict(attrs).keys() - {"type"}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def parse(path: Path) -> Page:
    page = Page()
    text = path.read_text(encoding="utf-8")
    page.feed(text)
    page.close()
    assert page.open == []
    assert not re.search(r"@import|https?://(?!www\.w3\.org/2000/svg)|url\((?!data:)", text)
    for address in page.addresses:
        assert (
            address.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,"))
            or address.removeprefix("#") in page.ids
        ), address[:80]
    return page


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a store with its features, and an evaluation, each in a folder."""
    folder = tmp_path_factory.mktemp("report")
    _write_store(folder / "store")
    (folder / "run").mkdir()
    encoder = small_resnet(widths=[4, 8, 8, 8])
    pre = Preprocessing(SIZE)
    export_encoder(encoder, ENCODER, pre, folder / "run" / "encoder.safetensors")
    patches = LesionPatches(folder / "store", SIZE)
    with torch.no_grad():
        hu = torch.stack([patches.positive(i) for i in range(len(patches))])
        features = encoder.eval()(pre.normalize(hu)).numpy()
    lesions = patches.lesions.assign(lesion_id=patches.lesions["lesion_id"].astype(str))
    order = np.random.default_rng(0).permutation(len(lesions))  # not the order of the store: rows are joined by id
    provenance = {
        "name": "ours",
        "kind": "encoder",
        "weights": str(folder / "run" / "encoder.safetensors"),
        "preprocessing": pre.to_dict(),
        "source": {"kind": "store", "path": str(folder / "store")},
    }
    table = FeatureTable(lesions.iloc[order].reset_index(drop=True), features[order], provenance)
    table.write(folder / "features.parquet")
    _write_run(folder / "run")
    _write_results(folder / "evaluated", table)
    return folder


def _write_store(folder: Path) -> None:
    rng, numbers = np.random.default_rng(0), [(scan, lesion) for scan in range(NUM_SCANS) for lesion in range(3)]
    scans = {f"s{scan}": rng.integers(-20, 20, (20, 40, 40)).astype(np.int16) for scan in range(NUM_SCANS)}
    rough = [(scan + lesion) % 2 for scan, lesion in numbers]
    for (scan, lesion), is_rough in zip(numbers, rough, strict=True):
        block = np.s_[6:14, 6:14, 4 + 12 * lesion : 12 + 12 * lesion]
        scans[f"s{scan}"][block] = rng.normal(100, 150 if is_rough else 10, SIZE)
    ids, patients = [f"lesion-{k}" for k in range(len(numbers))], [f"p{scan}" for scan, _ in numbers]
    columns = {"lesion_id": ids, "rough": rough, "size": rng.uniform(size=len(ids)), "PatientID": patients}
    make_store(folder, scans, [(f"s{scan}", 10, 10, 8 + 12 * lesion) for scan, lesion in numbers], **columns)


def _write_run(folder: Path) -> None:
    steps = np.arange(70)
    metrics = pd.DataFrame({"step": steps, "train/loss": 3 - steps / 100, "signals/negatives_solved": np.nan})
    metrics["signals/collapsed"] = np.nan
    for step, solved in ((20, 0.0), (50, 1.0)):
        metrics.loc[steps == step, ["signals/negatives_solved", "signals/collapsed"]] = [solved, 0.0]
    metrics.loc[steps % 10 == 0, "online/linear_auc"] = 0.5
    metrics.to_csv(folder / "metrics.csv", index=False)
    config = {"name": "mine", "seed": 3, "loss": {"_target_": "fmcib_ssl.losses.InfoNCELoss", "negatives": "mined"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"command": ["train.py", "<seed>"], "packages": {"torch": "2.9"}, "git": {"commit": "abc123"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    imsave(folder / "contact_sheet.png", np.zeros((4, 4)))


def _write_results(folder: Path, table: FeatureTable) -> None:
    folder.mkdir()
    about = {"task": "rough", "probe": "logistic", "split": "5 folds"}
    rows = [
        {"features": name, **about, "metric": metric, "value": value, "low": value - 0.1, "high": value + 0.1,
         "num_train": 30, "num_test": 36, "fraction": fraction}
        for name, value in (("ours", 0.81), ("random weights <b>", 0.62))
        for metric in ("AUC", "balanced accuracy")
        for fraction in (1.0, 0.5)
    ]  # fmt: skip
    rows.append({**rows[0], "features": "size", "value": None, "low": None, "high": None})
    ahead = {"features": "ours", "against": "random weights <b>", **about, "metric": "AUC", "fraction": 1.0}
    halves = [
        {"name": f"{side} risk", "num": 9, "num_events": 4, "times": [0.0, 5.0], "survival": [1.0, 0.6]}
        for side in ("low", "high")
    ]
    found = {
        "rows": rows,
        "differences": [{**ahead, "value": 0.19, "low": 0.05, "high": 0.3}],
        "leakage": [
            {"check": "patients", "found": False, "refuses": True, "message": "all is well"},
            {"check": "extent", "found": True, "refuses": False, "message": "the extent predicts the label"},
        ],
        "survival": [{"features": "ours", "probe": "cox", "log_rank_p": 0.03, "halves": halves}],
        "missing": [{"features": "raw voxels", "reason": "no patches"}],
    }
    (folder / "results.json").write_text(json.dumps(found))
    rng = np.random.default_rng(1)
    predictions = table.lesions[["lesion_id"]].assign(
        fold=[str(k % 3) for k in range(len(table))], probe="logistic", fraction=1.0, split="5 folds",
        label=table.lesions["rough"].astype(float),
    )  # fmt: skip
    pd.concat(
        [
            predictions.assign(features=name, score=rng.uniform(size=len(table)))
            for name in ("ours", "random weights <b>")
        ]
    ).to_parquet(folder / "predictions.parquet")


@pytest.fixture(autouse=True)
def _no_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba takes long to compile it; the map has a test of its own."""
    monkeypatch.setattr(report_maps, "has_umap", lambda: False)


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


def test_the_terminals_table_reads_back() -> None:
    text = results_table(ROWS)
    assert text.splitlines()[1].replace(" ", "").strip("-") == ""
    assert not any(line.endswith(" ") for line in text.splitlines())
    table = pd.read_csv(io.StringIO(text), sep=r"\s{2,}", engine="python", skiprows=[1])
    assert list(table.columns) == ["features", "AUC", "dim"]
    assert table.AUC.tolist() == ["0.94 (0.90 to 0.97)", "0.612"]
    assert table.dim.tolist() == [128, 64]


def test_the_page_holds_all_and_needs_nothing(given: Path, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    path = report_all(
        tmp_path / "new" / "report.html",
        run=given / "run",
        features=[given / "features.parquet"],
        results=[given / "evaluated"],
        introduction="First words.",
        options=FeatureOptions(label="rough", queries=4, salient=2),
    )
    pictures = list(path.with_name("report_pictures").rglob("*.png"))
    assert len(pictures) >= 9
    shutil.rmtree(path.with_name("report_pictures"))
    page = parse(path)
    assert sum(address.startswith("data:") for address in page.addresses) == len(pictures) + 1  # and the contact sheet
    assert page.headings == [
        "About", "Did it learn?", "Results: rough", "ROC and calibration: evaluated", "Survival: evaluated",
        "Leakage checks, evaluated", "Map: ours", "Nearest neighbours: ours", "Saliency: ours",
        "Training", "What the encoder saw", "How it was made",
    ]  # fmt: skip
    for text in (
        "First words.",
        "Pretraining helped: +0.19 (+0.05 to +0.30) AUC for rough (ours, logistic).",
        "The negatives were solved",
        "first at step 50",
        "0.81 (0.71 to 0.91)",
        "random weights <b>",
        "30 / 36",
        "Not computed: raw voxels: no patches",
        "the extent predicts the label",
        "log-rank p = 0.03",
        "loss",
        "{_target_: fmcib_ssl.losses.InfoNCELoss, negatives: mined}",
        "train.py <seed>",
        "abc123",
        "pip install 'fmcib_ssl[report]'",
        "Over all 36 lesions",
    ):
        assert text in page.text, text
    assert "all is well" not in page.text
    assert "collapsed" not in page.text


def test_a_report_without_names(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name of a patient, scan, file or folder; what is fitted and drawn is the same."""
    run, evaluated = tmp_path / "run", tmp_path / "evaluated"
    shutil.copytree(given / "run", run)
    shutil.copytree(given / "evaluated", evaluated)
    config = {"name": "mine", "data": {"store": "Doe_John", "select": {"PatientID": ["Doe"]}, "patch_size": [8, 8, 8]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"command": ["train.py", "data.store=Doe_John"]}))
    found = json.loads((evaluated / "results.json").read_text())
    found["leakage"][0] |= {"found": True, "message": "1 patients are on more than one side of the split, such as Doe"}
    (evaluated / "results.json").write_text(json.dumps(found))
    table = FeatureTable.read(given / "features.parquet")
    lesions = table.lesions.assign(PatientID="Doe " + table.lesions["PatientID"]).drop(columns="rough")
    features = [FeatureTable(lesions, table.features, table.provenance).write(tmp_path / "doe.parquet")]
    captions: list[str] = []

    def note(queries: list[int], found: Any, read: Any, caption: Any, path: Path, **_: Any) -> Path:
        captions.extend(map(caption, queries))
        imsave(path, np.zeros((4, 4)))
        return path

    monkeypatch.setattr(report_features, "retrieval_sheet", note)
    pages = {}
    for identifiers in ("show", "hash"):
        options = FeatureOptions(salient=0, queries=2, identifiers=identifiers)
        page = report_all(tmp_path / "page.html", run=run, features=features, results=[evaluated], options=options)
        pages[identifiers] = parse(page)
    assert "Doe" in pages["show"].text
    assert "Doe" not in pages["hash"].text
    assert str(tmp_path) not in pages["hash"].text
    assert "patients" in pages["hash"].text
    assert "the names of scans stand on it" in pages["hash"].text
    assert len(pages["hash"].addresses) == len(pages["show"].addresses) - 1  # the contact sheet of the run
    assert captions[2:] == [hashlib.sha256(name.encode()).hexdigest()[:8] for name in captions[:2]]
    with pytest.raises(FeatureTableError, match="identifiers=hash shows no names, but PatientID has such"):
        report_all(tmp_path / "page.html", features=features, options=FeatureOptions(["PatientID"], identifiers="hash"))
    gone = FeatureTable(lesions, table.features, {**table.provenance, "source": {"kind": "store", "path": "Doe"}})
    features = [gone.write(tmp_path / "gone.parquet")]
    page = report_all(tmp_path / "page.html", features=features, options=FeatureOptions(identifiers="hash"))
    assert "Doe" not in parse(page).text


def test_features_whose_scans_are_gone_are_mapped_all_the_same(given: Path, tmp_path: Path) -> None:
    table = FeatureTable.read(given / "features.parquet")
    gone = FeatureTable(
        table.lesions, table.features, {**table.provenance, "source": {"kind": "store", "path": "gone"}}
    )
    page = parse(report_all(tmp_path / "report.html", features=[gone.write(tmp_path / "gone.parquet")]))
    assert page.headings == ["Map: ours", "Patches: ours"]
    assert '"tiles": ""' in page.text
    assert "gone is not a store" in page.text


def test_what_is_not_there_is_named(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match="nothing to report on"):
        report_all(out)
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        report_all(out, run=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="fmcib-ssl evaluate"):
        report_all(out, results=[given])
    with pytest.raises(FeatureTableError, match=r"ours has no column 'texture'; it has .*rough"):
        report_all(out, features=[given / "features.parquet"], options=FeatureOptions(label="texture"))
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        write_report(out, "T", [Section("S", figures=[ReportFigure(tmp_path / "absent.png", "")])])
    assert not out.exists()


@pytest.mark.parametrize("num", [1, 3])
def test_a_few_lesions_have_a_page(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    monkeypatch.setattr(report_maps, "has_umap", lambda: True)
    table = FeatureTable.read(given / "features.parquet")
    few = FeatureTable(table.lesions.iloc[:num].reset_index(drop=True), table.features[:num], table.provenance)
    page = parse(report_all(tmp_path / "report.html", features=[few.write(tmp_path / "few.parquet")]))
    assert "Fewer than 15 lesions" in page.text
    assert "Saliency is not shown: " in page.text


def test_the_map_shows_each_lesions_own_patch(given: Path, tmp_path: Path) -> None:
    """The tile at a point's place is the middle axial plane of the lesion of that row, in the lung window."""
    table = FeatureTable.read(given / "features.parquet")
    section = report_features.feature_sections(table, FeatureOptions(queries=0, salient=0), tmp_path)[0]
    points = section.points
    assert points is not None
    with Image.open(io.BytesIO(base64.b64decode(points["tiles"]))) as opened:
        tiles = np.asarray(opened, dtype=float)
    store = LesionPatches(given / "store", SIZE)
    ids, edge = store.lesions["lesion_id"].tolist(), points["tile_edge"]
    for row in (0, 17, 35):
        down, across = divmod(points["tile_of"][row], points["num_across"])
        tile = tiles[down * edge : (down + 1) * edge, across * edge : (across + 1) * edge]
        hu = store.positive(ids.index(table.lesions["lesion_id"].iloc[row]))[0, 4].numpy()
        grey = np.clip((hu.astype(float) + 1350) / 1500, 0, 1) * 255
        blocks = tile.reshape(8, edge // 8, 8, edge // 8).mean((1, 3))
        assert np.corrcoef(blocks.ravel(), grey.ravel())[0, 1] > 0.9
    assert points["columns"]["rough"]["values"] == table.lesions["rough"].astype(str).tolist()


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.25, 0.14, 0.38, "Pretraining helped: +0.25 (+0.14 to +0.38)"),
        (0.02, -0.03, 0.06, "No difference from random weights can be shown: +0.02 (-0.03 to +0.06)"),
        (-0.2, -0.3, -0.1, "Pretraining did harm: -0.20 (-0.30 to -0.10)"),
    ],
)  # fmt: skip
def test_a_sentence_answers_the_question(value: float, low: float, high: float, expected: str) -> None:
    row = {"features": "ours", "task": "y", "probe": "logistic", "split": "", "fraction": 1.0, "metric": "AUC"}
    against = {"against": "untrained", "value": value, "low": low, "high": high}
    smaller = {**row, **against, "fraction": 0.5, "value": 9.0}
    voxels = {**row, **against, "against": "raw voxels"}
    provenances = {"untrained": {"kind": "random_weights"}, "ours": {"kind": "encoder"}}
    found = {
        "rows": [row],
        "differences": [{**row, **against}, smaller, voxels],
        "provenance": {"features": provenances},
    }
    assert answer(found) == f"{expected} AUC for y (ours, logistic)."


def test_the_page_of_a_fine_tuning(given: Path, tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    for fold in ("fold_0", "fold_1"):
        (run / fold).mkdir(parents=True)
        metrics = {"step": [1, 2, 3], "train/loss": [0.7, 0.5, 0.4], "val/score": [0.5, 0.7, 0.8]}
        pd.DataFrame(metrics).to_csv(run / fold / "metrics.csv", index=False)
    rows = [{"metric": "AUC", "value": 0.9, "low": 0.8, "high": 0.95}]
    found = {"rows": rows, "label": "rough", "kind": "binary", "classes": ["0", "1"], "train": "all", "weights": "e.st"}
    (run / "results.json").write_text(json.dumps(found))
    predictions = pd.read_parquet(given / "evaluated" / "predictions.parquet").iloc[:36]
    sides = ["val", "test"] * 18
    predictions.drop(columns=["features", "probe", "fraction"]).assign(split=sides).to_parquet(
        run / "predictions.parquet"
    )
    config = {"data": {"store": "s", "select": {"fold": [1, 2]}}, "finetune": {"label": "rough"}}
    config |= {"method": {"_target_": "x.MinedContrast"}, "encoder": {"_target_": "x.small_net"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for options in ({"run": run}, {"results": [run]}, {"run": run, "results": [run]}):
        page = parse(report_all(tmp_path / "report.html", **options))
        assert page.headings[:2] == ["Results: rough", "ROC and calibration: tuned"]
        assert ("Training" in page.headings) == ("run" in options)
        assert "0.90 (0.80 to 0.95)" in page.text
        assert "pretrained weights" in page.text
    assert "select: {fold: [1, 2]}, store: s" in page.text
    assert "small_net" in page.text
    assert "MinedContrast" not in page.text


def test_links_in_a_run_are_not_followed_and_a_failed_write_leaves_the_old_page(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret.png"
    shutil.copytree(given / "run", run)
    shutil.copy(run / "contact_sheet.png", secret)
    for name in ("contact_sheet.png", "config.yaml", "environment.json"):
        (run / name).unlink()
        (run / name).symlink_to(secret)
    page = tmp_path / "report.html"
    report_all(page, run=run)
    assert base64.b64encode(secret.read_bytes()).decode()[:60] not in page.read_text()
    assert "is a link, which is not followed" in page.read_text()
    before = page.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        report_all(page, run=run)
    assert page.read_bytes() == before


def test_results_are_drawn_where_they_are(drawn: list[Figure], tmp_path: Path) -> None:
    """A series has one colour in all figures, every axis a name, and `$` in a name is no formula."""
    about = {"task": "y", "probe": "logistic", "metric": "AUC"}
    values = {"$ours": 0.8, "random_{$": 0.6}
    rows = [
        {**about, "features": name, "fraction": share, "value": value * share, "low": value - 0.1, "high": value + 0.05}
        for name, value in values.items()
        for share in (0.9, 1.0)
    ]
    ahead = {**about, "features": "random_{$", "against": "$ours", "value": -0.2, "low": -0.3, "high": 0.0}
    half = {"name": "high risk", "num": 3, "num_events": 1, "times": [0.0, 2.0], "survival": [1.0, 0.5]}
    survival = {"features": "$ours", "probe": "cox", "log_rank_p": None, "halves": [half]}
    results = {"rows": rows, "differences": [{**ahead, "fraction": 1.0}], "survival": [survival]}
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(0, 2, 500), rng.integers(0, 4, 500)
    scores = 0.1 * labels + 0.2 * (3 - folds) + rng.uniform(0, 0.3, 500)  # folds' models share no scale
    labels[folds == 3] = 1  # and one fold lacks a class
    table = pd.DataFrame(
        {"features": "random_{$", "probe": "logistic", "label": labels, "score": scores, "fold": folds}
    )
    table.to_parquet(tmp_path / "predictions.parquet")

    result_sections(results, tmp_path, tmp_path / "pictures", Palette())
    intervals, differences, fractions, roc, calibrated, kaplan_meier = (figure.axes[0] for figure in drawn)
    assert [text.get_text() for text in intervals.get_yticklabels()] == list(values)
    assert intervals.get_ylim()[0] > intervals.get_ylim()[1]  # the first row is at the top
    bars, dots = intervals.lines[::2], intervals.lines[1::2]
    for place, (value, bar, dot) in enumerate(zip(values.values(), bars, dots, strict=True)):
        assert list(bar.get_xdata()) == [value - 0.1, value + 0.05]
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (value, place)
    colors = [line.get_color() for line in bars]
    zero, bar, _ = differences.lines
    assert list(zero.get_xdata()) == [0, 0] and list(bar.get_xdata()) == [-0.3, 0] and bar.get_color() == colors[1]
    assert [text.get_text() for text in differences.get_yticklabels()] == ["random_{$ minus $ours"]
    assert list(fractions.lines[0].get_xdata()) == [90, 100]
    assert list(fractions.lines[0].get_ydata()) == pytest.approx([0.72, 0.8])
    assert [line.get_color() for line in fractions.lines] == colors
    areas = [roc_auc_score(labels[folds == k], scores[folds == k]) for k in range(3)]
    x, y = roc.lines[1].get_data()
    assert np.trapezoid(y, x) == pytest.approx(np.mean(areas), abs=0.005)
    assert abs(roc_auc_score(labels, scores) - np.mean(areas)) > 0.05  # put together they would have another
    observed = calibrated.lines[-1]
    assert observed.get_color() == roc.lines[1].get_color() == colors[1]
    assert np.average(observed.get_ydata(), weights=np.full(10, 50)) == pytest.approx(labels.mean(), abs=0.01)
    assert kaplan_meier.lines[0].get_drawstyle() == "steps-post"
    assert list(kaplan_meier.lines[0].get_ydata()) == [1.0, 0.5]
    assert all(axes.get_xlabel() for axes in (intervals, differences, fractions, roc, calibrated, kaplan_meier))
    assert (tmp_path / "pictures").joinpath(f"{tmp_path.name}_0_intervals.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.slow
def test_umap_keeps_neighbours_and_gives_the_same_map_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("umap")
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(6, 20))[rng.integers(0, 6, 90)] + 0.2 * rng.normal(size=(90, 20))).astype(np.float32)
    table = FeatureTable(pd.DataFrame({"lesion_id": [f"l{k}" for k in range(90)]}), features, {})
    first, again = (report_features.feature_sections(table, FeatureOptions(), tmp_path)[0].points for _ in range(2))
    assert first is not None and first == again
    assert trustworthiness(features, np.array(first["layouts"]["UMAP"]), n_neighbors=5, metric="cosine") > 0.9


def columns_of(n: int = 60) -> pd.DataFrame:
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
    table = columns_of()
    assert columns_to_color(table) == ["texture", "margin", "diameter_mm"]
    assert columns_to_color(table, limit=1) == ["texture"]


def test_a_map_has_a_panel_a_column_coloured_by_it(drawn: list[Figure], tmp_path: Path) -> None:
    """PCA of standardised features as scikit-learn's; classes, measurements and what is missing."""
    lesions, names = columns_of(), ["texture", "diameter_mm", "site", "margin"]
    features = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32) * [1, 10, 100, 3, 0, 1]
    table = FeatureTable(lesions, features.astype(np.float32), {"name": "ours"})
    report_features.feature_sections(table, FeatureOptions(names), tmp_path)
    oracle = np.abs(PCA(2).fit_transform(StandardScaler().fit_transform(features)))
    for axes, name in zip(drawn[0].axes, names, strict=True):
        (points,) = axes.collections
        np.testing.assert_allclose(np.abs(points.get_offsets()), oracle, atol=1e-4)
        assert [to_hex(color) for color in points.get_facecolor()] == point_colors(lesions[name])[0]
        assert axes.get_title(loc="left") == f"PCA, by {name}"
    assert drawn[0].axes[0].get_legend().get_texts()[0].get_text() == f"1 ({(lesions.texture == 1).sum()})"
    colors, legend = point_colors(lesions["site"])
    assert len(legend) == 8 and set(colors) == set(legend.values()) and list(legend)[-1].startswith("4 others (")
    colors, legend = point_colors(lesions["margin"])
    assert list(legend.items())[-1] == ("missing (15)", "#d5dae0") and colors[::4] == ["#d5dae0"] * 15
    by_size = np.array(point_colors(lesions["diameter_mm"])[0])[np.argsort(lesions["diameter_mm"])]
    assert by_size[0] == by_size[1] != by_size[30]  # below the 2nd percentile all are of one colour


def test_agreement_is_counted_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    features, patients = rng.normal(size=(80, 16)), rng.integers(0, 25, 80)
    labels = np.random.default_rng(1).integers(0, 3, 80)
    queries = list(range(0, 80, 3))
    found = nearest_lesions(features, patients, queries, 4)
    hits, chance = agreement(found, queries, labels, patients)
    pairs = [labels[q] == labels[row] for q, line in zip(queries, found.rows, strict=True) for row in line if row >= 0]
    lots = [np.mean([labels[q] == labels[j] for j in range(80) if patients[j] != patients[q]]) for q in queries]
    assert (hits, chance) == (pytest.approx(np.mean(pairs)), pytest.approx(np.mean(lots)))


PATCH = (6, 8, 8)
CUT = Preprocessing(PATCH)


class Readout(nn.Module):
    """Not linear, and looks at one corner only."""

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        return views[:, 0, :3, :4, :4].square().sum((1, 2, 3)) * 100


def patch() -> torch.Tensor:
    return torch.randint(-900, 300, (1, *PATCH), generator=torch.Generator().manual_seed(0), dtype=torch.int16)


@captum
def test_it_is_the_mean_fall_over_the_cubes_that_cover_a_voxel() -> None:
    edge, step = 4, 2
    hu = patch()
    view = CUT.normalize(hu)[None]
    hidden_by = torch.from_numpy(gaussian_filter(view[0, 0].numpy(), edge / 2, mode="nearest"))
    total, times = np.zeros(PATCH), np.zeros(PATCH)
    readout = Readout()
    starts = [range(0, n - edge + step, step) for n in PATCH]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                cube = (slice(z, z + edge), slice(y, y + edge), slice(x, x + edge))
                hidden = view.clone()
                hidden[0, 0][cube] = hidden_by[cube]
                total[cube] += float(readout(view) - readout(hidden))
                times[cube] += 1
    np.testing.assert_allclose(occlusion(readout, hu, CUT, edge=edge), total / times, rtol=1e-4, atol=1e-4)


@captum
def test_what_the_answer_does_not_rest_on_has_no_saliency() -> None:
    falls = occlusion(Readout(), patch(), CUT, edge=2)  # cubes reach one voxel further
    assert np.abs(falls[4:]).max() < 1e-4 < np.abs(falls[:3, :4, :4]).max()


def test_the_readout_is_scikit_learns_probe_behind_the_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6 * 8 * 8, 5), nn.ReLU(), nn.Dropout(0.5))
    views = torch.randn(60, 1, *PATCH)
    with torch.no_grad():
        features = encoder.eval()(views).numpy()
    labels = (features[:, 0] > np.median(features[:, 0])).astype(int)
    readout = linear_readout(encoder.train(), features, labels, c=0.1)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000)).fit(features, labels)
    with torch.no_grad():
        np.testing.assert_allclose(readout(views).numpy(), oracle.decision_function(features), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["random weights", "pretrained + size minus size (diameter_mm)"])
def test_the_title_of_a_panel_is_not_cut_off_beside_long_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(report_results, "save_chart", lambda figure, path: figures.append(figure) or path)
    rows = pd.DataFrame({"name": [name], "features": ["a"], "value": [0.4], "low": [0.3], "high": [0.5]})
    panels = {"Difference in AUC, logistic": rows}
    report_results.interval_chart(panels, tmp_path / "results", Palette(), "AUC", differences=True)
    figures[0].draw_without_rendering()
    assert figures[0].axes[0]._left_title.get_window_extent().x1 <= figures[0].bbox.x1  # type: ignore[attr-defined]
