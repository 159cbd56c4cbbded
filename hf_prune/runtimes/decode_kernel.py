"""The product of a few rows with a 2:4 matrix, y = x Wᵀ for 1 to 16 rows: a layout that is read once, and the Triton kernel that does.

Decoding is bound by the bytes of the weights. Of every four weights (8 bytes in bf16) this layout reads 4.5 bytes, so 1.78x is the
limit, and 2.5 bytes where the weights have 8 bits (3.2x); the sparse tensor cores' libraries are made for many rows and are slower than
dense at one. Leaves out who calls it when, and how weights come to have 8 bits (`eight_bits.py`).

**Layout** of W (out, in), in float16, bfloat16, int8 or float8_e4m3fn. Four neighbours along `in` are a group; `in` is padded to whole groups.

- `values` (out, 2 * groups), dtype of W: the two weights of each group, in order. The kernel reads them as one integer a group.
- `codes` (out, words) int32: four bits a group. The lower two are the position (0 to 2) of the first weight, the upper two that of the
  second (1 to 3). A word holds eight groups, not neighbours but `words` apart: lane k (bits 4k to 4k + 3) of word w belongs to group
  k * words + w. `words` is ceil(groups / 8), rounded up to a multiple of four.

That is 2.25 bytes for each kept weight of 16 bits, 0.5625 of dense. A group with fewer than two non-zeros stores zeros of its own.

**Why so.** No index is ever used as an address. A thread holds two words of codes and walks their eight lanes; for each it reads the two
weights and eight bytes of x (the whole group). All reads are contiguous along `in`. One to four rows of x take the two numbers that a
code means by one instruction that permutes bytes; its selector comes from the code by such permutations too: byte p of 0x76543210 is the
selector of the two bytes at position p. More rows build the dense tile of a lane (its zeros too) and give it to the tensor cores with the
same columns of x. Sums are fp32. Narrow matrices split `in` over programs of the tensor cores, each of which writes its own sums, so the
result does not depend on their order.
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


MAX_ROWS = 16
TUNED_ROWS = (1, 2, 4, 8, MAX_ROWS)
DTYPES = (torch.float16, torch.bfloat16)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


class Schedule(NamedTuple):
    """How the kernel divides its work: what is tuned."""

    block_out: int = 16
    block_words: int = 16
    splits: int = 1  # programs that share the words of a row; the tensor cores' alone
    rows: int = 1  # of x that a program takes: 1, 2 or 4; or 16, by the tensor cores
    warps: int = 4
    stages: int = 1  # of loads in flight, for the tensor cores

    @classmethod
    def candidates(cls, rows: int) -> Iterator[Schedule]:
        """Those worth timing for so many rows: the fastest that an H100 showed for matrices of 576 to 14336."""
        tiles = {
            1: ((1, 64, 1), (4, 64, 1), (4, 64, 4), (1, 128, 2), (2, 128, 2), (4, 128, 2)),
            2: ((1, 64, 1), (2, 64, 1), (8, 64, 4)),
        }
        for block_out, block_words, warps in tiles.get(rows, ((1, 64, 1), (2, 64, 1), (4, 64, 1))):
            yield cls(block_out, block_words, 1, min(rows, 4), warps)
        if rows > 4:
            yield cls(16, 32, 4, MAX_ROWS, 2, 3)
            yield cls(16, 32, 1, MAX_ROWS, 2, 3)


def is_semi_structured(weight: Tensor) -> bool:
    """Whether no four neighbours along `in` of `weight` (out, in) have more than two whose bits are not all zero.

    -0.0 counts as a weight: it could not be given back otherwise.
    """
    return bool((_groups(weight) != 0).sum(-1).max() <= 2)


def check_matrix(weight: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raises ValueError or TypeError for what cannot be packed, whatever its zeros."""
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"the packed layout is of a matrix (out, in), got shape {tuple(weight.shape)}.")
    if weight.dtype not in dtypes:
        raise TypeError(
            f"the packed layout holds {' or '.join(map(str, dtypes))}, got {weight.dtype}: convert the model first."
        )


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`values` and `codes` of a 2:4 `weight` (out, in), see the layout above.

    Raises:
        TypeError: another dtype.
        ValueError: more than two weights in a group of four, or no matrix.
    """
    check_matrix(weight, DTYPES + EIGHT_BITS)
    quads = _groups(weight)
    kept = (quads != 0).to(torch.int32)
    if kept.sum(-1).max() > 2:
        raise ValueError("the weight is not 2:4: more than two of four neighbours along `in` are not zero.")
    nibbles = _nibbles().to(weight.device)[kept[..., 0] | kept[..., 1] << 1 | kept[..., 2] << 2 | kept[..., 3] << 3]
    values = quads.gather(-1, _positions(nibbles)).flatten(1).view(weight.dtype)
    words = -(-weight.shape[1] // 128) * 4
    lanes = functional.pad(nibbles, (0, 8 * words - nibbles.shape[1])).view(-1, 8, words)
    codes = torch.zeros_like(lanes[:, 0])
    for lane in range(8):
        codes |= lanes[:, lane] << 4 * lane
    return values, codes


def unpack(values: Tensor, codes: Tensor, in_features: int) -> Tensor:
    """The weight (out, in) that `pack` was given, equal bit for bit."""
    pairs = _integers(values).unflatten(1, (-1, 2))
    nibbles = torch.stack([codes >> 4 * lane & 15 for lane in range(8)], 1).flatten(1)[:, : pairs.shape[1]]
    quads = pairs.new_zeros(*pairs.shape[:2], 4).scatter_(-1, _positions(nibbles), pairs)
    return quads.flatten(1)[:, :in_features].contiguous().view(values.dtype)


def _nibbles() -> Tensor:
    """For each of the 16 ways in which a group can be kept, its code; zeros fill in where fewer than two are."""
    codes = []
    for way in range(16):
        first, second = sorted(sorted(range(4), key=lambda place: ~way >> place & 1)[:2])  # sorted is stable: kept ones first
        codes.append(first | second << 2)
    return torch.tensor(codes, dtype=torch.int32)


def _positions(nibbles: Tensor) -> Tensor:
    """The places (..., 2) in their groups that codes stand for."""
    return torch.stack([nibbles & 3, nibbles >> 2], -1).long()


def _groups(weight: Tensor) -> Tensor:
    """(out, groups, 4), padded with zeros."""
    return functional.pad(_integers(weight.detach()), (0, -weight.shape[1] % 4)).contiguous().unflatten(1, (-1, 4))


def _integers(weight: Tensor) -> Tensor:
    """The bits of floats of 16 or 8."""
    return weight.view(torch.int16 if weight.dtype.itemsize == 2 else torch.int8)


def linear(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    how: Schedule,
    scales: Tensor | None = None,
    trace: Callable[[Any], Any] | None = None,
) -> Tensor:
    """x Wᵀ (rows, out) of `x` (rows, in) in float16 or bfloat16, in the dtype of x.

    Args:
        scales: (out,) float32, what the rows of a W of 8 bits are multiplied with.
        trace: wraps the kernel, where it is not launched but written down.
    """
    (rows, dtype), (out_features, words) = (x.shape[0], x.dtype), codes.shape
    if (scales is None) == (values.dtype in EIGHT_BITS):
        raise TypeError(
            f"values of {values.dtype} {'need scales, one for each row of W' if scales is None else 'have no scales'}."
        )
    x = as_groups(x, values, bool(trace))
    if not trace and not rows:
        return x.new_empty(0, out_features)
    kernel, splits, x = (_many_rows, how.splits, x) if how.rows == MAX_ROWS else (_few_rows, 1, x.view(torch.int64))
    blocks = triton.cdiv(out_features, how.block_out), triton.cdiv(rows, how.rows)
    grid, words_each = (blocks[0] * blocks[1],), {}
    if kernel is _many_rows:
        grid, words_each = (blocks[0], splits, blocks[1]), {"SPLIT": triton.cdiv(words, 4 * splits) * 4}
    # On the CPU it is the interpreter that runs: its dot takes bfloat16 for integers, and its rounding to it is not quite right.
    y = x.new_empty(splits, rows, out_features, dtype=dtype if x.is_cuda and splits == 1 else torch.float32)
    with contextlib.nullcontext() if trace else current(x.device):
        (trace(kernel) if trace else kernel)[grid](
            x, values.view(torch.int32 if values.dtype.itemsize == 2 else torch.int16), codes, codes if scales is None else scales, y,
            rows, out_features, values.shape[1] // 2, words, BF16=dtype == torch.bfloat16, HELD=_HELD.get(values.dtype, 0), NATIVE=x.is_cuda,
            BLOCK_OUT=how.block_out, BLOCK_WORDS=how.block_words, ROWS=how.rows, **words_each, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return (y[0] if splits == 1 else y.sum(0)).to(dtype)


_HELD = {torch.int8: 1, torch.float8_e4m3fn: 2}  # what the weights are; else as x


def as_groups(x: Tensor, values: Tensor, traced: bool = False) -> Tensor:
    """`x` (rows, in) as the kernels read it, in aligned groups of four, for a packed weight with such `values`.

    Raises:
        TypeError: not of the same dtype, or, for weights of 8 bits, of none that can be.
    """
    if x.dtype not in DTYPES or (values.dtype in DTYPES and x.dtype != values.dtype):
        raise TypeError(f"the packed weight is {values.dtype}, its input {x.dtype}: convert the input.")
    x = (functional.pad(x, (0, -x.shape[1] % 4)) if x.shape[1] % 4 else x).contiguous()
    x = x.view(-1).view(x.shape)  # one row may have any stride
    aligned = x.storage_offset() % 4 == 0 if traced else x.data_ptr() % 8 == 0
    return x if aligned else x.clone()


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Where Triton launches on `device`."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


@triton.jit
def low_half(bits, BF16: tl.constexpr):
    """The 16-bit float in the lower half of each int32, as fp32."""
    if BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(bits, BF16: tl.constexpr):
    """The same of the upper half."""
    if BF16:
        return (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _permute(lower, upper, selector, NATIVE: tl.constexpr):
    """int32 whose four bytes are those of the eight of `lower` and `upper` that the lowest four digits of `selector` (base 16, 0 to 7) say."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [lower, upper, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    eight = (lower.to(tl.int64) & 0xFFFFFFFF) | (upper.to(tl.int64) << 32)
    result = (eight >> 8 * (selector & 7)) & 0xFF
    for byte in tl.static_range(1, 4):
        result |= ((eight >> 8 * ((selector >> 4 * byte) & 7)) & 0xFF) << 8 * byte
    return result.to(tl.int32)


