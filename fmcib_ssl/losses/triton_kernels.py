"""The contrast kernel for GPUs, in Triton: `attend` and `key_gradient` as in `streamed`, without ever storing a logit.

Both are one sweep: a block of rows stays on the chip while all columns pass by; a tile of logits lives in registers
only. In `attend` the rows are queries and the sums are not known yet, so a running maximum is kept and what has been
summed is scaled when it moves (as in flash attention, whose values are here the keys). In `key_gradient` the rows are
keys, and the queries that pass by know their sums. Nothing is accumulated by atomics: results do not vary between runs.

bf16 vectors go to the tensor cores as they are, and their scale (length, temperature) is applied to the float32
product: only the weights of the second product are rounded to bf16. float32 vectors use three TF32 products for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = math.log2(math.e)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    rows_ptr,
    row_scale_ptr,
    columns_ptr,
    column_scale_ptr,  # with the factor to base 2
    column_weight_ptr,
    column_shift_ptr,  # read if not RUNNING
    sums_ptr,  # (num_rows, dim) float32: weighted sums of the columns' vectors
    logs_ptr,  # (num_rows,) logarithms to base 2 of the sums of exponentials, written if RUNNING
    num_rows,
    num_columns,
    dim,
    own,  # column `row + own` is left out, if HAS_OWN
    RUNNING: tl.constexpr,  # noqa: N803
    HAS_OWN: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # a vector fits BLOCK_DIM == BLOCK_OUT  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_COLUMNS: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
    BLOCK_OUT: tl.constexpr,  # noqa: N803
    OPERAND: tl.constexpr,  # what is multiplied: the vectors' dtype, but float32 in the interpreter  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_exists = rows < num_rows
    row_start = rows.to(tl.int64)[:, None] * dim
    row_scale = tl.load(row_scale_ptr + rows, mask=row_exists, other=0.0)[:, None]
    dims = tl.arange(0, BLOCK_DIM)
    out_dims = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    if WHOLE:
        row_vectors = tl.load(rows_ptr + row_start + dims, mask=row_exists[:, None] & (dims < dim), other=0.0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    maximum = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)

    for first in range(0, num_columns, BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        exists = columns < num_columns
        column_start = columns.to(tl.int64)[:, None] * dim
        if WHOLE:
            vectors = tl.load(columns_ptr + column_start + dims, mask=exists[:, None] & (dims < dim), other=0.0)
            logits = tl.dot(row_vectors.to(OPERAND), tl.trans(vectors.to(OPERAND)), input_precision=PRECISION)
        else:
            logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for offset in range(0, dim, BLOCK_DIM):
                inside = offset + dims < dim
                a = tl.load(rows_ptr + row_start + offset + dims, mask=row_exists[:, None] & inside, other=0.0)
                b = tl.load(columns_ptr + column_start + offset + dims, mask=exists[:, None] & inside, other=0.0)
                logits = tl.dot(a.to(OPERAND), tl.trans(b.to(OPERAND)), logits, input_precision=PRECISION)
            vectors = tl.load(columns_ptr + column_start + out_dims, mask=exists[:, None] & (out_dims < dim), other=0.0)
        column_scale = tl.load(column_scale_ptr + columns, mask=exists, other=0.0)
        logits = logits * row_scale * column_scale[None, :]
        seen = exists[None, :]
        if HAS_OWN:
            seen = seen & (columns[None, :] != rows[:, None] + own)
        logits = tl.where(seen, logits, -float("inf"))

        if RUNNING:
            higher = tl.maximum(maximum, tl.max(logits, 1))
            shift = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
            weights = tl.exp2(logits - shift[:, None])
            rescale = tl.exp2(maximum - shift)
            total = total * rescale + tl.sum(weights, 1)
            sums = sums * rescale[:, None]
            maximum = higher
        else:
            shift = tl.load(column_shift_ptr + columns, mask=exists, other=0.0)
            weights = tl.exp2(logits - shift[None, :])
        weights *= tl.load(column_weight_ptr + columns, mask=exists, other=0.0)[None, :]
        sums = tl.dot(weights.to(OPERAND), vectors.to(OPERAND), sums, input_precision=PRECISION)

    if RUNNING:
        sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        if tl.program_id(1) == 0:
            tl.store(logs_ptr + rows, maximum + tl.log2(total), mask=row_exists)
    tl.store(sums_ptr + row_start + out_dims, sums, mask=row_exists[:, None] & (out_dims < dim))


@dataclass(frozen=True)
class _Blocks:
    """How a sweep is cut. A vector of more than `whole` elements is read in pieces, and summed in slices."""

    rows: int
    columns: int
    dim: int
    out: int
    whole: bool

    @classmethod
    def choose(cls, dim: int, dtype: torch.dtype) -> _Blocks:
        """Blocks that fit 99 KiB of shared memory (the smallest of the cards since Ampere) twice buffered."""
        half = dtype == torch.bfloat16
        if dim <= (256 if half else 128):
            block = max(16, triton.next_power_of_2(dim))
            return cls(rows=128 if half and block <= 128 else 64, columns=64 if half and block <= 128 else 32,
                       dim=block, out=block, whole=True)  # fmt: skip
        return cls(rows=64, columns=64 if half else 32, dim=64 if half else 32, out=256 if half else 128, whole=False)


def _launch(  # noqa: PLR0917
    rows: Tensor,
    row_scale: Tensor,
    columns: Tensor,
    column_scale: Tensor,
    column_weight: Tensor,
    column_shift: Tensor | None,
    own: int | None,
) -> tuple[Tensor, Tensor]:
    num_rows, dim = rows.shape
    rows, columns = rows.contiguous(), columns.contiguous()
    sums = torch.empty(num_rows, dim, dtype=torch.float32, device=rows.device)
    logs = torch.empty(num_rows, dtype=torch.float32, device=rows.device)
    blocks = _Blocks.choose(dim, rows.dtype)
    interpreted = rows.device.type == "cpu"  # NumPy underneath knows no bf16
    has_tf32 = interpreted or (torch.version.hip is None and torch.cuda.get_device_capability(rows.device) >= (8, 0))
    grid = (triton.cdiv(num_rows, blocks.rows), triton.cdiv(dim, blocks.out))
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        _sweep[grid](
            rows,
            row_scale.contiguous(),
            columns,
            column_scale.contiguous() * _LOG2_E,
            column_weight.contiguous(),
            logs if column_shift is None else column_shift.contiguous(),
            sums,
            logs,
            num_rows,
            len(columns),
            dim,
            own or 0,
            RUNNING=column_shift is None,
            HAS_OWN=own is not None,
            WHOLE=blocks.whole,
            BLOCK_ROWS=blocks.rows,
            BLOCK_COLUMNS=blocks.columns,
            BLOCK_DIM=blocks.dim,
            BLOCK_OUT=blocks.out,
            OPERAND=tl.bfloat16 if rows.dtype == torch.bfloat16 and not interpreted else tl.float32,
            PRECISION="tf32x3" if has_tf32 else "ieee",
            num_warps=8 if blocks.rows == 128 or not blocks.whole else 4,
            num_stages=2,
        )
    return sums, logs


@torch.library.custom_op("fmcib_ssl::triton_attend", mutates_args=())
def attend(
    queries: Tensor, query_scale: Tensor, keys: Tensor, key_scale: Tensor, own_key: int | None
) -> tuple[Tensor, Tensor]:
    """As `streamed.attend`; the vectors are float32 or bf16, the scales and both results float32."""
    mean_key, log2_sum = _launch(queries, query_scale, keys, key_scale, key_scale, None, own_key)
    return log2_sum / _LOG2_E, mean_key


@torch.library.custom_op("fmcib_ssl::triton_key_gradient", mutates_args=())
def key_gradient(  # noqa: PLR0917
    queries: Tensor,
    query_scale: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    own_key: int | None,
    logsumexp: Tensor,
    grad: Tensor,
) -> Tensor:
    """As `streamed.key_gradient`; the vectors are float32 or bf16, everything else float32."""
    shift = (logsumexp * _LOG2_E).clamp_min(torch.finfo(torch.float32).min)
    own_query = None if own_key is None else -own_key
    return _launch(keys, key_scale, queries, query_scale, grad * query_scale, shift, own_query)[0]


attend.register_fake(
    lambda queries, query_scale, keys, key_scale, own_key: (
        torch.empty_like(query_scale),
        torch.empty_like(queries, dtype=torch.float32),
    )
)
key_gradient.register_fake(lambda queries, query_scale, keys, *_: torch.empty_like(keys, dtype=torch.float32))
