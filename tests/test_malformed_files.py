"""Hundreds of damaged and harmful files: each is refused in our words or used as if whole; none runs anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from mutations import changed, damaged, harmful_pickles, only, seeds

from fmcib_ssl.data.annotations import check_annotations, read_annotations
from fmcib_ssl.data.tables import AnnotationsError
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.models import EncoderFileError, encoder_metadata, encoders, load_encoder
from fmcib_ssl.training.checkpoints import checkpoint_problem
from fmcib_ssl.types import Preprocessing

pytestmark = pytest.mark.attack

SPEC = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [2, 2, 2, 2]}
PATCHES = Preprocessing((16, 16, 16))
Check = Callable[..., Any]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return encoder_metadata(encoders.small_resnet([2, 2, 2, 2]), SPEC, PATCHES, {"run": "a"})


def small_weights() -> dict[str, torch.Tensor]:
    return {name: w.contiguous() for name, w in encoders.small_resnet([2, 2, 2, 2]).state_dict().items()}


def checkpoint(metadata: dict[str, Any]) -> dict[str, Any]:
    weights = encoders.small_resnet([2, 2, 2, 2]).state_dict()
    return {
        "state_dict": {f"encoder.{name}": weight for name, weight in weights.items()},
        "fmcib_ssl": {**metadata, "extra": {"run_id": "mine"}},
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [],
        "epoch": 1,
    }


@pytest.mark.parametrize("seed", seeds(48))
def test_encoders_with_other_descriptions(seed: int, metadata: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    weights = small_weights()
    text = json.dumps(changed(metadata, seed))
    safetensors.torch.save_file(weights, path, metadata={"fmcib_ssl": text})
    with only(EncoderFileError):
        load_encoder(path)


@pytest.mark.parametrize(
    "spec",
    [
        {"widths": [10**9, 4, 4, 4]},
        {"widths": [2**40] * 4},
        {"widths": [2, 2, 2, 2], "conv1_t_size": 10**6},
        {"widths": list(range(1, 100_000))},
        {"widths": [0, 0, 0, 0]},
        {"widths": [-1, 2, 2, 2]},
        {"widths": "abcd"},
        {"_target_": "fmcib_ssl.models.encoders.monai_resnet", "depth": 10, "widen_factor": 1e12},
        {"_target_": "fmcib_ssl.models.encoders.monai_resnet", "depth": 10**9},
        {"_target_": "fmcib_ssl.models.encoders.monai_resnet", "depth": 50, "widen_factor": -1},
    ],
    ids=lambda spec: str(spec)[:60],
)
def test_encoders_that_would_take_all_memory(spec: dict[str, Any], metadata: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    text = json.dumps({**metadata, "encoder": {**SPEC, **spec}})
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"fmcib_ssl": text})
    with only(), pytest.raises(EncoderFileError):
        load_encoder(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_encoders_that_are_not_finite(value: float, metadata: dict[str, Any], tmp_path: Path) -> None:
    weights = small_weights()
    weights["layer2.0.conv1.weight"].view(-1)[3] = value
    path = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(weights, path, metadata={"fmcib_ssl": json.dumps(metadata)})
    with pytest.raises(EncoderFileError, match=r"layer2\.0\.conv1\.weight holds NaN or infinity"):
        load_encoder(path)


@pytest.mark.parametrize("seed", seeds(40))
def test_checkpoints_with_other_contents(seed: int, metadata: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.ckpt"
    torch.save(changed(checkpoint(metadata), seed), path)
    with only(EncoderFileError):
        load_encoder(path)
    with only():
        problem = checkpoint_problem(path, "mine")
    assert problem is None or len(problem) > 10


@pytest.mark.parametrize("name", list(harmful_pickles(Path("canary"))))
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "parquet", "csv"])
def test_pickles_are_never_unpickled(name: str, suffix: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"step-00000001.{suffix}"
    path.write_bytes(harmful_pickles(canary)[name])
    with only(), pytest.raises(EncoderFileError):
        load_encoder(path)
    with only(), pytest.raises(FeatureTableError):
        FeatureTable.read(path)
    with only(), pytest.raises(AnnotationsError):
        read_annotations(path)
    with only():
        assert checkpoint_problem(path, "mine")
    assert not canary.exists()


TABLE = (
    "image_path,coordX,coordY,coordZ,lesion_id,split\n"
    + "".join(f"scan_{i}.nii.gz,{i}.5,-{i},{i * 10},l{i},train\n" for i in range(8))
).encode()


@pytest.mark.parametrize("seed", seeds(40))
def test_damaged_tables(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "annotations.csv"
    path.write_bytes(damaged(TABLE, seed))
    with only(AnnotationsError):
        check_annotations(read_annotations(path), on_bad_row="skip")


TABLES: dict[str, bytes] = {
    "empty": b"",
    "only a header": TABLE.split(b"\n")[0],
    "no header": TABLE.split(b"\n", 1)[1],
    "latin 1": TABLE.replace(b"scan_3", "Lösion".encode("latin-1")),
    "utf 16": TABLE.decode().encode("utf-16"),
    "zeros": bytes(1000),
    "a NUL": TABLE.replace(b"scan_3", b"scan\x003"),
    "an open quote": TABLE.replace(b"scan_3", b'"scan_3'),
    "a long field": TABLE.replace(b"scan_3", b"x" * 200_000),
    "a column twice": TABLE.replace(b"coordY", b"coordX"),
    "a row too short": TABLE.replace(b",l3,train", b""),
    "a huge number": TABLE.replace(b"-3", b"1e400"),
    "words": TABLE.replace(b"-3", b"three"),
    "a formula": TABLE.replace(b"scan_3.nii.gz", b"\"=cmd|' /C calc'!A0\""),
    "a way out": TABLE.replace(b"scan_3.nii.gz", b"../../../../../etc/passwd"),
    "a device": TABLE.replace(b"scan_3.nii.gz", b"/dev/null"),
    "a name too long": TABLE.replace(b"scan_3.nii.gz", b"x" * 5000),
    "a URL": TABLE.replace(b"scan_3.nii.gz", b"https://example.org/scan.nii.gz"),
    "many columns": b",".join(b"c%d" % i for i in range(20_000)) + b"\n" + b"," * 19_999 + b"\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_they_should_not_be(name: str, tmp_path: Path) -> None:
    path = tmp_path / "annotations.csv"
    path.write_bytes(TABLES[name])
    with only(), pytest.raises(AnnotationsError):  # none of the scans exists, so no table is of use
        check_annotations(read_annotations(path), on_bad_row="skip")


FEATURES = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8, np.float32)), 2)
#: A column of a table of features as it should not be, or what is to be its metadata.
ODD_FEATURES: dict[str, dict[str, Any]] = {
    "no metadata": {"metadata": None},
    "metadata no JSON": {"metadata": b"{"},
    "provenance a list": {"metadata": b"[1]"},
    "ids twice": {"lesion_id": ["a", "a", "b", "c"]},
    "ids numbers": {"lesion_id": [1, 2, 3, 4]},
    "ids missing": {"lesion_id": ["a", "b", None, "c"]},
    "no features": {"features": None},
    "ragged features": {"features": [[1.0], [2.0, 3.0], [], [1.0]]},
    "features text": {"features": ["a", "b", "c", "d"]},
    "features empty": {"features": pa.array([[], [], [], []], pa.list_(pa.float32()))},
    "a row without": {"features": pa.array([[1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0]], pa.list_(pa.float32(), 2))},
}


@pytest.mark.parametrize("name", ODD_FEATURES)
def test_feature_tables_of_others(name: str, tmp_path: Path) -> None:
    columns = {"lesion_id": list("abcd"), "features": FEATURES, "metadata": b'{"name": "a"}', **ODD_FEATURES[name]}
    metadata = columns.pop("metadata")
    table = pa.table({column: values for column, values in columns.items() if values is not None})
    if metadata is not None:
        table = table.replace_schema_metadata({b"fmcib_ssl": metadata})
    pq.write_table(table, tmp_path / "features.parquet")
    with only(), pytest.raises(FeatureTableError):
        FeatureTable.read(tmp_path / "features.parquet")
