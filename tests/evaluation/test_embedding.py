"""Features are what the encoder gives for the lesion's own patch, whatever the order, the batch and the source.

And in parts on the disk: stopped, resumed, shared between processes, they are always the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from embedded_archive import LESIONS, PATCH_ZYX, Archive, make_archive, make_encoder
from torch import nn

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.store import Store
from fmcib_ssl.evaluation.embedding import (
    Outcome,
    baseline_tables,
    embed_source,
    embed_to_file,
    rejected_file,
)
from fmcib_ssl.evaluation.embedding_sources import FrozenEncoder, Inference, encode, open_patches, random_encoder
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.hu_statistics import hu_statistics
from fmcib_ssl.models import small_resnet
from fmcib_ssl.types import Preprocessing, UserError

CPU = Inference(batch_size=2, device="cpu")
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
        features: torch.Tensor = self.encoder(patches)
        return features


class Reciprocal(nn.Module):
    """Not a number where the patch's middle voxel is above -300 HU."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        middle = patches[:, :, 5, 6, 7]
        return torch.where(middle > (1024 - 300) / 3072, torch.nan, middle)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive") / "ct")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    return make_encoder(tmp_path_factory.mktemp("run") / "encoder.safetensors")


@pytest.fixture
def counted(encoder: FrozenEncoder) -> Counted:
    return Counted(encoder.module)


@pytest.fixture
def run(archive: Archive, encoder: FrozenEncoder, counted: Counted) -> Run:
    """Seven lesions in shards of three, three and one."""

    def embed(output: Path, **changes: Any) -> Outcome:
        values = {"encoder": replace(encoder, module=counted), "source": archive.store_source, "inference": CPU}
        return embed_to_file(output=output, shard_size=3, progress=False, **{**values, **changes})

    return embed


@pytest.fixture
def whole(run: Run, counted: Counted, tmp_path: Path) -> Path:
    """The table made in one go."""
    run(tmp_path / "whole.parquet")
    counted.num_patches = 0
    return tmp_path / "whole.parquet"


def by_hand(encoder: FrozenEncoder, patches: list[torch.Tensor]) -> np.ndarray:
    """The formula: air 0, 2048 HU 1; one patch at a time."""
    with torch.no_grad():
        return torch.cat([encoder.module((p[None].float().clamp_min(-1024) + 1024) / 3072) for p in patches]).numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_features_of_a_store(archive: Archive, encoder: FrozenEncoder) -> None:
    table = embed_source(encoder, archive.store_source, Inference(batch_size=3))
    patches = LesionPatches(archive.store, PATCH_ZYX)
    close(table.features, by_hand(encoder, [patches.positive(i) for i in range(len(LESIONS))]))
    assert np.abs(np.diff(table.features, axis=0)).max(axis=1).min() > 1e-4  # no two lesions are alike
    index = Store(archive.store).lesions
    pd.testing.assert_frame_equal(table.lesions, index.rename(columns={"features": "table_features"}))


def test_a_table_gets_a_store_and_its_order_does_not_matter(archive: Archive, encoder: FrozenEncoder) -> None:
    stored, direct = (embed_source(encoder, source) for source in (archive.store_source, archive.scans_source))
    pd.testing.assert_frame_equal(stored.lesions, direct.lesions)
    np.testing.assert_array_equal(stored.features, direct.features)
    csv = pd.read_csv(archive.table)
    pd.testing.assert_frame_equal(direct.lesions[[*csv.columns[:-1]]], csv.iloc[:, :-1])
    order = np.random.default_rng(3).permutation(len(LESIONS))
    csv.iloc[order].to_csv(archive.table.with_name("shuffled.csv"), index=False)
    source = {**archive.scans_source, "annotations": str(archive.table.with_name("shuffled.csv"))}
    shuffled = embed_source(encoder, source)
    assert shuffled.lesions["lesion_id"].tolist() == stored.lesions["lesion_id"].iloc[order].tolist()
    close(shuffled.features, stored.features[order])


