"""From patches to batches of views, with labels or without: the order, the seeds, and a trainer's loader.

All that is random follows from the run's seed, the epoch and the lesion. So batches are the same for any number of
workers and devices, wherever the views are made, and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int16
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from fmcib_ssl.data.workers import WatchedLoader
from fmcib_ssl.types import PatchPair, Preprocessing, SampleKey, ViewPairs, ViewTransform


class PatchPairs(Protocol):
    """A dataset of patches: item `SampleKey(epoch, index)` is the pair drawn for lesion `index` in `epoch`."""

    def __len__(self) -> int:
        """Number of usable lesions."""
        ...

    def __getitem__(self, key: SampleKey, /) -> PatchPair:
        """Cut the pair that `key` names."""
        ...

    def title(self, lesion: int, /) -> str:
        """What names a lesion in a picture."""
        ...


class EpochSampler(Sampler[SampleKey]):
    """Deals lesions out to ranks, in an order that is a function of seed and epoch alone.

    Global batch `k` of an epoch is `order[k * B * W : (k + 1) * B * W]` for `W` ranks with batches of `B`; rank `r`
    takes its `r`-th block of `B`. So `W` ranks with `B` see what one process with `W * B` sees, and every rank has
    the same number of batches. What is left over at the end of an epoch is dropped, never padded with repeats.

    `Trainer` calls `set_epoch` by itself if it finds this as the `sampler` of a loader, and must not replace it:
    `use_distributed_sampler=False`.

    Args:
        num_lesions: how many there are.
        batch_size: lesions a rank takes at a time.
        rank: of this process, from 0.
        world_size: number of processes.
        seed: non-negative.

    Raises:
        ValueError: fewer lesions than one global batch, or a number that makes no sense.
    """

    def __init__(self, num_lesions: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size={batch_size}, rank={rank}, world_size={world_size}: need batch_size >= 1 and "
                "0 <= rank < world_size."
            )
        if num_lesions < batch_size * world_size:
            raise ValueError(
                f"{num_lesions} lesions do not fill one batch of {batch_size} on {world_size} device(s), which takes "
                f"{batch_size * world_size}: choose a batch size of at most {num_lesions // world_size}, "
                "fewer devices, or more lesions."
            )
        self.num_lesions, self.batch_size, self.seed = num_lesions, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._resumed = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration deals out."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """Leave out the first batches of one epoch, which were seen before; other epochs stay whole."""
        self._resumed = (epoch, batch)

    def __len__(self) -> int:
        """Number of lesions that this rank sees in a whole epoch, a multiple of the batch size."""
        return self.num_lesions // (self.batch_size * self.world_size) * self.batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        """Yield this rank's keys for the epoch that is set now."""
        first = self._resumed[1] if self._resumed[0] == self.epoch else 0
        stream = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,))
        order = np.random.default_rng(stream).permutation(self.num_lesions)
        dealt = order[: len(self) * self.world_size].reshape(-1, self.world_size, self.batch_size)
        return iter([SampleKey(self.epoch, index) for index in dealt[first:, self.rank].ravel().tolist()])


def view_seeds(seed: int, key: SampleKey, num_negatives: int) -> list[int]:
    """Seeds of the views that `key` names: two of the lesion's patch, then two of each negative."""
    # A spawn key, unlike a longer list of entropy, is distinct by its length too: SeedSequence([1, 2]) and
    # SeedSequence([1, 2, 0]) are the same stream.
    seeds: list[int] = np.random.SeedSequence(seed, spawn_key=key).generate_state(2 + 2 * num_negatives).tolist()
    return seeds


class ViewPairDataset(Dataset[dict[str, Any]]):
    """The patches of each lesion with the seeds of their views, and what makes the views of a batch of them.

    A transform gives HU; here and nowhere else views are normalised, as the encoder's preprocessing says.

    Args:
        patches: where the patches come from.
        view_transform: makes the views of a batch of patches.
        seed: non-negative; with epoch and index it decides every view.
        preprocessing: of the encoder; its intensity range is used, not its patch size.
    """

    def __init__(
        self,
        patches: PatchPairs,
        view_transform: ViewTransform,
        seed: int,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  (frozen)
    ) -> None:
        self.patches, self.view_transform = patches, view_transform
        self.seed, self.preprocessing = seed, preprocessing

    def __len__(self) -> int:
        """Number of usable lesions."""
        return len(self.patches)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        """Cut the patches that `key` names, and add `view_seeds`; a plain number means that lesion in epoch 0."""
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        pair = self.patches[key]
        num_negatives = len(pair["negative"]) if pair["negative"].ndim == 5 else 1
        return {**pair, "view_seeds": torch.tensor(view_seeds(self.seed, key, num_negatives))}

    def make_views(self, batch: dict[str, Any]) -> ViewPairs:
        """Make the views of a collated batch, on the device it is on."""
        positive, negative, seeds = batch["positive"], batch["negative"], torch.as_tensor(batch["view_seeds"])
        several = negative.ndim == 6  # (batch, negatives_per_lesion, 1, z, y, x)
        patches = torch.cat([positive, negative.flatten(0, 1) if several else negative])
        # Columns: both views of the lesion, then both of its first negative, ... All go in one call, for a GPU's sake.
        by_view = [torch.cat([seeds[:, view], seeds[:, 2 + view :: 2].flatten()]) for view in (0, 1)]
        views_hu = self.view_transform(torch.cat([patches, patches]), torch.cat(by_view))
        view0, view1 = self.preprocessing.normalize(views_hu).chunk(2)
        num, shape = len(positive), (*negative.shape[:-4], *view0.shape[1:])
        pairs = ViewPairs(
            positive=(view0[:num], view1[:num]),
            negative=(view0[num:].view(shape), view1[num:].view(shape)),
            lesion=batch["lesion"],
            negative_from_other_scan=batch["negative_from_other_scan"],
        )
        if "patient" in batch:
            pairs["patient"] = batch["patient"]
        return pairs

    def collate(self, pairs: list[dict[str, Any]]) -> ViewPairs:
        """Turn lesions into a batch of views."""
        return self.make_views(default_collate(pairs))


