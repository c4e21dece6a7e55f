"""What every loss keeps, with every choice of negatives: the definition, in value and gradient, and the errors."""

from __future__ import annotations

import copy
import io
import math
import re

import pytest
import torch
from naive_contrast import (
    KERNELS,
    LOSSES,
    NEGATIVES,
    as_double,
    gradients,
    leaves,
    make_loss,
    margin_of,
    naive_contrast,
    random_views,
    two_collapsed_classes,
    with_leaves,
)

from fmcib_ssl.losses import InfoNCELoss, NTXentNegativeMinedLoss
from fmcib_ssl.types import ViewPairs

every_loss = pytest.mark.parametrize("name", LOSSES)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_choice = pytest.mark.parametrize("negatives", NEGATIVES)


@every_kernel
@every_loss
@every_choice
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("rows", [(5, 5), (4, 7), (3, 6), (6, 1), (1, 4)], ids=str)
def test_value_and_gradients_equal_the_definition(kernel, name, negatives, temperature, rows):
    if rows[0] == 1 and negatives in ("lesions", "mined_of_others"):
        pytest.skip("there is no other lesion")
    if rows[1] % rows[0] and negatives == "mined_of_others":
        pytest.skip("lesions have as many mined patches each")
    loss_function = make_loss(name, temperature, negatives, kernel=kernel)
    out = random_views(0, *rows)
    exact = as_double(out)
    expected = naive_contrast(exact, temperature, negatives, margin_of(loss_function))
    expected_gradients = gradients(expected, exact)

    loss = loss_function(out)
    assert loss.dtype == torch.float32 and loss.shape == ()
    # A float32 cosine is right to about 1e-7; the temperature divides that.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=2e-7 / temperature)
    for ours, theirs in zip(gradients(loss, out), expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-7 / temperature**2)

    loss = loss_function(exact)  # in float64 there is no rounding to excuse
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, exact), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def with_patients(out: ViewPairs) -> ViewPairs:
    return {**out, "patient": torch.tensor([7, 3, 7, 9, 3, 7])[: len(out["positive"][0])]}


@every_kernel
@every_loss
@pytest.mark.parametrize("negatives", ["mined_and_lesions", "lesions"])
@pytest.mark.parametrize("same_patient", ["ignore", "attract"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_lesions_of_one_patient(kernel, name, negatives, same_patient, temperature):
    loss_function = make_loss(name, temperature, negatives, kernel=kernel, same_patient=same_patient)
    exact = with_patients(as_double(random_views(0, 6, 4)))
    expected = naive_contrast(exact, temperature, negatives, margin_of(loss_function), same_patient)
    loss = loss_function(exact)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, exact), gradients(expected, exact), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@every_kernel
@pytest.mark.parametrize("same_patient", ["ignore", "attract"])
def test_patients_with_one_lesion_change_nothing(kernel, same_patient):
    out = {**random_views(1, 5, 5), "patient": torch.arange(5)}
    loss, same = (
        make_loss("infonce", 0.1, "mined_and_lesions", kernel=kernel, same_patient=choice)(out)
        for choice in ("keep", same_patient)
    )
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=1e-6)


@every_kernel
@pytest.mark.parametrize("same_patient", ["ignore", "attract"])
def test_an_anchor_without_negatives_adds_nothing(kernel, same_patient):
    """All lesions are one patient's, and only lesions are compared."""
    out = {**random_views(1, 4, 4), "patient": torch.zeros(4, dtype=torch.int64)}
    loss = make_loss("ntxent_mined", 0.1, "lesions", kernel=kernel, same_patient=same_patient)(out)
    assert loss == 0
    assert all((grad == 0).all() for grad in gradients(loss, out))


