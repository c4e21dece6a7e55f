"""NT-Xent with mined negatives against the published formula and against lightly."""

from __future__ import annotations

import inspect

import pytest
import torch
from naive_contrast import gradients, random_views
from torch.nn.functional import cross_entropy, normalize

from fmcib_ssl.losses import NTXentNegativeMinedLoss


def published_formula(out, temperature):
    """The four matrices of the published loss, with the diagonals of the middle two."""
    p0, p1, n0, n1 = (normalize(x, dim=1) for x in (*out["positive"], *out["negative"]))
    first = torch.cat([(p0 @ p1.T).diagonal()[:, None], p0 @ n0.T], dim=1)
    second = torch.cat([(p1 @ p0.T).diagonal()[:, None], p1 @ n1.T], dim=1)
    logits = torch.cat([first, second]) / temperature
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, -0.2])
@pytest.mark.parametrize(("num_lesions", "num_mined"), [(32, 32), (16, 48), (48, 16), (1, 1)])
@pytest.mark.filterwarnings("ignore:temperature -0.2 is negative")
def test_default_is_the_published_loss(temperature, num_lesions, num_mined):
    out = random_views(0, num_lesions, num_mined, dim=128)
    ours, theirs = NTXentNegativeMinedLoss(temperature)(out), published_formula(out, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(ours, out), gradients(theirs, out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("num_lesions", [2, 17])
def test_lesions_alone_are_simclr(temperature, num_lesions):
    lightly_loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature=temperature)
    out = random_views(1, num_lesions, 3, dim=32)
    ours = NTXentNegativeMinedLoss(temperature, negatives="lesions")(out)
    theirs = lightly_loss(*out["positive"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(ours, out), gradients(theirs, out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_negative_temperature_warns_what_it_does():
    with pytest.warns(UserWarning, match="pushes the two views of a lesion apart"):
        loss_function = NTXentNegativeMinedLoss(-0.1)
    out = random_views(2, 4, 4)
    view0, view1 = out["positive"]
    step = torch.autograd.grad(loss_function(out), view0)[0]
    cosine = torch.cosine_similarity(view0 - 0.1 * step, view1).mean()
    assert cosine < torch.cosine_similarity(view0, view1).mean()


def test_what_outside_users_rely_on():
    """The document of the published class: arguments by position, attributes, what may be changed later, errors."""
    defaults = {k: p.default for k, p in inspect.signature(NTXentNegativeMinedLoss).parameters.items()}
    assert defaults == {
        "temperature": 0.1,
        "gather_distributed": False,
        "negatives": "mined",
        "kernel": "auto",
        "same_patient": "keep",
    }
    assert list(defaults)[:2] == ["temperature", "gather_distributed"]
    loss_function = NTXentNegativeMinedLoss(0.2, True)
    assert (loss_function.temperature, loss_function.gather_distributed, loss_function.eps) == (0.2, True, 1e-8)
    assert isinstance(loss_function.cross_entropy, torch.nn.CrossEntropyLoss)
    assert loss_function.cross_entropy.reduction == "mean"
    assert not loss_function.state_dict() and not list(loss_function.parameters())
    # Without a process group there is nothing to gather.
    out = random_views(3, 3, 3)
    assert loss_function(out) == NTXentNegativeMinedLoss(0.2)(out)
    loss_function.temperature = 0.5
    assert loss_function(out) == NTXentNegativeMinedLoss(0.5)(out)
    with pytest.raises(ValueError, match=r"^Illegal temperature: abs\(1e-09\) < 1e-8"):
        NTXentNegativeMinedLoss(1e-9)
    for key in ("positive", "negative"):
        with pytest.raises(AssertionError, match=f"^`{key}` key needs to be specified"):
            loss_function({name: views for name, views in out.items() if name != key})


def test_a_temperature_that_is_a_parameter_is_trained():
    out = random_views(4, 3, 3, dtype=torch.float64)
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss_function = NTXentNegativeMinedLoss(temperature)
    assert [name for name, _ in loss_function.named_parameters()] == ["temperature"]
    up, down = (NTXentNegativeMinedLoss(0.3 + step)(out) for step in (1e-6, -1e-6))
    (grad,) = torch.autograd.grad(loss_function(out), temperature)
    assert grad.item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6)