class LabelledPatches(Dataset[dict[str, Any]]):
    """The patch of each lesion with its label: `view` float32 `(1, z, y, x)`, `label` int64 or float32, `row`.

    With a transform, item `SampleKey(epoch, i)` is a view that (seed, epoch, row) decide; without, the patch as it is.

    Args:
        read: gives a lesion's patch by its row, int16 HU `(1, z, y, x)`.
        rows: of the lesions to serve.
        labels: of all rows: class numbers or values.
        preprocessing: how patches and views are scaled.
        view_transform: makes the views of a batch of patches, in HU.
        seed: non-negative.
    """

    def __init__(
        self,
        read: Callable[[int], Int16[Tensor, "1 z y x"]],
        rows: Sequence[int] | npt.NDArray[np.intp],
        labels: npt.NDArray[Any],
        preprocessing: Preprocessing,
        *,
        view_transform: ViewTransform | None = None,
        seed: int = 0,
    ) -> None:
        self.read, self.rows, self.labels = read, np.asarray(rows), labels
        self.preprocessing, self.view_transform, self.seed = preprocessing, view_transform, seed

    def __len__(self) -> int:
        """Number of lesions served."""
        return len(self.rows)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        """One lesion; a plain number means epoch 0."""
        epoch, index = key if isinstance(key, SampleKey) else (0, key)
        row = int(self.rows[index])
        view_hu = self.read(row)
        if self.view_transform is not None:
            seed = np.random.SeedSequence(self.seed, spawn_key=(epoch, row)).generate_state(1)[0]
            view_hu = self.view_transform(view_hu[None], torch.tensor([int(seed)]))[0]
        view = self.preprocessing.normalize(view_hu)
        return {"view": view, "label": torch.as_tensor(self.labels[row]), "row": row}


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
        """Resume where `state_dict` was called; with another global batch, at the lesion that was next then."""
        per_batch = self.lesions.batch_size * self.lesions.world_size
        self.lesions.resume_at(state["epoch"], state["batch"] * state["lesions_per_batch"] // per_batch)


class LesionDataModule(LightningDataModule):
    """Serves every lesion's views once an epoch, the same batches for any number of workers.

    Needs `Trainer(use_distributed_sampler=False)`: the sampler here already knows ranks. A checkpoint of the trainer
    holds the place in the epoch, and training resumes with the batches that were still to come.

    Args:
        patches: one pair of patches a lesion.
        view_transform: makes the views of a batch of patches, in HU.
        preprocessing: of the encoder, which every view is normalised for; its patch size is not used.
        batch_size: lesions per device; `"auto"` takes as many as there are for each device, up to
            `max_batch_size`.
        max_batch_size: bound of `"auto"`.
        num_workers: processes that cut and augment; 0 does it in the training process.
        seed: non-negative; with the epoch it decides order and views.
        pin_memory: for a CUDA device.
        augment_on: where a batch is when its views are made: `"workers"`; `"device"`, where it is to be trained on, for
            which the workers send int16 patches; or `"auto"`, on the device unless that is a CPU or the transform
            takes patch by patch. The views are the same to rounding.

    Raises:
        ValueError: `augment_on` is something else.
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
        pin_memory: bool = False,
        augment_on: Literal["auto", "workers", "device"] = "auto",
    ) -> None:
        super().__init__()
        if augment_on not in ("auto", "workers", "device"):
            raise ValueError(f"augment_on is {augment_on!r}; it must be 'auto', 'workers' or 'device'.")
        self.dataset = ViewPairDataset(patches, view_transform, seed, preprocessing)
        self.num_workers, self.seed, self.pin_memory = num_workers, seed, pin_memory
        self.batch_size, self._max_batch_size = batch_size, max_batch_size
        self._augment_on = augment_on
        self._patch_by_patch = getattr(view_transform, "patch_by_patch", False)

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

    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of this rank.

        Raises:
            ValueError: fewer lesions than one batch on every device takes.
        """
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batch_size = self.batch_size_per_device(world_size)
        lesions = EpochSampler(len(self.dataset), batch_size, rank=rank, world_size=world_size, seed=self.seed)
        return ResumableLoader(
            lesions,
            self._num_trained,
            dataset=self.dataset,
            collate_fn=None if self._augments_on_device() else self.dataset.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            title=self.dataset.patches.title,
            rank=rank if world_size > 1 else None,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # a loader draws a seed, else from the global one
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep the seeds of views on the CPU: they are drawn from there, and the device need not be waited for."""
        return {**batch, "view_seeds": batch["view_seeds"].numpy()} if "view_seeds" in batch else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make the views of a batch of patches that has reached its device; leave a batch of views alone."""
        if "view_seeds" not in batch:
            return batch
        views = self.dataset.make_views(batch)
        # A trainer whose precision is half throughout has cast the batch before there were views in it.
        return self.trainer.precision_plugin.convert_input(views) if self.trainer else views

    def _augments_on_device(self) -> bool:
        if self._augment_on == "auto":
            on_accelerator = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
            return on_accelerator and not self._patch_by_patch
        return self._augment_on == "device"

    def _num_trained(self) -> int:
        """Batches of this epoch whose optimizer step is done; that of one which an error interrupts is not."""
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)
