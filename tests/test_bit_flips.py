"""Any damage to any file that is kept: refused in our words, or no value differs from the whole one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from mutations import damaged, only, seeds
from stores import body, make_store

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.store import Store, StoreError
from fmcib_ssl.data.store_files import read_record
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.models import EncoderFileError, encoder_metadata, encoders, export_encoder, load_encoder
from fmcib_ssl.models.export import read_archive
from fmcib_ssl.types import Preprocessing

pytestmark = pytest.mark.attack

NUM_FLIPS = 12
NUM_FLIPS_SLOW = 1000
SPEC = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [2, 2, 2, 2]}
PATCHES = Preprocessing((16, 16, 16))


class Kind(NamedTuple):
    """A file that is kept: what makes it below a folder, its place there, what uses all of it, and its refusals."""

    make: Callable[[Path], object]
    file: str
    use: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...]


def make_small_store(folder: Path) -> None:
    lesions = [("a", 16.0, 20.0, 20.0), ("a", 10.0, 130.0, 14.0), ("b", 15.0, 18.0, 25.0)]
    make_store(folder / "store", {"a": body((40, 140, 40)), "b": body((40, 40, 40), seed=1)}, lesions)


def use_store(folder: Path) -> Any:
    store = Store(folder / "store")
    pairs = [LesionPatches(store, (8, 8, 8), mining="hard")[lesion] for lesion in range(len(store.lesions))]
    maps = {name: store.coarse_map(name) for name in store.scans.index}
    return (
        store.settings,
        store.lesions.to_csv(),
        store.scans.to_csv(),
        [store.read_patch(name, (-2, -2, -2), (44, 144, 44)).tobytes() for name in maps],
        [(found.cells.tobytes(), found.shape_zyx, found.spacing_mm) for found in maps.values()],
        [(pair["positive"].numpy().tobytes(), pair["negative"].numpy().tobytes()) for pair in pairs],
    )


def use_sidecar(folder: Path) -> Any:
    """What `prepare` goes by; nothing is what it would make anew."""
    return read_record(folder / "store" / "scans" / "a.json") or _refuse()


def _refuse() -> Any:
    raise StoreError("not as it was written")


def make_encoder(folder: Path) -> None:
    torch.manual_seed(0)
    export_encoder(encoders.small_resnet([2, 2, 2, 2]), SPEC, PATCHES, folder / "encoder.safetensors", extra={"a": 1})


def make_checkpoint(folder: Path) -> None:
    encoder = encoders.small_resnet([2, 2, 2, 2])
    state = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    torch.save({"state_dict": state, "fmcib_ssl": encoder_metadata(encoder, SPEC, PATCHES)}, folder / "step.ckpt")


def use_encoder(path: Path) -> Any:
    encoder: Any = load_encoder(path)
    weights = {name: weight.numpy().tobytes() for name, weight in encoder.state_dict().items()}
    return encoder.spec, encoder.preprocessing, encoder.feature_dim, weights


def make_features(folder: Path) -> None:
    lesions = pd.DataFrame({"lesion_id": [f"l{i}" for i in range(20)], "label": range(20), "text": ["ä", None] * 10})
    features = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    FeatureTable(lesions, features, {"name": "a", "kind": "encoder"}).write(folder / "features.parquet")


def use_features(folder: Path) -> Any:
    table = FeatureTable.read(folder / "features.parquet")
    return table.lesions.to_csv(), table.features.tobytes(), table.provenance


def make_fault(folder: Path) -> None:
    fault = {"step": 1, "batch": {"lesion": torch.arange(50)}, "weights": {"a": torch.rand(50)}}
    torch.save(fault, folder / "rank-0.pt")


STORE_FILES = ["scans/a.b2nd", "scans/a.cells", "scans/a.sums", "lesions.parquet", "scans.parquet", "store.json"]
KINDS = {
    **{name: Kind(make_small_store, f"store/{name}", use_store, (StoreError,)) for name in STORE_FILES},
    "scans/a.json": Kind(make_small_store, "store/scans/a.json", use_sidecar, (StoreError,)),
    "encoder": Kind(
        make_encoder,
        "encoder.safetensors",
        lambda folder: use_encoder(folder / "encoder.safetensors"),
        (EncoderFileError,),
    ),
    "checkpoint": Kind(
        make_checkpoint, "step.ckpt", lambda folder: use_encoder(folder / "step.ckpt"), (EncoderFileError,)
    ),
    "features": Kind(make_features, "features.parquet", use_features, (FeatureTableError,)),
    "fault": Kind(make_fault, "rank-0.pt", lambda folder: str(read_archive(folder / "rank-0.pt")), (ValueError,)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The folder of a kind, and what using it gives; made once."""
    made: dict[Any, Path] = {}

    def of(name: str) -> tuple[Path, Any]:
        kind = KINDS[name]
        if kind.make not in made:
            made[kind.make] = tmp_path_factory.mktemp("whole")
            kind.make(made[kind.make])
        return made[kind.make], kind.use(made[kind.make])

    return of


def assert_none_is_used_silently(name: str, whole: Any, tmp_path: Path, num_flips: int) -> None:
    kind, (folder, expected) = KINDS[name], whole(name)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = (copy / kind.file).read_bytes()
    draw, num_refused = random.Random(name), 0
    for _ in range(num_flips):
        bit = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (copy / kind.file).write_bytes(damaged)
        try:
            assert kind.use(copy) == expected, f"bit {bit} of {name}"
        except kind.refusals:
            num_refused += 1
    assert num_refused > num_flips // 4  # else the damage is not looked at at all


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bits(name: str, whole: Any, tmp_path: Path) -> None:
    assert_none_is_used_silently(name, whole, tmp_path, NUM_FLIPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_flipped_bits(name: str, whole: Any, tmp_path: Path) -> None:
    assert_none_is_used_silently(name, whole, tmp_path, NUM_FLIPS_SLOW)


@pytest.mark.parametrize("seed", seeds(40))
@pytest.mark.parametrize("name", KINDS)
def test_other_damage(name: str, seed: int, whole: Any, tmp_path: Path) -> None:
    kind, (folder, expected) = KINDS[name], whole(name)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / kind.file).write_bytes(damaged((copy / kind.file).read_bytes(), seed))
    with only(*kind.refusals):
        assert kind.use(copy) == expected
