"""The product of a row with an unstructured sparse matrix, y = x Wᵀ: a bitmask and the values that are left, and the Triton kernel.

At 50 % this layout reads 10 of every 16 bytes of bf16, so 1.6x is the limit; the memory that it takes is 0.625 of dense. Leaves out who
calls it when.

**Layout** of W (out, in), in float16 or bfloat16. 32 neighbours along `in` are a word.

- `values` (kept,), dtype of W: every weight whose bits are not all zero, row by row.
- `codes` (out, words) int64: the lower half has a bit for each weight of the word that is kept; the upper half is where in `values` the
  first of them is.

**Why so.** Eight threads share a word, four weights each. A thread counts the bits below its own four (one instruction that is slow, so
one for four weights), which gives the place of its first value; the other three follow. The values of neighbouring threads are neighbours,
so the reads fall together though each is of two bytes. It takes about ten instructions a weight, as long as the reads: hence one row at a
time, and a gain that is far from the limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .decode_kernel import as_groups, check_matrix, current, high_half, low_half


MAX_ROWS = 4
TUNED_ROWS = (1,)
WORD = 32


class Schedule(NamedTuple):
    """How the kernel divides its work: what is tuned."""

    block_words: int = 32
    block_out: int = 2  # rows of W that share a read of x: 1, 2 or 4
    warps: int = 1

    @classmethod
    def candidates(cls, rows: int) -> Iterator[Schedule]:
        """Those worth timing: the fastest that an H100 showed for matrices of 576 to 28672."""
        for how in ((32, 2, 1), (32, 4, 1), (128, 2, 4)):
            yield cls(*how)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`values` and `codes` of a `weight` (out, in) in float16 or bfloat16, see the layout above.

    Raises:
        TypeError: another dtype.
        ValueError: no matrix, or 2^31 weights are kept.
    """
    check_matrix(weight)
    weight = weight.detach().contiguous()
    kept = weight.view(torch.int16) != 0
    words = functional.pad(kept, (0, -weight.shape[1] % WORD)).unflatten(1, (-1, WORD))
    counts = words.sum(-1)
    if (total := int(counts.sum())) >= 2**31:
        raise ValueError(f"{total} weights are kept, of at most {2**31 - 1}.")
    codes = torch.empty(*counts.shape, 2, dtype=torch.int32, device=weight.device)
    eights = words.unflatten(2, (-1, 8)).to(torch.uint8) << _eight(weight.device)
    codes[..., 0] = eights.sum(-1, dtype=torch.uint8).view(torch.int32)[..., 0]
    codes[..., 1] = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
    return weight[kept], codes.view(torch.int64)[..., 0]


def unpack(values: Tensor, codes: Tensor, in_features: int) -> Tensor:
    """The weight (out, in) that `pack` was given, equal bit for bit."""
    eights = codes.contiguous().view(torch.uint8).unflatten(1, (-1, 8))[..., : WORD // 8]
    kept = (eights[..., None] >> _eight(codes.device) & 1).flatten(1)[:, :in_features].bool()
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


def _eight(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def linear(
    x: Tensor, values: Tensor, codes: Tensor, how: Schedule, scales: None = None, trace: Callable[[Any], Any] | None = None
) -> Tensor:
    """x Wᵀ (rows, out) of `x` (rows, in), in the dtype of the packed W, which is read anew for each row; `trace` as of the 2:4 kernel."""
    rows, (out_features, words) = x.shape[0], codes.shape
    x = as_groups(x, values, bool(trace))
    if not trace and not rows:
        return x.new_empty(0, out_features)
    y = x.new_empty(rows, out_features, dtype=x.dtype if x.is_cuda else torch.float32)  # the interpreter does not round well
    with contextlib.nullcontext() if trace else current(x.device):
        (trace(_one_row) if trace else _one_row)[triton.cdiv(out_features, how.block_out), rows](
            x.view(torch.int64), values, codes, y, out_features, x.shape[1] // 4, words, BF16=x.dtype == torch.bfloat16,
            BLOCK_WORDS=how.block_words, BLOCK_OUT=how.block_out, NATIVE=x.is_cuda, num_warps=how.warps,
        )  # fmt: skip
    return y.to(values.dtype)


@triton.jit
def _bits_set(word, NATIVE: tl.constexpr):
    """Number of bits that are set in each int32."""
    if NATIVE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24) & 0xFF


@triton.jit
def _products(values, codes, out, out_features, word, words, x0, x1, x2, x3, NATIVE: tl.constexpr):
    """Of some words of row `out` of W with their x, four for each eighth of a word: (words, 8)."""
    code = tl.load(codes + out.to(tl.int64) * words + word, mask=word < tl.where(out < out_features, words, 0), other=0)
    bits = code.to(tl.int32)
    shift = 4 * tl.arange(0, 8)
    below = _bits_set(bits[:, None] & ((1 << shift) - 1)[None, :], NATIVE)
    value = values + ((code >> 32).to(tl.int32)[:, None] + below)
    four = bits[:, None] >> shift[None, :]
    here, next, third, last = four & 1, (four >> 1) & 1, (four >> 2) & 1, (four >> 3) & 1
    total = tl.load(value, mask=here != 0, other=0.0).to(tl.float32) * x0
    value += here
    total += tl.load(value, mask=next != 0, other=0.0).to(tl.float32) * x1
    value += next
    total += tl.load(value, mask=third != 0, other=0.0).to(tl.float32) * x2
    value += third
    return total + tl.load(value, mask=last != 0, other=0.0).to(tl.float32) * x3


@triton.jit
def _one_row(
    x, values, codes, y, out_features, groups, words: tl.constexpr,
    BF16: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_OUT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One row of x, int64 (rows, groups), with BLOCK_OUT of W -> y (rows, out)."""
    out = tl.program_id(0) * BLOCK_OUT
    x += tl.program_id(1) * groups
    a = tl.zeros((BLOCK_WORDS, 8), tl.float32)
    b, c, d = a, a, a
    for start in range(0, words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        group = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        quad = tl.load(x + group, mask=group < groups, other=0)
        left, right = quad.to(tl.int32), (quad >> 32).to(tl.int32)
        x0, x1, x2, x3 = low_half(left, BF16), high_half(left, BF16), low_half(right, BF16), high_half(right, BF16)
        a += _products(values, codes, out, out_features, word, words, x0, x1, x2, x3, NATIVE)
        if BLOCK_OUT > 1:
            b += _products(values, codes, out + 1, out_features, word, words, x0, x1, x2, x3, NATIVE)
        if BLOCK_OUT > 2:
            c += _products(values, codes, out + 2, out_features, word, words, x0, x1, x2, x3, NATIVE)
            d += _products(values, codes, out + 3, out_features, word, words, x0, x1, x2, x3, NATIVE)
    y += tl.program_id(1) * out_features + out
    tl.store(y, tl.sum(tl.sum(a, 1), 0).to(y.dtype.element_ty))
    if BLOCK_OUT > 1:
        tl.store(y + 1, tl.sum(tl.sum(b, 1), 0).to(y.dtype.element_ty), mask=out + 1 < out_features)
    if BLOCK_OUT > 2:
        tl.store(y + 2, tl.sum(tl.sum(c, 1), 0).to(y.dtype.element_ty), mask=out + 2 < out_features)
        tl.store(y + 3, tl.sum(tl.sum(d, 1), 0).to(y.dtype.element_ty), mask=out + 3 < out_features)
