"""The contrast kernel in panels: some queries against all keys at a time.

A panel is `(rows, keys)` with few enough rows to stay in the cache, so memory grows with the number of embeddings and
not with its square. Inside, logarithms are to base 2: torch computes `exp2` more than twice as fast as `exp` on a CPU.

`attend` and `key_gradient` are what any kernel must offer (the Triton one offers the same two); they need four products
of matrices for a loss and its gradients. `cross_entropy_sum` needs three, and one exponential, but only for a scalar:
it sees all negatives of an anchor at once, so its share of the gradients is known while its panel is still there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
#: Elements of a panel: 16 MiB of float32 on a CPU, whose caches reuse it; 256 MiB where kernels have to be kept busy.
_PANEL_CPU, _PANEL_OTHER = 2**22, 2**26
#: Powers of two up to this magnitude, and sums of very many of them, are safe in float32 without subtracting a maximum.
_SAFE_EXPONENT = 60.0


def cross_entropy_sum(
    queries: Float[Tensor, "n dim"],
    positive_logits: Float[Tensor, " n"],
    keys: Float[Tensor, "m dim"],
    own_keys: Sequence[int] = (),
) -> Float[Tensor, ""]:
    """`sum_i -log(e^p_i / (e^p_i + sum_j e^(queries[i] . keys[j])))`.

    Differentiable once. The gradients are accumulated here, in the forward, and scaled in the backward.

    Args:
        queries: anchors, divided by the temperature.
        positive_logits: the logit `p_i` of each anchor's positive.
        keys: negatives.
        own_keys: for each of these, query `i` does not see key `own_key + i`.
    """
    inputs = (queries, positive_logits, keys)
    loss: Tensor
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        loss, *_ = _CrossEntropySum.apply(*inputs, list(own_keys), keys.requires_grad)
    else:
        loss, *_ = _cross_entropy_sum(*inputs, list(own_keys), False, False)
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        queries: Tensor, positive_logits: Tensor, keys: Tensor, own_keys: list[int], keys_need_it: bool
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = _cross_entropy_sum(queries, positive_logits, keys, own_keys, True, keys_need_it)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.save_for_backward(*inputs[:3], *gradients)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(once(grad * saved, *inputs) if need else None for saved, need in needed), None, None


def once(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """`gradient` as it is; but asked for its own gradient it refuses, where autograd would take it for a constant."""
    return _Once.apply(gradient, *inputs) if torch.is_grad_enabled() else gradient


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the streamed contrast kernels have no second derivative: construct the loss with kernel='plain', which has"
        )


def _operator(fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function an operator to torch.compile, which then takes it as it is and does not unroll its loop.

    Elsewhere the function itself runs: the first call of an operator loads torch's compiler, 900 modules.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = f"fmcib_ssl::streamed_{function.__name__.lstrip('_')}"
        operator = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return cast("R", operator(*args, **kwargs))
            with torch.no_grad():
                return function(*args, **kwargs)

        return call

    return register


@_operator(
    lambda queries, positive_logits, keys, *_: (
        positive_logits.new_empty(()),
        *map(torch.empty_like, (queries, positive_logits, keys)),
    )
)
def _cross_entropy_sum(  # noqa: PLR0917
    queries: Tensor,
    positive_logits: Tensor,
    keys: Tensor,
    own_keys: list[int],
    with_gradients: bool,
    with_key_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and the gradients with respect to queries, positive logits and keys; zeros where they are not wanted."""
    loss = positive_logits.new_zeros(())
    of_queries, of_positives = torch.zeros_like(queries), torch.zeros_like(positive_logits)
    of_keys = torch.zeros_like(keys)
    bounded = _bounded(queries, keys)
    for rows, panel in _panels(queries, keys, own_keys):
        total, log_total = _exponentiate(panel, bounded)
        margin = positive_logits[rows] - log_total
        # -log(e^p / (e^p + e^n)), without cancellation where the pair is well separated already.
        loss -= F.logsigmoid(margin).sum()
        if with_gradients:
            share = torch.sigmoid(-margin)  # of an anchor's probability: what its negatives have
            of_positives[rows] = -share
            factor = (share / total)[:, None]  # turns exponentials into gradients of logits
            torch.mul(panel @ keys, factor, out=of_queries[rows])
        if with_key_gradient:
            of_keys.addmm_(panel.T, queries[rows] * factor)
    return loss, of_queries, of_positives, of_keys


