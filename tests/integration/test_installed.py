"""The wheel, installed into a folder outside the checkout: `fmcib-ssl` there opens no file of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny_runs import NUM_SCANS, REPO

#: Ends a Python that opens a file of the checkout, or a package's, other than those of the environment.
GUARD = f"""
import os, sys
def guard(event, arguments, checkout={str(REPO)!r} + os.sep, environment=sys.prefix + os.sep):
    if event == "open" and str(arguments[0]).startswith(checkout) and not str(arguments[0]).startswith(environment):
        os.write(2, b"opened " + os.fsencode(arguments[0]))
        os._exit(99)
sys.addaudithook(guard)
"""
SMALL = ["data.patch_size=[16,16,16]", "data.batch_size=2", "encoder.widths=[4,4,8,8]", "trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installation."""
    for builder in ("hatchling", "hatch_vcs"):
        pytest.importorskip(builder, reason=f"{builder} builds the wheel, and is not installed: pip install '.[dev]'")
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, REPO], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    (target / "sitecustomize.py").write_text(GUARD)
    return target


def call(installed: Path, folder: Path, *words: str, code: int = 0) -> str:
    """`fmcib-ssl` of the installation, in a folder; gives all that it prints."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FMCIB_SSL")}
    done = subprocess.run(
        [installed / "bin" / "fmcib-ssl", *words], cwd=folder, text=True, check=False,
        env={**environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == code, f"{words}: {done.stdout}"
    return done.stdout


@pytest.mark.slow
def test_from_scans_to_features(installed: Path, tmp_path: Path) -> None:
    assert "import-encoder" in call(installed, tmp_path, "--help")
    assert "Did you mean train?" in call(installed, tmp_path, "+experiment=phantom_ntxent_mined", code=2)
    assert "phantom_ntxent_mined" in call(installed, tmp_path, "train", "--help")
    call(installed, tmp_path, "phantom", "folder=scans", f"num_scans={NUM_SCANS}")
    prepared = ["annotations=scans/annotations.csv", "store=store", "spacing_mm=1.25", "num_workers=1"]
    call(installed, tmp_path, "prepare", *prepared)
    hardware = ["hardware=cpu", "hardware.devices=2", "hardware.num_workers=1"]
    call(installed, tmp_path, "train", "+experiment=phantom_ntxent_mined", "data.store=store", *SMALL, *hardware)
    (run,) = (tmp_path / "runs" / "phantom_ntxent_mined").iterdir()
    call(installed, tmp_path, "embed", f"checkpoint={run}", "store=store", "output=features.parquet", "num_workers=0")
    assert len(pd.read_parquet(tmp_path / "features.parquet")) == len(pd.read_csv(tmp_path / "scans/annotations.csv"))
    assert "finished" in call(installed, tmp_path, "runs")


@pytest.mark.slow
def test_the_guard_sees_what_is_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert "opened" in call(installed, tmp_path, "prepare", f"annotations={REPO}/README.md", "store=store", code=99)


@pytest.mark.slow
def test_it_has_the_batch_scripts(installed: Path) -> None:
    for script in (REPO / "scripts" / "slurm").iterdir():
        assert (installed / "share" / "fmcib_ssl" / "slurm" / script.name).read_bytes() == script.read_bytes()
