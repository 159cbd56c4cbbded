"""The product of a few rows with a 2:4 matrix, y = x Wᵀ for 1 to 16 rows: a layout that is read once, and the Triton kernel that does.

Decoding is bound by the bytes of the weights. Of every four weights (8 bytes in bf16) this layout reads 4.5 bytes, so 1.78x is the
limit; the sparse tensor cores' libraries are made for many rows and are slower than dense at one. Leaves out who calls it when.

**Layout** of W (out, in), in float16 or bfloat16. Four neighbours along `in` are a group; `in` is padded to whole groups.

- `values` (out, 2 * groups), dtype of W: the two weights of each group, in order. The kernel reads them as one int32 a group.
- `codes` (out, words) int32: four bits a group. The lower two are the position (0 to 2) of the first weight, the upper two that of the
  second (1 to 3), less one, so each comparison is the test of one bit. A word holds eight groups, not neighbours but `words` apart: lane k
  (bits 4k to 4k + 3) of word w belongs to group k * words + w. `words` is ceil(groups / 8), rounded up to a multiple of four.

That is 2.25 bytes for each kept weight, 1.125 a weight, 0.5625 of dense. A group with fewer than two non-zeros stores zeros of its own.

**Why so.** No index is ever used as an address. A thread holds one int32 of codes and walks its eight lanes; for each it reads one int32
of values and eight bytes of x (the whole group), and selects in registers. All reads are contiguous along `in`, 16 bytes a thread.
One to four rows are multiplied with the weights by pairs, each by the x that its code selects. More rows build the dense tile of a lane
(its zeros too) and give it to the tensor cores with the same columns of x. Sums are fp32. Narrow matrices split `in` over programs,
each of which writes its own sums, so the result does not depend on their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


MAX_ROWS = 16
TUNED_ROWS = (1, 2, 4, MAX_ROWS)
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Schedule(NamedTuple):
    """How the kernel divides its work: what is tuned."""

    block_out: int = 16
    block_words: int = 16
    splits: int = 1  # programs that share the words of a row
    rows: int = 1  # of x that a program takes: 1, 2 or 4; or 16, by the tensor cores
    warps: int = 4
    stages: int = 1  # of loads in flight, for the tensor cores

    @classmethod
    def candidates(cls, rows: int) -> Iterator[Schedule]:
        """Those worth timing for so many rows: the fastest that an H100 showed for matrices of 4096 to 14336."""
        tiles = {1: ((1, 32, 1), (1, 64, 1), (1, 128, 2)), 2: ((8, 64, 4), (8, 64, 8)), 4: ((2, 64, 1), (8, 64, 8))}
        for block_out, block_words, warps in tiles.get(rows, ()):
            yield cls(block_out, block_words, 1, rows, warps)
        if rows > 2:
            yield cls(16, 32, 4, MAX_ROWS, 2, 3)
            yield cls(16, 32, 1, MAX_ROWS, 2, 3)


def is_semi_structured(weight: Tensor) -> bool:
    """Whether no four neighbours along `in` of `weight` (out, in) have more than two whose bits are not all zero.

    -0.0 counts as a weight: it could not be given back otherwise.
    """
    return bool((_groups(weight).view(torch.int16) != 0).sum(-1).max() <= 2)


def check_matrix(weight: Tensor) -> None:
    """Raises ValueError or TypeError for what cannot be packed, whatever its zeros."""
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"the packed layout is of a matrix (out, in), got shape {tuple(weight.shape)}.")
    if weight.dtype not in DTYPES:
        raise TypeError(f"the packed layout holds float16 or bfloat16, got {weight.dtype}: convert the model first.")


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`values` and `codes` of a 2:4 `weight` (out, in) in float16 or bfloat16, see the layout above.

    Raises:
        TypeError: another dtype.
        ValueError: more than two weights in a group of four, or no matrix.
    """
    check_matrix(weight)
    quads = _groups(weight)
    kept = (quads.view(torch.int16) != 0).to(torch.int32)
    if kept.sum(-1).max() > 2:
        raise ValueError("the weight is not 2:4: more than two of four neighbours along `in` are not zero.")
    nibbles = _nibbles().to(weight.device)[kept[..., 0] | kept[..., 1] << 1 | kept[..., 2] << 2 | kept[..., 3] << 3]
    values = quads.gather(-1, _positions(nibbles)).flatten(1)
    words = words_of(weight.shape[1])
    lanes = functional.pad(nibbles, (0, 8 * words - nibbles.shape[1])).view(-1, 8, words)
    codes = torch.zeros_like(lanes[:, 0])
    for lane in range(8):
        codes |= lanes[:, lane] << 4 * lane
    return values, codes


