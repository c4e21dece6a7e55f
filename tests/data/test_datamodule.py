"""Batches: the same for any number of workers, and the same from ranks together as from one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmcib_ssl.augment import BatchedPublishedViews, PublishedViews
from fmcib_ssl.data.datamodule import LesionDataModule
from fmcib_ssl.data.sampler import EpochSampler
from fmcib_ssl.data.views import view_seeds
from fmcib_ssl.types import PatchPair, Preprocessing, SampleKey, ViewTransform

SIZE = (8, 8, 8)


class NoisePatches:
    """Patches whose every voxel follows from their key."""

    def __init__(self, num_lesions: int = 13) -> None:
        self.num_lesions = num_lesions

    def __len__(self) -> int:
        return self.num_lesions

    def __getitem__(self, key: SampleKey) -> PatchPair:
        draw = np.random.default_rng([key.epoch, key.index])
        positive, negative = torch.from_numpy(draw.integers(-1024, 1000, (2, 1, *SIZE), dtype=np.int16))
        return {"positive": positive, "negative": negative, "lesion": key.index, "negative_from_other_scan": False}


def datamodule(transform: ViewTransform | None = None, **options: Any) -> LesionDataModule:
    views = transform or PublishedViews(SIZE)
    return LesionDataModule(NoisePatches(), views, **{"batch_size": 4, "seed": 3, **options})


def batches(module: LesionDataModule, epochs: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    loader = module.train_dataloader()
    found = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found += list(loader)
    return found


def tensors(batch: dict[str, Any]) -> list[Tensor]:
    return [*batch["positive"], *batch["negative"], batch["lesion"], batch["negative_from_other_scan"]]


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_do_not_change_the_batches(num_workers: int) -> None:
    alone, parallel = batches(datamodule()), batches(datamodule(num_workers=num_workers))
    assert len(alone) == len(parallel) == 6
    for here, there in zip(alone, parallel, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(here), tensors(there), strict=True))
    lesions = [tuple(batch["lesion"].tolist()) for batch in alone]
    assert len(set(lesions)) == 6
    assert not torch.equal(alone[0]["positive"][0], alone[0]["positive"][1])


def test_a_batch_is_what_the_method_takes() -> None:
    batch = batches(datamodule())[0]
    for view in tensors(batch)[:4]:
        assert view.shape == (4, 1, *SIZE)
        assert view.dtype == torch.float32
    assert batch["lesion"].dtype == torch.int64
    assert batch["negative_from_other_scan"].dtype == torch.bool
    assert len(tensors(batch)) == 6


def test_blocks_of_ranks_make_the_batch_of_one_process() -> None:
    alone = batches(datamodule(batch_size=6))
    ranks = []
    for rank in range(3):
        module = datamodule(batch_size=2)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=3)  # type: ignore[assignment]
        ranks.append(batches(module))
    assert len(alone) == len(ranks[0]) == 4
    for number, whole in enumerate(alone):
        blocks = [tensors(rank[number]) for rank in ranks]
        for index, expected in enumerate(tensors(whole)):
            assert torch.equal(torch.cat([block[index] for block in blocks]), expected)


def test_loading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(datamodule())
    batches(datamodule(num_workers=2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("world_size", "expected"), [(1, 10), (2, 6), (3, 4), (13, 1)])
def test_automatic_batch_size(world_size: int, expected: int) -> None:
    module = datamodule(batch_size="auto", max_batch_size=10)
    assert module.batch_size_per_device(world_size) == expected
    module.trainer = SimpleNamespace(global_rank=0, world_size=world_size)  # type: ignore[assignment]
    assert len(batches(module)[0]["lesion"]) == expected


class RecordsViews(L.LightningModule):
    """Keeps the batches that reach a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Any]] = []
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * batch["positive"][0].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("views_on", ["auto", "workers", "device"])
def test_views_of_batches_are_the_same_wherever_they_are_made(views_on: str, num_workers: int) -> None:
    transform = BatchedPublishedViews(SIZE)
    module = datamodule(transform, num_workers=num_workers, views_on=views_on)
    first = next(iter(module.train_dataloader()))
    # On a CPU `auto` is the workers: what the device sends on is made where the batch is collated.
    assert ("view_seeds" in first) == (views_on == "device")
    recorder = RecordsViews()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, module)
    one_by_one = batches(LesionDataModule(NoisePatches(), OneByOne(transform), batch_size=4, seed=3))
    assert len(recorder.batches) == len(one_by_one) == 6
    for here, there in zip(recorder.batches, one_by_one, strict=True):
        assert set(here) == set(there)
        for a, b in zip(tensors(here), tensors(there), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    # The contact sheet asks the dataset for one lesion.
    sheet = module.dataset[SampleKey(0, int(recorder.batches[0]["lesion"][1]))]
    torch.testing.assert_close(sheet["positive"][1], recorder.batches[0]["positive"][1][1], atol=1e-6, rtol=0)


def test_any_view_can_be_made_again_from_its_lesion_and_epoch() -> None:
    transform = BatchedPublishedViews(SIZE)
    batch = batches(datamodule(transform))[4]  # the second of epoch 1
    key = SampleKey(1, int(batch["lesion"][2]))
    params = transform.draw(torch.tensor(view_seeds(3, key, 1)), SIZE)
    pair = NoisePatches()[key]
    patches = torch.stack([pair["positive"], pair["positive"], pair["negative"], pair["negative"]])
    views = Preprocessing().normalize(transform.apply(patches, params))
    for again, made in zip(views, tensors(batch)[:4], strict=True):
        torch.testing.assert_close(again, made[2], atol=1e-6, rtol=0)


class OneByOne:
    """Hides that a transform can make batches."""

    def __init__(self, transform: ViewTransform) -> None:
        self.transform = transform

    def __call__(self, patch: Tensor, seed: int) -> Tensor:
        return self.transform(patch, seed)


def test_half_precision_throughout_reaches_views_made_on_the_device() -> None:
    recorder = RecordsViews()
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-true",
        max_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule(BatchedPublishedViews(SIZE), views_on="device"))
    assert {view.dtype for view in tensors(recorder.batches[0])[:4]} == {torch.bfloat16}
    assert recorder.batches[0]["lesion"].dtype == torch.int64


