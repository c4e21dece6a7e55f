"""W&B with a server: one page with each step once, through stops; and no server can stop a training."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import tiny_settings
from wandb_server import TrackingServer

from fmcib_ssl.run import pretrain
from fmcib_ssl.training.loggers import MetricsFile, WeightsAndBiases

RUN_ID = "abcd1234"
#: Of the server, in these tests; W&B's own look at the login may take ten seconds more.
TIMEOUT_S = 2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    import wandb

    with TrackingServer() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # the service keeps the environment that it was started in
        yield server
        server.behaviour = "serves"
        wandb.teardown()


def tracker_from(step: int, folder: Path) -> WeightsAndBiases:
    tracker = WeightsAndBiases("project", "name", folder, timeout_s=TIMEOUT_S)
    tracker.resume_from(SimpleNamespace(run_id=RUN_ID, path=folder), step, {})  # type: ignore[arg-type]
    return tracker


def log(tracker: Any, steps: range, folder: Path) -> None:
    metrics = MetricsFile(folder / "metrics.csv")
    metrics.resume_from(Any, steps[0], {})  # type: ignore[arg-type]
    for step in steps:
        for its in (tracker, metrics):
            its.log_metrics({"loss": step / 7}, step=step)
    metrics.save()


def assert_each_step_once(history: list[dict[str, Any]], num_steps: int) -> None:
    assert [row["_step"] for row in history] == list(range(num_steps))
    assert [row["trainer/global_step"] for row in history] == list(range(num_steps))


def test_nothing_is_sent_but_what_the_docs_list(
    server: TrackingServer, phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that the server was ever sent is looked through."""
    monkeypatch.setattr(
        "sys.argv", ["/home/jane_doe/train.py", "hydra.job.env_set.MY_API_KEY=abc123", "data.annotations=/jane_doe.csv"]
    )
    settings = tiny_settings(
        phantom_table, tmp_path / "jane_doe", "logger=wandb", "contact_sheet_rows=1", "trainer.max_epochs=1"
    )
    pretrain(settings)
    (page,) = server.pages.values()
    sent = server.received + b"".join(page.files.values()) + json.dumps(page.config).encode()
    host, home = f'"{socket.gethostname()}"', str(Path.home())
    for secret in ("abc123", "MY_API_KEY", "jane_doe", host, str(phantom_table), "site-packages", home):
        assert secret.encode() not in sent, secret
    kinds = {name.partition("/")[0] for name in [*page.files, *page.lines]}
    assert kinds <= {"media", "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "config.yaml"}
    assert page.config["seed"]["value"] == 0 and page.summary["contact_sheet"] and page.history


@pytest.mark.parametrize(
    "behaviour", ["denies", "hangs", *(pytest.param(way, marks=pytest.mark.slow) for way in ("refuses", "fails"))]
)
def test_a_server_that_is_none(
    behaviour: str, server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    if behaviour == "refuses":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    else:
        server.behaviour = behaviour
    tracker = tracker_from(0, tmp_path)
    with caplog.at_level(logging.INFO):
        log(tracker, range(5), tmp_path)
        tracker.finish()
    assert "cannot be reached" in caplog.text and "to upload it: wandb sync" in caplog.text
    (written,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{RUN_ID}.wandb")
    assert written.stat().st_size and not server.pages


@pytest.mark.parametrize("behaviour", ["fails", "hangs"])
def test_a_server_that_dies_while_training(
    behaviour: str, server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing waits for it but the end, which says how to send the rest; the next start sends it by itself."""
    import wandb

    tracker = tracker_from(0, tmp_path)
    log(tracker, range(3), tmp_path)
    server.behaviour = behaviour
    log(tracker, range(3, 9), tmp_path)
    tracker.finish()
    assert "did not take everything" in caplog.text and "wandb sync" in caplog.text
    wandb.teardown()
    server.behaviour = "serves"
    tracker = tracker_from(9, tmp_path)
    log(tracker, range(9, 12), tmp_path)
    tracker.finish()
    assert_each_step_once(server.pages[RUN_ID].history, 12)
    assert server.opened == [RUN_ID] * 2


@pytest.mark.slow
def test_pictures_of_a_run_hash_names_if_it_asks_for_it(
    phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def sheet(rows: list[Any], path: Path, preprocessing: Any) -> Path:
        titles.extend(row.title for row in rows)
        path.write_bytes(b"a picture")
        return path

    monkeypatch.setattr("fmcib_ssl.training.summary.contact_sheet", sheet)
    options = ["contact_sheet_rows=2", "trainer.max_steps=1", "encoder=small"]
    for identifiers in ("show", "hash"):  # the second start draws the sheet anew
        pretrain(tiny_settings(phantom_table, tmp_path / "run", *options, f"identifiers={identifiers}"))
        (tmp_path / "run" / "encoder.safetensors").unlink()  # so that it is not finished
    assert all("phantom" in title for title in titles[:2]) and not any("phantom" in title for title in titles[2:])
    assert len(titles) == 4
