"""The list of runs, and what two differ in, against the files of real runs and of damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from fmcib_ssl.command import main

GOLDEN = Path(__file__).parent / "golden" / "files" / "run"


def make_run(folder: Path, seed: int, losses: list[float], *, finished: bool = True) -> Path:
    """What a run leaves; its settings are those of a real one."""
    folder.mkdir(parents=True)
    settings = {**yaml.safe_load((GOLDEN / "config.yaml").read_text()), "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    state = json.loads((GOLDEN / "run.json").read_text())
    state["finished"] = (
        {"time": "2026-01-31T12:00:00+00:00", "step": len(losses), "loss": losses[-1]} if finished else None
    )
    (folder / "run.json").write_text(json.dumps(state))
    metrics = pd.DataFrame({"step": range(len(losses)), "train/loss": losses})
    metrics.assign(**{"online/linear_auc": [0.5, *[None] * (len(losses) - 2), 0.75]}).to_csv(
        folder / "metrics.csv", index=False
    )
    return folder


def test_every_run_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a" / "one", 1, [3.0, 2.0, 1.5])
    make_run(tmp_path / "a" / "two", 2, [3.0, 2.5], finished=False)
    (make_run(tmp_path / "b", 3, [1.0, 1.0]) / "run.json").write_text("{")
    shutil.copy(GOLDEN / "run.json", tmp_path / "a" / "one" / "encoder.safetensors")
    main(["runs", f"folder={tmp_path}"])
    header, _, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["run", "started", "state", "step", "loss", "probe", "encoder"]
    one, two, damaged = lines
    assert one[0] == "a/one" and one[-5:] == ["finished", "3", "1.500", "0.750", "yes"]
    assert two[0] == "a/two" and two[-6:] == ["not", "finished", "2", "2.500", "0.750", "no"]
    assert damaged == ["b", "damaged"]


def test_two_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, seed, [3.0, 2.0, 1.0]) for seed, name in ((1, "a"), (7, "b"))]
    main(["runs", f"compare={runs[0]},{runs[1]}", f"output={tmp_path / 'both.png'}"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["setting", *map(str, runs)]
    assert [line for line in table[2:] if line and line[0] != "curves"] == [["seed", "1", "7"]]
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder={0}"], "holds no run folder"),
        (["compare={0}"], "two run folders or more"),
        (["compare={0},{0}"], "is no run folder: it has no config.yaml"),
    ],
)
def test_what_is_no_run(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["runs", *(word.format(tmp_path) for word in words)])
