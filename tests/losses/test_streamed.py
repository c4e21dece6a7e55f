"""What the streamed kernels add to the contract of the losses: panels, one derivative, and nothing of N x M size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from naive_contrast import KERNELS, LOSSES, NEGATIVES, gradients, leaves, make_loss, random_views, with_leaves
from torch._subclasses import FakeTensorMode

from fmcib_ssl.losses import NTXentNegativeMinedLoss, streamed
from fmcib_ssl.losses.logsumexp import choose_kernel, logsumexp_similarity, streamed_logsumexp

LINEAR = [kernel for kernel in KERNELS if kernel != "plain"]
every_kernel = pytest.mark.parametrize("kernel", LINEAR)
every_choice = pytest.mark.parametrize("negatives", NEGATIVES)


@every_kernel
@every_choice
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("rows", [(37, 150), (150, 37)], ids=str)
def test_many_panels_and_blocks_equal_the_plain_kernel(kernel, negatives, temperature, rows, monkeypatch):
    monkeypatch.setattr(streamed, "_PANEL_CPU", 512)  # 16 rows, the last panel incomplete
    out = random_views(0, *rows, dim=40)
    double = with_leaves([x.detach().double().requires_grad_() for x in leaves(out)])
    expected = make_loss("infonce", temperature, negatives, kernel="plain")(double)
    loss = make_loss("infonce", temperature, negatives, kernel=kernel)(out)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(loss, out), gradients(expected, double), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6 / temperature)


@pytest.mark.parametrize("negatives", ["mined", "mined_and_lesions"])
def test_nothing_larger_than_a_panel_is_made(negatives, monkeypatch):
    made, panels = [], streamed._panels

    def watched(*arguments):
        for rows, panel in panels(*arguments):
            made.append(panel.numel())
            yield rows, panel

    monkeypatch.setattr(streamed, "_panels", watched)
    monkeypatch.setattr(streamed, "_PANEL_CPU", 8192)
    make_loss("ntxent_mined", 0.1, negatives, kernel="streamed")(random_views(1, 200, 100)).backward()
    assert 0 < max(made) <= 8192 < 200 * 100


@every_kernel
@pytest.mark.parametrize("own_key", [None, 0, 2])
@pytest.mark.parametrize("length", [1.0, 1e3])
@pytest.mark.parametrize("dim", [1, 16, 300])
def test_logsumexp_of_rows_of_any_length(kernel, own_key, length, dim):
    generator = torch.Generator().manual_seed(dim)
    queries, keys = (torch.randn(rows, dim, generator=generator) for rows in (70, 90))
    inputs = [queries, torch.full((70,), length / dim), keys, torch.rand(90, generator=generator)]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = logsumexp_similarity(exact[0] * exact[1][:, None], exact[2] * exact[3][:, None], own_key)
    found = streamed_logsumexp(inputs[0][None], inputs[1][None], inputs[2], inputs[3], own_key, kernel=kernel)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(70, generator=generator)  # every query has a gradient of its own
    ours = torch.autograd.grad(found @ weights, inputs)
    theirs = torch.autograd.grad(expected @ weights.double(), exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@every_kernel
def test_bf16_embeddings_lose_nothing_on_the_way_to_the_logits(kernel):
    half = with_leaves([x.detach().bfloat16().requires_grad_() for x in leaves(random_views(2, 20, 30, dim=64))])
    double = with_leaves([x.detach().double().requires_grad_() for x in leaves(half)])
    loss = make_loss("ntxent_mined", 0.05, "mined_and_lesions", kernel=kernel)(half)
    expected = make_loss("ntxent_mined", 0.05, "mined_and_lesions", kernel="plain")(double)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(gradients(loss, half), gradients(expected, double), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=1e-5)


@every_kernel
@every_choice
@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_and_not_wrong(kernel, negatives, name):
    out = random_views(3, 5, 6)
    (first,) = torch.autograd.grad(
        make_loss(name, 0.1, negatives, kernel=kernel)(out), out["positive"][0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="kernel='plain'"):
        first.sum().backward()


@every_kernel
@every_choice
def test_functional_gradients(kernel, negatives):
    loss_function = make_loss("infonce", 0.1, negatives, kernel=kernel)
    out = random_views(4, 5, 6)
    functional = torch.func.grad(lambda *views: loss_function(with_leaves(list(views))), argnums=(0, 1, 2, 3))
    found = functional(*(x.detach() for x in leaves(out)))
    for ours, theirs in zip(found, gradients(loss_function(out), out), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_kernel
def test_a_trained_temperature_gets_its_gradient(kernel):
    out = random_views(5, 6, 7)
    grads = []
    for k in ("plain", kernel):
        loss_function = make_loss("infonce", 0.1, "mined_and_lesions", trainable_temperature=True, kernel=k)
        loss_function(out).backward()
        grads.append(loss_function.log_temperature.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@every_kernel
def test_only_what_is_asked_for_gets_a_gradient(kernel):
    loss_function = make_loss("ntxent_mined", 0.1, "mined", kernel=kernel)
    out = random_views(6, 5, 6)
    expected = loss_function(out)
    with torch.no_grad():
        torch.testing.assert_close(loss_function(out), expected)
    frozen = {"positive": out["positive"], "negative": tuple(x.detach() for x in out["negative"])}
    grads = torch.autograd.grad(loss_function(frozen), out["positive"])
    for ours, theirs in zip(grads, gradients(expected, out), strict=False):
        torch.testing.assert_close(ours, theirs)


@every_kernel
def test_nan_shows(kernel):
    out = random_views(7, 5, 6, requires_grad=False)
    out["negative"][0][2, 3] = torch.nan
    assert make_loss("ntxent_mined", 0.1, "mined", kernel=kernel)(out).isnan()


def test_who_computes():
    anchors = torch.zeros(2, 1024, 8)
    assert choose_kernel("auto", anchors[:, :32], 32) == "plain"
    assert choose_kernel("auto", anchors, 4096) == "streamed"
    with FakeTensorMode():
        on_gpu = torch.empty(2, 1024, 8, device="cuda")
    assert choose_kernel("auto", on_gpu, 4096) == "streamed"  # Triton's kernels have never run on one
    with pytest.raises(ValueError, match=r"triton.*float64|triton.*GPU"):
        choose_kernel("triton", anchors.double(), 4096)
    with pytest.raises(ValueError, match="plain, streamed, triton; got 'fast'"):
        NTXentNegativeMinedLoss(kernel="fast")
    with pytest.raises(ValueError, match="True, False or \"ring\"; got 'all'"):
        NTXentNegativeMinedLoss(gather_distributed="all")


def test_training_on_a_cpu_does_not_load_the_compiler():
    code = """
import sys
import torch
from fmcib_ssl.losses import NTXentNegativeMinedLoss
from fmcib_ssl.losses.logsumexp import streamed_logsumexp
views = [torch.randn(8, 4, requires_grad=True) for _ in range(4)]
for negatives in ("mined", "mined_and_lesions"):
    loss = NTXentNegativeMinedLoss(negatives=negatives, kernel="streamed")
    loss({"positive": tuple(views[:2]), "negative": tuple(views[2:])}).backward()
streamed_logsumexp(views[0][None], torch.ones(1, 8), views[2], torch.ones(8)).sum().backward()
assert all(view.grad.abs().sum() > 0 for view in views)
print(sorted({"sympy", "torch._dynamo"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr[-2000:]