@every_kernel
def test_the_temperature_that_is_learned_has_the_gradient_of_the_definition(kernel):
    """With a margin on every positive; by central differences."""
    out = with_patients(as_double(random_views(2, 6, 4)))
    options = {"negatives": "mined_and_lesions", "same_patient": "attract", "kernel": kernel}
    loss_function = InfoNCELoss(0.05, math.log(0.3), trainable_temperature=True, **options)
    loss_function.log_temperature.data = loss_function.log_temperature.data.double()
    (grad,) = torch.autograd.grad(loss_function(out), loss_function.log_temperature)
    up, down = (
        naive_contrast(out, 0.3 * math.exp(step), "mined_and_lesions", 0.05, "attract") for step in (1e-5, -1e-5)
    )
    torch.testing.assert_close(grad, (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_patients_that_are_missing_or_that_no_choice_looks_at():
    with pytest.raises(ValueError, match='same_patient="ignore" needs `patient`, 4 integers; got none'):
        make_loss("infonce", 0.1, "lesions", same_patient="ignore")(random_views(0, 4, 4))
    out = random_views(0, 4, 4)
    for negatives in ("mined", "mined_of_others"):
        with pytest.raises(ValueError, match=f'negatives="{negatives}" compares none'):
            make_loss("infonce", 0.1, negatives, same_patient="attract")
        same = make_loss("infonce", 0.1, negatives, same_patient="ignore")(out)
        assert same == make_loss("infonce", 0.1, negatives)(out)


@every_kernel
@every_loss
@every_choice
def test_zero_vectors_are_as_in_normalize(kernel, name, negatives):
    loss_function = make_loss(name, 0.1, negatives, kernel=kernel)
    out = random_views(2, 4, 8)
    with torch.no_grad():
        out["positive"][0][1] = 0
        out["negative"][1][2] = 0
    exact = as_double(out)
    loss = loss_function(out)
    expected = naive_contrast(exact, 0.1, negatives, margin_of(loss_function))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(loss, out), gradients(expected, exact), strict=True):
        assert ours.isfinite().all()
        # At zero both are steep (1 / 1e-12), so rounding is relative to that.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@every_loss
@every_choice
@pytest.mark.parametrize(("kernel", "order"), [("plain", 1), ("plain", 2), ("streamed", 1)])
def test_a_backward_inside_autocast_is_exact(kernel, name, negatives, order):
    """Autocast rounds the products of a backward that runs inside it: to 3e-3 of the largest gradient in bfloat16."""
    loss_function = make_loss(name, 0.05, negatives, kernel=kernel)
    out = random_views(3, 4, 8, dim=64)

    def derivative(views):
        grad = torch.autograd.grad(loss_function(views), leaves(views), create_graph=order == 2, allow_unused=True)
        if order == 1:
            return [x for x in grad if x is not None]
        return gradients(sum(x.sin().sum() for x in grad if x is not None), views)

    with torch.autocast("cpu", torch.bfloat16):
        inside = derivative(out)
    for ours, exact in zip(inside, derivative(as_double(out)), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@every_choice
def test_the_plain_kernel_can_be_transformed(negatives):
    """Forward-mode and nested derivatives, a batch of losses, and torch.compile, each against another way to it."""
    loss_function = make_loss("infonce", 0.5, negatives, kernel="plain")
    view0, *others = (x.detach().double() for x in leaves(random_views(4, 3, 6, dim=4)))

    def function(view):
        return loss_function(with_leaves([view, *others]))

    reverse = torch.autograd.functional.hessian(function, view0)
    torch.testing.assert_close(torch.func.hessian(function)(view0), reverse)
    grad, along = torch.func.grad(function)(view0), torch.ones_like(view0)
    torch.testing.assert_close(torch.func.jvp(function, (view0,), (along,))[1], grad.sum())
    batch = torch.stack([view0, along])
    torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(x) for x in batch]))
    leaf = view0.clone().requires_grad_()
    torch.compile(function, backend="aot_eager", fullgraph=True)(leaf).backward()
    torch.testing.assert_close(leaf.grad, grad)


@every_kernel
@every_loss
@every_choice
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs_compute_in_float32(kernel, name, negatives, dtype):
    loss_function = make_loss(name, 0.05, negatives, kernel=kernel)
    half = with_leaves([x.detach().to(dtype).requires_grad_() for x in leaves(random_views(3, 3, 6, dim=64))])
    exact = as_double(half)  # the same numbers, which half precision rounded before the loss saw them
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_function(half)
    assert loss.dtype == torch.float32
    expected = naive_contrast(exact, 0.05, negatives, margin_of(loss_function))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(loss, half), gradients(expected, exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-4)


