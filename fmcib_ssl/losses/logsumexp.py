"""`log(sum_j exp(similarity))` of anchors to negatives: its definition, and the kernels that never hold the matrix."""

from __future__ import annotations

import importlib.util
import math
import os
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fmcib_ssl.losses import streamed
from fmcib_ssl.losses.across_ranks import num_ranks, swap

#: How the sums over negatives are computed; "auto" decides by size. `docs/contrast_kernel.md` explains each.
Kernel = Literal["auto", "plain", "streamed", "triton"]

#: From this many logits on, streaming is faster than the matrix (docs/contrast_kernel.md has the measurement).
_WORTH_STREAMING = 2**19
_TRITON_MAX_DIM = 2048
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch, to debug kernels on a CPU


def check_kernel(kernel: str) -> None:
    """Raise ValueError unless `kernel` names one."""
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}; got {kernel!r}")


def choose_kernel(kernel: Kernel, anchors: Tensor, num_keys: int) -> Literal["plain", "streamed", "triton"]:
    """The kernel that computes anchors `(..., dim)` against `num_keys` negatives.

    Raises:
        ValueError: "triton" was asked for, and cannot compute this.
    """
    if kernel == "auto":
        num_logits = math.prod(anchors.shape[:-1]) * num_keys
        return "plain" if num_logits < _WORTH_STREAMING else "streamed"
    if kernel == "triton" and (obstacle := _obstacle_to_triton(anchors)):
        raise ValueError(f'kernel="triton" cannot run here: {obstacle}; "auto" takes what can')
    return kernel


def _obstacle_to_triton(anchors: Tensor) -> str | None:
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if anchors.device.type != "cuda" and not _TRITON_INTERPRETED:
        return f"the embeddings are on {anchors.device.type}, and it needs a GPU"
    if anchors.dtype == torch.float64:
        return "it computes in float32, and an embedding is float64"
    if anchors.shape[-1] > _TRITON_MAX_DIM:
        return f"embeddings have {anchors.shape[-1]} dimensions, and it takes {_TRITON_MAX_DIM} at most"
    return None


def logsumexp_similarity(
    queries: Float[Tensor, "queries dim"], keys: Float[Tensor, "keys dim"], own_key: int | None = None
) -> Float[Tensor, " queries"]:
    """`log(sum_j exp(queries[i] . keys[j]))` for every query, from the whole matrix: the definition.

    Args:
        queries: rows of any length.
        keys: rows of any length; none at all give -inf.
        own_key: leaves key `own_key + i` out of the sum of query `i`.
    """
    similarity = queries @ keys.T
    if own_key is not None:
        query_numbers = torch.arange(len(queries), device=queries.device)
        key_numbers = torch.arange(len(keys), device=keys.device)
        similarity = similarity.masked_fill(query_numbers[:, None] + own_key == key_numbers, -math.inf)
    return similarity.logsumexp(dim=1)


def streamed_logsumexp(
    queries: Float[Tensor, "views n dim"],
    query_scale: Float[Tensor, "views n"],
    keys: Float[Tensor, "m dim"],
    key_scale: Float[Tensor, " m"],
    own_key: int | None = None,
    *,
    kernel: Literal["streamed", "triton"] = "streamed",
    storage: torch.dtype | None = None,
    ring: bool = False,
) -> Float[Tensor, "views n"]:
    """The same for `query_scale[v, i] queries[v, i]` and `key_scale[j] keys[j]`, in linear memory, differentiable once.

    Vectors and their scales are apart, because vectors that come from bf16 are exact in bf16, and unit vectors are not.

    Args:
        queries: several sets that share the keys.
        query_scale: factor of each query.
        keys: this rank's.
        key_scale: factor of each key.
        own_key: leaves key `own_key + i` of this rank out of the sums of the queries `i`.
        kernel: what computes it.
        storage: a narrower dtype that holds every vector exactly; what the kernel reads, and what travels.
        ring: sum over the keys of all ranks, which must have as many as this one and call this together.
    """
    options = (own_key, kernel, storage or keys.dtype, num_ranks() if ring else 1)
    logsumexp: Tensor = _StreamedLogSumExp.apply(queries, query_scale, keys, key_scale, *options)[0]
    return logsumexp


class _StreamedLogSumExp(torch.autograd.Function):
    """Own keys first; then, rank by rank, another rank's keys come, are used, and are dropped, in both directions."""

    @staticmethod
    def forward(  # noqa: PLR0917
        queries: Tensor,
        query_scale: Tensor,
        keys: Tensor,
        key_scale: Tensor,
        own_key: int | None,
        kernel: str,
        storage: torch.dtype,
        world_size: int,
    ) -> tuple[Tensor, Tensor]:
        attend = _implementation(kernel).attend
        stored = queries.to(storage)
        own = [keys.to(storage), key_scale]
        logsumexp = torch.full_like(query_scale, -math.inf)
        mean_key = torch.zeros_like(queries)
        for distance in range(world_size):
            some_keys, scale = swap(own, distance) if distance else own
            for view, (vectors, factor) in enumerate(zip(stored, query_scale, strict=True)):
                part, mean = attend(vectors, factor, some_keys, scale, None if distance else own_key)
                both = torch.logaddexp(logsumexp[view], part)
                so_far = (logsumexp[view] - both).exp().nan_to_num(0.0)  # -inf - -inf: nothing was to be seen yet
                mean_key[view].mul_(so_far[:, None]).add_(mean * (part - both).exp().nan_to_num(0.0)[:, None])
                logsumexp[view] = both
        return logsumexp, mean_key

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.own_key, ctx.kernel, ctx.storage, ctx.world_size = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _StreamedLogSumExp._gradients(ctx, grad)
        inputs = ctx.saved_tensors[:4]
        return *(None if g is None else streamed.once(g, grad, *inputs) for g in gradients), *[None] * 4

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, query_scale, keys, key_scale, logsumexp, mean_key = ctx.saved_tensors
        of_queries = mean_key * grad[..., None]
        of_query_scale = (of_queries * queries).sum(dim=-1)
        of_queries *= query_scale[..., None]
        if not any(ctx.needs_input_grad[2:4]):
            return of_queries, of_query_scale, None, None

        key_gradient = _implementation(ctx.kernel).key_gradient
        stored = queries.to(ctx.storage)
        own = [keys.to(ctx.storage), key_scale]
        of_keys = torch.zeros_like(keys)
        for distance in range(ctx.world_size):
            some_keys, scale = swap(own, distance) if distance else own
            of_these = torch.zeros_like(keys)
            for vectors, factor, total, upstream in zip(stored, query_scale, logsumexp, grad, strict=True):
                own_key = None if distance else ctx.own_key
                of_these += key_gradient(vectors, factor, some_keys, scale, own_key, total, upstream)
            # Home they go, while ours come from the rank that has had our keys.
            of_keys += swap([of_these], -distance)[0] if distance else of_these
        of_key_scale = (of_keys * keys).sum(dim=-1)
        of_keys *= key_scale[:, None]
        return of_queries, of_query_scale, of_keys, of_key_scale


def _implementation(kernel: str) -> ModuleType:
    if kernel == "streamed":
        return streamed
    from fmcib_ssl.losses import triton_kernels  # noqa: PLC0415  # triton is not installed everywhere

    return triton_kernels
