"""Stopped, gone on with, shared between processes: always the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from embedded_archive import LESIONS, Archive, make_archive, make_encoder
from torch import nn

from fmcib_ssl.evaluation.embedding import embed_source
from fmcib_ssl.evaluation.embedding_encoders import FrozenEncoder, random_encoder
from fmcib_ssl.evaluation.embedding_inference import Inference
from fmcib_ssl.evaluation.embedding_parts import Outcome, Share, embed_to_file, parts_folder, rejected_file
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError

INFERENCE = Inference(batch_size=2, device="cpu")
#: Seven lesions in shards of three, three and one.
NUM_SHARDS = 3
Run = Callable[..., Outcome]


class Counted(nn.Module):
    """An encoder that counts what it is given, and can be interrupted as by Ctrl-C."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_patches = 0
        self.stop_after: int | None = None

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if self.stop_after is not None and self.num_patches >= self.stop_after:
            raise KeyboardInterrupt
        self.num_patches += len(patches)
        found: torch.Tensor = self.encoder(patches)
        return found


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive") / "ct")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    return make_encoder(tmp_path_factory.mktemp("run") / "encoder.safetensors")


@pytest.fixture
def encoder(trained: FrozenEncoder) -> FrozenEncoder:
    return replace(trained, module=Counted(trained.module))


@pytest.fixture
def run(archive: Archive, encoder: FrozenEncoder) -> Run:
    def embed(output: Path, **changes: Any) -> Outcome:
        values = {"encoder": encoder, "source": archive.store_source, "inference": INFERENCE, **changes}
        return embed_to_file(output=output, shard_size=3, progress=False, **values)

    return embed


@pytest.fixture
def whole(run: Run, tmp_path: Path) -> Path:
    """The table made in one go."""
    run(tmp_path / "whole.parquet")
    return tmp_path / "whole.parquet"


def counted(encoder: FrozenEncoder) -> Counted:
    assert isinstance(encoder.module, Counted)
    return encoder.module


def test_the_file_holds_what_the_memory_would(
    run: Run, archive: Archive, encoder: FrozenEncoder, tmp_path: Path
) -> None:
    outcome = run(tmp_path / "new" / "features.parquet")
    assert (outcome.num_lesions, outcome.num_embedded, outcome.num_missing, outcome.num_rejected) == (7, 7, 0, 0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["features.parquet"]
    in_memory, in_file = embed_source(encoder, archive.store_source), FeatureTable.read(outcome.output)
    pd.testing.assert_frame_equal(in_file.lesions, in_memory.lesions)
    np.testing.assert_allclose(in_file.features, in_memory.features, rtol=1e-4, atol=1e-6)
    assert in_file.provenance == json.loads(json.dumps(in_memory.provenance))


@pytest.mark.parametrize("stop_after", [0, 2, 3, 5, 6])
def test_interrupted_and_gone_on_with(
    run: Run, encoder: FrozenEncoder, whole: Path, tmp_path: Path, stop_after: int
) -> None:
    output, module = tmp_path / "features.parquet", counted(encoder)
    module.num_patches, module.stop_after = 0, stop_after
    with pytest.raises(KeyboardInterrupt):
        run(output)
    assert not output.exists() and parts_folder(output).is_dir()
    module.num_patches, module.stop_after = 0, None
    outcome = run(output)
    finished = 3 * (stop_after // 3)
    assert module.num_patches == outcome.num_embedded == 7 - finished
    assert output.read_bytes() == whole.read_bytes()
    assert not parts_folder(output).exists()


@pytest.mark.parametrize("num_processes", [2, 5])
def test_several_processes_give_the_bytes_of_one(
    run: Run, encoder: FrozenEncoder, whole: Path, tmp_path: Path, num_processes: int
) -> None:
    """More processes than shards, too; the order in which they come to an end does not matter."""
    output, module = tmp_path / "features.parquet", counted(encoder)
    module.num_patches = 0
    outcomes = [run(output, share=Share(k, num_processes)) for k in reversed(range(num_processes))]
    assert module.num_patches == len(LESIONS)  # each lesion once
    assert [outcome.num_missing > 0 for outcome in outcomes] == [True] * (num_processes - 1) + [False]
    assert output.read_bytes() == whole.read_bytes()


def test_other_shares_than_before(run: Run, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "features.parquet"
    run(output, share=Share(2, 3))
    assert run(output).num_embedded == 6
    assert output.read_bytes() == whole.read_bytes()


def test_a_finished_table_is_not_made_again(run: Run, encoder: FrozenEncoder, whole: Path) -> None:
    before = counted(encoder).num_patches
    assert run(whole).num_embedded == 0
    assert counted(encoder).num_patches == before
    assert run(whole, restart=True).num_embedded == 7


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"inference": Inference(2, "bf16", device="cpu")}, 'precision: "32" there, "bf16" asked for'),
    ({"inference": Inference(2, views=8, device="cpu")}, "views: 1 there, 8 asked for"),
    ({"source": {"select": {"label": 1}}}, "lesions: "),
    ({"encoder": None}, 'kind: "encoder" there, "random_weights" asked for'),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message.partition(":")[0] for _, message in CHANGES])