def test_selected_lesions_in_any_order(archive: Archive, encoder: FrozenEncoder) -> None:
    whole = embed_source(encoder, archive.store_source)
    ones = embed_source(encoder, {**archive.store_source, "select": {"label": 1}})
    assert ones.lesions["label"].tolist() == [1, 1, 1]
    close(ones.features, whole.features[whole.lesions["label"] == 1])
    wanted = whole.lesions["lesion_id"].iloc[[5, 0, 2]].tolist()
    close(embed_source(encoder, archive.store_source, lesion_ids=wanted).features, whole.features[[5, 0, 2]])
    with pytest.raises(FeatureTableError, match="nowhere"):
        embed_source(encoder, archive.store_source, lesion_ids=["nowhere"])


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"batch_size": 1}, 0), ({"num_workers": 2}, 0), ({"precision": "bf16"}, 0.02)]
)
def test_batches_and_workers_change_nothing_and_half_precision_little(
    archive: Archive, encoder: FrozenEncoder, options: dict[str, Any], tolerance: float
) -> None:
    whole = embed_source(encoder, archive.store_source, Inference(batch_size=4)).features
    other = embed_source(encoder, archive.store_source, Inference(**options)).features
    np.testing.assert_allclose(other, whole, rtol=1e-4, atol=tolerance * np.abs(whole).max() + 1e-6)
    assert (np.abs(other - whole).max() > 1e-5) == (tolerance > 0)


def test_eight_views_are_the_mean_over_mirror_images(encoder: FrozenEncoder) -> None:
    patches = torch.randint(-1000, 400, (3, 1, *PATCH_ZYX), dtype=torch.int16)
    found = encode(encoder.module, patches, encoder.preprocessing, views=8).numpy()
    total = np.zeros_like(found, dtype=np.float64)
    for z, y, x in itertools.product((1, -1), repeat=3):
        mirrored = np.ascontiguousarray(patches.numpy()[:, :, ::z, ::y, ::x])
        total += by_hand(encoder, list(torch.from_numpy(mirrored)))
    close(found, total / 8)
    assert np.abs(encode(encoder.module, patches, encoder.preprocessing).numpy() - found).max() > 1e-3


def test_sources_that_cannot_be(archive: Archive, encoder: FrozenEncoder) -> None:
    coarse = replace(encoder, preprocessing=Preprocessing(PATCH_ZYX, spacing_mm=2.0))
    with pytest.raises(FeatureTableError, match=r"voxels of 1 mm.*trained on 2 mm.*spacing_mm=2"):
        embed_source(coarse, archive.store_source)
    with pytest.raises(FeatureTableError, match="on the CPU take precision=bf16"):
        Inference(precision="fp16", device="cpu")
    with pytest.raises(FeatureTableError, match="not 'folder'"):
        open_patches({"kind": "folder"})
    with pytest.raises(UserError, match="select names the column 'lable'"):
        open_patches({**archive.store_source, "select": {"lable": 1}})


