"""The module: what it sends where, and that devices add up to one larger batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fmcib_ssl.losses import InfoNCELoss, NTXentNegativeMinedLoss
from fmcib_ssl.methods import MinedContrast
from fmcib_ssl.types import ViewPairs

SIDE = 6


def sgd(named_parameters: Any, lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named_parameters], lr=lr)


def make_module(loss: nn.Module, norm: bool = False, **options: Any) -> MinedContrast:
    torch.manual_seed(0)
    norm_layer = nn.BatchNorm3d(4) if norm else nn.GroupNorm(2, 4)
    encoder = nn.Sequential(nn.Conv3d(1, 4, 3), norm_layer, nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten())
    return MinedContrast(encoder, nn.Linear(32, 8), loss, sgd, **options)


class FixedViews(Dataset[dict[str, Any]]):
    """Lesions whose views are random but always the same."""

    def __init__(self, num_lesions: int) -> None:
        self.views = torch.randn(num_lesions, 4, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pos0, pos1, neg0, neg1 = self.views[index]
        return {"positive": (pos0, pos1), "negative": (neg0, neg1)}


def make_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=folder, accelerator="cpu", max_epochs=1, **{**quiet, **options})


def a_batch(num_lesions: int = 3) -> ViewPairs:
    batch: ViewPairs = next(iter(DataLoader(FixedViews(num_lesions), batch_size=num_lesions)))
    return batch


@pytest.mark.parametrize("forwards", ["joint", "separate"])
def test_forwards_agree_without_batch_norm(forwards: Any) -> None:
    module = make_module(NTXentNegativeMinedLoss(), forwards=forwards)
    batch = a_batch()
    out = module.embed(batch)
    for key in ("positive", "negative"):
        for view, embedding in zip(batch[key], out[key], strict=True):  # type: ignore[literal-required]
            torch.testing.assert_close(embedding, module.head(module.encoder(view)))


def test_batch_norm_tells_the_forwards_apart() -> None:
    batch = a_batch()
    joint = make_module(NTXentNegativeMinedLoss(), norm=True)
    separate = make_module(NTXentNegativeMinedLoss(), norm=True, forwards="separate")
    assert joint.encoder[1].num_batches_tracked == separate.encoder[1].num_batches_tracked == 0
    first = joint.embed(batch)["positive"][0]
    assert not torch.allclose(first, separate.embed(batch)["positive"][0])
    assert joint.encoder[1].num_batches_tracked == 1
    assert separate.encoder[1].num_batches_tracked == 4


def test_unknown_forwards_is_refused() -> None:
    with pytest.raises(ValueError, match="'joint' or 'separate'"):
        make_module(NTXentNegativeMinedLoss(), forwards="both")


def test_a_loss_that_gathers_too_is_refused() -> None:
    with pytest.raises(ValueError, match="gather_distributed=False"):
        make_module(NTXentNegativeMinedLoss(gather_distributed=True))


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_every_step_is_logged_with_the_true_gradient_norm(tmp_path: Path) -> None:
    from fmcib_ssl.training.throughput import Throughput

    module, recorder = make_module(NTXentNegativeMinedLoss()), Recorder()
    reference = copy.deepcopy(module)
    batch = a_batch(4)
    reference.loss(reference.embed(batch)).backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]).norm()

    trainer = make_trainer(tmp_path, callbacks=[Throughput(), recorder])
    trainer.fit(module, DataLoader(FixedViews(4), batch_size=4))
    logged = recorder.metrics[0]
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(reference.loss(reference.embed(batch)).detach()), rel=1e-5)
    assert logged["lr"] == 1.0
    assert {"train/positive_cosine", "train/negative_cosine", "train/alignment", "train/uniformity"} <= set(logged)
    assert logged["perf/samples_per_s"] > 0
    assert 0 <= logged["perf/data_wait_share"] <= 1


def test_the_schedule_is_stepped_per_step(tmp_path: Path) -> None:
    rates: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        assert total_steps == 3
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            rates.append(float(trainer.callback_metrics["lr"]))

    module = make_module(NTXentNegativeMinedLoss(), schedule=schedule)
    make_trainer(tmp_path, callbacks=[Rates()]).fit(module, DataLoader(FixedViews(6), batch_size=2))
    assert rates == pytest.approx([1.0, 1 / 2, 1 / 3])


LOSSES = [
    pytest.param(partial(loss, **options, negatives=negatives), id=f"{name}-{negatives}")
    for name, loss, options in [
        ("ntxent", NTXentNegativeMinedLoss, {"temperature": 0.2}),
        ("infonce", InfoNCELoss, {"trainable_temperature": True}),
        ("infonce_sum", InfoNCELoss, {"reduction": "sum"}),
    ]
    for negatives in ("mined", "mined_and_lesions", "lesions")
    if name != "infonce_sum" or negatives == "mined_and_lesions"
]


@pytest.mark.parametrize("make_loss", LOSSES)
def test_two_processes_equal_one_with_the_doubled_batch(make_loss: Any, tmp_path: Path) -> None:
    """One step of plain SGD at rate 1: the change of each parameter is its gradient."""
    data = FixedViews(6)
    one, two = make_module(make_loss()).double(), make_module(make_loss()).double()
    before = copy.deepcopy(one.state_dict())
    # In double precision, so that before - after is the gradient to many digits.
    trainer_one = make_trainer(tmp_path, precision="64-true")
    trainer_one.fit(one, DataLoader(data, batch_size=6))
    trainer_two = make_trainer(tmp_path, devices=2, strategy="ddp_fork", precision="64-true")
    trainer_two.fit(two, DataLoader(data, batch_size=3))
    loss_one, loss_two = (float(t.callback_metrics["train/loss"]) for t in (trainer_one, trainer_two))
    assert loss_two == pytest.approx(loss_one, rel=1e-6)
    for name, value in one.state_dict().items():
        gradient = before[name] - value
        scale = float(gradient.abs().max())
        torch.testing.assert_close(before[name] - two.state_dict()[name], gradient, rtol=1e-6, atol=1e-8 * scale)
        assert scale > 0, f"{name} had no gradient: nothing was compared"


class UnequalViews(IterableDataset[dict[str, Tensor]]):
    """Three lesions on the first process, two on the second."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(3 - torch.distributed.get_rank()):
            yield FixedViews(3)[index]


