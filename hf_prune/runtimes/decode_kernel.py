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
One row multiplies the selected x; more rows build the four columns of each group (their zeros too) and give them to the tensor cores as
four products, the operand of the p-th being every fourth x: nothing is interleaved. Sums are fp32. Narrow matrices split `in`
over programs, each of which writes its own sums, so the result does not depend on their order.
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
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Schedule(NamedTuple):
    """How the kernel divides its work: what is tuned."""

    block_out: int = 16
    block_words: int = 16
    splits: int = 1  # programs that share the words of a row
    tensor_cores: int = 1  # 16 rows at once; otherwise a program a row
    warps: int = 4

    @classmethod
    def candidates(cls, rows: int) -> Iterator[Schedule]:
        """Those worth timing on a GPU for so many rows."""
        # Tiles whose x needs no exchange between threads: a row of W a warp, or threads that hold like columns of several rows.
        for block_out, block_words, warps in ((1, 128, 1), (8, 32, 2), (16, 32, 4), (16, 64, 4)) if rows <= 2 else ():
            yield from (cls(block_out, block_words, splits, 0, warps) for splits in (1, 4))
        for block_out, block_words, warps in ((16, 16, 1), (16, 32, 2), (64, 32, 4)):
            yield from (cls(block_out, block_words, splits, 1, warps) for splits in (1, 4))


