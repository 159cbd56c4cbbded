"""A sparse model that runs on what is fastest for the number of rows: our kernels for a few, sparse tensor cores for many, dense between.

Each `nn.Linear` whose weight is 2:4, or has enough zeros anywhere, becomes a `SemiStructuredLinear` in place, holding only the forms that
its plan uses. The plan is measured on the device, once a shape. Leaves out how the kernels work (`decode_kernel.py`, `bitmask_kernel.py`),
and int8 and fp8.

Memory, in units of the dense weight: 2:4 packed for few rows 0.5625, for a library 0.5625, dense 1. With `use="any"` a linear may hold all
three, since no form serves all row counts: 2.125, or 1.625 with CUTLASS, whose values ours shares. That is the price of
having the fastest for each. `use="decode"` holds the first alone and makes the dense weight anew for more than 16 rows, `use="prefill"` the
second. An unstructured weight with half of its values takes 0.625, and dense 1 for more rows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..patterns import first_line
from ..report import by_reason, table


try:
    from . import bitmask_kernel, decode_kernel
except ImportError:  # no Triton
    bitmask_kernel = decode_kernel = None

USES = ("any", "decode", "prefill")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # what is measured
PREFILL_ROWS = 2048
LIBRARIES = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}
KERNELS = {"decode": decode_kernel, "bitmask": bitmask_kernel}  # our forms
MOST_KEPT = 0.6  # of an unstructured weight that is packed
NOISE = 1.1  # another form is taken where dense takes this much longer; within a model a gain of 1.07 was a loss of 2 %
LEAST_ROWS = 8  # of cuSPARSELt, and what its rows are a multiple of


@dataclass(frozen=True)
class Plan:
    """What runs for how many rows of one shape.

    Attributes:
        steps: (most rows, form) in ascending order; a form is "decode" (our kernel for 2:4), "bitmask" (ours for zeros anywhere),
            "cusparselt", "cutlass", "dense" or "unpacked", which makes the dense weight anew at each call.
        schedules: (most rows, schedule of our kernel).
        algorithms: (most rows, cuSPARSELt's number of the fastest of its kernels; the default's are far slower).
        eager: as `steps`, where a call is neither captured nor compiled, so that the host's time counts too; empty: the same.
        milliseconds: rows -> form -> what was measured; empty in Triton's interpreter.
        missing: form -> why it could not be measured.
    """

    steps: tuple[tuple[float, str], ...]
    schedules: tuple[tuple[float, tuple], ...] = ()
    algorithms: tuple[tuple[float, int], ...] = ()
    eager: tuple[tuple[float, str], ...] = ()
    milliseconds: dict[int, dict[str, float]] = field(default_factory=dict, compare=False)
    missing: dict[str, str] = field(default_factory=dict, compare=False)

    def form(self, rows: int, eager: bool = False) -> str:
        return _at(self.eager if eager and self.eager else self.steps, rows)

    @property
    def forms(self) -> set[str]:
        return {form for _, form in self.steps + self.eager}

    def __str__(self) -> str:
        eager = f"; eager: {_told(self.eager)}" if self.eager and self.eager != self.steps else ""
        return _told(self.steps) + eager


def _told(steps: tuple[tuple[float, str], ...]) -> str:
    bounds = [f"{form} to {most} rows" if most < math.inf else f"{form} above" for most, form in steps]
    return ", ".join(bounds) if len(bounds) > 1 else steps[0][1]


def _at(steps: tuple[tuple[float, Any], ...], rows: int) -> Any:
    """What of `steps`, (most rows, what), is for so many rows."""
    return next(what for most, what in steps if rows <= most)


class SemiStructuredLinear(nn.Linear):
    """A linear whose weight is held in the forms of its plan; made from an `nn.Linear` in place, and back. For inference only.

    `weight` is the dense weight, made anew where it is not held; `state_dict()` has it, so what is saved is a dense model.
    """

    plan: Plan
    values: Tensor | None
    codes: Tensor | None
    library: Tensor | None
    loaded: set[str]  # forms that ran, of those that run in a capture only

    @property
    def weight(self) -> Tensor:
        if (dense := self._parameters.get("weight")) is not None:
            return dense
        if self.values is not None:
            return _kernel_of(self.codes).unpack(self.values, self.codes, self.in_features)
        return _dense_of(self.library, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if torch.is_autocast_enabled(x.device.type):  # our kernels are none of the operators that it knows
            held = (self._parameters.get("weight"), self.values, self.library)
            flat = flat.to(next(form.dtype for form in held if form is not None))
        form = self.plan.form(len(flat))
        if self.plan.eager and not _captured(flat):
            captured, form = form, self.plan.form(len(flat), eager=True)
            if captured != form and captured not in self.loaded:  # what runs first within a capture cannot be loaded there
                self._product(captured, flat)
                self.loaded.add(captured)
        return self._product(form, flat).view(*x.shape[:-1], self.out_features)

    def _product(self, form: str, x: Tensor) -> Tensor:
        if form in KERNELS:
            return _packed(x, self.values, self.codes, bias=self.bias, schedules=self.plan.schedules)
        if form == "cusparselt":
            return _cusparselt(x, self.library, bias=self.bias, algorithms=self.plan.algorithms)
        return functional.linear(x, self.library if form == "cutlass" else self.weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        raise ValueError(f"{prefix}weight is packed: call hf_prune.to_dense(model) before loading weights.")


def _captured(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _kernel_of(codes: Tensor) -> Any:
    return bitmask_kernel if codes.dtype == torch.int64 else decode_kernel


@torch.library.custom_op("hf_prune::packed_linear", mutates_args=())
def packed_linear(x: Tensor, values: Tensor, codes: Tensor, schedule: list[int]) -> Tensor:
    """x Wᵀ (rows, out) by the kernel that `codes` are of, as an operator of torch; `schedule` is a `Schedule` of that kernel."""
    kernel = _kernel_of(codes)
    return kernel.linear(x, values, codes, kernel.Schedule(*schedule))


@packed_linear.register_fake
def _(x: Tensor, values: Tensor, codes: Tensor, schedule: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])
    ctx.in_features = inputs[0].shape[1]


def _backward(ctx, gradient: Tensor):
    """Of x alone: the packed weight takes none. A model that is compiled outside of `no_grad` asks for it."""
    values, codes = ctx.saved_tensors
    return gradient @ _kernel_of(codes).unpack(values, codes, ctx.in_features), None, None, None


packed_linear.register_autograd(_backward, setup_context=_keep_for_backward)


def _packed(x: Tensor, values: Tensor, codes: Tensor, *, bias: Tensor | None, schedules: tuple) -> Tensor:
    schedule = _at(schedules, len(x))
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y = packed_linear(x, values, codes, list(schedule))
    else:  # an operator of Python's takes longer to call than the kernel to run
        y = _kernel_of(codes).linear(x, values, codes, schedule)
    return y if bias is None else y + bias


def _cusparselt(x: Tensor, packed: Tensor, *, bias: Tensor | None, algorithms: tuple) -> Tensor:
    """By its operator rather than its tensor, which knows one algorithm for all numbers of rows and gives back a transposed result."""
    rows = len(x)
    padded = (
        functional.pad(x, (0, 0, 0, -rows % LEAST_ROWS)) if rows % LEAST_ROWS else x
    ).contiguous()  # pad copies, if by nothing
    y = torch._cslt_sparse_mm(packed, padded.t(), bias=bias, transpose_result=True, alg_id=_at(algorithms, rows))
    return y[:rows]


def _library_of(name: str, weight: Tensor) -> Tensor:
    """The form of a library: cuSPARSELt's is what it compresses a weight to, CUTLASS's a tensor of torch's."""
    library = LIBRARIES[name].from_dense(weight.contiguous())  # checks shape, dtype and device
    return library.packed if name == "cusparselt" else library


