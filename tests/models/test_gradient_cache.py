"""A batch embedded in chunks: the direct step's gradients, in the memory of a chunk, all else as before."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny import LOSSES, FixedViews, a_batch, assert_same_gradients, make_module, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmcib_ssl.losses import InfoNCELoss, NTXentNegativeMinedLoss
from fmcib_ssl.models import MinedContrast
from fmcib_ssl.models.mined_contrast import embed_in_chunks
from fmcib_ssl.types import ViewPairs

VIEWS = ("positive", "negative")


def double(batch: ViewPairs) -> ViewPairs:
    return {key: tuple(view.double() for view in batch[key]) for key in VIEWS}  # type: ignore[return-value, literal-required]


def step(module: MinedContrast, batch: ViewPairs) -> tuple[Tensor, dict[str, Tensor]]:
    loss = module.loss(module.embed(batch))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("forwards", ["joint", "separate"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", ["group", "batch in eval mode"])
def test_every_gradient_is_that_of_the_direct_step(loss: str, norm: str, forwards: Any) -> None:
    def made(**options: Any) -> MinedContrast:
        module = make_module(LOSSES[loss](), norm=norm != "group", forwards=forwards, **options).double()
        if norm != "group":
            module.encoder[1].running_var.fill_(0.3)
            module.encoder.eval()
        return module

    batch = double(a_batch(10))
    expected_loss, expected = step(made(), batch)
    for chunk_size in (1, 3, 5, 9, 10, 64):
        value, gradients = step(made(chunk_size=chunk_size), batch)
        torch.testing.assert_close(value, expected_loss, rtol=1e-12, atol=0)
        assert_same_gradients(gradients, expected, rtol=1e-10)


def test_chunks_keep_apart_whose_the_mined_patches_are() -> None:
    """Two for each lesion, of which the loss leaves out the anchor's own."""
    batch = double(a_batch(5))
    batch["negative"] = tuple(torch.stack([view, 2 * view.flip(0)], dim=1) for view in batch["negative"])  # type: ignore[typeddict-item]
    loss = LOSSES["ntxent-mined_of_others"]()
    expected_loss, expected = step(make_module(loss).double(), batch)
    value, gradients = step(make_module(loss, chunk_size=2).double(), batch)
    torch.testing.assert_close(value, expected_loss, rtol=1e-12, atol=0)
    assert_same_gradients(gradients, expected, rtol=1e-10)


def test_chunks_are_even_and_a_batch_of_one_chunk_is_embedded_once() -> None:
    sizes: list[int] = []

    def embed(views: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(views))
        return (views * scale,)

    scale = torch.ones(2, requires_grad=True)
    options = {"networks": nn.Identity(), "device": torch.device("cpu")}
    views = torch.randn(20, 2)
    (embedded,) = embed_in_chunks(embed, [views], 8, **options)
    torch.testing.assert_close(embedded, views)
    embedded.sum().backward()
    assert sizes == [7, 7, 6, 6, 7, 7]  # the last chunk's gradient first
    sizes.clear()
    embed_in_chunks(embed, [views], 20, **options)[0].sum().backward()
    assert sizes == [20]


