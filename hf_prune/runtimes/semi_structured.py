"""A sparse model that runs on what is fastest for the number of rows: our kernels for a few, sparse tensor cores for many, dense between.

Each `nn.Linear` whose weight is 2:4, or has enough zeros anywhere, becomes a `SemiStructuredLinear` in place, holding only the forms that
its plan uses. Leaves out how plans are measured (`plans.py`), what a form is (`products.py`) and how kernels work (`decode_kernel.py`,
`bitmask_kernel.py`).

Memory, in units of the dense weight of 16 bits: 2:4 packed for few rows 0.5625, for a library 0.5625, dense 1. With `use="any"` a linear may
hold all three, since no form serves all row counts: 2.125, or 1.625 with CUTLASS, whose values ours shares. That is the price of
having the fastest for each. `use="decode"` holds the first alone and makes the dense weight anew for more than 16 rows, `use="prefill"` the
second. An unstructured weight with half of its values takes 0.625, and dense 1 for more rows. In 8 bits either packed form takes 0.3125.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..report import by_reason, table
from . import products
from .plans import PREFILL_ROWS, Plan, held_in, interpreted_plan, measured_plan
from .products import INTERPRETED, KERNELS, LIBRARIES, decode_kernel, dense_of, packed_product, unpacked


USES = ("any", "decode", "prefill")
DTYPES = (None, torch.int8, torch.float8_e4m3fn)
MOST_KEPT = 0.6  # of an unstructured weight that is packed
HELD = ("values", "codes", "library", "scales")  # buffers of a packed linear


class SemiStructuredLinear(nn.Linear):
    """A linear whose weight is held in the forms of its plan; made from an `nn.Linear` in place, and back. For inference only.

    `weight` is the dense weight, made anew where it is not held; `state_dict()` has it, so what is saved is a dense model.
    """

    plan: Plan
    weight_dtype: torch.dtype  # of the dense weight
    values: Tensor | None
    codes: Tensor | None
    library: Tensor | None
    scales: Tensor | None  # of a weight of 8 bits
    loaded: bool  # whether every form ran: what runs first within a capture cannot be loaded there

    @property
    def weight(self) -> Tensor:
        if (dense := self._parameters.get("weight")) is not None:
            return dense
        if self.values is not None:
            return unpacked(self.values, self.codes, self.scales, self.in_features, self.weight_dtype)
        return dense_of(self.library, self.scales, self.in_features, self.weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        captured = _captured(x)
        if not captured and self.loaded and self.plan.dense_eagerly:  # it waits for the host: no more of Python than this
            return functional.linear(x, self._parameters["weight"], self._parameters["bias"])
        flat, dtype = x.reshape(-1, self.in_features), x.dtype
        if torch.is_autocast_enabled(x.device.type):  # our kernels are none of the operators that it knows
            flat, dtype = flat.to(self.weight_dtype), torch.get_autocast_dtype(x.device.type)
        if not (captured or self.loaded) and len(flat):
            for form, rows in self.plan.trials():
                self._product(form, flat[:1].detach().expand(rows, -1))
            self.loaded = True
        y = self._product(self.plan.form(len(flat), eager=not captured), flat)
        return y.to(dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, form: str, x: Tensor) -> Tensor:
        plan = self.plan
        if form in KERNELS:
            return packed_product(x, self.values, self.codes, self.scales, bias=self.bias, schedules=plan.schedules)
        if form == "cusparselt":
            words = {"algorithms": plan.algorithms, "out_features": self.out_features}
            return products.cusparselt_product(x, self.library, self.scales, bias=self.bias, **words)
        return functional.linear(x, self.library if form == "cutlass" else self.weight, self.bias)

    def _apply(self, fn, recurse=True):
        """Moves, but converts nothing: what is packed is no number of that type."""
        if fn(torch.empty(0, dtype=self.weight_dtype)).dtype != self.weight_dtype:
            raise ValueError(
                f"a packed weight of {self.weight_dtype} cannot be converted: call hf_prune.to_dense(model) first. (What comes before "
                "it in the model has been.)"
            )

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loaded": False}  # in another process nothing ran yet

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        raise ValueError(f"{prefix}weight is packed: call hf_prune.to_dense(model) before loading weights.")


def _captured(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _pack_in_place(linear: nn.Linear, plan: Plan, dtype: torch.dtype | None = None) -> None:
    source, weight, *scales = held_in(dtype, linear.weight.detach())
    held: dict[str, Tensor | None] = dict.fromkeys(HELD) | {"scales": scales[0] if scales else None}
    for name in plan.forms & set(KERNELS):  # one at most
        held["values"], held["codes"] = KERNELS[name].pack(source)
    for name in plan.forms & set(LIBRARIES):  # likewise
        held["library"] = library = products.library_of(name, source)
        if name == "cutlass" and held["values"] is not None and _equal_bits(library.packed, held["values"]):
            held["values"] = library.packed  # the two differ in their indices alone
    lossless = bool(scales) or held["values"] is not None
    if "dense" not in plan.forms and not lossless:  # -0.0 may come back as 0.0
        lossless = _equal_bits(dense_of(held["library"], None, linear.in_features, weight.dtype), weight)
    linear.plan, linear.loaded, linear.trained, linear.weight_dtype = plan, False, linear.weight.requires_grad, weight.dtype
    linear.__class__ = SemiStructuredLinear
    for name, tensor in held.items():
        linear.register_buffer(name, tensor, persistent=False)
    if "dense" not in plan.forms and lossless:
        linear._parameters["weight"] = None  # its place is kept: optimizers count parameters
    elif dtype is not None:
        linear.weight = nn.Parameter(weight, linear.trained)


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@dataclass
class SemiStructuredReport:
    """What `to_semi_structured` did; prints as a table.

    Attributes:
        plans: linear -> plan, of those that were converted.
        shapes: linear -> (out, in), of the same.
        dense: linear -> why it was left dense.
        bytes_before, bytes_after: of the weights of the converted linears.
    """

    device: str
    use: str
    dtype: torch.dtype | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        groups: dict[tuple, list[str]] = defaultdict(list)
        for name, plan in self.plans.items():
            groups[self.shapes[name], plan].append(name)
        rows = [("(out, in)", "linears", *(f"{rows} rows" for rows in (1, 16, PREFILL_ROWS)), "plan")]
        for (shape, plan), names in groups.items():
            rows.append((str(shape), str(len(names)), *(_speed_up(plan, n) for n in (1, 16, PREFILL_ROWS)), str(plan)))
        how = f"use={self.use!r}" + (f", {self.dtype}" if self.dtype else "")
        total = (
            f"{len(self.plans)} linears on {self.device}, {how}: {self.bytes_before / 2**20:.1f} MiB of weights before, "
            f"{self.bytes_after / 2**20:.1f} after; the columns of rows are the speed-up over dense"
        )
        missing = [(f"{name} ({form})", why) for name, plan in self.plans.items() for form, why in plan.missing.items()]
        reasons = {name: f"left dense, {why}" for name, why in self.dense.items()} | dict(missing)
        return "\n".join([table(rows), total, *by_reason(reasons)])


def _speed_up(plan: Plan, rows: int) -> str:
    measured = plan.milliseconds.get(rows, {})
    form = plan.form(rows)
    return f"{measured['dense'] / measured[form]:.2f}x" if form in measured else "not measured"


def to_semi_structured(model: nn.Module, *, use: str = "any", dtype: torch.dtype | None = None) -> SemiStructuredReport:
    """Packs the sparse linears of a `model` on a CUDA device, in place, each for what is fastest there; `to_dense` undoes it.

    Taken are linears that are 2:4, and those with at least 40 % zeros anywhere, for which there is a kernel for one row.
    `generate`, a static cache, `torch.compile`, deepcopy and `state_dict()` work as before; saving, pruning and loading weights
    are refused until `to_dense`. A linear for which nothing is faster than dense is left as it is. The first time the kernel is
    compiled in a dozen ways for each `in`; Triton remembers them.

    Args:
        use: "any" is dense wherever no other form was 10 % faster, and takes the memory of all forms it needs. What is
            neither captured in a CUDA graph nor compiled waits for Python, and mostly stays dense there. "decode" and "prefill"
            hold one packed form, 0.5625 of the dense weight (0.625 of an unstructured one at 50 %, which has none for
            "prefill"), and are slow for what they were not made for. (A library that would not give a weight back bit for bit
            does not replace it.)
        dtype: torch.int8 or torch.float8_e4m3fn: the 2:4 weights are quantised too, symmetrically by row, and where cuSPARSELt runs
            the activations by token; others stay dense. A packed form takes 0.3125 of the dense weight and both are faster, but
            outputs are no more those of the model, and `to_dense` gives the quantised weights: what was rounded away is not kept.

    Raises:
        TypeError, ValueError: no model, not on CUDA, nothing sparse in float16 or bfloat16; nothing has changed then. With
            TRITON_INTERPRET=1 in the environment a model on the CPU is taken, for tests: exact, very slow, and not measured.
        ImportError: no Triton.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_semi_structured takes a model, got a {type(model).__name__}.")
    if use not in USES:
        raise ValueError(f"use={use!r} is not known: it is one of {', '.join(map(repr, USES))}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: it is one of {', '.join(map(str, DTYPES))}.")
    check_triton()
    if any(isinstance(module, SemiStructuredLinear) for module in model.modules()):
        raise ValueError("the model is packed already: call hf_prune.to_dense(model) first.")
    device = _device_of(model)
    eligible, dense = _eligible(model, use, dtype)
    if not eligible:
        reasons = sorted(set(dense.values())) or ["it has no nn.Linear"]
        raise ValueError(f"nothing to pack: {'; '.join(reasons)}. Prune with pattern='2:4' and load in bfloat16 or float16.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    report, plan_for = SemiStructuredReport(name, use, dtype), measured_plan if device.type == "cuda" else interpreted_plan
    plans: dict[tuple, Plan] = {}
    for name, (linear, kept) in eligible.items():  # all that can fail comes before the first linear changes
        key = *linear.weight.shape, linear.weight.dtype, linear.bias is None, kept
        weight = linear.weight.detach().contiguous()
        plans[key] = report.plans[name] = plans.get(key) or plan_for(weight, linear.bias, use, dtype)
    linears, report.dense = {name: linear for name, (linear, _) in eligible.items()}, dense
    for name in [name for name, plan in report.plans.items() if plan.forms == {"dense"}]:
        missing = "".join(f"; no {form}: {why}" for form, why in report.plans.pop(name).missing.items())
        report.dense[name] = f"nothing that was measured is faster{missing}"
        del linears[name]
    report.shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
    report.bytes_before = sum(linear.weight.nbytes for linear in linears.values())
    originals: dict[str, Tensor] = {}  # in the CPU's memory
    try:
        for name, linear in linears.items():
            if dtype is not None:
                originals[name] = linear.weight.detach().cpu()
            _pack_in_place(linear, report.plans[name], dtype)
    except BaseException:  # out of memory, Ctrl-C
        to_dense(model)
        for name, weight in originals.items():
            linears[name].weight.data.copy_(weight)
        raise
    report.bytes_after = sum(_bytes_held(linear) for linear in linears.values())
    if linears:
        for name in _REFUSED:
            if hasattr(model, name):
                setattr(
                    model,
                    name,
                    partial(_refuse, name, "which gives the quantised weights" if dtype else "which gives them back"),
                )
    return report


def check_triton() -> None:
    if decode_kernel is None:
        raise ImportError("2:4 inference, and timing it, needs Triton 3.4 or newer: pip install 'hf-prune[sparse]'.")


def to_dense(model: nn.Module) -> nn.Module:
    """Undoes `to_semi_structured` in place: every weight is again what it was, bit for bit, or was quantised to. Returns `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense takes a model, got a {type(model).__name__}.")
    for module in model.modules():
        if isinstance(module, SemiStructuredLinear):
            weight, requires_grad = module.weight.detach(), module.trained
            for name in HELD:
                module._buffers.pop(name, None)
            del module.plan, module.loaded, module.trained, module.weight_dtype
            module.__class__ = nn.Linear
            if module._parameters["weight"] is None:
                module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    for name in _REFUSED:
        model.__dict__.pop(name, None)
    return model


_REFUSED = ("save_pretrained", "push_to_hub", "prune")  # they would read or write parameters that are packed


def _refuse(name: str, what_it_gives: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"{name} needs plain weights, but the model is packed for 2:4 inference: call hf_prune.to_dense(model) first, {what_it_gives}. "
        "(state_dict() has the same.)"
    )


def _device_of(model: nn.Module) -> torch.device:
    """Where the model is.

    Raises:
        ValueError: not where 2:4 runs.
    """
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    kinds = sorted({device.type for device in devices})
    if kinds != ["cuda"] and not (kinds == ["cpu"] and INTERPRETED):
        there = "call model.to('cuda') first." if torch.cuda.is_available() else "there is no CUDA device here."
        raise ValueError(
            f"2:4 inference needs CUDA and the model is on {', '.join(kinds)}: {there} On a CPU 2:4 zeros make nothing faster; a smaller "
            "model does (PruningConfig('taylor', parameters=0.7)), and save_pretrained(compact=True) makes smaller files. "
            "hf_prune.advise(model) measures it."
        )
    return min(devices, key=str)


def _eligible(
    model: nn.Module, use: str, dtype: torch.dtype | None
) -> tuple[dict[str, tuple[nn.Linear, str | float]], dict[str, str]]:
    """The linears that can be packed, with "2:4" or the share of weights, to a tenth, that are not zero; and why others are not
    taken: whatever has masks, and every `nn.Linear`."""
    masks = getattr(model, "pruning_masks", None) or {}
    patterns = getattr(masks, "patterns", {})
    owners: dict[int, int] = defaultdict(int)
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] += 1
    linears: dict[str, tuple[nn.Linear, str | float]] = {}
    dense = {name.removesuffix(".weight"): "no nn.Linear" for name in masks}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight, pattern = module.weight, patterns.get(f"{name}.weight")
        if type(module) is not nn.Linear:
            dense[name] = f"a {type(module).__name__}"
        elif "forward" in vars(module):
            dense[name] = "its forward is hooked, as by accelerate's device_map"
        elif owners[id(weight)] > 1:
            dense[name] = "shares its weight"
        elif weight.dtype not in decode_kernel.DTYPES:
            dense[name] = f"{weight.dtype}, not float16 or bfloat16"
        elif decode_kernel.is_semi_structured(weight):
            linears[name] = module, "2:4"
        elif decode_kernel.is_semi_structured(weight + 0.0):
            dense[name] = "2:4 with zeros that are -0.0, write +0.0"
        elif use == "prefill" or dtype or (kept := int(weight.detach().count_nonzero()) / weight.numel()) > MOST_KEPT:
            dense[name] = f"not 2:4{f' but {pattern}' * bool(pattern)}"
        else:
            linears[name] = module, round(kept, 1)
    return linears, {name: why for name, why in dense.items() if name not in linears}


def _bytes_held(linear: SemiStructuredLinear) -> int:
    """By all forms of the weight of `linear`; what two of them share counts once."""
    held = [linear._parameters.get("weight"), linear.values, linear.codes, linear.scales]
    if isinstance(linear.library, LIBRARIES["cutlass"]):  # its own nbytes would be those of the dense matrix
        held += [getattr(linear.library, name) for name in linear.library.__tensor_flatten__()[0]]
    else:
        held.append(linear.library)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held if tensor is not None}.values())
