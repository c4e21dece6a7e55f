"""Order, seeds and batches: functions of seed, epoch and lesion, for any number of workers, ranks and restarts."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from monai.transforms import RandFlip
from torch import Tensor, nn

from fmcib_ssl.augment import (
    BatchedPublishedViews,
    BatchedViews,
    MonaiViews,
    PublishedViews,
    RandomGamma,
    RandomNoise,
)
from fmcib_ssl.data.loader import EpochSampler, LabelledPatches, LesionDataModule, ViewPairDataset, view_seeds
from fmcib_ssl.types import PatchPair, Preprocessing, SampleKey, ViewTransform

SIZE = (8, 8, 8)


def keys(epoch: int, **options: int | bool) -> list[SampleKey]:
    sampler = EpochSampler(**{"num_lesions": 23, "batch_size": 4, **options})  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


@pytest.mark.parametrize("num_lesions", [12, 13, 24, 100])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 1), (2, 3), (3, 4)])
def test_ranks_together_see_what_one_process_sees(num_lesions: int, batch_size: int, world_size: int) -> None:
    alone = keys(5, num_lesions=num_lesions, batch_size=batch_size * world_size, seed=9)
    ranks = [
        keys(5, num_lesions=num_lesions, batch_size=batch_size, world_size=world_size, rank=rank, seed=9)
        for rank in range(world_size)
    ]
    together = []
    for start in range(0, len(ranks[0]), batch_size):
        for rank in ranks:
            together += rank[start : start + batch_size]
    assert together == alone
    assert len(alone) == num_lesions - num_lesions % (batch_size * world_size)
    assert len({key.index for key in alone}) == len(alone)
    assert {key.epoch for key in alone} == {5}


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {tuple(key.index for key in keys(epoch, seed=seed)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert {key.index for epoch in range(20) for key in keys(epoch)} == set(range(23))  # every lesion has its turn


def test_an_order_that_cannot_be_is_refused_with_the_numbers_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"23 lesions .* batch of 16 on 2 .* takes 32: .* at most 11"):
        EpochSampler(23, 16, world_size=2)
    with pytest.raises(ValueError, match="need batch_size"):
        keys(0, rank=2, world_size=2)


class Noise:
    """Patches whose every voxel follows from their key, over all that a CT can hold, and below."""

    def __init__(self, num_lesions: int = 13) -> None:
        self.num_lesions = num_lesions

    def __len__(self) -> int:
        return self.num_lesions

    def __getitem__(self, key: SampleKey) -> PatchPair:
        draw = np.random.default_rng([key.epoch, key.index])
        positive, negative = torch.from_numpy(draw.integers(-2000, 3000, (2, 1, *SIZE), dtype=np.int16))
        return {"positive": positive, "negative": negative, "lesion": key.index, "negative_from_other_scan": False}

    def title(self, lesion: int) -> str:
        return str(lesion)


#: Of every kind of transform one that changes nothing.
IDENTITIES: dict[str, ViewTransform] = {
    "monai": MonaiViews([RandFlip(prob=0.0)]),
    "published": PublishedViews(SIZE, crop_edge=(1, 1), flip_prob=0, histogram_shift_prob=0, smooth_prob=0),
    "batched_published": BatchedPublishedViews(
        SIZE, crop_edge=(1, 1), flip_prob=0, histogram_shift_prob=0, smooth_prob=0
    ),
    "batched": BatchedViews({"gamma": RandomGamma(0.0), "noise": RandomNoise(0.0)}),
    "own": lambda patches, seeds: patches.float(),
}


@pytest.mark.parametrize("transform", IDENTITIES.values(), ids=IDENTITIES)
@pytest.mark.parametrize("where", ["workers", "device", "labelled"])
def test_views_of_every_kind_are_normalised_as_the_preprocessing_says(transform: ViewTransform, where: str) -> None:
    lung = Preprocessing(SIZE, padding_hu=-900, hu_offset=800.0, hu_scale=1500.0)
    order = [key.index for key in EpochSampler(3, 3)]
    pairs = [Noise()[SampleKey(0, index)] for index in order]
    expected = {
        kind: [(pair[kind].double().clamp_min(-900) + 800) / 1500 for pair in pairs]  # type: ignore[literal-required]
        for kind in ("positive", "negative")
    }
    if where == "labelled":
        labelled = LabelledPatches(
            lambda row: pairs[row]["positive"], range(3), np.zeros(3), lung, view_transform=transform
        )
        result = {"positive": [labelled[index]["view"] for index in range(3)]}
    else:
        data = LesionDataModule(
            Noise(3), transform, preprocessing=lung, batch_size=3, augment_on=where  # type: ignore[arg-type]
        )  # fmt: skip
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        result = {kind: list(batch[kind][1]) for kind in expected}
    for kind, views in result.items():
        for view, patch in zip(views, expected[kind], strict=True):
            assert view.dtype == torch.float32
            torch.testing.assert_close(view.double(), patch, atol=1e-6, rtol=0)


def test_an_array_is_normalised_as_a_tensor_is() -> None:
    lung, patch = Preprocessing(padding_hu=-900, hu_offset=800.0, hu_scale=1500.0), Noise()[SampleKey(0, 1)]["positive"]
    for patch_ in (patch, patch.float(), patch.double() + 0.3):
        before, result = patch_.clone(), lung.normalize(patch_.numpy())
        assert isinstance(result, np.ndarray) and result.dtype == np.float32
        assert np.array_equal(result, lung.normalize(patch_).numpy())
        assert torch.equal(patch_, before)


class AsTheyAre(Preprocessing):
    """Hands on what views show, which is no HU here."""

    def normalize(self, patch_hu: Tensor) -> Tensor:  # type: ignore[override]
        return patch_hu


class Constants:
    """Patches that show their key: the positive is `epoch * 100 + index`, negatives its opposite and 1000 less each.

    Args:
        num: negatives of a lesion; None for a single one without an axis of its own.
    """

    def __init__(self, num: int | None = None) -> None:
        self.num = num

    def __len__(self) -> int:
        return 7

    def __getitem__(self, key: SampleKey) -> PatchPair:
        patch = torch.full((1, 2, 3, 4), key.epoch * 100 + key.index, dtype=torch.int16)
        less = 1000 * torch.arange(self.num or 0, dtype=torch.int16).view(-1, 1, 1, 1, 1)
        negative = -patch if self.num is None else -patch[None] - less
        return {"positive": patch, "negative": negative, "lesion": key.index, "negative_from_other_scan": key.index < 3}

    def title(self, lesion: int) -> str:
        return str(lesion)


def show_seeds(patches: Tensor, seeds: Tensor) -> Tensor:
    """The patch, and its seed in the first voxel of the second slice."""
    assert patches.dtype == torch.int16
    views = patches.double()
    views[:, 0, 1, 0, 0] = seeds.double()
    return views


def shown(views: Any) -> list[list[tuple[int, int]]]:
    """What each lesion of a batch shows: `(patch, seed)` of both views of its patch, then of both of its negative."""
    sets = zip(*views["positive"], *views["negative"], strict=True)
    return [[(int(view[0, 0, 0, 0]), int(view[0, 1, 0, 0])) for view in lesion] for lesion in sets]


def test_every_view_has_a_seed_of_its_own_that_follows_from_the_key() -> None:
    drawn: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for seed, epoch, index in itertools.product(range(2), range(3), range(7)):
        dataset = ViewPairDataset(Constants(), show_seeds, seed, AsTheyAre())
        (drawn[seed, epoch, index],) = shown(dataset.collate([dataset[SampleKey(epoch, index)]]))
        assert [patch for patch, _ in drawn[seed, epoch, index]] == [s * (100 * epoch + index) for s in (1, 1, -1, -1)]
    seeds = [seed for views in drawn.values() for _, seed in views]
    assert len(set(seeds)) == len(seeds) == 4 * 42
    # In any batch, again and again; and a plain number is a lesion of epoch 0.
    chosen = [SampleKey(2, 6), SampleKey(0, 0), SampleKey(2, 6), 5]
    batch = dataset.collate([dataset[key] for key in chosen])
    assert shown(batch) == [drawn[1, 2, 6], drawn[1, 0, 0], drawn[1, 2, 6], drawn[1, 0, 5]]
    assert batch["lesion"].tolist() == [6, 0, 6, 5]
    assert batch["negative_from_other_scan"].tolist() == [False, True, False, False]
    assert len(dataset) == 7


def test_seeds_share_no_stream_with_the_plain_key() -> None:
    # NumPy: SeedSequence([a, b]) and SeedSequence([a, b, 0]) are one stream; whoever draws patches may use either.
    own = set(view_seeds(4, SampleKey(2, 0), 1))
    for entropy in ([4, 2], [4, 2, 0], [4, 2, 0, 0]):
        assert own.isdisjoint(np.random.SeedSequence(entropy).generate_state(8).tolist())


def test_several_negatives_have_views_each() -> None:
    one, several, none = (ViewPairDataset(Constants(num), show_seeds, 7, AsTheyAre()) for num in (None, 3, 0))
    chosen = [SampleKey(2, index) for index in (3, 0, 6)]
    single, batch = (dataset.collate([dataset[key] for key in chosen]) for dataset in (one, several))
    for number in (0, 1):
        assert batch["negative"][number].shape == (3, 3, 1, 2, 3, 4)
        assert torch.equal(batch["positive"][number], single["positive"][number])
        assert torch.equal(batch["negative"][number][:, 0], single["negative"][number])  # the first is as if alone
        assert batch["negative"][number][0, :, 0, 0, 0, 0].tolist() == [-203, -1203, -2203]
    seeds = torch.stack([*batch["negative"]])[:, :, :, 0, 1, 0, 0]
    assert len(seeds.unique()) == 18
    batch = none.collate([none[key] for key in chosen])
    assert [tuple(view.shape) for view in batch["negative"]] == [(3, 0, 1, 2, 3, 4)] * 2


def datamodule(transform: ViewTransform | None = None, **options: Any) -> LesionDataModule:
    views = transform or PublishedViews(SIZE)
    return LesionDataModule(Noise(), views, **{"batch_size": 4, "seed": 3, **options})


def batches(module: LesionDataModule, epochs: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    loader = module.train_dataloader()
    result = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        result += list(loader)
    return result


def tensors(batch: dict[str, Any]) -> list[Tensor]:
    return [*batch["positive"], *batch["negative"], batch["lesion"], batch["negative_from_other_scan"]]


def test_workers_do_not_change_the_batches_nor_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone, parallel = batches(datamodule()), batches(datamodule(num_workers=2))
    assert torch.equal(before, torch.get_rng_state())
    assert len(alone) == len(parallel) == 6
    for here, there in zip(alone, parallel, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(here), tensors(there), strict=True))
    assert len({tuple(batch["lesion"].tolist()) for batch in alone}) == 6
    for view in tensors(alone[0])[:4]:  # as a method takes them
        assert view.shape == (4, 1, *SIZE) and view.dtype == torch.float32
    assert [tensor.dtype for tensor in tensors(alone[0])[4:]] == [torch.int64, torch.bool]
    assert not torch.equal(alone[0]["positive"][0], alone[0]["positive"][1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="augment_on is 'gpu'"):
        datamodule(augment_on="gpu")
    sizes = [datamodule(batch_size="auto", max_batch_size=10).batch_size_per_device(size) for size in (1, 2, 3, 13)]
    assert sizes == [10, 6, 4, 1]
    with pytest.raises(ValueError, match="13 lesions for 14 devices"):
        datamodule(batch_size="auto").batch_size_per_device(14)
    with pytest.raises(ValueError, match="13 lesions do not fill one batch of 14"):
        datamodule(batch_size=14).train_dataloader()


class Recorder(L.LightningModule):
    """Keeps the batches that reach a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Any]] = []
        self.seen: list[tuple[int, list[int]]] = []
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.batches.append(batch)
        self.seen.append((self.current_epoch, batch["lesion"].tolist()))
        return self.weight * batch["positive"][0].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: Any, *callbacks: L.Callback, recorder: Recorder, checkpoint: Path | None = None, **options: Any
) -> None:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=3, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(recorder, module, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_are_the_same_wherever_they_are_made(num_workers: int) -> None:
    for transform in (BatchedPublishedViews(SIZE), PublishedViews(SIZE)):
        expected = batches(datamodule(transform), epochs=(0, 1, 2))
        for augment_on in ("auto", "workers", "device"):
            module = datamodule(transform, num_workers=num_workers, augment_on=augment_on)
            # On a CPU `auto` is the workers: what the device sends on is made where the batch is collated.
            assert ("view_seeds" in next(iter(module.train_dataloader()))) == (augment_on == "device")
            fit(module, recorder=(recorder := Recorder()))
            assert len(recorder.batches) == len(expected) == 9
            for here, there in zip(recorder.batches, expected, strict=True):
                assert set(here) == set(there)
                assert all(torch.equal(a, b) for a, b in zip(tensors(here), tensors(there), strict=True))


def test_any_view_can_be_made_again_from_its_lesion_and_epoch() -> None:
    transform = BatchedPublishedViews(SIZE)
    batch = batches(datamodule(transform))[4]  # the second of epoch 1
    key = SampleKey(1, int(batch["lesion"][2]))
    params = transform.draw(torch.tensor(view_seeds(3, key, 1)), SIZE)
    pair = Noise()[key]
    patches = torch.stack([pair["positive"], pair["positive"], pair["negative"], pair["negative"]])
    views = Preprocessing().normalize(transform.apply(patches, params))
    for again, made in zip(views, tensors(batch)[:4], strict=True):
        torch.testing.assert_close(again, made[2], atol=1e-6, rtol=0)


def test_half_precision_throughout_reaches_views_made_on_the_device() -> None:
    module, recorder = datamodule(BatchedPublishedViews(SIZE), augment_on="device"), Recorder()
    fit(module, recorder=recorder, precision="bf16-true", max_steps=1)
    assert {view.dtype for view in tensors(recorder.batches[0])[:4]} == {torch.bfloat16}
    assert recorder.batches[0]["lesion"].dtype == torch.int64


class StopHereError(Exception):
    """What ends a run before its time."""


class Stopper(L.Callback):
    """Saves a checkpoint at some hook of a run, and ends the run there."""

    def __init__(self, hook: str, steps: int, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        setattr(self, hook, self.stop)

    def stop(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.folder / "last.ckpt")
            raise StopHereError


@pytest.mark.parametrize(
    ("num_workers", "hook", "steps"),
    [
        *((0, "on_train_batch_end", steps) for steps in (1, 3, 4, 8)),
        *((0, "on_before_backward", steps) for steps in (0, 2, 3)),
        *((0, "on_train_epoch_end", steps) for steps in (3, 6)),
        # Workers fetch ahead; one of each kind, in the second epoch.
        (2, "on_train_batch_end", 4),
        (2, "on_before_backward", 5),
        (2, "on_train_epoch_end", 6),
    ],
)
@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_an_interrupted_run_resumes_with_the_next_batch(
    num_workers: int, hook: str, steps: int, augment_on: str, tmp_path: Path
) -> None:
    whole, interrupted, resumed = Recorder(), Recorder(), Recorder()
    fit(datamodule(BatchedPublishedViews(SIZE)), recorder=whole)
    assert [epoch for epoch, _ in whole.seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert whole.seen[4][1] == [key.index for key in keys(1, num_lesions=13, seed=3)[4:8]]
    module = datamodule(BatchedPublishedViews(SIZE), num_workers=num_workers, augment_on=augment_on)
    with pytest.raises(StopHereError):
        fit(module, Stopper(hook, steps, tmp_path), recorder=interrupted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        fit(module, checkpoint=tmp_path / "last.ckpt", recorder=resumed)
    assert interrupted.seen == whole.seen[: steps + (hook == "on_before_backward")]
    assert resumed.seen == whole.seen[steps:]
    assert torch.equal(resumed.weight, whole.weight)


def test_another_number_of_devices_resumes_at_the_same_lesion() -> None:
    loader = datamodule(batch_size=2).train_dataloader()
    loader.load_state_dict({"epoch": 0, "batch": 2, "lesions_per_batch": 4})
    whole = datamodule(batch_size=2).train_dataloader()
    assert list(loader.lesions) == list(whole.lesions)[8:]
