"""The forms in which a sparse weight is multiplied, and their products: our kernels', cuSPARSELt's, CUTLASS's.

A product is `run(x, *held)` of x (rows, in) and what a form holds of W (out, in), with `bias` and what was tuned as keywords. Leaves out
which form is best for how many rows (`plans.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


try:
    from . import bitmask_kernel, decode_kernel, eight_bits

    INTERPRETED = decode_kernel.triton.knobs.runtime.interpret
except (ImportError, AttributeError):  # no Triton, or one without knobs, older than 3.4
    bitmask_kernel = decode_kernel = eight_bits = INTERPRETED = None

LIBRARIES = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}
KERNELS = {"decode": decode_kernel, "bitmask": bitmask_kernel}  # our forms
LEAST_ROWS = {2: 8, 1: 16}  # bytes of a weight -> of cuSPARSELt, and what its rows are a multiple of


def at(steps: tuple[tuple[float, Any], ...], rows: int) -> Any:
    """What of `steps`, (most rows, what), is for so many rows."""
    return next(what for most, what in steps if rows <= most)


def form_of(weight: Tensor) -> str:
    """That of our two which a sparse `weight` can have."""
    return "decode" if decode_kernel.is_semi_structured(weight) else "bitmask"


def kernel_of(codes: Tensor) -> Any:
    """The module of the kernel that packed a weight with such codes."""
    return bitmask_kernel if codes.dtype == torch.int64 else decode_kernel


def unpacked(values: Tensor, codes: Tensor, scales: Tensor | None, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`, as `values` and `codes` hold it."""
    weight = kernel_of(codes).unpack(values, codes, in_features)
    return weight if scales is None else eight_bits.dequantised(weight, scales, dtype)


def library_of(name: str, weight: Tensor) -> Tensor:
    """The form of a library: cuSPARSELt's is what it compresses a weight to, CUTLASS's a tensor of torch's."""
    library = LIBRARIES[name].from_dense(weight.contiguous())  # checks shape, dtype and device
    return library.packed if name == "cusparselt" else library


def dense_of(library: Tensor, scales: Tensor | None, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype` that a library's form holds."""
    if isinstance(library, LIBRARIES["cutlass"]):
        return library.to_dense()
    eye = torch.eye(in_features, device=library.device).to(library.dtype).t()
    if scales is None:
        return torch._cslt_sparse_mm(library, eye)
    return eight_bits.dequantised(torch._cslt_sparse_mm(library, eye, out_dtype=torch.bfloat16), scales, dtype)  # 8 bits fit


def _packed_linear(x: Tensor, values: Tensor, codes: Tensor, schedule: list[int], scales: Tensor | None = None) -> Tensor:
    """x Wᵀ (rows, out) by the kernel that `codes` are of, as an operator of torch; `schedule` is a `Schedule` of that kernel."""
    kernel = kernel_of(codes)
    schedule = kernel.Schedule(*map(int, schedule))  # torch.compile takes numbers that differ from call to call for variables
    return kernel.linear(x, values, codes, schedule, scales, None if INTERPRETED else torch.library.wrap_triton)


if INTERPRETED is None or INTERPRETED:
    packed_linear = torch.library.custom_op("hf_prune::packed_linear", _packed_linear, mutates_args=())
    packed_linear.register_fake(lambda x, values, codes, schedule, scales=None: x.new_empty(x.shape[0], codes.shape[0]))
else:  # torch.compile sees the kernel itself, and launches it as its own
    packed_linear = torch.library.triton_op("hf_prune::packed_linear", _packed_linear, mutates_args=())


def _cusparselt(
    x: Tensor, packed: Tensor, algorithms: list[int], scales: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x Wᵀ (rows, out) by cuSPARSELt, whose own tensor knows one algorithm for all numbers of rows, gives back a transposed result, and
    has no scales; `algorithms` are the most rows and the number of each in turn."""
    rows, multiple = len(x), LEAST_ROWS[packed.dtype.itemsize]
    padded = max(multiple, rows + -rows % multiple)
    algorithm = next((number for most, number in zip(algorithms[::2], algorithms[1::2]) if rows <= most), algorithms[-1])
    if scales is None:
        x = (functional.pad(x, (0, 0, 0, padded - rows)) if padded > rows else x).contiguous()
        return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)[:rows]
    q, of_rows = eight_bits.quantised_tokens(x, packed.dtype, padded)
    y = torch._cslt_sparse_mm(packed, q.t(), transpose_result=True, alg_id=algorithm, out_dtype=torch.bfloat16)
    return eight_bits.rescaled(y[:rows], of_rows[:rows], scales, bias, x.dtype)


@torch.library.custom_op("hf_prune::cusparselt_linear", mutates_args=())
def cusparselt_linear(
    x: Tensor, packed: Tensor, algorithms: list[int], out_features: int, scales: Tensor | None = None
) -> Tensor:
    """The same as an operator of torch, which knows its gradient and compiles once for all numbers of rows."""
    return _cusparselt(x, packed, algorithms, scales)


@cusparselt_linear.register_fake
def _(x, packed, algorithms, out_features, scales=None):
    return x.new_empty(x.shape[0], out_features)


def _keep_packed(ctx, inputs, output):
    x, values, codes, _, scales = inputs
    ctx.save_for_backward(values, codes, scales)
    ctx.in_features, ctx.dtype = x.shape[1], x.dtype


def _backward_packed(ctx, gradient: Tensor):
    """Of x alone: the packed weight takes none. A model that is compiled outside of `no_grad` asks for it."""
    return gradient @ unpacked(*ctx.saved_tensors, ctx.in_features, ctx.dtype), None, None, None, None


def _keep_library(ctx, inputs, output):
    x, packed, _, _, scales = inputs
    ctx.save_for_backward(packed, scales)
    ctx.in_features, ctx.dtype = x.shape[1], x.dtype


def _backward_library(ctx, gradient: Tensor):
    return gradient @ dense_of(*ctx.saved_tensors, ctx.in_features, ctx.dtype), None, None, None, None


packed_linear.register_autograd(_backward_packed, setup_context=_keep_packed)
cusparselt_linear.register_autograd(_backward_library, setup_context=_keep_library)


def _needs_operator(x: Tensor) -> bool:
    """An operator of Python's takes longer to call than the kernel to run."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)


def packed_product(
    x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None = None, *, bias: Tensor | None, schedules: tuple
) -> Tensor:
    """By our kernel, as `schedules`, (most rows, `Schedule`), say."""
    schedule = at(schedules, len(x))
    if _needs_operator(x):
        y = packed_linear(x, values, codes, list(schedule), scales)
    else:
        y = kernel_of(codes).linear(x, values, codes, schedule, scales)
    return y if bias is None else y + bias


def cusparselt_product(
    x: Tensor, packed: Tensor, scales: Tensor | None = None, *, bias: Tensor | None, algorithms: list[int], out_features: int
) -> Tensor:
    """By cuSPARSELt; with `scales` x is quantised as the weight is, token by token."""
    if not _needs_operator(x):
        return _cusparselt(x, packed, algorithms, scales, bias)
    y = cusparselt_linear(x, packed, algorithms, out_features, scales)
    return y if bias is None else y + bias