@triton.jit
def _two_weights(pair, BF16: tl.constexpr, HELD: tl.constexpr, NATIVE: tl.constexpr):
    """The two weights of each group as fp32, of integers of twice their width."""
    if HELD == 0:
        return low_half(pair, BF16), high_half(pair, BF16)
    if HELD == 1:
        return (pair & 0xFF).to(tl.int8).to(tl.float32), (pair >> 8).to(tl.int8).to(tl.float32)
    if NATIVE:
        both = tl.inline_asm_elementwise("cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", [pair], dtype=tl.int32, is_pure=True, pack=1)
        return low_half(both, False), high_half(both, False)
    return _of_eight_bits(pair & 0xFF), _of_eight_bits((pair >> 8) & 0xFF)


@triton.jit
def _of_eight_bits(bits):
    """float8_e4m3fn as fp32: its exponent and mantissa are those of a float whose exponent is biased by 120 more."""
    magnitude = ((bits.to(tl.int32) & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((bits & 0x80) != 0, -magnitude, magnitude)


@triton.jit
def _add(total, quad, first, second, selector, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """`total` and the products of the two weights of each group (out, words) with those of its four x, `quad` int64 (words,), that they
    belong to."""
    chosen = _permute(quad.to(tl.int32)[None, :], (quad >> 32).to(tl.int32)[None, :], selector, NATIVE)
    total += first * low_half(chosen, BF16)
    total += second * high_half(chosen, BF16)
    return total


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x, values, codes, scales, y, rows, out_features, groups, words: tl.constexpr, BF16: tl.constexpr, HELD: tl.constexpr,
    NATIVE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of x as int64 (rows, groups), values as integers (out, groups), codes (out, words) -> y (rows, out).

    Compiled for each `words`: a loop whose length is known is worth a tenth of the time.
    """
    row_blocks = tl.cdiv(rows, ROWS)  # those of the same weights run together, so that the weights are read once
    outs = tl.program_id(0) // row_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(0) % row_blocks * ROWS
    inside_out = outs[:, None] < out_features
    x += row * groups
    last = rows - 1 - row  # rows past it are read as this one, and not written
    a = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    b, c, d = a, a, a
    selectors = tl.full((BLOCK_OUT, BLOCK_WORDS), 0x76543210, tl.int32)
    for start in range(0, words, BLOCK_WORDS):
        # Two words a thread: more would be read at once of codes than of x, and x be handed from thread to thread.
        word = tl.max_contiguous(start + tl.arange(0, BLOCK_WORDS), 2)
        inside_word = word < words
        code = tl.load(codes + outs[:, None] * words + word[None, :], mask=inside_out & inside_word[None, :], other=0)
        for lane in tl.static_range(8):
            if lane % 4 == 0:
                of_first = _permute(selectors, selectors, (code & 0x33333333) >> 4 * lane, NATIVE)
                of_second = _permute(selectors, selectors, ((code >> 2) & 0x33333333) >> 4 * lane, NATIVE)
            selector = _permute(
                of_first, of_second, tl.full((BLOCK_OUT, BLOCK_WORDS), 0x40 + 0x11 * (lane % 4), tl.int32), NATIVE
            )
            group = lane * words + word
            inside = inside_word & (group < groups)
            pair = tl.load(values + outs[:, None] * groups + group[None, :], mask=inside_out & inside[None, :], other=0)
            first, second = _two_weights(pair, BF16, HELD, NATIVE)
            quad = tl.load(x + group, mask=inside, other=0)
            a = _add(a, quad, first, second, selector, BF16, NATIVE)
            if ROWS > 1:
                quad = tl.load(x + tl.minimum(1, last) * groups + group, mask=inside, other=0)
                b = _add(b, quad, first, second, selector, BF16, NATIVE)
            if ROWS > 2:
                quad = tl.load(x + tl.minimum(2, last) * groups + group, mask=inside, other=0)
                c = _add(c, quad, first, second, selector, BF16, NATIVE)
                quad = tl.load(x + tl.minimum(3, last) * groups + group, mask=inside, other=0)
                d = _add(d, quad, first, second, selector, BF16, NATIVE)
    scale = tl.load(scales + outs, mask=outs < out_features, other=0.0) if HELD else 1.0
    y += row * out_features + outs
    left = tl.where(outs < out_features, last, -1)
    tl.store(y, (tl.sum(a, 1) * scale).to(y.dtype.element_ty), mask=left >= 0)
    if ROWS > 1:
        tl.store(y + out_features, (tl.sum(b, 1) * scale).to(y.dtype.element_ty), mask=left >= 1)
    if ROWS > 2:
        tl.store(y + 2 * out_features, (tl.sum(c, 1) * scale).to(y.dtype.element_ty), mask=left >= 2)
        tl.store(y + 3 * out_features, (tl.sum(d, 1) * scale).to(y.dtype.element_ty), mask=left >= 3)


@triton.jit(do_not_specialize=["rows"])
def _many_rows(
    x, values, codes, scales, y, rows, out_features, groups, words: tl.constexpr, BF16: tl.constexpr, HELD: tl.constexpr,
    NATIVE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The same of x (rows, 4 * groups) by the tensor cores, `SPLIT` of the words in each program: y (splits, rows, out)."""
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside_out = outs[:, None] < out_features
    begin = tl.program_id(1) * SPLIT
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
    for start in range(begin, begin + SPLIT, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside_word = (word < begin + SPLIT) & (word < words)
        code = tl.load(codes + outs[:, None] * words + word[None, :], mask=inside_out & inside_word[None, :], other=0)
        column = 4 * start + tl.arange(0, 4 * BLOCK_WORDS)
        inside_column = (column < 4 * (begin + SPLIT)) & (column < 4 * words)
        for lane in range(8):
            group = lane * words + word
            inside = inside_word & (group < groups)
            pair = tl.load(values + outs[:, None] * groups + group[None, :], mask=inside_out & inside[None, :], other=0)
            first, second = _two_weights(pair, BF16, HELD, NATIVE)
            if NATIVE:
                first, second = first.to(x.dtype.element_ty), second.to(x.dtype.element_ty)
            none = tl.zeros_like(first)
            place, other = (code >> 4 * lane) & 3, (code >> (4 * lane + 2)) & 3
            w0 = tl.where(place == 0, first, none)
            w1 = tl.where(place == 1, first, tl.where(other == 1, second, none))
            w2 = tl.where(place == 2, first, tl.where(other == 2, second, none))
            w3 = tl.where(other == 3, second, none)
            w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape((BLOCK_OUT, 4 * BLOCK_WORDS))
            place_x = column + 4 * lane * words
            inside_x = (row[:, None] < rows) & (inside_column & (place_x < 4 * groups))[None, :]
            quads = tl.load(x + row[:, None] * (4 * groups) + place_x[None, :], mask=inside_x, other=0.0)
            total = tl.dot(quads if NATIVE else quads.to(tl.float32), tl.trans(w), total)
    if HELD:
        total *= tl.load(scales + outs, mask=outs < out_features, other=0.0)[None, :]
    y += tl.program_id(1) * rows * out_features
    inside_y = (row[:, None] < rows) & (outs[None, :] < out_features)
    tl.store(y + row[:, None] * out_features + outs[None, :], total.to(y.dtype.element_ty), mask=inside_y)
