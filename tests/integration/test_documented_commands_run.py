"""The commands on the pages that are not marked otherwise, page by page, in a folder that has what they name."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from documented_commands import documented_commands

from fmcib_ssl.api import prepare
from fmcib_ssl.data import make_archive
from fmcib_ssl.models import export_encoder, small_resnet
from fmcib_ssl.types import Preprocessing

COMMANDS = [one for one in documented_commands() if one.reason is None]
#: Less of everything than a reader's command has.
SMALLER = {"evaluate": ["num_bootstrap=20", "folds=2"], "robustness": ["num_bootstrap=20", "folds=2"]}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below `data` what the pages have below `/data`."""
    folder = tmp_path_factory.mktemp("archive")
    table = pd.read_csv(make_archive(folder / "data" / "ct", num_scans=8, progress=False))
    table = table.assign(malignancy=table["label"], texture=[5 - 2 * label for label in table["label"]])
    for name in ("lesions.csv", "my.csv"):
        table.drop(columns=["split", "label"]).to_csv(folder / name, index=False)
    prepare(folder / "lesions.csv", folder / "data" / "store", image_root=folder / "data" / "ct", num_workers=0)
    spec = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 4, 8, 8]}
    torch.manual_seed(0)
    encoder = small_resnet([4, 4, 8, 8])
    for file in ("encoder.safetensors", "runs/x/encoder.safetensors"):
        export_encoder(encoder, spec, Preprocessing((16, 16, 16)), folder / file)
    for source, output in (("encoder.safetensors", "a"), ("hu_statistics", "b"), ("encoder.safetensors", "features")):
        words = [f"checkpoint={folder / source if '.' in source else source}", f"like={folder / 'encoder.safetensors'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            run(["embed", *words, "store=data/store", f"output={output}.parquet"])
    return folder


def run(words: list[str]) -> None:
    """A command, in this process; `/data` is `data` of the folder."""
    verb, *arguments = (word.replace("=/data/", "=data/") for word in words)
    try:
        module = importlib.import_module(f"fmcib_ssl.command.{verb.replace('-', '_')}")
        module.main([*arguments, *SMALLER.get(verb, [])])
    except SystemExit as end:
        assert not end.code, f"{' '.join(words)}: {end.code}"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({one.page for one in COMMANDS}), ids=lambda page: page.stem)
def test_the_commands_of_a_page(page: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    shutil.copytree(archive, folder)
    if page.stem in ("embed", "evaluate"):  # that make it
        (folder / "features.parquet").unlink()
    monkeypatch.chdir(folder)
    for one in COMMANDS:
        if one.page == page:
            run(one.words[1:])
