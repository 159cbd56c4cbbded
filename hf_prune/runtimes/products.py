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
    from . import bitmask_kernel, decode_kernel
    from .eight_bits import dequantised, quantised, rescaled
except ImportError:  # no Triton
    bitmask_kernel = decode_kernel = None

LIBRARIES = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}
KERNELS = {"decode": decode_kernel, "bitmask": bitmask_kernel}  # our forms
LEAST_ROWS = {2: 8, 1: 16}  # bytes of a weight -> of cuSPARSELt, and what its rows are a multiple of


def at(steps: tuple[tuple[float, Any], ...], rows: int) -> Any:
    """What of `steps`, (most rows, what), is for so many rows."""
    return next(what for most, what in steps if rows <= most)


def kernel_for(weight: Tensor) -> Any:
    """The module of our kernel for a sparse `weight`."""
    return decode_kernel if decode_kernel.is_semi_structured(weight) else bitmask_kernel


def kernel_of(codes: Tensor) -> Any:
    """The module of the kernel that packed a weight with such codes."""
    return bitmask_kernel if codes.dtype == torch.int64 else decode_kernel


def unpacked(values: Tensor, codes: Tensor, scales: Tensor | None, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`, as `values` and `codes` hold it."""
    weight = kernel_of(codes).unpack(values, codes, in_features)
    return weight if scales is None else dequantised(weight, scales, dtype)


def _packed_linear(x: Tensor, values: Tensor, codes: Tensor, schedule: list[int], scales: Tensor | None = None) -> Tensor:
    """x Wᵀ (rows, out) by the kernel that `codes` are of, as an operator of torch; `schedule` is a `Schedule` of that kernel."""
    kernel, interpreted = kernel_of(codes), decode_kernel.triton.knobs.runtime.interpret
    schedule = kernel.Schedule(*map(int, schedule))  # torch.compile takes numbers that differ from call to call for variables
    return kernel.linear(x, values, codes, schedule, scales, None if interpreted else torch.library.wrap_triton)


if decode_kernel is None or decode_kernel.triton.knobs.runtime.interpret:
    packed_linear = torch.library.custom_op("hf_prune::packed_linear", _packed_linear, mutates_args=())
    packed_linear.register_fake(lambda x, values, codes, schedule, scales=None: x.new_empty(x.shape[0], codes.shape[0]))
else:  # torch.compile sees the kernel itself, and launches it as its own
    packed_linear = torch.library.triton_op("hf_prune::packed_linear", _packed_linear, mutates_args=())


def _keep_for_backward(ctx, inputs, output):
    x, values, codes, _, scales = inputs
    ctx.save_for_backward(values, codes, scales)
    ctx.in_features, ctx.dtype = x.shape[1], x.dtype


def _backward(ctx, gradient: Tensor):
    """Of x alone: the packed weight takes none. A model that is compiled outside of `no_grad` asks for it."""
    return gradient @ unpacked(*ctx.saved_tensors, ctx.in_features, ctx.dtype), None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_keep_for_backward)


def packed_product(
    x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None = None, *, bias: Tensor | None, schedules: tuple
) -> Tensor:
    """By our kernel, as `schedules`, (most rows, `Schedule`), say."""
    schedule = at(schedules, len(x))
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y = packed_linear(x, values, codes, list(schedule), scales)
    else:  # an operator of Python's takes longer to call than the kernel to run
        y = kernel_of(codes).linear(x, values, codes, schedule, scales)
    return y if bias is None else y + bias


def cusparselt_product(
    x: Tensor, packed: Tensor, scales: Tensor | None = None, *, bias: Tensor | None, algorithms: tuple
) -> Tensor:
    """By cuSPARSELt's operator rather than its tensor, which knows one algorithm for all numbers of rows, gives back a transposed
    result, and has no scales. With `scales` x is quantised as the weight is, token by token."""
    rows, multiple = len(x), LEAST_ROWS[packed.dtype.itemsize]
    padded, algorithm = rows + -rows % multiple, at(algorithms, rows)
    if scales is None:
        x = (functional.pad(x, (0, 0, 0, padded - rows)) if padded > rows else x).contiguous()
        return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)[:rows]
    q, of_rows = quantised(x, packed.dtype, padded)
    y = torch._cslt_sparse_mm(packed, q.t(), transpose_result=True, alg_id=algorithm, out_dtype=torch.bfloat16)
    return rescaled(y[:rows], of_rows[:rows], scales, bias, x.dtype)


def library_of(name: str, weight: Tensor) -> Tensor:
    """The form of a library: cuSPARSELt's is what it compresses a weight to, CUTLASS's a tensor of torch's."""
    library = LIBRARIES[name].from_dense(weight.contiguous())  # checks shape, dtype and device
    return library.packed if name == "cusparselt" else library


def dense_of(library: Tensor, in_features: int) -> Tensor:
    """The weight that a library's form holds; of 8 bits as bfloat16, which has room for them."""
    if isinstance(library, LIBRARIES["cutlass"]):
        return library.to_dense()
    eye = torch.eye(in_features, device=library.device).to(library.dtype)
    return torch._cslt_sparse_mm(library, eye.t(), **({"out_dtype": torch.bfloat16} if library.dtype.itemsize == 1 else {}))
