"""Each baseline's loss against its paper's formula, written out naively, and the queue against a deque."""

from __future__ import annotations

import copy
import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import a_batch, fitted, make_method
from torch import Tensor

from fmcib_ssl.models.denoising import _Decoder
from fmcib_ssl.models.two_views import _FeatureQueue


def unit_rows(embeddings: Tensor) -> np.ndarray[Any, Any]:
    rows = embeddings.detach().double().numpy()
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def two_views() -> Tensor:
    return torch.cat(list(a_batch()["positive"]))


def first_loss(module: Any, folder: Path) -> float:
    return fitted(module, folder, max_steps=1).metrics[0]["train/loss"]


def test_simclr_is_nt_xent(tmp_path: Path) -> None:
    module = make_method("simclr")
    z = unit_rows(module(two_views()))
    n, total = len(z), 0.0
    for i in range(n):
        scores = [math.exp(z[i] @ z[k] / 0.3) for k in range(n)]
        total -= math.log(scores[(i + n // 2) % n] / (sum(scores) - scores[i]))
    assert first_loss(module, tmp_path) == pytest.approx(total / n, rel=1e-5)


def test_nnclr_is_its_pseudo_code(tmp_path: Path) -> None:
    module = make_method("nnclr")
    embeddings = module(two_views())
    z0, z1 = np.split(unit_rows(embeddings), 2)
    p0, p1 = np.split(unit_rows(module.predictor(embeddings)), 2)
    queue = module.queue.features.double().numpy().copy()

    def one_way(z: Any, p: Any) -> float:
        total = 0.0
        for i in range(len(z)):
            neighbour = max(queue, key=lambda row: float(row @ z[i]))
            scores = [math.exp(neighbour @ other / 0.3) for other in p]
            total -= math.log(scores[i] / sum(scores))
        return total / len(z)

    expected = (one_way(z0, p1) + one_way(z1, p0)) / 2
    assert first_loss(module, tmp_path) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(module.queue.features[:4].numpy(), z0, atol=1e-6)
    np.testing.assert_allclose(module.queue.features[4:].numpy(), queue[4:], atol=1e-6)


@pytest.mark.parametrize("batch_sizes", [[3, 3, 3, 3], [7], [12, 1], [1] * 11])
def test_the_queue_holds_the_newest_and_checkpoints_hold_the_queue(batch_sizes: list[int]) -> None:
    queue, newest, total = _FeatureQueue(5, 3), deque[list[float]](maxlen=5), 0
    newest.extend(queue.features.tolist())
    for size in batch_sizes:
        batch = F.normalize(torch.randn(size, 3), dim=1)
        queue.enqueue(batch)
        newest.extend(batch.tolist())
        total += size
        assert sorted(queue.features.tolist()) == sorted(newest)
        assert queue.is_full == (total >= 5)
        restored = _FeatureQueue(5, 3)
        restored.load_state_dict(queue.state_dict())
        queue = restored
    z = F.normalize(torch.randn(6, 3), dim=1)
    assert queue.nearest(z).tolist() == [max(newest, key=lambda row: float(torch.tensor(row) @ one)) for one in z]


def naive_codes(scores: Any, epsilon: float, iterations: int) -> Any:
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        for k in range(len(q)):
            q[k] /= q[k].sum() * len(q)
        for i in range(q.shape[1]):
            q[:, i] /= q[:, i].sum() * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("with_queue", [False, True])
def test_swav_is_swapped_prediction(with_queue: bool, tmp_path: Path) -> None:
    module = make_method("swav", queue_from_epoch=0)
    prototypes = unit_rows(module.prototypes.weight)
    z = np.split(unit_rows(module(two_views())), 2)
    queued = [np.empty((0, 8))] * 2
    if with_queue:
        for queue in module.queues:
            queue.num_enqueued += 6
        queued = [queue.features.double().numpy().copy() for queue in module.queues]
    expected = 0.0
    for view in range(2):
        codes = naive_codes(np.concatenate([z[view], queued[view]]) @ prototypes.T, 0.05, 3)[:4]
        logits = z[1 - view] @ prototypes.T / 0.1
        log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        expected -= (codes * log_softmax).sum(1).mean() / 2
    assert first_loss(module, tmp_path) == pytest.approx(expected, rel=1e-4)


def test_swav_leaves_the_prototypes_alone_in_the_frozen_epochs(tmp_path: Path) -> None:
    module = make_method("swav", frozen_epochs=1)
    before = unit_rows(module.prototypes.weight)
    frozen, trained = fitted(module, tmp_path, max_epochs=2).states
    np.testing.assert_allclose(frozen["prototypes.weight"].numpy(), before, atol=1e-6)
    assert not np.allclose(trained["prototypes.weight"].numpy(), before, atol=1e-4)


def test_byol_is_the_squared_distance_of_unit_vectors(tmp_path: Path) -> None:
    module = make_method("byol")
    reference = copy.deepcopy(module)
    embeddings = reference(two_views())
    p0, p1 = np.split(unit_rows(reference.predictor(embeddings)), 2)
    # At the first step the target is the online network.
    t0, t1 = np.split(unit_rows(embeddings), 2)
    expected = (((p0 - t1) ** 2).sum(1) + ((p1 - t0) ** 2).sum(1)).mean()
    assert first_loss(module, tmp_path) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_byols_target_follows_once_an_optimizer_step(accumulated: int, tmp_path: Path) -> None:
    module = make_method("byol")
    target = {name: value.double().clone() for name, value in module.target_encoder.state_dict().items()}
    states = fitted(module, tmp_path, 12, 2, accumulate_grad_batches=accumulated).states
    num_steps = 6 // accumulated
    for step, state in enumerate(states[accumulated - 1 :: accumulated]):
        momentum = 1 - (1 - 0.5) * (math.cos(math.pi * step / num_steps) + 1) / 2
        for name, value in target.items():
            value.mul_(momentum).add_((1 - momentum) * state[f"encoder.{name}"].double())
            torch.testing.assert_close(state[f"target_encoder.{name}"].double(), value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(states[-1]["encoder.0.weight"], states[0]["encoder.0.weight"])


def test_vicreg_is_its_three_terms(tmp_path: Path) -> None:
    module = make_method("vicreg", invariance=3.0, variance=5.0, covariance=7.0)
    z0, z1 = np.split(module(two_views()).detach().double().numpy(), 2)
    n, dim = z0.shape
    expected = 3 * sum((z0[i, j] - z1[i, j]) ** 2 for i in range(n) for j in range(dim)) / (n * dim)
    for z in (z0, z1):
        covariance = np.cov(z.T, ddof=1)
        expected += 5 / 2 * np.mean([max(0, 1 - math.sqrt(covariance[j, j] + 1e-4)) for j in range(dim)])
        expected += 7 * sum(covariance[j, k] ** 2 for j in range(dim) for k in range(dim) if j != k) / dim
    assert first_loss(module, tmp_path) == pytest.approx(expected, rel=1e-4)


def test_the_denoiser_rebuilds_the_view_it_did_not_see(tmp_path: Path) -> None:
    module, views = make_method("denoising"), two_views()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    module.encoder.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    module.decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output.detach()))
    losses = [row["train/loss"] for row in fitted(module, tmp_path, max_epochs=2).metrics]
    assert losses == pytest.approx([float((rebuilt - views).square().mean()) for rebuilt in outputs], rel=1e-6)
    assert not torch.equal(inputs[0], views)
    assert not torch.equal(inputs[0] == 0, inputs[1] == 0)  # each step has holes of its own


def test_noise_and_holes_follow_from_the_seed_alone() -> None:
    views = torch.full((64, 1, 10, 12, 12), 0.5)
    module = make_method("denoising", hole_share=0.3, hole_edge=4, noise_std=0.05)
    one = module.corrupt(views, 3)
    assert torch.equal(one, module.corrupt(views, 3))
    assert not torch.equal(one, module.corrupt(views, 4))
    holes = one == 0
    assert 0.25 < float(holes.float().mean()) < 0.35
    assert float((one - views)[~holes].std()) == pytest.approx(0.05, rel=0.03)
    cubes = holes[..., :8, :, :].unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(-3)
    assert torch.equal(cubes.any(-1), cubes.all(-1)), "a hole is a whole cube"


@pytest.mark.parametrize("size", [(24, 24, 24), (50, 50, 50), (3, 4, 4), (17, 5, 9)])
def test_the_decoder_fits_any_patch(size: tuple[int, int, int]) -> None:
    assert _Decoder(5, size, 16)(torch.randn(2, 5)).shape == (2, 1, *size)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("denoising", {"hole_share": 1.0}, "hole_share"),
        ("denoising", {"noise_std": -1.0}, "noise_std"),
        ("byol", {"momentum": 1.1}, r"momentum=1\.1"),
        ("nnclr", {"queue_size": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(name, **options)