def test_float_dtypes_may_be_mixed():
    loss_function = make_loss("infonce", 0.1, "mined_and_lesions")
    positive0, positive1, mined0, mined1 = (x.detach() for x in leaves(random_views(4, 4, 5)))
    rounded = [positive0.half(), positive1.bfloat16(), mined0, mined1.bfloat16()]
    assert loss_function(with_leaves(rounded)) == loss_function(with_leaves([x.float() for x in rounded]))
    assert loss_function(with_leaves([positive0, positive1, mined0.double(), mined1])).dtype == torch.float64


@every_loss
def test_lesions_alone_ignore_the_mined_values(name):
    out = random_views(9, 4, 3)
    loss_function = make_loss(name, 0.1, "lesions")
    without = with_leaves([*out["positive"], torch.full((0, 8), 1.0), torch.full((0, 8), 1.0)])
    poisoned = with_leaves([*out["positive"], torch.full((3, 8), torch.nan), torch.full((3, 8), torch.inf)])
    assert loss_function(without) == loss_function(poisoned) == loss_function(out)


def test_mined_negatives_alone_put_no_force_between_two_lesions():
    """What the docs say: "lesion or not" is solved by one point for all lesions, and nothing moves them apart."""
    collapsed, by_hand = two_collapsed_classes(num_lesions=4, num_mined=3)
    assert NTXentNegativeMinedLoss(1.0)(collapsed).item() == pytest.approx(by_hand, rel=1e-6)
    for negatives in NEGATIVES:
        loss_function = NTXentNegativeMinedLoss(negatives=negatives)
        first_rows = []  # the gradient of lesion 0, before and after all other lesions move
        for shift in (0.0, 1.0):
            out = random_views(11, 4, 4)
            with torch.no_grad():
                for view in out["positive"]:
                    view[1:] += shift
            first_rows.append(torch.stack(gradients(loss_function(out), out)[:2])[:, 0])
        unmoved = torch.allclose(*first_rows, rtol=1e-6, atol=1e-7)
        assert unmoved == (negatives in ("mined", "mined_of_others"))


@every_choice
@every_kernel
def test_rows_that_are_duplicates_huge_strided_or_stacked(kernel, negatives):
    loss_function = make_loss("ntxent_mined", 0.1, negatives, kernel=kernel)
    out = random_views(5, 4, 4, requires_grad=False)
    with torch.no_grad():
        out["positive"][0][2], out["negative"][1][0] = out["positive"][0][1], out["positive"][1][3]
    expected = naive_contrast(as_double(out), 0.1, negatives)
    torch.testing.assert_close(loss_function(out).double(), expected, rtol=1e-6, atol=1e-6)
    scaled = {key: tuple(1e18 * view for view in out[key]) for key in ("positive", "negative")}
    torch.testing.assert_close(loss_function(scaled).double(), expected, rtol=1e-5, atol=1e-6)
    strided = {key: tuple(view.T.contiguous().T for view in out[key]) for key in ("positive", "negative")}
    stacked = {key: torch.stack(out[key]) for key in ("positive", "negative")}
    assert loss_function(strided) == loss_function(stacked) == loss_function(out)