def unpack(values: Tensor, codes: Tensor, in_features: int) -> Tensor:
    """The weight (out, in) that `pack` was given, equal bit for bit."""
    pairs = values.unflatten(1, (-1, 2))
    nibbles = torch.stack([codes >> 4 * lane & 15 for lane in range(8)], 1).flatten(1)[:, : pairs.shape[1]]
    quads = values.new_zeros(*pairs.shape[:2], 4).scatter_(-1, _positions(nibbles), pairs)
    return quads.flatten(1)[:, :in_features].contiguous()


def words_of(in_features: int) -> int:
    """Number of int32 of codes in a row."""
    return -(-in_features // 128) * 4


def _nibbles() -> Tensor:
    """For each of the 16 ways in which a group can be kept, its code; zeros fill in where fewer than two are."""
    codes = []
    for way in range(16):
        first, second = sorted(sorted(range(4), key=lambda place: ~way >> place & 1)[:2])  # sorted is stable: kept ones first
        codes.append(first | second - 1 << 2)
    return torch.tensor(codes, dtype=torch.int32)


def _positions(nibbles: Tensor) -> Tensor:
    """The places (..., 2) in their groups that codes stand for."""
    return torch.stack([nibbles & 3, (nibbles >> 2) + 1], -1).long()


def _groups(weight: Tensor) -> Tensor:
    """(out, groups, 4), padded with zeros."""
    return functional.pad(weight.detach(), (0, -weight.shape[1] % 4)).contiguous().unflatten(1, (-1, 4))


def linear(x: Tensor, values: Tensor, codes: Tensor, how: Schedule) -> Tensor:
    """x Wᵀ (rows, out) of `x` (rows, in), in the dtype of the packed W."""
    rows, (out_features, words) = len(x), codes.shape
    if not rows:
        return x.new_empty(0, out_features)
    x = as_groups(x, values)
    # On the CPU it is the interpreter that runs: its dot takes bfloat16 for integers, and its rounding to it is not quite right.
    operand = DTYPES[x.dtype] if x.is_cuda else tl.float32
    y = x.new_empty(how.splits, rows, out_features, dtype=x.dtype if x.is_cuda and how.splits == 1 else torch.float32)
    grid = (triton.cdiv(out_features, how.block_out), how.splits, triton.cdiv(rows, how.rows))
    kernel, x = (_many_rows, x) if how.rows == MAX_ROWS else (_few_rows, x.view(torch.int64))
    with current(x.device):
        kernel[grid](
            x, values.view(torch.int32), codes, y, rows, out_features, values.shape[1] // 2, words, triton.cdiv(words, 4 * how.splits) * 4,
            DTYPE=DTYPES[values.dtype], OPERAND=operand, BLOCK_OUT=how.block_out, BLOCK_WORDS=how.block_words, ROWS=how.rows,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return (y[0] if how.splits == 1 else y.sum(0)).to(values.dtype)


def as_groups(x: Tensor, values: Tensor) -> Tensor:
    """`x` (rows, in) as the kernels read it, in aligned groups of four, for a packed weight with such `values`.

    Raises:
        TypeError: not of the same dtype.
    """
    if x.dtype != values.dtype:
        raise TypeError(f"the packed weight is {values.dtype}, its input {x.dtype}: convert the input.")
    x = (functional.pad(x, (0, -x.shape[1] % 4)) if x.shape[1] % 4 else x).contiguous()
    return x if x.data_ptr() % 8 == 0 else x.clone()


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Where Triton launches on `device`."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


@triton.jit
def _half(bits, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """The 16-bit float that begins at bit SHIFT of each integer."""
    return ((bits >> SHIFT) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _of_lane(values, code, lane, outs, word, inside_out, inside_word, out_stride, words, DTYPE: tl.constexpr):
    """What a tile of one lane of words says: the groups and which of them there are, their two weights, and the bits of their places."""
    group = lane * words + word
    inside = inside_word & (group < out_stride)
    pair = tl.load(values + outs[:, None] * out_stride + group[None, :], mask=inside_out & inside[None, :], other=0)
    bits = code >> 4 * lane
    # The first weight's place is 0, 1 or 2, the second's 1, 2 or 3: each test says that it is not the lowest.
    one, two, then_two, then_three = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    return group, inside, _half(pair, 0, DTYPE), _half(pair, 16, DTYPE), one, two, then_two, then_three


@triton.jit
def _dot(quad, first, second, one, two, then_two, then_three, DTYPE: tl.constexpr):
    """The products of the two weights of each group (out, words) with those of its four x, `quad` int64 (words,), that they belong to."""
    x0, x1 = _half(quad, 0, DTYPE)[None, :], _half(quad, 16, DTYPE)[None, :]
    x2, x3 = _half(quad, 32, DTYPE)[None, :], _half(quad, 48, DTYPE)[None, :]
    left = first.to(tl.float32) * tl.where(two, x2, tl.where(one, x1, x0)).to(tl.float32)
    return left + second.to(tl.float32) * tl.where(then_three, x3, tl.where(then_two, x2, x1)).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x, values, codes, y, rows, out_features, groups, words: tl.constexpr, split: tl.constexpr,
    DTYPE: tl.constexpr, OPERAND: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of x as int64 (rows, groups), values as int32 (out, groups), codes (out, words) -> y (splits, rows, out).

    Compiled for each `words`: a loop whose length is known is worth a tenth of the time.
    """
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside_out = outs[:, None] < out_features
    begin, row = tl.program_id(1) * split, tl.program_id(2) * ROWS
    x += row * groups
    last = rows - 1 - row  # rows past it are read as this one, and not written
    a = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    b, c, d = a, a, a
    for start in range(begin, begin + split, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside_word = (word < begin + split) & (word < words)
        code = tl.load(codes + outs[:, None] * words + word[None, :], mask=inside_out & inside_word[None, :], other=0)
        for lane in tl.static_range(8):
            group, inside, first, second, one, two, then_two, then_three = _of_lane(
                values, code, lane, outs, word, inside_out, inside_word, groups, words, DTYPE
            )
            quad = tl.load(x + group, mask=inside, other=0)
            a += _dot(quad, first, second, one, two, then_two, then_three, DTYPE)
            if ROWS > 1:
                quad = tl.load(x + tl.minimum(1, last) * groups + group, mask=inside, other=0)
                b += _dot(quad, first, second, one, two, then_two, then_three, DTYPE)
            if ROWS > 2:
                quad = tl.load(x + tl.minimum(2, last) * groups + group, mask=inside, other=0)
                c += _dot(quad, first, second, one, two, then_two, then_three, DTYPE)
                quad = tl.load(x + tl.minimum(3, last) * groups + group, mask=inside, other=0)
                d += _dot(quad, first, second, one, two, then_two, then_three, DTYPE)
    y += (tl.program_id(1) * rows + row) * out_features + outs
    left = tl.where(outs < out_features, last, -1)
    tl.store(y, tl.sum(a, 1).to(y.dtype.element_ty), mask=left >= 0)
    if ROWS > 1:
        tl.store(y + out_features, tl.sum(b, 1).to(y.dtype.element_ty), mask=left >= 1)
    if ROWS > 2:
        tl.store(y + 2 * out_features, tl.sum(c, 1).to(y.dtype.element_ty), mask=left >= 2)
        tl.store(y + 3 * out_features, tl.sum(d, 1).to(y.dtype.element_ty), mask=left >= 3)


@triton.jit(do_not_specialize=["rows"])
def _many_rows(
    x, values, codes, y, rows, out_features, groups, words: tl.constexpr, split: tl.constexpr,
    DTYPE: tl.constexpr, OPERAND: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same of x (rows, 4 * groups) by the tensor cores."""
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside_out = outs[:, None] < out_features
    begin = tl.program_id(1) * split
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
    for start in range(begin, begin + split, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside_word = (word < begin + split) & (word < words)
        code = tl.load(codes + outs[:, None] * words + word[None, :], mask=inside_out & inside_word[None, :], other=0)
        column = 4 * start + tl.arange(0, 4 * BLOCK_WORDS)
        inside_column = (column < 4 * (begin + split)) & (column < 4 * words)
        for lane in range(8):
            group, inside, first, second, one, two, then_two, then_three = _of_lane(
                values, code, lane, outs, word, inside_out, inside_word, groups, words, DTYPE
            )
            none = tl.zeros_like(first)
            w0 = tl.where(one | two, none, first)
            w1 = tl.where(one, first, tl.where(then_two | then_three, none, second))
            w2 = tl.where(two, first, tl.where(then_two, second, none))
            w3 = tl.where(then_three, second, none)
            w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape((BLOCK_OUT, 4 * BLOCK_WORDS))
            place = column + 4 * lane * words
            inside_x = (row[:, None] < rows) & (inside_column & (place < 4 * groups))[None, :]
            quads = tl.load(x + row[:, None] * (4 * groups) + place[None, :], mask=inside_x, other=0.0)
            total = tl.dot(quads.to(OPERAND), tl.trans(w).to(OPERAND), total)
    y += tl.program_id(1) * rows * out_features
    inside_y = (row[:, None] < rows) & (outs[None, :] < out_features)
    tl.store(y + row[:, None] * out_features + outs[None, :], total.to(y.dtype.element_ty), mask=inside_y)