class WritesItsError(MinedContrast):
    folder: str

    def contrast(self, out: ViewPairs) -> Tensor:
        try:
            return super().contrast(out)
        except ValueError as error:
            Path(self.folder, f"rank{self.global_rank}").write_text(str(error))
            raise


def test_unequal_batches_are_an_error_on_every_process(tmp_path: Path) -> None:
    module = make_module(NTXentNegativeMinedLoss())
    module.__class__ = WritesItsError
    module.folder = str(tmp_path)
    with pytest.raises(Exception, match="different sizes"):
        make_trainer(tmp_path, devices=2, strategy="ddp_fork").fit(module, DataLoader(UnequalViews(), batch_size=3))
    for rank in range(2):
        message = (tmp_path / f"rank{rank}").read_text()
        assert "rank 0: 3 lesions and 3 negatives, rank 1: 2 lesions and 2 negatives" in message


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="SyncBatchNorm needs two GPUs; torch has none on the CPU")
def test_synchronised_batch_norm_equals_the_doubled_batch(tmp_path: Path) -> None:
    data = FixedViews(6)
    one, two = (make_module(NTXentNegativeMinedLoss(), norm=True) for _ in range(2))
    make_trainer(tmp_path, accelerator="gpu", devices=1).fit(one, DataLoader(data, batch_size=6))
    trainer = make_trainer(tmp_path, accelerator="gpu", devices=2, strategy="ddp_spawn", sync_batchnorm=True)
    trainer.fit(two, DataLoader(data, batch_size=3))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