@_operator(
    lambda queries, query_scale, keys, key_scale, own_key: (
        torch.empty_like(query_scale),
        torch.empty_like(queries, dtype=query_scale.dtype),
    )
)
def attend(
    queries: Tensor, query_scale: Tensor, keys: Tensor, key_scale: Tensor, own_key: int | None
) -> tuple[Tensor, Tensor]:
    """What attention with the keys as values computes.

    The logits are `s[i, j] = query_scale[i] key_scale[j] queries[i] . keys[j]`.

    Args:
        queries: `(n, dim)`.
        query_scale: `(n,)`.
        keys: `(m, dim)`.
        key_scale: `(m,)`.
        own_key: `s[i, own_key + i]` is left out; None leaves out nothing.

    Returns:
        `log(sum_j exp(s[i, j]))`, `(n,)`; and the mean of `key_scale[j] keys[j]` under those weights, `(n, dim)`.
        The second is the gradient of the first with respect to `query_scale[i] queries[i]`.
    """
    queries, keys = queries * query_scale[:, None], keys * key_scale[:, None]
    logsumexp, mean_key = queries.new_empty(len(queries)), torch.empty_like(queries)
    bounded = _bounded(queries, keys)
    for rows, panel in _panels(queries, keys, [] if own_key is None else [own_key]):
        total, logsumexp[rows] = _exponentiate(panel, bounded)
        torch.div(panel @ keys, total[:, None], out=mean_key[rows])
    return logsumexp, mean_key


@_operator(lambda queries, query_scale, keys, key_scale, *_: torch.empty_like(keys, dtype=key_scale.dtype))
def key_gradient(  # noqa: PLR0917
    queries: Tensor,
    query_scale: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    own_key: int | None,
    logsumexp: Tensor,
    grad: Tensor,
) -> Tensor:
    """`sum_i grad[i] exp(s[i, j] - logsumexp[i]) query_scale[i] queries[i]`, `(m, dim)`; names as in `attend`.

    With `attend`'s `logsumexp` it is the gradient with respect to `key_scale[j] keys[j]`. A larger one, over more keys
    than these, gives these keys their share.
    """
    queries, keys = queries * query_scale[:, None], keys * key_scale[:, None]
    of_keys = torch.zeros_like(keys)
    shift = (logsumexp * _LOG2_E).clamp_min(torch.finfo(logsumexp.dtype).min)[:, None]
    for rows, panel in _panels(queries, keys, [] if own_key is None else [own_key]):
        panel.sub_(shift[rows]).exp2_()
        of_keys.addmm_(panel.T, queries[rows] * grad[rows, None])
    return of_keys


def _bounded(queries: Tensor, keys: Tensor) -> bool:
    """Whether no logit can be so large or small that its exponential needs a maximum subtracted. False for NaN."""
    return float(queries.norm(dim=1).max() * keys.norm(dim=1).max()) * _LOG2_E < _SAFE_EXPONENT


def _panels(
    queries: Tensor, keys: Tensor, own_keys: Sequence[int]
) -> Iterator[tuple[slice, Float[Tensor, "rows keys"]]]:
    """Some rows at a time, and their logits to base 2 with all keys; those of own keys are -inf."""
    size = _PANEL_CPU if queries.device.type == "cpu" else _PANEL_OTHER
    num_rows = max(16, size // len(keys))
    for start in range(0, len(queries), num_rows):
        rows = slice(start, min(start + num_rows, len(queries)))
        panel = (queries[rows] * _LOG2_E) @ keys.T
        for own_key in own_keys:
            panel[:, own_key + start :].diagonal().fill_(-math.inf)
        yield rows, panel
        del panel  # before the next one is made


def _exponentiate(panel: Tensor, bounded: bool) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Turn logits to base 2 into exponentials, in place, up to a factor for each row.

    Returns:
        The sum of each row, and the natural logarithm of what the sum would be without that factor.
    """
    lowest = torch.finfo(panel.dtype)
    shift = None if bounded else panel.amax(dim=1, keepdim=True).clamp_min(lowest.min)
    if shift is not None:
        panel.sub_(shift)
    total = panel.exp2_().sum(dim=1)
    log2_total = total.log2() if shift is None else total.log2() + shift[:, 0]
    # Only a row that sees no key at all has a sum of 0; its exponentials are 0 too, and stay it when divided.
    return total.clamp_min(lowest.tiny), log2_total * _LN_2
