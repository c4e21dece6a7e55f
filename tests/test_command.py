"""Command lines of key=value, and the two commands that make tables."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from pydantic import Field, PositiveInt

from fmcib_ssl.io import Command, parse_command

REPO = Path(__file__).resolve().parents[1]


class Example(Command):
    """An example."""

    table: Path = Field(description="a table")
    kind: Literal["a", "b"] = Field(default="a", description="which")
    count: PositiveInt | None = Field(default=None, description="how many")
    size: tuple[PositiveInt, PositiveInt] | None = Field(default=None, description="z,y")
    select: dict[str, Any] | None = Field(default=None, description="rows")


def test_the_demo_says_what_it_does_instead_of_doing_it(tmp_path: Path) -> None:
    script = REPO / "scripts" / "demo.py"
    run = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (
        "synthetic scans" in run.stdout
        and "fmcib-ssl demo [key=value" in run.stdout
        and "$ fmcib-ssl" not in run.stdout
    )
    assert not list(tmp_path.iterdir())


def test_values_get_their_types() -> None:
    command = parse_command(Example, ["table=with blank=and equals.csv", "count=3"])
    assert command == Example(table=Path("with blank=and equals.csv"), kind="a", count=3)
    assert parse_command(Example, ["table=a", "count=null"]).count is None


@pytest.mark.parametrize("size", ["3,4", "[3, 4]", "(3,4)"])
def test_lists(size: str) -> None:
    assert parse_command(Example, ["table=a", f"size={size}"]).size == (3, 4)


@pytest.mark.parametrize(
    ("text", "select"),
    [
        ("{PatientID: 007}", {"PatientID": "007"}),  # as a number of YAML's it would be 7, by its octal digits
        ("{PatientID: [0x1F, 1e3, 2020-01-01, yes]}", {"PatientID": ["0x1F", "1e3", "2020-01-01", "yes"]}),
        ("{split: [val, test], fold: 1}", {"split": ["val", "test"], "fold": "1"}),
    ],
)
def test_ids_in_a_selection_stay_text(text: str, select: dict[str, Any]) -> None:
    assert parse_command(Example, ["table=a", f"select={text}"]).select == select


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel=a"], "there is no 'tabel': do you mean 'table'?"),
        (["table"], "'table' is not of the form key=value"),
        (["table=a", "table=b"], "'table' is given twice"),
        ([], "table is missing"),
        (["table=a", "kind=c"], "kind is 'c': Input should be 'a' or 'b'"),
        (["table=a", "size=3,x"], "size.1 is 'x': Input should be a valid integer"),
        (["table=a", "select={a: [b}"], "is not of the form {key: [value, value]}"),
        (["table=a", "count=0"], "count is '0': Input should be greater than 0"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_command(Example, arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_command(Example, ["--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("An example.")
    assert "count   how many [null]" in shown


def run(capsys: pytest.CaptureFixture[str], script: str, *arguments: str) -> tuple[str, object]:
    """What a command prints, on both streams, and what it exits with."""
    code: object = 0
    try:
        runpy.run_path(str(REPO / "scripts" / script))["main"](list(arguments))
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return f"{printed.out}{printed.err}{code}", code


def test_import_then_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"/mnt/LUNG1-{i:03d}/CT.nrrd,LUNG1-{i:03d},00{i},{i},1,2.50" for i in range(1, 13)]
    (tmp_path / "lung1.csv").write_text("\n".join(["image_path,PatientID,code,coordX,coordY,coordZ", *lines]) + "\n")
    table, split = tmp_path / "lesions.csv", tmp_path / "split.csv"
    arguments = ["source=lung1", f"table={tmp_path / 'lung1.csv'}", f"output={table}"]
    assert "12 lesions in 12 scans" in run(capsys, "import_annotations.py", *arguments)[0]
    assert "exists; take another name" in run(capsys, "import_annotations.py", *arguments)[0]
    shares = ["shares=train:2,val:1", "seed=3"]
    printed, code = run(capsys, "split.py", f"annotations={table}", f"output={split}", *shares)
    assert code == 0, printed
    before, after = (pd.read_csv(path, dtype=str) for path in (table, split))
    pd.testing.assert_frame_equal(after.drop(columns="split"), before)
    assert after["split"].value_counts().to_dict() == {"train": 8, "val": 4}
    printed, code = run(capsys, "split.py", f"annotations={split}", f"output={split}")
    assert "has a column 'split' already" in printed and code
    assert run(capsys, "split.py", f"annotations={split}", f"output={split}", "folds=3")[1] == 0
    assert pd.read_csv(split)["fold"].value_counts().to_dict() == {0: 4, 1: 4, 2: 4}
    assert "write train:0.7,val:0.15" in run(capsys, "split.py", f"annotations={table}", "output=x", "shares=train")[0]
