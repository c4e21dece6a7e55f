"""The benchmark on sarcomas: where its places lie, how places find each other, who is trained on, and what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import sarcoma  # noqa: E402
import sarcoma_data  # noqa: E402
import sarcoma_methods  # noqa: E402
import sarcoma_probes  # noqa: E402

from fmcib_ssl.data import Store, prepare_store, read_annotations  # noqa: E402
from fmcib_ssl.types import SampleKey  # noqa: E402

SPACING_XYZ = (1.5, 1.5, 3.3)
SHAPE_ZYX = (36, 90, 80)


def write_scan(folder: Path) -> tuple[sitk.Image, sitk.Image]:
    """A cylinder of tissue in air with a tumour in it that is not convex, rows and columns counted backwards."""
    rng = np.random.default_rng(0)
    z, y, x = np.indices(SHAPE_ZYX)
    body = (y - 45) ** 2 + (x - 40) ** 2 < 37**2
    tumour = np.hypot(np.hypot((y - 50) * 1.5, (x - 45) * 1.5), (z - 18) * 3.3) < 24
    tumour &= ~((y < 50) & (x < 45))
    hu = np.where(body, rng.normal(40, 30, SHAPE_ZYX), -1000).astype(np.int16)
    images = sitk.GetImageFromArray(hu), sitk.GetImageFromArray(tumour.astype(np.uint8))
    for image, name in zip(images, ("scan", "mask"), strict=True):
        image.SetSpacing(SPACING_XYZ)
        image.SetOrigin((31.0, -12.0, 400.0))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(folder / f"{name}.nii.gz"))
    return images


def test_places_are_inside_the_mask_or_far_from_it_in_the_body(tmp_path: Path) -> None:
    scan, mask = write_scan(tmp_path)
    own = sarcoma_data.Mask.read(tmp_path / "mask.nii.gz")
    points = pd.DataFrame(own.lattice_lps_mm(), columns=["coordX", "coordY", "coordZ"])
    points.assign(image_path="scan.nii.gz", PatientID="P").to_csv(tmp_path / "points.csv", index=False)
    prepare_store(read_annotations(tmp_path / "points.csv"), tmp_path / "store", image_root=tmp_path, num_workers=0)
    store = Store(tmp_path / "store")
    places = sarcoma_data.place_table(store, {"P": own})

    grid = store.grid(store.lesions["scan_id"].iloc[0])
    lps = grid.to_lps_mm(places[["z", "y", "x"]].to_numpy(float))
    index = np.array([mask.TransformPhysicalPointToIndex(point)[::-1] for point in lps.tolist()])
    inside = sitk.GetArrayFromImage(mask) > 0
    distance = ndimage.distance_transform_edt(~inside, sampling=SPACING_XYZ[::-1])[tuple(index.T)]
    of_kind = {kind: (places["kind"] == kind).to_numpy() for kind in sarcoma_data.KINDS}
    assert len(places) == 3 * sarcoma_data.NUM_PLACES
    # A point of the lattice is the centre of a voxel of the mask; its place, one of the store's, is within half of one.
    assert distance[of_kind["inside"]].max() <= max(SPACING_XYZ)
    assert distance[~of_kind["inside"]].min() >= sarcoma_data.MARGIN_MM
    assert (distance[of_kind["outside"]] > 15).any()
    np.testing.assert_array_equal(places["row"] >= 0, of_kind["inside"])

    body = np.argwhere(sitk.GetArrayFromImage(scan) > -500) * SPACING_XYZ[::-1]
    off_body, _ = cKDTree(body).query(index * SPACING_XYZ[::-1])
    assert off_body.max() <= 4.0  # a cell of the coarse map
    starts = places[["z", "y", "x"]].to_numpy() - sarcoma_data.SIZE_ZYX // 2
    assert (starts >= 0).all() and (starts + sarcoma_data.SIZE_ZYX <= grid.shape_zyx).all()


def test_lattice_is_so_fine_that_its_patches_cover_the_tumour(tmp_path: Path) -> None:
    _, mask = write_scan(tmp_path)
    lattice = sarcoma_data.Mask.read(tmp_path / "mask.nii.gz").lattice_lps_mm()
    assert all(mask.GetPixel(mask.TransformPhysicalPointToIndex(point)) for point in lattice.tolist())
    voxels = np.argwhere(sitk.GetArrayFromImage(mask))
    lps = np.array([mask.TransformIndexToPhysicalPoint(v[::-1].tolist()) for v in voxels])
    reach = sarcoma_data.SIZE_ZYX[::-1] - 1
    assert all((np.abs(lattice - point) < reach).all(1).any() for point in lps)


def test_distances_are_those_of_scipy_at_the_voxel_that_holds_a_point(tmp_path: Path) -> None:
    _, mask = write_scan(tmp_path)
    inside = np.argwhere(sitk.GetArrayFromImage(mask)) * SPACING_XYZ[::-1]
    index = np.random.default_rng(1).integers(0, SHAPE_ZYX, size=(200, 3))
    points = np.array([mask.TransformIndexToPhysicalPoint(i[::-1].tolist()) for i in index])
    expected, _ = cKDTree(inside).query(index * SPACING_XYZ[::-1])
    distances = sarcoma_data.Mask.read(tmp_path / "mask.nii.gz").distances_at(points)
    np.testing.assert_allclose(distances, expected, atol=1e-5)


def test_pairs_are_those_far_apart_without_a_common_voxel() -> None:
    centers = np.random.default_rng(0).integers(0, 60, size=(14, 3))
    expected = {
        (i, j)
        for i in range(14)
        for j in range(14)
        if np.linalg.norm(centers[i] - centers[j]) >= 24
        and any(abs(int(centers[i, a]) - int(centers[j, a])) >= n for a, n in enumerate((8, 24, 24)))
    }
    assert expected and {tuple(pair) for pair in sarcoma_probes.pairs_apart(centers).tolist()} == expected


def test_in_a_small_tumour_the_places_farthest_apart_are_taken() -> None:
    centers = np.array([[0, 0, 0], [0, 3, 0], [0, 10, 0], [2, 2, 2]])
    assert {tuple(pair) for pair in sarcoma_probes.pairs_apart(centers).tolist()} == {(0, 2), (2, 0)}


def test_ranks_by_cosine_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(2)
    patients = np.repeat([f"P{k:02d}" for k in range(9)], 6)
    features, centers = rng.normal(size=(54, 5)), rng.integers(0, 100, size=(54, 3))
    asking, gallery = sarcoma_probes.draw_pairs(patients, centers)
    ranks = sarcoma_probes.ranks_by_cosine(features, asking, gallery)
    for g in range(sarcoma_probes.NUM_GALLERIES):
        for p in range(9):
            assert patients[asking[g, p]] == patients[gallery[g, p]] == f"P{p:02d}" and asking[g, p] != gallery[g, p]
            query = features[asking[g, p]]
            cosines = [
                float(query @ features[row] / np.linalg.norm(query) / np.linalg.norm(features[row]))
                for row in gallery[g]
            ]
            assert ranks[p, g] == sorted(cosines, reverse=True).index(cosines[p]) + 1
    assert ranks.shape == (9, sarcoma_probes.NUM_GALLERIES) and 3.5 < ranks.mean() < 6.5  # chance: 5


def synthetic(num_patients: int = 12) -> sarcoma_data.Sarcomas:
    """Patches of noise; inside a tumour brighter than outside, and like each other in a tumour."""
    rng = np.random.default_rng(0)
    rows, patches = [], []
    for patient in range(num_patients):
        own = rng.normal(0, 60)
        for kind in sarcoma_data.KINDS:
            for number in range(6):
                rows.append({"PatientID": f"P{patient:02d}", "kind": kind, "z": 30 * number, "y": 0, "x": 0, "row": 0})
                level = own + 80 * (kind == "inside")
                patches.append(rng.normal(level, 30, (1, *sarcoma_data.SIZE_ZYX)).astype(np.int16))
    num_inside = 6 * num_patients

    def pool(num: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, 50, (num_inside, num, 1, *sarcoma_data.SIZE_ZYX)).astype(np.int16))

    ratings = rng.integers(1, 6, size=(40, 2))
    nodules = {f"{n}_{k + 1}": ratings[:, k] for n in sarcoma_probes.RATINGS for k in (0, 1)}
    hu = rng.normal(-300 + 60 * ratings.mean(1)[:, None, None, None, None], 50, (40, 1, *sarcoma_data.SIZE_ZYX))
    return sarcoma_data.Sarcomas(
        pd.DataFrame(rows),
        torch.from_numpy(np.stack(patches)),
        {"background": pool(sarcoma_data.NUM_NEGATIVES)},
        pd.DataFrame({**nodules, "PatientID": [f"N{k // 2}" for k in range(40)]}),
        torch.from_numpy(hu.astype(np.int16)),
        [],
    )


def command(workspace: Path, **options: object) -> sarcoma.SarcomaBenchmark:
    values = {"data": Path("none"), "workspace": workspace, "output": workspace / "out.json", **options}
    return sarcoma.SarcomaBenchmark(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["none", "background", "instances"])
def test_only_patches_of_the_rows_chosen_are_trained_on(pool: str) -> None:
    places = synthetic()
    rows = np.arange(12, 30)
    beside = places.pools["background"]
    beside[:] = torch.arange(len(beside)).view(-1, 1, 1, 1, 1, 1)
    inside = places.rows_of("inside")
    places.patches[torch.from_numpy(inside)] = torch.arange(len(inside), dtype=torch.int16).view(-1, 1, 1, 1, 1)
    training = sarcoma_methods.training_places(pool, places, rows, seed=0)
    assert len(training) == len(rows) * (2 if pool == "instances" else 1)
    for index in range(len(training)):
        pair = training[SampleKey(0, index)]
        own = rows[index % len(rows)]
        assert (pair["positive"] == own).all() and (pair["negative"] == own).all()
        assert len(pair["negative"]) == {"none": 0, "instances": 0, "background": 1}[pool]
        assert pair["patient"] == (own // 6) - 2


def test_other_negatives_are_drawn_in_other_epochs() -> None:
    places = synthetic()
    training = sarcoma_methods.training_places("background", places, np.arange(18), seed=0)
    drawn = {training[SampleKey(epoch, 3)]["negative"].float().mean().item() for epoch in range(12)}
    assert len(drawn) > 3
    again = sarcoma_methods.training_places("background", places, np.arange(18), seed=0)
    assert torch.equal(again[SampleKey(5, 3)]["negative"], training[SampleKey(5, 3)]["negative"])


def test_figures_are_those_of_scikit_learn_and_scipy_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sarcoma_probes, "NUM_BOOTSTRAP", 40)
    places = synthetic()
    benchmark = sarcoma.Benchmark(command(tmp_path, methods="hu_statistics", seeds=1), places)
    benchmark.work()
    results = benchmark.write()
    rows = {(r["method"], r["task"], r["target"], r["metric"]): r for r in results["rows"]}
    assert len(rows) == len(sarcoma_probes.QUESTIONS)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert json.loads((tmp_path / "out.json").read_text()) == results

    jobs = list(benchmark.jobs())
    answers = [benchmark.answers(job, only_kept=True) for job in jobs]
    aucs, recalls = [], []
    for job, one in zip(jobs, answers, strict=True):
        assert one is not None
        among = places.rows_of("inside", "outside")
        tested = among[benchmark.fold[among] == job.fold]
        aucs.append(roc_auc_score(places.places["kind"][tested] == "inside", one["tumour-outside"]))
        recalls += (one["same_tumour-inside"] == 1).mean(1).tolist()
    assert rows["hu_statistics", "tumour", "outside", "auc"]["value"] == pytest.approx(np.mean(aucs), abs=1e-4)
    recall = rows["hu_statistics", "same_tumour", "inside", "recall_at_1"]["value"]
    assert recall == pytest.approx(np.mean(recalls), abs=1e-4)
    _, protocol = sarcoma_probes.rating(places, "texture")
    ends = np.cumsum([len(split.test) for split in protocol.splits])[:-1]
    assert answers[0] is not None
    by_fold: list[npt.NDArray[np.float64]] = np.split(answers[0]["texture-mean"], ends)
    expected = np.mean([
        spearmanr(part, protocol.labels.values[split.test]).statistic
        for part, split in zip(by_fold, protocol.splits, strict=True)
    ])  # fmt: skip
    assert rows["hu_statistics", "texture", "mean", "spearman"]["value"] == pytest.approx(expected, abs=1e-4)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("this was judged before")

    monkeypatch.setattr(sarcoma, "judged", refused)
    sarcoma.Benchmark(command(tmp_path, methods="hu_statistics", seeds=1), places).work()


@pytest.mark.parametrize("name", ["both_attract", "instances"])
def test_contenders_are_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sarcoma_methods, "BATCH_SIZE", 16)
    contender = sarcoma_methods.BY_NAME[name]
    small = ("data.batch_size=32" if name == "instances" else "data.batch_size=8", "encoder.widths=[2,2,2,2]")
    contender = sarcoma_methods.Contender(name, overrides=(*contender.overrides, *small), pool=contender.pool)
    places = synthetic(6)
    train = np.unique(places.patients)[:4]
    trained = sarcoma_methods.features(contender, places, train, seed=0, epochs=2)
    untrained = sarcoma_methods.features(
        sarcoma_methods.Contender("random", "random", small[1:]), places, train, seed=0, epochs=2
    )
    for after, before, num in zip(trained, untrained, (len(places.places), 40), strict=True):
        assert after.shape == before.shape == (num, 2) and np.isfinite(after).all() and not np.allclose(after, before)


def test_an_unknown_method_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="methods=moco: there is mined, lesions"):
        sarcoma.Benchmark(command(tmp_path, methods="mined,moco"), synthetic())
