"""Numbers of 8 bits, int8 or float8_e4m3fn, for 2:4 products: symmetric, so a zero stays a zero; weights by row, activations by token.

w ≈ s q with s = max |w| / 127 of each row (of int8; 448 of float8). A product of many rows quantises x the same way, token by token as it
comes, multiplies 8 bits with 8 bits and scales the result: y = s_x s_w (q_x q_wᵀ) + bias. On a GPU each of the two steps around the product is
one kernel here, which reads once and writes once. A row that is not finite comes out as NaN. Leaves out the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .decode_kernel import current


MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TOLERANCE = {torch.int8: 0.05, torch.float8_e4m3fn: 0.1}  # of the largest output, from quantised activations
BLOCK = 1024


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` (rows, columns) as q (rows, columns) in `dtype`, one of int8 and float8_e4m3fn, and s (rows,) float32 with x ≈ s q.

    Rows of zeros have s = 1.
    """
    most = x.abs().amax(-1, keepdim=True).float() / MOST[dtype]
    scales = torch.where(most == 0, 1.0, most)
    q = x.float() / scales
    return ((q + 0.5).floor() if dtype == torch.int8 else q).to(dtype), scales[:, 0]


def dequantised(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """s q, in `dtype`."""
    return (q.float() * scales[:, None]).to(dtype)


def quantised_tokens(x: Tensor, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    """The same of activations, to so many `rows`: those past x are zeros."""
    if not x.is_cuda:
        return quantised(functional.pad(x, (0, 0, 0, rows - len(x))), dtype)
    x = x.contiguous()
    q, scales = x.new_empty(rows, x.shape[1], dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    with current(x.device):
        _quantise[rows,](
            x, q, scales, len(x), x.shape[1], MOST=MOST[dtype], WHOLE=dtype == torch.int8, BLOCK=BLOCK, num_warps=4
        )
    return q, scales


def rescaled(y: Tensor, of_rows: Tensor, of_columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y (rows, columns) times `of_rows` (rows,) and `of_columns` (columns,), plus `bias` (columns,), in `dtype`."""
    if not y.is_cuda:
        y = y.float() * of_rows[:, None] * of_columns
        return (y if bias is None else y + bias).to(dtype)
    out, grid = torch.empty_like(y, dtype=dtype), (len(y), triton.cdiv(y.shape[1], BLOCK))
    with current(y.device):
        _rescale[grid](y, of_rows, of_columns, of_columns if bias is None else bias, out, y.shape[1], bias is not None, BLOCK)
    return out


@triton.jit(do_not_specialize=["rows"])
def _quantise(x, q, scales, rows, columns, MOST: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """One row of x: its largest magnitude, then all of it again, which is still in the cache."""
    row = tl.program_id(0).to(tl.int64) * columns
    there = tl.where(tl.program_id(0) < rows, columns, 0)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(x + row + column, mask=column < there, other=0.0).to(tl.float32))
        most = tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.max(most, 0) / MOST + tl.sum(most - most, 0)  # NaN if one is not finite
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales + tl.program_id(0), scale)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + column, mask=column < there, other=0.0).to(tl.float32) / scale
        if WHOLE:
            value = tl.floor(value + 0.5)
        tl.store(q + row + column, value.to(q.dtype.element_ty), mask=column < columns)


@triton.jit
def _rescale(y, of_rows, of_columns, bias, out, columns, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * columns + column
    value = tl.load(y + place, mask=column < columns, other=0.0).to(tl.float32) * tl.load(of_rows + tl.program_id(0))
    value *= tl.load(of_columns + column, mask=column < columns, other=0.0)
    if BIAS:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=column < columns)
