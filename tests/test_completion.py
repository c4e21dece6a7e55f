"""Completion in a real bash: what Tab offers after a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmcib_ssl.command import VERBS

QUESTION = """
eval "$(fmcib-ssl -sc install=bash)"
COMP_LINE=$1 COMP_POINT=${#1} words=($1)
case $1 in *' ') COMP_CWORD=${#words[@]} ;; *) COMP_CWORD=$((${#words[@]} - 1)) ;; esac
hydra_bash_completion
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fmcib-ssl ", set(VERBS)),
        ("fmcib-ssl import-e", {"import-encoder"}),
        ("fmcib-ssl prepare annotations=x coord", {"coordinates="}),
        ("fmcib-ssl prepare coordinates=", {"coordinates=lps", "coordinates=ras", "coordinates=voxel"}),
        ("fmcib-ssl check-data annotations=my", {"annotations=my.csv"}),
        ("fmcib-ssl train loss=", {"loss=infonce", "loss=ntxent_mined"}),
        ("fmcib-ssl train +experiment=finet", {"+experiment=finetune"}),
    ],
)
def test_tab_offers_verbs_keys_and_values(line: str, expected: set[str], tmp_path: Path) -> None:
    program = tmp_path / "bin" / "fmcib-ssl"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom fmcib_ssl.command import main\nmain()\n")
    program.chmod(0o755)
    (tmp_path / "my.csv").touch()
    environ = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    words = ["bash", "-c", QUESTION, "bash", line]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == "" and set(done.stdout.split()) == expected
