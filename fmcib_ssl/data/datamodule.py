"""Batches of views for a Lightning trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fmcib_ssl.data.sampler import EpochSampler
from fmcib_ssl.data.views import PatchPairs, SeededPairDataset, ViewCollation, ViewPairDataset, batch_of_views
from fmcib_ssl.data.workers import WatchedLoader
from fmcib_ssl.types import BatchViewTransform, PatchPair, Preprocessing, SampleKey, ViewTransform


class ResumableLoader(WatchedLoader):
    """A loader that a `Trainer` stores in its checkpoints and sets going again in the middle of an epoch.

    Workers fetch ahead, so how many batches were trained on is asked of the trainer and not counted here.

    Args:
        lesions: the sampler.
        num_trained: gives the number of batches of the current epoch that were trained on.
        arguments: of `WatchedLoader`.
    """

    def __init__(self, lesions: EpochSampler, num_trained: Callable[[], int], **arguments: Any) -> None:
        super().__init__(sampler=lesions, batch_size=lesions.batch_size, drop_last=True, **arguments)
        self.lesions = lesions
        self._num_trained = num_trained

    def state_dict(self) -> dict[str, int]:
        """Epoch, batch and size of the global batch."""
        per_batch = self.lesions.batch_size * self.lesions.world_size
        return {"epoch": self.lesions.epoch, "batch": self._num_trained(), "lesions_per_batch": per_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was called; with another global batch, at the lesion that was next then."""
        per_batch = self.lesions.batch_size * self.lesions.world_size
        self.lesions.resume_at(state["epoch"], state["batch"] * state["lesions_per_batch"] // per_batch)


class LesionDataModule(LightningDataModule):
    """Serves every lesion's views once an epoch, the same batches for any number of workers.

    Needs `Trainer(use_distributed_sampler=False)`: the sampler here already knows ranks. A checkpoint of the trainer
    holds the place in the epoch, and training goes on from it with the batches that were still to come.

    A `BatchViewTransform` makes the views of a whole batch at once: on the device where that is not the CPU, in which
    case the workers send int16 patches, else in the workers. The views are the same wherever they are made.

    Args:
        patches: one pair of patches a lesion.
        view_transform: makes one view of one patch, or those of a batch, in HU.
        preprocessing: of the encoder, which every view is normalised for; its patch size is not used.
        batch_size: lesions per device; `"auto"` takes as many as there are for each device, up to
            `max_batch_size`.
        max_batch_size: bound of `"auto"`.
        num_workers: processes that cut and augment; 0 does it in the training process.
        seed: non-negative; with the epoch it decides order and views.
        shuffle: draw a new order each epoch.
        pin_memory: for a CUDA device.
        prefetch_factor: batches each worker prepares ahead.
        multiprocessing_context: how workers start, `"fork"`, `"forkserver"` or `"spawn"`; None is Python's own.
        views_on: where a `BatchViewTransform` works: `"workers"`, `"device"`, or `"auto"`, as said above.

    Raises:
        ValueError: another place, or `"device"` for a transform that makes one view at a time.
    """

    def __init__(
        self,
        patches: PatchPairs,
        view_transform: ViewTransform,
        *,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  (frozen)
        batch_size: int | Literal["auto"] = "auto",
        max_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        multiprocessing_context: str | None = None,
        views_on: Literal["auto", "workers", "device"] = "auto",
    ) -> None:
        super().__init__()
        if views_on not in ("auto", "workers", "device"):
            raise ValueError(f"views_on is {views_on!r}; it must be 'auto', 'workers' or 'device'.")
        if views_on == "device" and not isinstance(view_transform, BatchViewTransform):
            raise ValueError(
                f"views_on='device', and {type(view_transform).__name__} makes one view at a time: choose "
                "views_on='auto', or an augmentation for batches, such as batched_published."
            )
        self.dataset = ViewPairDataset(patches, view_transform, seed, preprocessing)
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self.pin_memory = pin_memory
        self.prefetch_factor = prefetch_factor
        self.multiprocessing_context = multiprocessing_context
        self._views_on = views_on
        self.batch_size = batch_size
        self._max_batch_size = max_batch_size

    def batch_size_per_device(self, world_size: int) -> int:
        """Lesions each of `world_size` devices takes at a time.

        Raises:
            ValueError: `"auto"`, and fewer lesions than devices.
        """
        if self.batch_size != "auto":
            return self.batch_size
        available = len(self.dataset) // world_size
        if available < 1:
            raise ValueError(f"{len(self.dataset)} lesions for {world_size} devices: use fewer devices.")
        return min(self._max_batch_size, available)

    def rehearsal(self, batch_size: int, num_batches: int) -> LesionDataModule:
        """Data of the same shapes, made in the same places, but of one lesion and one view over and over."""
        rehearsal = copy.copy(self)
        patches = _OneLesion(self.dataset.patches[SampleKey(0, 0)], batch_size * num_batches)
        rehearsal.dataset = ViewPairDataset(patches, self.dataset.view_transform, self.seed, self.dataset.preprocessing)
        if not isinstance(self.dataset.view_transform, BatchViewTransform):
            rehearsal.dataset.view_transform = _OneView(self.dataset.view_transform)
        rehearsal.batch_size = batch_size
        rehearsal.num_workers = 0
        return rehearsal

    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of this rank.

        Raises:
            ValueError: fewer lesions than one batch on every device takes.
        """
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batch_size = self.batch_size_per_device(world_size)
        in_workers = self.num_workers > 0
        lesions = EpochSampler(
            len(self.dataset), batch_size, rank=rank, world_size=world_size, seed=self.seed, shuffle=self.shuffle
        )
        view_transform = self.dataset.view_transform
        views: dict[str, Any] = {"dataset": self.dataset}
        if isinstance(view_transform, BatchViewTransform):
            collate = None if self._views_on_device() else ViewCollation(view_transform, self.dataset.preprocessing)
            views = {"dataset": SeededPairDataset(self.dataset.patches, self.seed), "collate_fn": collate}
        return ResumableLoader(
            lesions,
            self._num_trained,
            **views,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            title=self._title,
            rank=rank if world_size > 1 else None,
            persistent_workers=in_workers,
            prefetch_factor=self.prefetch_factor if in_workers else None,
            multiprocessing_context=self.multiprocessing_context,
            generator=torch.Generator().manual_seed(self.seed),  # a loader draws a seed, else from the global one
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep the seeds of views on the CPU: they are drawn from there, and the device need not be waited for."""
        return {**batch, "view_seeds": batch["view_seeds"].numpy()} if "view_seeds" in batch else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make the views of a batch of patches that has reached its device; leave a batch of views alone."""
        view_transform = self.dataset.view_transform
        if "view_seeds" not in batch or not isinstance(view_transform, BatchViewTransform):
            return batch
        views = batch_of_views(batch, view_transform, self.dataset.preprocessing)
        # A trainer whose precision is half throughout has cast the batch before there were views in it.
        return self.trainer.precision_plugin.convert_input(views) if self.trainer else views

    def _title(self, lesion: int) -> str:
        return self.dataset.patches.title(lesion)

    def _views_on_device(self) -> bool:
        if self._views_on == "auto":
            return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        return self._views_on == "device"

    def _num_trained(self) -> int:
        """Batches of this epoch whose optimizer step is done; that of one which an error interrupts is not."""
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)


class _OneLesion:
    """The same patches as often as they are asked for."""

    def __init__(self, pair: PatchPair, times: int) -> None:
        self.pair = pair
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, key: SampleKey, /) -> PatchPair:
        return self.pair

    def title(self, lesion: int, /) -> str:
        return ""


class _OneView:
    """The first view that a transform makes, for all others."""

    def __init__(self, view_transform: ViewTransform) -> None:
        self.view_transform = view_transform
        self.view: Tensor | None = None

    def __call__(self, patch: Tensor, seed: int) -> Tensor:
        if self.view is None:
            self.view = self.view_transform(patch, seed)
        return self.view