def _dense_of(library: Tensor, in_features: int) -> Tensor:
    if isinstance(library, LIBRARIES["cutlass"]):
        return library.to_dense()
    return torch._cslt_sparse_mm(library, torch.eye(in_features, dtype=library.dtype, device=library.device))


def _kernel_for(weight: Tensor) -> Any:
    return decode_kernel if decode_kernel.is_semi_structured(weight) else bitmask_kernel


def _pack_in_place(linear: nn.Linear, plan: Plan) -> None:
    weight = linear.weight.detach()
    values = codes = library = None
    for name in plan.forms & set(KERNELS):  # one at most
        values, codes = KERNELS[name].pack(weight)
    for name in plan.forms & set(LIBRARIES):
        library = _library_of(name, weight)
        if values is not None and name == "cutlass" and _equal_bits(library.packed, values):
            values = library.packed  # the two differ in their indices alone
    for name, tensor in (("values", values), ("codes", codes), ("library", library)):
        linear.register_buffer(name, tensor, persistent=False)
    linear.plan, linear.loaded, linear.trained = plan, set(), linear.weight.requires_grad
    linear.__class__ = SemiStructuredLinear
    if "dense" not in plan.forms and (
        values is not None or _equal_bits(_dense_of(library, linear.in_features), weight)
    ):  # -0.0 may come back as 0.0
        del linear._parameters["weight"]


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
        total = (
            f"{len(self.plans)} linears on {self.device}, use={self.use!r}: {self.bytes_before / 2**20:.1f} MiB of weights before, "
            f"{self.bytes_after / 2**20:.1f} after; the columns of rows are the speed-up over dense"
        )
        missing = [(f"{name} ({form})", why) for name, plan in self.plans.items() for form, why in plan.missing.items()]
        reasons = {name: f"left dense, {why}" for name, why in self.dense.items()} | dict(missing)
        return "\n".join([table(rows), total, *by_reason(reasons)])


