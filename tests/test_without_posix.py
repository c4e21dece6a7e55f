"""A system without POSIX's signals, locks and links, played on this one: what one process does works all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmcib_ssl.training.checkpoints import _link

REPO = Path(__file__).resolve().parents[1]

#: Windows as far as the standard library goes; other packages are imported first, since they know where they are.
PREAMBLE = """
import os, pkgutil, signal, sys
import blosc2, lightning, matplotlib.pyplot, pandas, pyarrow.parquet, SimpleITK, sklearn.linear_model, torch, yaml
import hydra, multiprocessing.resource_tracker, torch.utils.data, torch.distributed, types
from lightning.pytorch.trainer.connectors import signal_connector
signal_connector.signal = types.SimpleNamespace(**vars(signal))  # Lightning asks the platform, which stays this one
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm", "pthread_sigmask", "SIG_BLOCK", "SIG_UNBLOCK"):
    delattr(signal, name)
for name in ("sched_getaffinity", "sysconf", "fork"):
    delattr(os, name)
for name in ("fcntl", "resource"):
    sys.modules[name] = None
def no_links(*_, **__): raise PermissionError(1, "no links here")
os.link = os.symlink = no_links
"""
PREPARE_AND_EMBED = """
import importlib
import fmcib_ssl
for module in pkgutil.walk_packages(fmcib_ssl.__path__, "fmcib_ssl."):
    if not module.name.endswith("triton_kernels"):
        importlib.import_module(module.name)
from fmcib_ssl.command import embed, prepare
from fmcib_ssl.data.phantom import make_archive
from fmcib_ssl.models import encoders, export_encoder
from fmcib_ssl.types import Preprocessing
make_archive(FOLDER / "ct", 2, seed=0, progress=False)
weights = FOLDER / "encoder.safetensors"
spec = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [2, 2, 2, 2]}
export_encoder(encoders.small_resnet([2, 2, 2, 2]), spec, Preprocessing((16, 16, 16)), weights)
prepare.main([f"annotations={FOLDER}/ct/annotations.csv", f"store={FOLDER}/store", "num_workers=0", "sheet_lesions=0"])
embed.main([f"checkpoint={weights}", f"store={FOLDER}/store", "num_workers=0", f"output={FOLDER}/features.parquet"])
"""
TRAIN = """
from fmcib_ssl.training import signals
signals.listen(starting=True)
sys.path += ["tests/integration"]
from tiny_runs import tiny_settings
from fmcib_ssl.data.phantom import make_archive
from fmcib_ssl.run import pretrain
make_archive(FOLDER / "ct", 4, seed=0, progress=False)
signals.listen()
pretrain(tiny_settings(FOLDER / "ct/annotations.csv", FOLDER / "run", "+experiment=ct_ntxent_mined", "encoder=small",
                    "trainer.max_steps=2"))
"""


def run_there(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"{PREAMBLE}\nfrom pathlib import Path\nFOLDER = Path({str(folder)!r})\n{code}"
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environ, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_everything_imports_prepares_and_embeds(tmp_path: Path) -> None:
    result = run_there(PREPARE_AND_EMBED, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "features.parquet").is_file()


@pytest.mark.slow
def test_a_run_trains_and_saves(tmp_path: Path) -> None:
    result = run_there(TRAIN, tmp_path)
    assert result.returncode == 0, result.stderr
    last, newest = tmp_path / "run/checkpoints/last.ckpt", max((tmp_path / "run/checkpoints").glob("step-*.ckpt"))
    assert last.read_bytes() == newest.read_bytes() and not last.is_symlink()


def test_without_links_the_newest_checkpoint_is_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    for step in (1, 2):
        (newest := tmp_path / f"step-{step}.ckpt").write_bytes(bytes([step]) * 1000)
        _link(newest, tmp_path / "last.ckpt")
        assert (tmp_path / "last.ckpt").read_bytes() == newest.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step-1.ckpt", "step-2.ckpt"]