def is_semi_structured(weight: Tensor) -> bool:
    """Whether no four neighbours along `in` of `weight` (out, in) have more than two whose bits are not all zero.

    -0.0 counts as a weight: it could not be given back otherwise.
    """
    return bool((_groups(weight).view(torch.int16) != 0).sum(-1).max() <= 2)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`values` and `codes` of a 2:4 `weight` (out, in) in float16 or bfloat16, see the layout above.

    Raises:
        TypeError: another dtype.
        ValueError: more than two weights in a group of four, or no matrix.
    """
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"the packed layout is of a matrix (out, in), got shape {tuple(weight.shape)}.")
    if weight.dtype not in DTYPES:
        raise TypeError(f"the packed layout holds float16 or bfloat16, got {weight.dtype}: convert the model first.")
    if not is_semi_structured(weight):
        raise ValueError("the weight is not 2:4: more than two of four neighbours along `in` are not zero.")
    quads = _groups(weight)
    kept = (quads.view(torch.int16) != 0).to(torch.int32)
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


@torch.library.custom_op("hf_prune::sparse24_linear", mutates_args=())
def sparse24_linear(x: Tensor, values: Tensor, codes: Tensor, schedule: list[int]) -> Tensor:
    """x Wᵀ (rows, out) of `x` (rows, in), in the dtype of the packed W; `schedule` is a `Schedule`."""
    if x.dtype != values.dtype:
        raise TypeError(f"the packed weight is {values.dtype}, its input {x.dtype}: convert the input.")
    how = Schedule(*schedule)
    (rows, in_features), (out_features, words) = x.shape, codes.shape
    if not rows:
        return x.new_empty(0, out_features)
    x = functional.pad(x, (0, -in_features % 4)).contiguous()
    x = x if x.data_ptr() % 8 == 0 else x.clone()  # the kernel reads groups of eight bytes
    pairs = values.view(torch.int32)
    # On the CPU it is the interpreter that runs: its dot takes bfloat16 for integers, and its rounding to it is not quite right.
    operand = DTYPES[x.dtype] if x.is_cuda else tl.float32
    y = x.new_empty(how.splits, rows, out_features, dtype=x.dtype if x.is_cuda and how.splits == 1 else torch.float32)
    grid = (triton.cdiv(out_features, how.block_out), how.splits, triton.cdiv(rows, MAX_ROWS) if how.tensor_cores else rows)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _sparse24_linear[grid](
            x.view(torch.int64), pairs, codes, y, rows, out_features, pairs.shape[1],
            WORDS=words, SPLIT=triton.cdiv(words, how.splits), DTYPE=DTYPES[x.dtype], OPERAND=operand, BLOCK_OUT=how.block_out,
            BLOCK_WORDS=how.block_words, TENSOR_CORES=bool(how.tensor_cores), ROWS=MAX_ROWS, num_warps=how.warps,
            num_stages=1,  # the eight lanes are loads enough in flight; stages would take 100 KiB of shared memory
        )  # fmt: skip
    return (y[0] if how.splits == 1 else y.sum(0)).to(x.dtype)


@sparse24_linear.register_fake
def _(x: Tensor, values: Tensor, codes: Tensor, schedule: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])
    ctx.in_features = inputs[0].shape[1]


def _backward(ctx, gradient: Tensor):
    """Of x alone: the packed weight takes none. A model that is compiled outside of `no_grad` asks for it."""
    return gradient @ unpack(*ctx.saved_tensors, ctx.in_features), None, None, None


sparse24_linear.register_autograd(_backward, setup_context=_keep_for_backward)


@triton.jit
def _half(bits, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """The 16-bit float that begins at bit SHIFT of each integer."""
    return ((bits >> SHIFT) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _sparse24_linear(
    x, values, codes, y, rows, out_features, groups,
    WORDS: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, OPERAND: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, TENSOR_CORES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of x as int64 (rows, groups), values as int32 (out, groups), codes (out, WORDS) -> y (splits, rows, out)."""
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside_out = outs[:, None] < out_features
    begin = tl.program_id(1) * SPLIT
    if TENSOR_CORES:
        row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    else:
        row = tl.program_id(2)
        total = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    for start in range(begin, begin + SPLIT, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside_word = (word < begin + SPLIT) & (word < WORDS)
        code = tl.load(codes + outs[:, None] * WORDS + word[None, :], mask=inside_out & inside_word[None, :], other=0)
        for lane in tl.static_range(8):
            group = lane * WORDS + word
            inside = inside_word & (group < groups)
            pair = tl.load(values + outs[:, None] * groups + group[None, :], mask=inside_out & inside[None, :], other=0)
            first, second = _half(pair, 0, DTYPE), _half(pair, 16, DTYPE)
            bits = code >> 4 * lane
            one, two = (bits & 1) != 0, (bits & 2) != 0  # the first weight's place, else 0
            then_two, then_three = (bits & 4) != 0, (bits & 8) != 0  # the second's, else 1
            if TENSOR_CORES:
                quad = tl.load(
                    x + row[None, :] * groups + group[:, None], mask=inside[:, None] & (row[None, :] < rows), other=0
                )
                none = tl.zeros_like(first)
                w0 = tl.where(one | two, none, first)
                w1 = tl.where(one, first, tl.where(then_two | then_three, none, second))
                w2 = tl.where(two, first, tl.where(then_two, second, none))
                w3 = tl.where(then_three, second, none)
                total = tl.dot(w0.to(OPERAND), _half(quad, 0, DTYPE).to(OPERAND), total)
                total = tl.dot(w1.to(OPERAND), _half(quad, 16, DTYPE).to(OPERAND), total)
                total = tl.dot(w2.to(OPERAND), _half(quad, 32, DTYPE).to(OPERAND), total)
                total = tl.dot(w3.to(OPERAND), _half(quad, 48, DTYPE).to(OPERAND), total)
            else:
                quad = tl.load(x + row * groups + group, mask=inside, other=0)
                x0, x1 = _half(quad, 0, DTYPE)[None, :], _half(quad, 16, DTYPE)[None, :]
                x2, x3 = _half(quad, 32, DTYPE)[None, :], _half(quad, 48, DTYPE)[None, :]
                total += first.to(tl.float32) * tl.where(two, x2, tl.where(one, x1, x0)).to(tl.float32)
                total += second.to(tl.float32) * tl.where(then_three, x3, tl.where(then_two, x2, x1)).to(tl.float32)
    y += tl.program_id(1) * rows * out_features
    if TENSOR_CORES:
        place, inside_rows = y + row[None, :] * out_features + outs[:, None], row[None, :] < rows
        tl.store(place, total.to(y.dtype.element_ty), mask=inside_out & inside_rows)
    else:
        tl.store(y + row * out_features + outs, tl.sum(total, 1).to(y.dtype.element_ty), mask=outs < out_features)