@every_loss
def test_copies_pickles_and_what_is_printed(name):
    loss_function = make_loss(name, 0.2, "mined")
    out = random_views(12, 3, 3)
    file = io.BytesIO()
    torch.save(copy.deepcopy(loss_function), file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(out) == loss_function(out)
    assert not loss_function.state_dict()
    assert "temperature=0.2" in repr(loss_function) and "negatives='mined'" in repr(loss_function)


@every_kernel
@every_loss
def test_extreme_logits_keep_their_digits(kernel, name):
    """At temperature 0.01 exp(100 - -100) is no float32, and 1 + exp(-20) is 1."""
    loss_function = make_loss(name, 0.01, "mined", kernel=kernel)
    margin = margin_of(loss_function)
    one = torch.tensor([[1.0, 0.0]])
    opposite = loss_function(with_leaves([one, -one, one, -one]))
    assert opposite.item() == pytest.approx((2 + margin) / 0.01, rel=1e-6)
    near = torch.tensor([[0.8, 0.6]])
    separated = loss_function(with_leaves([one, one, near, near]))
    assert separated.item() == pytest.approx(math.exp((0.8 - 1 + margin) / 0.01), rel=1e-4)


@pytest.mark.parametrize(
    ("negatives", "num_mined"), [("mined", 4300), ("mined_and_lesions", 2260), ("mined_of_others", 3072)]
)
def test_large_batches_are_streamed_in_panels(negatives, num_mined):
    """4.4 million logits for each view or more: a panel on a CPU has 4.2 million."""
    out = random_views(15, 1024, num_mined, dim=4)
    plain, streamed, chosen = (make_loss("infonce", 0.1, negatives, kernel=k)(out) for k in (*KERNELS, "auto"))
    assert chosen == streamed
    torch.testing.assert_close(streamed, plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(streamed, out), gradients(plain, out), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_a_second_derivative_is_refused_by_the_streamed_loss_and_not_wrong():
    out = random_views(3, 5, 6)
    plain, streamed = (make_loss("infonce", 0.1, "mined_and_lesions", kernel=kernel)(out) for kernel in KERNELS)
    torch.autograd.grad(plain, out["positive"][0], create_graph=True)[0].sum().backward()
    with pytest.raises(RuntimeError, match="kernel='plain'"):
        torch.autograd.grad(streamed, out["positive"][0], create_graph=True)


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


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("positive", lambda a, b: (a, b, a), "`positive` must be a pair .* got 3 entries"),
        ("negative", lambda a, b: a, "`negative` must be a pair .* got Tensor"),
        ("positive", lambda a, b: (a[0], b), r"`positive` view 0 .* got torch\.float32 \(8,\)"),
        ("positive", lambda a, b: (a, b[:2]), "the two views of `positive` differ: 3 and 2 rows"),
        ("negative", lambda a, b: (a[:, :5], b[:, :5]), "same dim, got `positive` 8 and 8, `negative` 5 and 5"),
        ("negative", lambda a, b: (a, b.to("meta")), "same device, .* `negative` cpu and meta"),
        ("positive", lambda a, b: (a[:0], b[:0]), "`positive` has no rows"),
        ("negative", lambda a, b: (a[:0], b[:0]), "`negative` has no rows.* mine at least one"),
        ("positive", lambda a, b: (a, b.tolist()), "`positive` view 1 must be a float tensor .* got list"),
        ("negative", lambda a, b: (a.long(), b), r"`negative` view 0 .* got torch\.int64"),
        ("negative", lambda a, b: (a, b.cfloat()), r"`negative` view 1 .* got torch\.complex64"),
    ],
)
def test_embeddings_that_do_not_fit(key, change, message):
    out = random_views(0, 3, 3)
    out[key] = change(*out[key])
    with pytest.raises(ValueError, match=message):
        make_loss("infonce", 0.1, "mined_and_lesions")(out)


def test_missing_keys_and_others():
    out = random_views(0, 1, 3)
    with pytest.raises(AssertionError, match="`negative` key needs to be specified"):
        make_loss("infonce", 0.1, "lesions")({"positive": out["positive"]})
    for negatives in ("lesions", "mined_of_others"):
        with pytest.raises(ValueError, match=f'"{negatives}" needs at least 2 lesions in all, got 1'):
            make_loss("infonce", 0.1, negatives)(out)
    with pytest.raises(ValueError, match="as many for every lesion: got 3 for 2 lesions"):
        make_loss("infonce", 0.1, "mined_of_others")(random_views(0, 2, 3))


@every_loss
@pytest.mark.parametrize(
    ("temperature", "options", "message"),
    [
        (0.1, {"negatives": "minde"}, "lesions, mined_of_others; got 'minde'"),
        (0.1, {"kernel": "triton"}, "auto, plain, streamed; got 'triton'"),
        (0.1, {"gather_distributed": "ring"}, "True, False; got 'ring'"),
        *((value, {}, "Illegal temperature: .*" + re.escape(str(value))) for value in (0.0, -9e-9, math.nan, math.inf)),
    ],
)
def test_unknown_choices_and_illegal_temperatures(name, temperature, options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, temperature, **{"negatives": "mined", **options})
