"""InfoNCE against PyKEEN, on scores and, through its score method, on embeddings."""

from __future__ import annotations

import copy
import inspect
import types

import pytest
import torch
from naive_contrast import gradients, random_views
from torch.nn.functional import normalize

from fmcib_ssl.losses import InfoNCELoss

SETTINGS = [{}, {"margin": 0.0}, {"margin": 0.3, "log_adversarial_temperature": 0.5}, {"reduction": "sum"}]
every_setting = pytest.mark.parametrize("setting", SETTINGS)
every_smoothing = pytest.mark.parametrize("label_smoothing", [None, 0.0, 0.1, 0.9])


@pytest.fixture(scope="module")
def pykeen_losses() -> types.ModuleType:
    return pytest.importorskip("pykeen.losses")


def scores(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_signature_defaults_and_search_space_are_pykeens(pykeen_losses):
    theirs = pykeen_losses.InfoNCELoss
    ours = inspect.signature(InfoNCELoss).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    for method in ("process_lcwa_scores", "process_slcwa_scores"):
        ours_and_theirs = (inspect.signature(getattr(loss, method)).parameters for loss in (InfoNCELoss, theirs))
        assert len({tuple((p.name, p.kind, p.default) for p in found.values()) for found in ours_and_theirs}) == 1
    assert InfoNCELoss.hpo_default == dict(theirs.hpo_default)
    assert InfoNCELoss().inverse_softmax_temperature == pytest.approx(theirs().inverse_softmax_temperature)
    assert InfoNCELoss().margin == theirs().margin


@every_setting
@every_smoothing
def test_lcwa_scores(pykeen_losses, setting, label_smoothing):
    predictions = scores(0, 5, 7)
    labels = (scores(1, 5, 7) > 0.3).float()
    labels[0] = 0  # a row without a positive
    labels[1] = 1
    weights = scores(2, 5, 7).detach().square()
    weights[2] = 0
    for given in (None, weights, weights[:, :1], torch.zeros(5, 7)):
        options = {"label_smoothing": label_smoothing, "num_entities": 7, "weights": given}
        ours = InfoNCELoss(**setting).process_lcwa_scores(predictions, labels, **options)
        theirs = pykeen_losses.InfoNCELoss(**setting).process_lcwa_scores(predictions, labels, **options)
        assert_same(ours, theirs, predictions)


@every_setting
@every_smoothing
def test_slcwa_dense_scores(pykeen_losses, setting, label_smoothing):
    positive, negative = scores(5, 6, 1), scores(6, 6, 9)
    options = {"label_smoothing": label_smoothing, "num_entities": 100, "pos_weights": None, "neg_weights": None}
    ours = InfoNCELoss(**setting).process_slcwa_scores(positive, negative, **options)
    theirs = pykeen_losses.InfoNCELoss(**setting).process_slcwa_scores(positive, negative, **options)
    assert_same(ours, theirs, positive, negative)
    flat = InfoNCELoss(**setting).process_slcwa_scores(positive[:, 0], negative, **options)
    assert flat == ours


@pytest.mark.parametrize("weights", ["pos_weights", "neg_weights"])
def test_slcwa_takes_no_weights_as_in_pykeen(pykeen_losses, weights):
    positive, negative = scores(5, 6, 1), scores(6, 6, 9)
    given = {weights: torch.ones(6, 1)}
    for loss_function in (InfoNCELoss(), pykeen_losses.InfoNCELoss()):
        with pytest.raises(RuntimeError, match="InfoNCELoss does not support sample weights"):
            loss_function.process_slcwa_scores(positive, negative, **given)


@pytest.fixture(scope="module")
def adapter(pykeen_losses):
    """The two lines of docs/losses.md."""

    class MarginInfoNCELoss(InfoNCELoss, pykeen_losses.Loss):
        """InfoNCE with a margin."""

    pykeen_losses.loss_resolver.register(MarginInfoNCELoss)
    return MarginInfoNCELoss


LOOPS = {
    "slcwa": {"training_loop": "slcwa"},
    "slcwa, filtered": {"training_loop": "slcwa", "negative_sampler_kwargs": {"filtered": True}},
    "lcwa": {"training_loop": "lcwa", "training_kwargs": {"label_smoothing": 0.1}},
    "lcwa, weighted": {"training_loop": "lcwa", "training_loop_kwargs": {"loss_weighter": "relation"}},
}


@pytest.mark.parametrize(("loop", "form"), [
    ("slcwa, filtered", "name"), ("lcwa, weighted", "instance"),
    *(pytest.param(loop, "instance", marks=pytest.mark.slow) for loop in ("slcwa", "slcwa, filtered", "lcwa")),
])  # fmt: skip
def test_a_pipeline_of_pykeen_trains_with_it(adapter, pykeen_losses, loop, form):
    """By its name in the resolver with arguments, or as an instance of the plain class: PyKEEN's losses and ranks."""
    pipeline, nations = (pytest.importorskip(f"pykeen.{module}") for module in ("pipeline", "datasets"))
    options = copy.deepcopy(LOOPS[loop])
    if "loss_weighter" in options.get("training_loop_kwargs", {}):
        weights = torch.linspace(0.5, 2.0, 55)  # of the relations of Nations
        options["training_loop_kwargs"]["loss_weighter_kwargs"] = {"weights": weights}

    def run(loss):
        training = {"num_epochs": 2, "use_tqdm": False, **options.get("training_kwargs", {})}
        return pipeline.pipeline(
            dataset=nations.Nations(), model="distmult", loss=loss, random_seed=0, device="cpu",
            loss_kwargs={"margin": 0.05} if isinstance(loss, str) else None,
            evaluation_kwargs={"use_tqdm": False}, **{**options, "training_kwargs": training},
        )  # fmt: skip

    ours = run("margininfonce" if form == "name" else InfoNCELoss(0.05))
    theirs = run(pykeen_losses.InfoNCELoss(0.05))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.losses[-1] < ours.losses[0]
    assert ours.get_metric("mrr") == pytest.approx(theirs.get_metric("mrr"), rel=1e-3)


@pytest.fixture
def kept() -> torch.Tensor:
    kept = torch.rand(6, 4, generator=torch.Generator().manual_seed(7)) > 0.4
    kept[0] = True
    kept[1] = False  # a row without any negative
    return kept


@every_setting
def test_slcwa_sparse_scores(pykeen_losses, setting, kept):
    positive, negative = scores(8, 6, 1), scores(9, int(kept.sum()))
    ours = InfoNCELoss(**setting).process_slcwa_scores(positive, negative, batch_filter=kept)
    theirs = pykeen_losses.InfoNCELoss(**setting).process_slcwa_scores(positive, negative, batch_filter=kept)
    assert_same(ours, theirs, positive, negative)


@every_setting
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_slcwa_smoothing_leaves_removed_negatives_out(pykeen_losses, setting, kept, label_smoothing):
    """PyKEEN's value is infinite here; row by row, with only the kept negatives, it is what we give."""
    positive, negative = scores(10, 6, 1), scores(11, int(kept.sum()))
    ours = InfoNCELoss(**setting).process_slcwa_scores(positive, negative, label_smoothing, kept)
    reference = pykeen_losses.InfoNCELoss(**setting)
    assert reference.process_slcwa_scores(positive, negative, label_smoothing, kept).isinf()
    rows = torch.split(negative, kept.sum(dim=1).tolist())
    values = [
        reference.process_slcwa_scores(positive[i : i + 1], row[None], label_smoothing) for i, row in enumerate(rows)
    ]
    total = torch.stack(values).sum()
    assert_same(ours, total if reference.reduction == "sum" else total / len(values), positive, negative)


@every_setting
def test_forward_is_pykeens_loss_of_the_cosines(pykeen_losses, setting):
    out = random_views(12, 5, 8)
    p0, p1, n0, n1 = (normalize(x, dim=1) for x in (*out["positive"], *out["negative"]))
    positive = (p0 * p1).sum(dim=1, keepdim=True).repeat(2, 1)
    negative = torch.cat([p0 @ n0.T, p1 @ n1.T])
    ours = InfoNCELoss(**setting)(out)
    theirs = pykeen_losses.InfoNCELoss(**setting).process_slcwa_scores(positive, negative)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours, out), gradients(theirs, out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_scores_are_computed_in_float32(reduction):
    loss_function = InfoNCELoss(reduction=reduction)
    positive, negative = scores(13, 4, 1).half(), scores(14, 4, 5).half()
    expected = loss_function.process_slcwa_scores(positive.float(), negative.float())
    assert loss_function.process_slcwa_scores(positive, negative) == expected
    labels = torch.eye(4, 5)
    expected = loss_function.process_lcwa_scores(negative.float(), labels)
    assert loss_function.process_lcwa_scores(negative, labels) == expected


def test_from_temperature():
    loss_function = InfoNCELoss.from_temperature(0.2, 0.05, "sum", negatives="lesions", gather_distributed=True)
    settings = (
        loss_function.margin,
        loss_function.reduction,
        loss_function.negatives,
        loss_function.gather_distributed,
    )
    assert loss_function.temperature == pytest.approx(0.2) and settings == (0.05, "sum", "lesions", True)
    assert InfoNCELoss.from_temperature(temperature=0.05).margin == InfoNCELoss().margin


@pytest.mark.parametrize("kernel", ["plain", "streamed"])
def test_trainable_temperature(kernel):
    out = random_views(15, 4, 4, dtype=torch.float64)
    trained = InfoNCELoss.from_temperature(0.1, trainable_temperature=True, kernel=kernel).double()
    assert [name for name, _ in trained.named_parameters()] == ["log_temperature"]
    loss = trained(out)
    step = 1e-6
    low, high = (
        InfoNCELoss(log_adversarial_temperature=trained.log_temperature.item() + sign * step)(out) for sign in (-1, 1)
    )
    (gradient,) = torch.autograd.grad(loss, trained.parameters())
    assert gradient.item() == pytest.approx((high - low).item() / (2 * step), rel=1e-5)

    optimizer = torch.optim.SGD(trained.parameters(), lr=10.0)
    for _ in range(20):
        optimizer.zero_grad()
        trained(out).backward()
        optimizer.step()
    assert trained(out) < loss
    assert trained.temperature > 0 and trained.inverse_softmax_temperature == trained.temperature
    restored = InfoNCELoss(trainable_temperature=True).double()
    restored.load_state_dict(trained.state_dict())
    assert restored(out) == trained(out) == copy.deepcopy(trained)(out)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"margin": -0.01}, r"Cannot have a negative margin: -0\.01"),
        ({"margin": float("nan")}, "margin must be finite, got nan"),
        ({"reduction": "none"}, "reduction must be one of mean, sum; got 'none'"),
        ({"log_adversarial_temperature": 1e4}, "must be a logarithm, got 10000"),
        ({"log_adversarial_temperature": -1e4}, "Illegal temperature"),
    ],
)
def test_settings_that_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(**setting)
    with pytest.raises(ValueError, match=r"positive temperature, got -0\.1"):
        InfoNCELoss.from_temperature(-0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((scores(0, 3, 1), scores(1, 3)), r"got \(3,\) and None"),
        ((scores(0, 2, 1), scores(1, 3, 4)), r"positive_scores must be \(3, 1\)"),
        ((scores(0, 3, 2), scores(1, 3, 4)), r"got \(3, 2\)"),
        ((scores(0, 3, 1), scores(1, 3), None, torch.ones(3, 2)), "a boolean batch_filter"),
        ((scores(0, 3, 1), scores(1, 5), None, torch.ones(3, 2).bool()), r"got \(5,\) and \(3, 2\)"),
        ((scores(0, 3, 1), scores(1, 3, 2), None, torch.ones(3, 2).bool()), r"got \(3, 2\) and \(3, 2\)"),
        ((scores(0, 3, 1), scores(1, 3, 2), 1.5), "label_smoothing must be in 0 to 1, got 1.5"),
    ],
)
def test_slcwa_scores_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss().process_slcwa_scores(*arguments)


def test_lcwa_scores_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weights must be \(3, any number\), got \(1, 4\)"):
        InfoNCELoss().process_lcwa_scores(scores(0, 3, 4), torch.ones(3, 4), weights=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(3, 5\)"):
        InfoNCELoss().process_lcwa_scores(scores(0, 3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"label_smoothing must be in 0 to 1, got -0\.1"):
        InfoNCELoss().process_lcwa_scores(scores(0, 3, 4), torch.ones(3, 4), label_smoothing=-0.1)