def test_the_provenance_tells_the_whole_story_and_opens_the_lesions_again(
    archive: Archive, encoder: FrozenEncoder
) -> None:
    table = embed_source(encoder, archive.store_source, Inference(precision="bf16", views=8))
    provenance = table.provenance
    weights = Path(provenance["weights"])
    assert provenance["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    expected = {"kind": "encoder", "name": "encoder", "precision": "bf16", "views": 8}
    assert {key: provenance[key] for key in expected} == expected
    assert Preprocessing.from_dict(provenance["preprocessing"]) == encoder.preprocessing
    assert provenance["encoder"]["widths"] == [4, 4, 8, 8]
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    patches = open_patches(provenance["source"])
    assert patches.preprocessing == encoder.preprocessing and len(patches) == len(LESIONS)
    pd.testing.assert_frame_equal(patches.lesions, table.lesions)
    assert open_patches(archive.store_source).preprocessing == Preprocessing()


def test_features_that_are_no_numbers_are_left_out(archive: Archive, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table = embed_source(FrozenEncoder(Reciprocal(), Preprocessing(PATCH_ZYX), {}), archive.store_source)
    patches = LesionPatches(archive.store, PATCH_ZYX)
    kept = [i for i in range(len(LESIONS)) if patches.positive(i)[0, 5, 6, 7] <= -300]
    assert 0 < len(kept) < len(LESIONS) and table.lesions["row"].tolist() == [i + 1 for i in kept]
    assert caplog.text.count("NaN or infinity") == len(LESIONS) - len(kept)


def test_the_mode_and_the_random_state_stay(archive: Archive) -> None:
    encoder = FrozenEncoder(small_resnet([4, 4, 8, 8]).train(), Preprocessing(PATCH_ZYX), {})
    state = torch.random.get_rng_state()
    table = embed_source(encoder, archive.store_source)
    assert encoder.module.training and torch.equal(torch.random.get_rng_state(), state)
    close(table.features, by_hand(replace(encoder, module=encoder.module.eval()), patches_of(archive)))


def patches_of(archive: Archive) -> list[torch.Tensor]:
    patches = LesionPatches(archive.store, PATCH_ZYX)
    return [patches.positive(i) for i in range(len(LESIONS))]


def test_baselines(archive: Archive, encoder: FrozenEncoder, tmp_path: Path) -> None:
    """Of the same lesions in the same order, also after a journey through a file and a shuffle."""
    table = embed_source(encoder, archive.scans_source)
    shuffled = FeatureTable.read(table.write(tmp_path / "f.parquet")).aligned(table.lesions["lesion_id"].iloc[::-1])
    baselines = baseline_tables(shuffled, seed=3)
    assert list(baselines) == ["random weights", "HU statistics", "raw voxels"]
    hu = patches_of(archive)[::-1]
    voxels = (np.stack([p.numpy().ravel() for p in hu]).astype(np.float32).clip(-1024) + 1024) / 3072
    np.testing.assert_allclose(baselines["raw voxels"].features, voxels, atol=1e-6)
    torch.manual_seed(3)
    untrained = small_resnet([4, 4, 8, 8]).eval()
    np.testing.assert_array_equal(baselines["HU statistics"].features, hu_statistics(np.stack(hu)))
    close(baselines["random weights"].features, by_hand(replace(encoder, module=untrained), hu))
    for baseline in baselines.values():
        pd.testing.assert_frame_equal(baseline.lesions, shuffled.lesions)
    assert baselines["random weights"].provenance["kind"] == "random_weights"


def test_baselines_need_to_know_their_lesions(archive: Archive, encoder: FrozenEncoder) -> None:
    table = embed_source(encoder, archive.store_source)
    with pytest.raises(FeatureTableError, match="does not say where its lesions are"):
        baseline_tables(replace(table, provenance={"name": "diameter"}))
    unknown = replace(table, provenance={**table.provenance, "encoder": None})
    assert list(baseline_tables(unknown)) == ["HU statistics", "raw voxels"]
    foreign = replace(table, provenance={**table.provenance, "encoder": {"_target_": "os.system", "command": "false"}})
    with pytest.raises(FeatureTableError, match=r"os\.system, which is not one of"):
        baseline_tables(foreign)
    for target in ("encoders.small_resnet", "absent.net", "export.save"):
        with pytest.raises(FeatureTableError, match=r"cannot be built|is not one of"):
            random_encoder({"_target_": f"fmcib_ssl.models.{target}", "depth": 3}, Preprocessing())


def test_the_file_holds_what_the_memory_would(run: Run, archive: Archive, encoder: FrozenEncoder, whole: Path) -> None:
    assert [path.name for path in whole.parent.iterdir()] == ["whole.parquet"]
    in_memory, in_file = embed_source(encoder, archive.store_source), FeatureTable.read(whole)
    pd.testing.assert_frame_equal(in_file.lesions, in_memory.lesions)
    close(in_file.features, in_memory.features)
    assert in_file.provenance == json.loads(json.dumps(in_memory.provenance))
    run(whole.with_name("half.parquet"), inference=Inference(2, "bf16", device="cpu"))
    stored = np.stack(pd.read_parquet(whole.with_name("half.parquet"))["features"])
    assert stored.dtype == np.float16
    assert np.abs(stored - in_memory.features).max() < 0.02 * np.abs(in_memory.features).max()


@pytest.mark.parametrize("stop_after", [0, 2, 3, 6])
def test_interrupted_and_resumed(run: Run, counted: Counted, whole: Path, tmp_path: Path, stop_after: int) -> None:
    output = tmp_path / "features.parquet"
    counted.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run(output)
    assert not output.exists()
    counted.num_patches, counted.stop_after = 0, None
    outcome = run(output)
    assert counted.num_patches == outcome.num_embedded == 7 - 3 * (stop_after // 3)
    assert output.read_bytes() == whole.read_bytes()
    assert not output.with_suffix(".parts").exists()


@pytest.mark.parametrize("num_processes", [2, 5])
def test_several_processes_give_the_bytes_of_one(
    run: Run, counted: Counted, whole: Path, tmp_path: Path, num_processes: int
) -> None:
    """More processes than shards, too; the order in which they come to an end does not matter."""
    output = tmp_path / "features.parquet"
    outcomes = [run(output, share=(k, num_processes)) for k in reversed(range(num_processes))]
    assert counted.num_patches == len(LESIONS)  # each lesion once
    assert [outcome.num_missing > 0 for outcome in outcomes] == [True] * (num_processes - 1) + [False]
    assert output.read_bytes() == whole.read_bytes()


def test_a_finished_table_is_not_made_again(run: Run, counted: Counted, whole: Path) -> None:
    assert run(whole).num_embedded == counted.num_patches == 0
    assert run(whole, restart=True).num_embedded == 7


def test_a_damaged_part_is_made_again(run: Run, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "features.parquet"
    run(output, share=(0, 2))
    part = sorted(output.with_suffix(".parts").glob("0*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-10])
    run(output, share=(1, 2))
    assert not output.exists()
    assert run(output).num_embedded == 3
    assert output.read_bytes() == whole.read_bytes()


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"inference": Inference(2, "bf16", device="cpu")}, 'precision: "32", now "bf16"'),
    ({"source": {"select": {"label": 1}}}, "lesions: "),
    ({"encoder": None}, 'kind: "encoder", now "random_weights"'),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message.partition(":")[0] for _, message in CHANGES])
@pytest.mark.parametrize("state", ["finished", "in parts"])
def test_another_request_is_refused_unless_told(
    run: Run, archive: Archive, encoder: FrozenEncoder, tmp_path: Path, change: dict[str, Any], message: str, state: str
) -> None:
    output = tmp_path / "features.parquet"
    run(output, share=(0, 1) if state == "finished" else (0, 2))
    if "source" in change:
        change = {"source": {**archive.store_source, **change["source"]}}
    if "encoder" in change:
        change = {"encoder": random_encoder(encoder.about["encoder"], encoder.preprocessing)}
    with pytest.raises(FeatureTableError) as caught:
        run(output, **change)
    assert message in str(caught.value) and "restart=true" in str(caught.value)
    run(output, **change, restart=True)
    run(tmp_path / "fresh.parquet", **change)
    assert output.read_bytes() == (tmp_path / "fresh.parquet").read_bytes()


def test_a_file_that_is_no_table_is_not_replaced(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "features.parquet"
    output.write_text("somebody's work")
    with pytest.raises(FeatureTableError, match="is not a table of features"):
        run(output)
    assert output.read_text() == "somebody's work"
    with pytest.raises(FeatureTableError, match=r"NAME\.parquet"):
        run(tmp_path / "features.csv")


def test_rows_that_cannot_be_used_are_listed(run: Run, tmp_path: Path) -> None:
    """A scan of two lesions is cut off, a row names no file; the others are embedded; the scan comes back."""
    archive = make_archive(tmp_path / "ct")
    rows = pd.read_csv(archive.table)
    pd.concat([rows, rows.iloc[:1].assign(image_path="absent.nii.gz")]).to_csv(archive.table, index=False)
    scan = archive.table.with_name("scan2.nii.gz")
    contents = scan.read_bytes()
    scan.write_bytes(contents[:-1000])
    output = tmp_path / "features.parquet"
    assert run(output, source=archive.scans_source).num_rejected == 3
    rejected = pd.read_csv(rejected_file(output))
    assert sorted(rejected["row"]) == [3, 6, 8]
    assert sorted(rejected["image_path"]) == ["absent.nii.gz"] + ["scan2.nii.gz"] * 2
    assert FeatureTable.read(output).lesions["row"].tolist() == [1, 2, 4, 5, 7]
    scan.write_bytes(contents)
    assert run(output, source=archive.scans_source, restart=True).num_rejected == 1
    assert FeatureTable.read(output).lesions["row"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_patches_that_cannot_be_read_are_listed(run: Run, whole: Path, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "ct")
    (damaged,) = archive.store.glob("scans/scan1-*.b2nd")
    damaged.write_bytes(damaged.read_bytes()[:100])
    output = tmp_path / "features.parquet"
    assert run(output, source=archive.store_source, share=(0, 2)).num_embedded == 4
    assert run(output, source=archive.store_source, share=(1, 2)).num_rejected == 3
    rejected = pd.read_csv(rejected_file(output))
    index = pd.read_parquet(archive.store / "lesions.parquet").set_index("lesion_id")
    assert sorted(rejected["row"]) == [1, 4, 7]
    assert index["row"].loc[rejected["lesion_id"]].tolist() == rejected["row"].tolist()
    assert rejected["reason"].str.contains("is damaged").all()
    rest = FeatureTable.read(output)
    assert rest.lesions["row"].tolist() == [2, 3, 5, 6]
    close(rest.features, FeatureTable.read(whole).features[[1, 2, 4, 5]])

    for other in archive.store.glob("scans/*.b2nd"):
        other.write_bytes(b"")
    with pytest.raises(FeatureTableError, match=r"no lesion could be embedded; see .*none\.rejected\.csv"):
        run(tmp_path / "none.parquet", source=archive.store_source)
    assert len(pd.read_csv(tmp_path / "none.rejected.csv")) == 7
    assert not (tmp_path / "none.parquet").exists()
