"""Features are what the encoder gives for the lesion's own patch, whatever the order, the batch and the source."""

from __future__ import annotations

import hashlib
import itertools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from embedded_archive import LESIONS, PATCH_ZYX, Archive, make_archive, make_encoder
from torch import nn

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.store import Store
from fmcib_ssl.evaluation.embedding import baseline_tables, embed_source, open_patches
from fmcib_ssl.evaluation.embedding_encoders import FrozenEncoder, random_encoder
from fmcib_ssl.evaluation.embedding_inference import Inference, encode
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.models import small_resnet
from fmcib_ssl.types import Preprocessing


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive") / "ct")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    return make_encoder(tmp_path_factory.mktemp("run") / "encoder.safetensors")


def by_hand(encoder: FrozenEncoder, patches: list[torch.Tensor]) -> np.ndarray:
    """The formula: air 0, 2048 HU 1; one patch at a time."""
    with torch.no_grad():
        return torch.cat([encoder.module((p[None].float().clamp_min(-1024) + 1024) / 3072) for p in patches]).numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ["store_source", "scans_source"])
def test_edges_are_repeated_as_the_weights_say(archive: Archive, source: str) -> None:
    size = (PATCH_ZYX[0], 90, PATCH_ZYX[2])  # longer than the scans
    _, patches, found = open_patches(getattr(archive, source), Preprocessing(size, padding="edge"))
    _, plain, _ = open_patches(getattr(archive, source), Preprocessing(size))
    assert found.padding == "edge"
    for index in range(len(patches)):
        patch, constant = patches[index][0].numpy(), plain[index][0].numpy()
        columns = [np.flatnonzero((constant != -1024).any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        inside = constant[np.ix_(*columns)]
        widths = [(c[0], n - 1 - c[-1]) for c, n in zip(columns, size, strict=True)]
        assert len(columns[1]) < 90
        np.testing.assert_array_equal(patch, np.pad(inside, widths, mode="edge"))


def test_features_of_a_store(archive: Archive, encoder: FrozenEncoder) -> None:
    table = embed_source(encoder, archive.store_source, batch_size=3)
    patches = LesionPatches(archive.store, PATCH_ZYX)
    close(table.features, by_hand(encoder, [patches.positive(i) for i in range(len(LESIONS))]))
    assert np.abs(np.diff(table.features, axis=0)).max(axis=1).min() > 1e-4  # no two lesions are alike
    index = Store(archive.store).lesions
    pd.testing.assert_frame_equal(table.lesions, index.rename(columns={"features": "table_features"}))


def test_a_table_gets_a_store_of_its_own(archive: Archive, encoder: FrozenEncoder) -> None:
    stored, of_table = (embed_source(encoder, source) for source in (archive.store_source, archive.scans_source))
    pd.testing.assert_frame_equal(stored.lesions, of_table.lesions)
    close(stored.features, of_table.features)


def test_the_order_of_the_table_does_not_matter(archive: Archive, encoder: FrozenEncoder) -> None:
    straight = embed_source(encoder, archive.scans_source)
    shuffled_csv = archive.table.with_name("shuffled.csv")
    order = np.random.default_rng(3).permutation(len(LESIONS))
    pd.read_csv(archive.table).iloc[order].to_csv(shuffled_csv, index=False)
    shuffled = embed_source(encoder, {**archive.scans_source, "annotations": str(shuffled_csv)})
    assert shuffled.lesions["lesion_id"].tolist() == straight.lesions["lesion_id"].iloc[order].tolist()
    close(shuffled.features, straight.features[order])


def test_selected_lesions_in_any_order(archive: Archive, encoder: FrozenEncoder) -> None:
    whole = embed_source(encoder, archive.store_source)
    ones = embed_source(encoder, {**archive.store_source, "select": {"label": 1}})
    assert ones.lesions["label"].tolist() == [1, 1, 1]
    close(ones.features, whole.features[whole.lesions["label"] == 1])
    wanted = whole.lesions["lesion_id"].iloc[[5, 0, 2]].tolist()
    close(embed_source(encoder, archive.store_source, lesion_ids=wanted).features, whole.features[[5, 0, 2]])
    with pytest.raises(FeatureTableError, match="nowhere"):
        embed_source(encoder, archive.store_source, lesion_ids=["nowhere"])


def test_workers_and_batches_change_nothing(archive: Archive, encoder: FrozenEncoder) -> None:
    one = embed_source(encoder, archive.store_source, batch_size=1)
    many = embed_source(encoder, archive.store_source, batch_size=4, num_workers=2)
    close(many.features, one.features)


def test_eight_views_are_the_mean_over_mirror_images(encoder: FrozenEncoder) -> None:
    patches = torch.randint(-1000, 400, (3, 1, *PATCH_ZYX), dtype=torch.int16)
    found = encode(encoder.module, patches, encoder.preprocessing, views=8).numpy()
    total = np.zeros_like(found, dtype=np.float64)
    for z, y, x in itertools.product((1, -1), repeat=3):
        mirrored = np.ascontiguousarray(patches.numpy()[:, :, ::z, ::y, ::x])
        total += by_hand(encoder, list(torch.from_numpy(mirrored)))
    close(found, total / 8)
    close(encode(encoder.module, patches.flip(3), encoder.preprocessing, views=8).numpy(), found)
    assert np.abs(encode(encoder.module, patches, encoder.preprocessing).numpy() - found).max() > 1e-3


def test_half_precision_is_close(archive: Archive, encoder: FrozenEncoder) -> None:
    whole = embed_source(encoder, archive.store_source).features
    half = embed_source(encoder, archive.store_source, precision="bf16").features
    assert 0 < np.abs(half - whole).max() < 0.02 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp16", "device": "cpu"}, "on the CPU take precision=bf16"),
        ({"precision": "fp8"}, "precision=fp8 is not one of 32, bf16, fp16"),
        ({"views": 2}, "views=2 is not one of 1, 8"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_values_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(FeatureTableError, match=message):
        Inference(**values)  # type: ignore[arg-type]


def test_a_store_of_another_spacing_is_refused(archive: Archive, encoder: FrozenEncoder) -> None:
    coarse = replace(encoder, preprocessing=Preprocessing(PATCH_ZYX, spacing_mm=2.0))
    with pytest.raises(FeatureTableError, match=r"voxels of 1 mm.*trained on 2 mm.*spacing_mm=2"):
        embed_source(coarse, archive.store_source)


def test_a_source_says_how_to_open_it_again(archive: Archive, encoder: FrozenEncoder) -> None:
    table = embed_source(encoder, archive.store_source)
    lesions, patches, preprocessing = open_patches(table.provenance["source"])
    assert preprocessing == encoder.preprocessing and len(patches) == len(LESIONS)
    close(table.features, by_hand(encoder, [patches[i] for i in range(len(patches))]))
    pd.testing.assert_frame_equal(lesions, table.lesions)
    assert open_patches(archive.store_source)[2] == Preprocessing()
    with pytest.raises(FeatureTableError, match="'store', 'scans' or 'medmnist', not 'folder'"):
        open_patches({"kind": "folder"})
    with pytest.raises(FeatureTableError, match="select names the column 'lable'"):
        open_patches({**archive.store_source, "select": {"lable": 1}})


def test_the_origin_tells_the_whole_story(archive: Archive, encoder: FrozenEncoder) -> None:
    provenance = embed_source(encoder, archive.store_source, precision="bf16", views=8).provenance
    weights = Path(provenance["weights"])
    assert provenance["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    expected = {"kind": "encoder", "name": "encoder", "precision": "bf16", "views": 8}
    assert {key: provenance[key] for key in expected} == expected
    assert Preprocessing.from_dict(provenance["preprocessing"]) == encoder.preprocessing
    assert provenance["encoder"]["widths"] == [4, 4, 8, 8]
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_scan_that_is_damaged_costs_only_its_lesions(
    tmp_path: Path, encoder: FrozenEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    archive = make_archive(tmp_path / "ct")
    whole = embed_source(encoder, archive.store_source)
    (damaged,) = archive.store.glob("scans/scan1-*.b2nd")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        rest = embed_source(encoder, archive.store_source)
    assert rest.lesions["PatientID"].tolist() == ["patient 0", "patient 2", "patient 0", "patient 2"]
    close(rest.features, whole.aligned(rest.lesions["lesion_id"]).features)
    assert caplog.text.count("is damaged") == 3


class Reciprocal(nn.Module):
    """Not a number where the patch's middle voxel is above -300 HU."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        middle = patches[:, :, 5, 6, 7]
        return torch.where(middle > (1024 - 300) / 3072, torch.nan, middle)


def test_features_that_are_no_numbers_are_left_out(archive: Archive) -> None:
    table = embed_source(Reciprocal(), archive.store_source, Preprocessing(PATCH_ZYX))
    patches = LesionPatches(archive.store, PATCH_ZYX)
    kept = [i for i in range(len(LESIONS)) if patches.positive(i)[0, 5, 6, 7] <= -300]
    assert 0 < len(kept) < len(LESIONS) and table.lesions["row"].tolist() == [i + 1 for i in kept]


def test_the_mode_and_the_random_state_stay(archive: Archive) -> None:
    encoder = small_resnet([4, 4, 8, 8]).train()
    state = torch.random.get_rng_state()
    table = embed_source(encoder, archive.store_source, Preprocessing(PATCH_ZYX))
    assert encoder.training and torch.equal(torch.random.get_rng_state(), state)
    close(table.features, embed_source(encoder.eval(), archive.store_source, Preprocessing(PATCH_ZYX)).features)
    with pytest.raises(FeatureTableError, match="give preprocessing="):
        embed_source(encoder, archive.store_source)


def test_baselines(archive: Archive, encoder: FrozenEncoder, tmp_path: Path) -> None:
    """Of the same lesions in the same order, also after a journey through a file and a shuffle."""
    table = embed_source(encoder, archive.scans_source)
    order = ["lesion_id", "row"]
    shuffled = FeatureTable.read(table.write(tmp_path / "f.parquet")).aligned(table.lesions["lesion_id"].iloc[::-1])
    baselines = baseline_tables(shuffled, seed=3)
    assert list(baselines) == ["random weights", "raw voxels"]
    patches = open_patches(archive.scans_source, encoder.preprocessing)[1]
    hu = [patches[i] for i in reversed(range(len(LESIONS)))]
    voxels = (np.stack([p.numpy().ravel() for p in hu]).astype(np.float32).clip(-1024) + 1024) / 3072
    np.testing.assert_allclose(baselines["raw voxels"].features, voxels, atol=1e-6)
    torch.manual_seed(3)
    untrained = small_resnet([4, 4, 8, 8]).eval()
    close(baselines["random weights"].features, by_hand(replace(encoder, module=untrained), hu))
    for baseline in baselines.values():
        pd.testing.assert_frame_equal(baseline.lesions[order], shuffled.lesions[order])
    assert baselines["random weights"].provenance["kind"] == "random_weights"


def test_baselines_need_to_know_their_lesions(archive: Archive, encoder: FrozenEncoder) -> None:
    table = embed_source(encoder, archive.store_source)
    with pytest.raises(FeatureTableError, match="does not say where its lesions are"):
        baseline_tables(replace(table, provenance={"name": "diameter"}))
    unknown = replace(table, provenance={**table.provenance, "encoder": None})
    assert list(baseline_tables(unknown)) == ["raw voxels"]
    foreign = replace(table, provenance={**table.provenance, "encoder": {"_target_": "os.system", "command": "false"}})
    with pytest.raises(FeatureTableError, match=r"os\.system, which is not one of"):
        baseline_tables(foreign)
    for target in (
        "fmcib_ssl.models.encoders.small_resnet",
        "fmcib_ssl.models.absent.net",
        "fmcib_ssl.models.export.save",
    ):
        with pytest.raises(FeatureTableError, match=r"cannot be built|is not one of"):
            random_encoder({"_target_": target, "depth": 3}, Preprocessing())
