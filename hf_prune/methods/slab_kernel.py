"""One slab of SparseGPT on a GPU, in one launch: columns are chosen, pruned and compensated without leaving the registers.

A program holds all columns of a slab for a few rows of W, which need nothing of one another. What is chosen is what
`patterns.NM.better` chooses. Leaves out what comes before the slab, and how unstructured masks are found.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


MOST_COLUMNS = 256  # of a slab
_ROWS = 32  # of a program


def solve_slab(
    slab: Tensor, decay: Tensor, gone: Tensor, curvature: Tensor, dropped: Tensor | None = None, nm: tuple[int, int] = (0, 0)
) -> None:
    """Prunes `slab` (columns, rows) fp32, W^T compensated for what came before, in place.

    Args:
        decay: (columns, columns) fp32, [j, i] is what column j takes over of a change of column i.
        gone: (columns, rows) fp32, 1 where a weight goes; filled in if `nm` (N, M) is given.
        curvature: (columns,) fp32.
        dropped: (columns, rows) bool, weights that went before: they go first.
    """
    size, rows = slab.shape
    assert size <= MOST_COLUMNS and slab.is_contiguous() and gone.is_contiguous() and decay.stride(1) == 1
    with torch.cuda.device(slab.device) if slab.is_cuda else contextlib.nullcontext():
        _slab[(triton.cdiv(rows, _ROWS),)](
            slab, decay, gone, curvature, slab if dropped is None else dropped.view(torch.int8), size, rows, decay.stride(0),
            N=nm[0], M=nm[1], DROPPED=dropped is not None, SIZE=triton.next_power_of_2(size), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip


@triton.jit
def _column(tile, at, i):
    """Column `i` of a `tile` (SIZE, ROWS) whose columns are numbered by `at` (SIZE, 1)."""
    return tl.sum(tl.where(at == i, tile, 0.0), 0)


@triton.jit
def _slab(
    slab, decay, gone, curvature, dropped, size, rows, stride,
    N: tl.constexpr, M: tl.constexpr, DROPPED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SIZE)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    place, inside = at * rows + row, (at < size) & (row < rows)
    w = tl.load(slab + place, mask=inside, other=0.0)
    if M:
        goes = tl.zeros((SIZE, ROWS), tl.float32)
        curve = tl.load(curvature + at, mask=at < size, other=0.0)
        if DROPPED:
            before = tl.load(dropped + place, mask=inside, other=0) != 0
    else:
        goes = tl.load(gone + place, mask=inside, other=0.0)
    for i in range(size):
        if M:
            if i % M == 0:
                scores = w * w * curve
                if DROPPED:
                    scores = tl.where(before, -float("inf"), scores)
                better = tl.zeros((SIZE, ROWS), tl.float32)
                for j in range(i, i + M):
                    rival = _column(scores, at, j)[None, :]
                    better += ((rival > scores) | ((rival == scores) & (at < j))).to(tl.float32)
                chosen = better >= N
                if DROPPED:
                    chosen = chosen | before
                goes = tl.where((at >= i) & (at < i + M), chosen.to(tl.float32), goes)
        change = _column(tl.where(goes != 0.0, w, 0.0), at, i)[None, :]
        taken = tl.load(decay + at * stride + i, mask=(at > i) & (at < size), other=0.0)
        w -= taken * change
    tl.store(slab + place, tl.where(goes != 0.0, 0.0, w), mask=inside)
    if M:
        tl.store(gone + place, goes, mask=inside)
