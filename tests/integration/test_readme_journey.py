"""The way of docs/start.md from a table of one's own to a report, its commands as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from starts import steps_logged
from tiny_runs import REPO

from fmcib_ssl.data.phantom import make_archive

#: What a machine without a GPU, and a test, need otherwise than the page's reader.
FOR_A_TEST = ["data.patch_size=[16,16,16]", "data.batch_size=4", "encoder.widths=[4,4,8,8]", "trainer.max_epochs=3"]
INTERRUPTED_AFTER = 2


def blocks(heading: str) -> list[str]:
    """The indented blocks of code below a heading of the page."""
    section = re.split(r"\n## ", (REPO / "docs" / "start.md").read_text().partition(f"\n## {heading}\n")[2])[0]
    found = re.findall(r"(?:^       .*\n)+", section, flags=re.MULTILINE)
    return ["".join(line[7:] + "\n" for line in block.splitlines()) for block in found]


def run(line: str, folder: Path, *more: str, steps: tuple[Path, int] | None = None) -> str:
    """One of the page's commands in a folder; with `steps` interrupted once a run has logged so many."""
    words = shlex.split(line, comments=True)[1:]
    process = subprocess.Popen(
        [sys.executable, "-m", "fmcib_ssl", *words, *more], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    if steps is not None:
        pattern, number = steps
        while not any(steps_logged(one) >= number for one in folder.glob(str(pattern))):
            assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == (130 if steps else 0), f"{line}: {output}"
    return output


@pytest.mark.slow
def test_from_a_table_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, commands, python, questions = blocks("Your own scans")
    lines = [line for line in (commands + questions).splitlines() if line.startswith("fmcib-ssl ")]
    check, prepare, train, _four_gpus, embed, evaluate, report = lines

    archive = make_archive(tmp_path, num_scans=12, progress=False)
    rows = pd.read_csv(archive).rename(columns={"label": "malignant"})
    assert set(table.splitlines()[0].split(",")) <= set(rows)
    rows.to_csv(tmp_path / "my.csv", index=False)

    run(check, tmp_path)
    assert pd.read_csv(tmp_path / "checked" / "rejected.csv").empty
    assert "<img" in (tmp_path / "checked" / "contact_sheet.html").read_text()
    run(prepare, tmp_path)

    # Without a GPU, as the page says; interrupted, and the same command given again.
    train = train.replace("ct_ntxent_mined", "ct_cpu").replace("hardware=gpu", "hardware=cpu")
    runs = Path("runs") / "*" / "*"
    output = run(train, tmp_path, *FOR_A_TEST, steps=(runs, INTERRUPTED_AFTER))
    assert "same command" in output
    output = run(train, tmp_path, *FOR_A_TEST)
    (folder,) = tmp_path.glob(str(runs))
    assert re.search(rf"resuming \S*{re.escape(str(folder.relative_to(tmp_path)))} at step [1-9]", output), output
    assert (folder / "contact_sheet.png").is_file() and (folder / "curves.png").is_file()

    place = str(folder.relative_to(tmp_path))
    run(embed.replace("runs/...", place), tmp_path)
    run(evaluate, tmp_path, "num_bootstrap=50", "folds=3")
    run(report.replace("runs/...", place), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "malignant" in page and page.count("<img") + page.count("<svg") > 5

    monkeypatch.chdir(tmp_path)
    import fmcib_ssl
    from fmcib_ssl.data import LesionPatches

    patch_hu = LesionPatches("my_store", patch_size=(16, 16, 16))[0]["positive"][None]
    names = {"fmcib_ssl": fmcib_ssl, "patch_hu": patch_hu}
    exec(python.replace("runs/...", place), names)
    assert names["features"].shape == (1, names["encoder"].feature_dim)  # type: ignore[union-attr]