@pytest.mark.parametrize("state", ["finished", "in parts"])
def test_another_request_is_refused_unless_told(
    run: Run,
    archive: Archive,
    trained: FrozenEncoder,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    state: str,
) -> None:
    output = tmp_path / "features.parquet"
    run(output, share=Share() if state == "finished" else Share(0, 2))
    if "source" in change:
        change = {"source": {**archive.store_source, **change["source"]}}
    if "encoder" in change:
        change = {"encoder": random_encoder(trained.about["encoder"], trained.preprocessing)}
    with pytest.raises(FeatureTableError) as caught:
        run(output, **change)
    assert message in str(caught.value) and "restart=true" in str(caught.value)
    run(output, **change, restart=True)
    run(tmp_path / "fresh.parquet", **change)
    assert output.read_bytes() == (tmp_path / "fresh.parquet").read_bytes()


def test_other_weights_are_noticed(run: Run, encoder: FrozenEncoder, whole: Path) -> None:
    other = replace(encoder, about={**encoder.about, "sha256": "0" * 64})
    with pytest.raises(FeatureTableError, match="sha256: "):
        run(whole, encoder=other)


def test_a_file_that_is_no_table_is_not_replaced(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "features.parquet"
    output.write_text("somebody's work")
    with pytest.raises(FeatureTableError, match="no table of features"):
        run(output)
    assert output.read_text() == "somebody's work"
    with pytest.raises(FeatureTableError, match=r"NAME\.parquet"):
        run(tmp_path / "features.csv")


def test_a_damaged_part_is_made_again(run: Run, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "features.parquet"
    run(output, share=Share(0, 2))
    part = sorted(parts_folder(output).glob("0*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-10])
    run(output, share=Share(1, 2))
    assert not output.exists()
    assert run(output).num_embedded == 3
    assert output.read_bytes() == whole.read_bytes()


def test_half_precision_takes_half_the_room(run: Run, archive: Archive, encoder: FrozenEncoder, tmp_path: Path) -> None:
    output = tmp_path / "features.parquet"
    run(output, inference=Inference(2, "bf16", device="cpu"))
    stored = np.stack(pd.read_parquet(output)["features"])
    assert stored.dtype == np.float16
    whole = embed_source(encoder, archive.store_source).features
    assert np.abs(stored - whole).max() < 0.02 * np.abs(whole).max()


def test_rows_that_cannot_be_used_are_listed(run: Run, tmp_path: Path) -> None:
    """A scan of two lesions is cut off, a row names a file that is not there; the others are embedded all the same."""
    archive = make_archive(tmp_path / "ct")
    rows = pd.read_csv(archive.table)
    pd.concat([rows, rows.iloc[:1].assign(image_path="absent.nii.gz")]).to_csv(archive.table, index=False)
    run(tmp_path / "before.parquet", source=archive.scans_source)
    before = FeatureTable.read(tmp_path / "before.parquet")
    assert len(before) == 7
    scan = archive.table.with_name("scan2.nii.gz")
    contents = scan.read_bytes()
    scan.write_bytes(contents[:-1000])

    output = tmp_path / "features.parquet"
    assert run(output, source=archive.scans_source, share=Share(0, 2)).num_embedded == 3  # of the other scans
    scan.write_bytes(contents)  # it comes back before the work is gone on with
    outcome = run(output, source=archive.scans_source)
    assert (outcome.num_embedded, outcome.num_rejected) == (4, 1)
    assert output.read_bytes() == (tmp_path / "before.parquet").read_bytes()

    scan.write_bytes(contents[:-1000])
    outcome = run(output, source=archive.scans_source, restart=True)
    rejected = pd.read_csv(rejected_file(output))
    assert outcome.num_rejected == 3
    assert rejected["row"].tolist() == [3, 6, 8]
    assert rejected["image_path"].tolist() == ["scan2.nii.gz"] * 2 + ["absent.nii.gz"]
    found = FeatureTable.read(output)
    assert found.lesions["row"].tolist() == [1, 2, 4, 5, 7]
    kept = before.aligned(found.lesions["lesion_id"])
    np.testing.assert_allclose(found.features, kept.features, rtol=1e-4, atol=1e-6)


def test_patches_that_cannot_be_read_are_listed(run: Run, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "ct")
    (damaged,) = archive.store.glob("scans/scan1-*.b2nd")
    damaged.write_bytes(damaged.read_bytes()[:100])
    output = tmp_path / "features.parquet"
    assert run(output, source=archive.store_source, share=Share(0, 2)).num_embedded == 4
    assert run(output, source=archive.store_source, share=Share(1, 2)).num_rejected == 3
    rejected = pd.read_csv(rejected_file(output))
    index = pd.read_parquet(archive.store / "lesions.parquet").set_index("lesion_id")
    assert sorted(rejected["row"]) == [1, 4, 7]
    assert index["row"].loc[rejected["lesion_id"]].tolist() == rejected["row"].tolist()
    assert rejected["reason"].str.contains("is damaged").all()
    assert FeatureTable.read(output).lesions["row"].tolist() == [2, 3, 5, 6]

    for other in archive.store.glob("scans/*.b2nd"):
        other.write_bytes(b"")
    with pytest.raises(FeatureTableError, match=r"no lesion could be embedded; see .*none\.rejected\.csv"):
        run(tmp_path / "none.parquet", source=archive.store_source)
    assert len(pd.read_csv(tmp_path / "none.rejected.csv")) == 7
    assert not (tmp_path / "none.parquet").exists()