class Activations:
    """The most elements of outputs of a network's layers that are alive at once."""

    def __init__(self, network: nn.Module) -> None:
        self.alive = self.peak = 0
        for layer in network.modules():
            if not list(layer.children()):
                layer.register_forward_hook(self.count)

    def count(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        size = output.numel()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(output.untyped_storage(), self.drop, size)

    def drop(self, size: int) -> None:
        self.alive -= size


def activations_of(num_lesions: int, chunk_size: int | None, forwards: Any) -> int:
    module = make_module(NTXentNegativeMinedLoss(), chunk_size=chunk_size, forwards=forwards)
    activations = Activations(module.encoder)
    step(module, a_batch(num_lesions))
    assert activations.alive == 0
    return activations.peak


@pytest.mark.parametrize("forwards", ["joint", "separate"])
def test_activations_are_those_of_one_chunk(forwards: Any) -> None:
    of_four, of_sixteen = (activations_of(num_lesions, None, forwards) for num_lesions in (4, 16))
    assert of_sixteen == 4 * of_four  # what is counted grows with the batch
    num_features = 32
    embedded = 4 * 16 * num_features  # the encoder's last output of the chunk before may still be alive
    assert of_four <= activations_of(16, 4, forwards) <= of_four + embedded
    assert of_four <= activations_of(64, 4, forwards) <= of_four + embedded


@pytest.mark.parametrize("forwards", ["joint", "separate"])
def test_batch_norm_sees_each_chunk_once(forwards: Any) -> None:
    """Statistics of a chunk, in both passes; running ones updated by each chunk, in order, as if it were a batch."""
    batch = double(a_batch(10))
    options = {"norm": True, "forwards": forwards}
    cached = make_module(NTXentNegativeMinedLoss(), chunk_size=4, **options).double()
    oracle = make_module(NTXentNegativeMinedLoss(), **options).double()
    value, gradients = step(cached, batch)

    parts = []
    for start, stop in ((0, 4), (4, 7), (7, 10)):
        part = {key: tuple(view[start:stop] for view in batch[key]) for key in VIEWS}  # type: ignore[literal-required]
        parts.append(oracle.embed(part))  # type: ignore[arg-type]
    out = {key: tuple(torch.cat([part[key][view] for part in parts]) for view in (0, 1)) for key in VIEWS}  # type: ignore[literal-required]
    loss = oracle.loss(out)
    loss.backward()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    gradients.pop("encoder.0.bias"), oracle.encoder[0].bias.requires_grad_(False)  # zero before batch norm
    expected = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    assert_same_gradients(gradients, expected, rtol=1e-9)
    assert cached.encoder[1].num_batches_tracked == (3 if forwards == "joint" else 12)
    for name, buffer in oracle.named_buffers():
        torch.testing.assert_close(dict(cached.named_buffers())[name], buffer, msg=name)


def test_views_stay_where_they_are_and_chunks_come_to_the_device() -> None:
    """The device is torch's meta device, which holds no values: whatever meets a tensor of the host there fails."""
    seen: list[tuple[str, int]] = []
    module = make_module(NTXentNegativeMinedLoss(), chunk_size=2).to("meta")
    module.encoder.register_forward_pre_hook(lambda _, views: seen.append((views[0].device.type, len(views[0]))))
    host: Any = {**a_batch(6), "lesion": torch.arange(6), "negative_from_other_scan": torch.zeros(6)}
    batch = module.transfer_batch_to_device(host, torch.device("meta"), 0)
    assert {batch["lesion"].device.type, batch["negative_from_other_scan"].device.type} == {"meta"}
    assert {view.device.type for key in VIEWS for view in batch[key]} == {"cpu"}
    out = module.embed(batch)
    assert seen == [("meta", 8)] * 3  # 2 lesions with 4 views each
    assert out["positive"][0].shape == (6, 8)
    patches: Any = {"positive": torch.zeros(6, 1, 6, 6, 6), "negative": torch.zeros(6, 1, 6, 6, 6)}
    patches["view_seeds"] = torch.zeros(6, 4)  # views of these are made on the device
    assert {tensor.device.type for tensor in module.transfer_batch_to_device(patches, "meta", 0).values()} == {"meta"}
    module.chunk_size = None
    assert module.transfer_batch_to_device(host, torch.device("meta"), 0)["positive"][0].device.type == "meta"


class Watch(L.Callback):
    """The gradients and figures of every step that a callback can see."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.figures: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        assert [[z.shape for z in outputs[key]] for key in ("embeddings", "negatives")] == [[(4, 8)] * 2] * 2
        self.figures.append({key: float(value) for key, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}], ids=str)
def test_a_run_is_the_direct_run(options: dict[str, Any], tmp_path: Path) -> None:
    """Gradients before clipping, figures of every step, and the weights at the end."""
    runs = []
    for chunk_size in (None, 3):
        loss = InfoNCELoss(trainable_temperature=True, negatives="mined_and_lesions")
        module, watch = make_module(loss, chunk_size=chunk_size), Watch()
        trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[watch], precision="64-true", **options)
        trainer.fit(module, DataLoader(FixedViews(12), batch_size=4))
        assert trainer.global_step == 6 // options.get("accumulate_grad_batches", 1)
        runs.append((watch, module.state_dict()))
    (expected, expected_weights), (watch, weights) = runs
    for ours, theirs in zip(watch.gradients, expected.gradients, strict=True):
        assert_same_gradients(ours, theirs, rtol=1e-8)
    for figures, others in zip(watch.figures, expected.figures, strict=True):
        assert figures == pytest.approx(others, rel=1e-5)  # metrics are float32
    assert {"train/loss", "train/grad_norm", "lr", "train/temperature"} <= set(watch.figures[-1])
    assert max(row.get("train/grad_norm", 0) for row in watch.figures) > 0.05  # a limit has an effect
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-8, atol=1e-10, msg=name)