def test_a_place_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="PublishedViews makes one view at a time"):
        datamodule(views_on="device")
    with pytest.raises(ValueError, match="views_on is 'gpu'"):
        datamodule(views_on="gpu")


def test_too_few_lesions_are_an_error() -> None:
    with pytest.raises(ValueError, match="13 lesions for 14 devices"):
        datamodule(batch_size="auto").batch_size_per_device(14)
    with pytest.raises(ValueError, match="13 lesions do not fill one batch of 14"):
        datamodule(batch_size=14).train_dataloader()


class Recorder(L.LightningModule):
    """Notes which lesions each step sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, list[int]]] = []
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch["lesion"].tolist()))
        return self.weight * batch["positive"][0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopHereError(Exception):
    """What ends a run before its time."""


class Stopper(L.Callback):
    """Saves a checkpoint at some place of a run, and ends the run there."""

    def __init__(self, place: str, steps: int, folder: Path) -> None:
        self.place, self.steps, self.folder = place, steps, folder

    def stop(self, trainer: L.Trainer, place: str) -> None:
        if place == self.place and trainer.global_step == self.steps:
            trainer.save_checkpoint(self.folder / "last.ckpt")
            raise StopHereError

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stop(trainer, "after a batch")

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self.stop(trainer, "in a step")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stop(trainer, "after an epoch")


def run(
    recorder: Recorder, num_workers: int, *callbacks: L.Callback, checkpoint: Path | None = None, **options: Any
) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(recorder, datamodule(num_workers=num_workers, **options), ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize(
    ("num_workers", "place", "steps"),
    [
        *((0, "after a batch", steps) for steps in (1, 2, 3, 4, 6, 8)),
        *((0, "in a step", steps) for steps in (0, 2, 3, 4)),
        *((0, "after an epoch", steps) for steps in (3, 6)),
        # Workers fetch ahead; one place of each kind, in the second epoch.
        *((2, place, steps) for place, steps in (("after a batch", 4), ("in a step", 5), ("after an epoch", 6))),
    ],
)
def test_an_interrupted_run_goes_on_with_the_next_batch(
    num_workers: int, place: str, steps: int, tmp_path: Path
) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    run(whole, 0)
    assert len(whole.seen) == 9  # three epochs of three batches
    with pytest.raises(StopHereError):
        run(first, num_workers, Stopper(place, steps, tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        run(second, num_workers, checkpoint=tmp_path / "last.ckpt")
    assert first.seen == whole.seen[: steps + (place == "in a step")]
    assert second.seen == whole.seen[steps:]
    assert torch.equal(second.weight, whole.weight)


def test_an_interrupted_run_goes_on_with_views_made_on_the_device(tmp_path: Path) -> None:
    options = {"transform": BatchedPublishedViews(SIZE), "views_on": "device"}
    whole, first, second = Recorder(), Recorder(), Recorder()
    run(whole, 0, **options)
    with pytest.raises(StopHereError):
        run(first, 0, Stopper("after a batch", 4, tmp_path), **options)
    run(second, 0, checkpoint=tmp_path / "last.ckpt", **options)
    assert second.seen == whole.seen[4:]
    assert torch.equal(second.weight, whole.weight)


def test_another_number_of_devices_goes_on_at_the_same_lesion() -> None:
    loader = datamodule(batch_size=2).train_dataloader()
    loader.load_state_dict({"epoch": 0, "batch": 2, "lesions_per_batch": 4})
    whole = datamodule(batch_size=2).train_dataloader()
    assert list(loader.lesions) == list(whole.lesions)[8:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_sets_the_epoch(num_workers: int) -> None:
    recorder = Recorder()
    run(recorder, num_workers)
    expected = []
    sampler = EpochSampler(13, 4, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = [key.index for key in sampler]
        expected += [(epoch, order[start : start + 4]) for start in range(0, 12, 4)]
    assert recorder.seen == expected