def _speed_up(plan: Plan, rows: int) -> str:
    measured = plan.milliseconds.get(rows, {})
    form = plan.form(rows)
    return f"{measured['dense'] / measured[form]:.2f}x" if form in measured else "not measured"


def to_semi_structured(model: nn.Module, *, use: str = "any") -> SemiStructuredReport:
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

    Raises:
        TypeError, ValueError: no model, not on CUDA, nothing sparse in float16 or bfloat16; nothing has changed then. With
            TRITON_INTERPRET=1 in the environment a model on the CPU is taken, for tests: exact, very slow, and not measured.
        ImportError: no Triton.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_semi_structured takes a model, got a {type(model).__name__}.")
    if use not in USES:
        raise ValueError(f"use={use!r} is not known: it is one of {', '.join(map(repr, USES))}.")
    check_triton()
    if any(isinstance(module, SemiStructuredLinear) for module in model.modules()):
        raise ValueError("the model is packed already: call hf_prune.to_dense(model) first.")
    device = _device_of(model)
    eligible, dense = _eligible(model, use)
    if not eligible:
        reasons = sorted(set(dense.values())) or ["it has no nn.Linear"]
        raise ValueError(f"nothing to pack: {'; '.join(reasons)}. Prune with pattern='2:4' and load in bfloat16 or float16.")
    report = SemiStructuredReport(torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter", use)
    plan_for = measured_plan if device.type == "cuda" else _interpreted_plan
    plans: dict[tuple, Plan] = {}
    for name, (linear, kept) in eligible.items():  # all that can fail comes before the first linear changes
        key = *linear.weight.shape, linear.weight.dtype, linear.bias is None, kept
        plans[key] = report.plans[name] = plans.get(key) or plan_for(linear.weight.detach().contiguous(), linear.bias, use)
    linears, report.dense = {name: linear for name, (linear, _) in eligible.items()}, dense
    for name in [name for name, plan in report.plans.items() if plan.forms == {"dense"}]:
        missing = "".join(f"; no {form}: {why}" for form, why in report.plans.pop(name).missing.items())
        report.dense[name] = f"nothing that was measured is faster{missing}"
        del linears[name]
    report.shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
    report.bytes_before = sum(linear.weight.nbytes for linear in linears.values())
    try:
        for name, linear in linears.items():
            _pack_in_place(linear, report.plans[name])
    except BaseException:  # out of memory, Ctrl-C
        to_dense(model)
        raise
    report.bytes_after = sum(_bytes_held(linear) for linear in linears.values())
    if linears:
        for name in _REFUSED:
            if hasattr(model, name):
                setattr(model, name, partial(_refuse, name))
    return report


def check_triton() -> None:
    if decode_kernel is None:
        raise ImportError("2:4 inference, and timing it, needs Triton: pip install 'hf-prune[sparse]'.")


def to_dense(model: nn.Module) -> nn.Module:
    """Undoes `to_semi_structured` in place: every weight is again what it was, bit for bit. Returns `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense takes a model, got a {type(model).__name__}.")
    for module in model.modules():
        if isinstance(module, SemiStructuredLinear):
            weight, requires_grad = module.weight.detach(), module.trained
            for name in ("values", "codes", "library"):
                delattr(module, name)
            del module.plan, module.loaded, module.trained
            module.__class__ = nn.Linear
            if "weight" not in module._parameters:
                module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    for name in _REFUSED:
        model.__dict__.pop(name, None)
    return model


_REFUSED = ("save_pretrained", "push_to_hub", "prune")  # they would read or write parameters that are packed


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"{name} needs plain weights, but the model is packed for 2:4 inference: call hf_prune.to_dense(model) first, which gives "
        "them back bit for bit. (state_dict() has them as they are.)"
    )


def _device_of(model: nn.Module) -> torch.device:
    """Where the model is.

    Raises:
        ValueError: not where 2:4 runs.
    """
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    kinds = sorted({device.type for device in devices})
    interpreted = decode_kernel.triton.knobs.runtime.interpret
    if kinds != ["cuda"] and not (kinds == ["cpu"] and interpreted):
        there = "call model.to('cuda') first." if torch.cuda.is_available() else "there is no CUDA device here."
        raise ValueError(
            f"2:4 inference needs CUDA and the model is on {', '.join(kinds)}: {there} On a CPU 2:4 zeros make nothing faster; a smaller "
            "model does (PruningConfig('taylor', parameters=0.7)), and save_pretrained(compact=True) makes smaller files. "
            "hf_prune.advise(model) measures it."
        )
    return min(devices, key=str)


def _eligible(model: nn.Module, use: str) -> tuple[dict[str, tuple[nn.Linear, str | float]], dict[str, str]]:
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
        elif use == "prefill" or (kept := int(weight.detach().count_nonzero()) / weight.numel()) > MOST_KEPT:
            dense[name] = f"not 2:4{f' but {pattern}' * bool(pattern)}"
        else:
            linears[name] = module, round(kept, 1)
    return linears, {name: why for name, why in dense.items() if name not in linears}


def _interpreted_plan(weight: Tensor, bias: Tensor | None, use: str) -> Plan:
    if use == "prefill":
        raise ValueError("use='prefill' needs sparse tensor cores, which Triton's interpreter has not: use 'any' or 'decode'.")
    tile = decode_kernel.Schedule(min(256, 1 << (len(weight) - 1).bit_length()), block_words=32, rows=decode_kernel.MAX_ROWS)
    form, missing = "decode", dict.fromkeys(LIBRARIES, "no CUDA device")
    if _kernel_for(weight) is bitmask_kernel:
        form, tile, missing = "bitmask", bitmask_kernel.Schedule(block_out=4), {}
    steps = (KERNELS[form].MAX_ROWS, form), (math.inf, "dense" if use == "any" else "unpacked")
    return Plan(steps, ((math.inf, tile),), missing=missing)


def measured_plan(weight: Tensor, bias: Tensor | None, use: str = "any") -> Plan:
    """The fastest forms for a sparse `weight` (out, in) on its GPU; what fails there is in `missing`."""
    missing: dict[str, str] = {}
    # Form -> its product, and what that reads besides x.
    forms: dict[str, tuple] = {"dense": (partial(functional.linear, bias=bias), weight)}
    schedules: tuple = ()
    algorithms: tuple = ()
    kernel = _kernel_for(weight)
    ours = next(form for form, of in KERNELS.items() if of is kernel)
    if use != "prefill":
        try:
            packed = kernel.pack(weight)
            schedules = _tuned(kernel, *packed, weight)
            forms[ours] = partial(_packed, bias=bias, schedules=schedules), *packed
        except Exception as error:  # no compiler, an old GPU, ...: whatever it is, dense still runs, and the report says why
            missing[ours] = _survived(error, weight)
    for name in LIBRARIES if use != "decode" and ours == "decode" else ():
        try:
            if name == "cusparselt" and weight.dtype == torch.float16:
                raise TypeError(
                    "not tried in float16, where it ended in an illegal instruction on an H100 (torch 2.11): use bfloat16"
                )
            library = _library_of(name, weight)
            run = partial(functional.linear, bias=bias)
            if name == "cusparselt":
                algorithms = _searched(library, weight, bias)
                run = partial(_cusparselt, bias=bias, algorithms=algorithms)
            x = sample(PREFILL_ROWS, weight)
            _compared(run(x, library), functional.linear(x, weight, bias))
            forms[name] = run, library
        except Exception as error:
            missing[name] = _survived(error, weight)
    spent: dict[int, dict[str, float]] = {}
    for rows in ROWS:
        fitting = {name: form for name, form in forms.items() if name not in KERNELS or rows <= kernel.MAX_ROWS}
        spent[rows] = {name: milliseconds(run, sample(rows, weight), *held) for name, (run, *held) in fitting.items()}
    hosts = {name: _host_milliseconds(run, sample(1, weight), *held) for name, (run, *held) in forms.items()}
    eager = {rows: {name: took + hosts[name] for name, took in by_form.items()} for rows, by_form in spent.items()}
    return Plan(_steps(spent, use), schedules, algorithms, _steps(eager, use) if use == "any" else (), spent, missing)


def _steps(spent: dict[int, dict[str, float]], use: str) -> tuple[tuple[float, str], ...]:
    """Which form for how many rows. Between two row counts whose best forms differ it is dense, the one that is never bad."""
    at_prefill = spent[PREFILL_ROWS]
    library = min(set(at_prefill) & set(LIBRARIES), key=at_prefill.get, default="dense")  # one is held, not both
    if use == "prefill":
        return ((math.inf, library),)
    if use == "decode":
        ours = next((form for form in KERNELS if form in spent[1]), None)
        return ((KERNELS[ours].MAX_ROWS, ours), (math.inf, "unpacked")) if ours else ((math.inf, "dense"),)
    best = []
    for rows, measured in sorted(spent.items()):
        form = min(set(measured) & {"dense", *KERNELS, library}, key=measured.get)
        best.append((rows, form if measured["dense"] > NOISE * measured[form] else "dense"))
    steps: list[tuple[float, str]] = []
    for (rows, form), (more, other) in zip(best, best[1:]):
        if form != other:
            steps += [(rows, form)] if form != "dense" else []
            steps += [(more - 1, "dense")] if other != "dense" and (form == "dense" or more - 1 > rows) else []
    return *steps, (math.inf, best[-1][1])


def _searched(packed: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[tuple[float, int], ...]:
    """cuSPARSELt's fastest kernel for each number of rows, by its own search."""
    algorithms: list[tuple[float, int]] = []
    for rows in ROWS:
        if rows >= LEAST_ROWS:
            number = torch._cslt_sparse_mm_search(packed, sample(rows, weight).t(), bias=bias, transpose_result=True)
            algorithms.append((rows, number))
    return *algorithms, (math.inf, algorithms[-1][1])


def _tuned(kernel: Any, values: Tensor, codes: Tensor, weight: Tensor) -> tuple[tuple[float, tuple], ...]:
    """The fastest schedule of one of our kernels for each number of rows, checked against the dense product."""
    tried = {rows: list(kernel.Schedule.candidates(rows)) for rows in kernel.TUNED_ROWS}
    samples = {rows: sample(rows, weight) for rows in tried}

    def compiled(job: tuple[int, tuple]) -> None:
        with contextlib.suppress(Exception):  # it will be told when it is timed
            kernel.linear(samples[job[0]], values, codes, job[1])

    if weight.is_cuda:
        with ThreadPoolExecutor() as pool:
            list(pool.map(compiled, {schedule: (rows, schedule) for rows in tried for schedule in tried[rows]}.values()))
    schedules = []
    for rows, candidates in tried.items():
        expected = functional.linear(samples[rows], weight)
        seconds, problem = {}, RuntimeError("no schedule to try")
        for schedule in candidates:
            try:
                _compared(kernel.linear(samples[rows], values, codes, schedule), expected)
                seconds[schedule] = milliseconds(partial(kernel.linear, how=schedule), samples[rows], values, codes)
            except Exception as error:  # one that needs more than this GPU has
                problem = error
        if not seconds:
            raise problem
        schedules.append((rows, min(seconds, key=seconds.get)))
    return *schedules, (math.inf, schedules[-1][1])


def _compared(y: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError unless `y` is `expected`, to what 16 bits can hold."""
    if not (y.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max():
        raise RuntimeError("its result differs from the dense product")


def sample(rows: int, weight: Tensor) -> Tensor:
    generator = torch.Generator(weight.device).manual_seed(0)
    return torch.randn(rows, weight.shape[1], generator=generator, device=weight.device, dtype=weight.dtype)


def replayed(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a CUDA graph, so that the host does not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[..., Any], x: Tensor, *weights: Tensor) -> float:
    """Median time of one of many `run(x, *weights)` within a replayed CUDA graph.

    As in decoding, each call finds its weights in memory: it has a copy of them where they would stay in the L2 cache. The graph
    reads a GiB, so that its own launch does not count.
    """
    size = sum(weight.nbytes for weight in weights)
    calls = min(64, math.ceil(2**30 / size))
    copies = min(calls, math.ceil(3 * torch.cuda.get_device_properties(x.device).L2_cache_size / size))
    held = [weights, *(tuple(map(_copied, weights)) for _ in range(copies - 1))]

    def all_calls() -> None:
        for call in range(calls):
            run(x, *held[call % copies])

    return decode_kernel.triton.testing.do_bench(replayed(all_calls), warmup=2, rep=8, return_mode="median") / calls


def _copied(weight: Tensor) -> Tensor:
    if not isinstance(weight, LIBRARIES["cutlass"]):
        return weight.clone()
    names, about = weight.__tensor_flatten__()  # older torch cannot clone it
    parts = {name: getattr(weight, name).clone() for name in names}
    return type(weight).__tensor_unflatten__(parts, about, weight.shape, weight.stride())


def _host_milliseconds(run: Callable[..., Any], x: Tensor, *weights: Tensor) -> float:
    """Time that the host takes to launch `run(x, *weights)`."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize(x.device)
        started = time.perf_counter()
        for _ in range(20):
            run(x, *weights)
        times.append((time.perf_counter() - started) / 20 * 1e3)
    return min(times)


def _survived(error: Exception, weight: Tensor) -> str:
    """The first line of `error`, unless nothing more can run on the GPU after it: then that error is raised."""
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)
    return first_line(error)


def _bytes_held(linear: SemiStructuredLinear) -> int:
    """By all forms of the weight of `linear`; what two of them share counts once."""
    held = [linear._parameters.get("weight"), linear.values, linear.codes]
    if isinstance(linear.library, LIBRARIES["cutlass"]):  # its own nbytes would be those of the dense matrix
        held += [getattr(linear.library, name) for name in linear.library.__tensor_flatten__()[0]]
    else:
        held.append(linear.library)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held if tensor is not None}.values())
