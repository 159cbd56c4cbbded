"""A 2:4 model that runs on what is fastest for the number of rows: our kernel for a few, sparse tensor cores for many, dense between.

Each `nn.Linear` whose weight is 2:4 becomes a `SemiStructuredLinear` in place, holding only the forms that its plan uses. The plan is
measured on the device, once a shape. Leaves out how the kernel works (`decode_kernel.py`), and int8 and fp8.

Memory, in units of the dense weight: packed for few rows 0.5625, for a library 0.5625, dense 1. With `use="any"` a linear may hold all
three, since no form serves all row counts: 2.125, or 1.625 with CUTLASS, whose values ours shares. That is the price of
having the fastest for each. `use="decode"` holds the first alone and makes the dense weight anew for more than 16 rows, `use="prefill"` the second.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..report import by_reason, table


try:
    from . import decode_kernel
except ImportError:  # no Triton
    decode_kernel = None

USES = ("any", "decode", "prefill")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # what is measured
PREFILL_ROWS = 2048
LIBRARIES = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}
NOISE = 1.1  # another form is taken where dense takes this much longer; within a model a gain of 1.04 was a loss


@dataclass(frozen=True)
class Plan:
    """What runs for how many rows of one shape.

    Attributes:
        steps: (most rows, form) in ascending order; a form is "decode", "cusparselt", "cutlass", "dense" or "unpacked", which
            makes the dense weight anew at each call.
        schedules: (most rows, schedule of the decode kernel).
        milliseconds: rows -> form -> what was measured; empty in Triton's interpreter.
        missing: form -> why it could not be measured.
    """

    steps: tuple[tuple[float, str], ...]
    schedules: tuple[tuple[float, decode_kernel.Schedule], ...] = ()
    milliseconds: dict[int, dict[str, float]] = field(default_factory=dict, compare=False)
    missing: dict[str, str] = field(default_factory=dict, compare=False)

    def form(self, rows: int) -> str:
        return next(form for most, form in self.steps if rows <= most)

    def schedule(self, rows: int) -> decode_kernel.Schedule:
        return next(schedule for most, schedule in self.schedules if rows <= most)

    @property
    def forms(self) -> set[str]:
        return {form for _, form in self.steps}

    def __str__(self) -> str:
        bounds = [f"{form} to {most} rows" if most < math.inf else f"{form} above" for most, form in self.steps]
        return ", ".join(bounds) if len(bounds) > 1 else self.steps[0][1]


class SemiStructuredLinear(nn.Linear):
    """A linear whose weight is held in the forms of its plan; made from an `nn.Linear` in place, and back. For inference only.

    `weight` is the dense weight, made anew where it is not held; `state_dict()` has it, so what is saved is a dense model.
    """

    plan: Plan
    values: Tensor | None
    codes: Tensor | None
    library: Tensor | None

    @property
    def weight(self) -> Tensor:
        if (dense := self._parameters.get("weight")) is not None:
            return dense
        if self.values is not None:
            return decode_kernel.unpack(self.values, self.codes, self.in_features)
        return self.library.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        rows = flat.shape[0]
        form = self.plan.form(rows)
        if form == "decode":
            schedule = self.plan.schedule(rows)
            if torch.compiler.is_compiling() or (torch.is_grad_enabled() and flat.requires_grad):
                y = decode_kernel.sparse24_linear(flat, self.values, self.codes, list(schedule))
            else:  # an operator of Python's takes longer to call than the kernel to run
                y = decode_kernel.linear(flat, self.values, self.codes, schedule)
            y = y if self.bias is None else y + self.bias
        else:
            y = functional.linear(flat, self.library if form in LIBRARIES else self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        raise ValueError(f"{prefix}weight is packed: call hf_prune.to_dense(model) before loading weights.")


def _pack_in_place(linear: nn.Linear, plan: Plan) -> None:
    weight = linear.weight.detach()
    values = codes = library = None
    if plan.forms & {"decode", "unpacked"}:
        values, codes = decode_kernel.pack(weight)
    for name in plan.forms & set(LIBRARIES):
        library = LIBRARIES[name].from_dense(weight.contiguous())
        if values is not None and name == "cutlass" and _equal_bits(library.packed, values):
            values = library.packed  # the two differ in their indices alone
    for name, tensor in (("values", values), ("codes", codes), ("library", library)):
        linear.register_buffer(name, tensor, persistent=False)
    linear.plan, linear.trained = plan, linear.weight.requires_grad
    linear.__class__ = SemiStructuredLinear
    if "dense" not in plan.forms and (
        values is not None or _equal_bits(library.to_dense(), weight)
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
    """Packs the 2:4 linears of a `model` on a CUDA device, in place, each for what is fastest there; `to_dense` undoes it.

    `generate`, a static cache, `torch.compile`, deepcopy and `state_dict()` work as before; saving, pruning and loading weights are
    refused until `to_dense`. A linear for which nothing is faster than dense is left as it is. The first time the
    kernel is compiled in a dozen ways for each `in`; Triton remembers them.

    Args:
        use: "any" is dense wherever no other form was a tenth faster alone, and takes the memory of all forms it needs; eager
            `generate` waits for Python, in whatever form. "decode" and "prefill" hold one packed form, 0.5625 of the dense weight,
            and are slow for what they were not made for. (A library that would not give a weight back bit for bit does not
            replace it.)

    Raises:
        TypeError, ValueError: no model, not on CUDA, nothing that is 2:4 in float16 or bfloat16; nothing has changed then. With
            TRITON_INTERPRET=1 in the environment a model on the CPU is taken, for tests: exact, very slow, and not measured.
        ImportError: no Triton.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_semi_structured takes a model, got a {type(model).__name__}.")
    if use not in USES:
        raise ValueError(f"use={use!r} is not known: it is one of {', '.join(map(repr, USES))}.")
    if decode_kernel is None:
        raise ImportError("2:4 inference needs Triton: pip install 'hf-prune[sparse]'.")
    if any(isinstance(module, SemiStructuredLinear) for module in model.modules()):
        raise ValueError("the model is packed already: call hf_prune.to_dense(model) first.")
    device = _device_of(model)
    linears, dense = _eligible(model)
    if not linears:
        reasons = sorted(set(dense.values())) or ["it has no nn.Linear"]
        raise ValueError(f"nothing to pack: {'; '.join(reasons)}. Prune with pattern='2:4' and load in bfloat16 or float16.")
    report = SemiStructuredReport(torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter", use)
    plan_for = measured_plan if device.type == "cuda" else _interpreted_plan
    plans: dict[tuple, Plan] = {}
    for name, linear in linears.items():  # all that can fail comes before the first linear changes
        key = *linear.weight.shape, linear.weight.dtype, linear.bias is None
        plans[key] = report.plans[name] = plans.get(key) or plan_for(linear.weight.detach().contiguous(), linear.bias, use)
    report.dense = dense
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


def to_dense(model: nn.Module) -> nn.Module:
    """Undoes `to_semi_structured` in place: every weight is again what it was, bit for bit. Returns `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense takes a model, got a {type(model).__name__}.")
    for module in model.modules():
        if isinstance(module, SemiStructuredLinear):
            weight, requires_grad = module.weight.detach(), module.trained
            for name in ("values", "codes", "library"):
                delattr(module, name)
            del module.plan, module.trained
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


def _eligible(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linears that are 2:4, and why others are not taken: whatever has masks, and every `nn.Linear`."""
    masks = getattr(model, "pruning_masks", None) or {}
    patterns = getattr(masks, "patterns", {})
    owners: dict[int, int] = defaultdict(int)
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] += 1
    linears: dict[str, nn.Linear] = {}
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
        elif not decode_kernel.is_semi_structured(weight):
            minus = decode_kernel.is_semi_structured(weight + 0.0)
            dense[name] = "2:4 with zeros that are -0.0, write +0.0" if minus else f"not 2:4{f' but {pattern}' * bool(pattern)}"
        else:
            dense.pop(name, None)
            linears[name] = module
    return linears, dense


def _interpreted_plan(weight: Tensor, bias: Tensor | None, use: str) -> Plan:
    if use == "prefill":
        raise ValueError("use='prefill' needs sparse tensor cores, which Triton's interpreter has not: use 'any' or 'decode'.")
    tile = decode_kernel.Schedule(min(256, 1 << (len(weight) - 1).bit_length()), block_words=32, rows=decode_kernel.MAX_ROWS)
    steps = (decode_kernel.MAX_ROWS, "decode"), (math.inf, "dense" if use == "any" else "unpacked")
    return Plan(steps, ((math.inf, tile),), missing=dict.fromkeys(LIBRARIES, "no CUDA device"))


def measured_plan(weight: Tensor, bias: Tensor | None, use: str = "any") -> Plan:
    """The fastest forms for a 2:4 `weight` (out, in) on its GPU; what fails there is in `missing`."""
    missing: dict[str, str] = {}
    runs: dict[str, Callable[[Tensor], Tensor]] = {"dense": partial(functional.linear, weight=weight, bias=bias)}
    schedules: tuple = ()
    if use != "prefill":
        try:
            values, codes = decode_kernel.pack(weight)
            schedules = _tuned(values, codes, weight)

            def decode(x: Tensor) -> Tensor:
                schedule = next(schedule for most, schedule in schedules if len(x) <= most)
                y = decode_kernel.linear(x, values, codes, schedule)
                return y if bias is None else y + bias

            runs["decode"] = decode
        except Exception as error:  # no compiler, an old GPU, ...: whatever it is, dense still runs, and the report says why
            missing["decode"] = _first_line(error)
    for name, kind in LIBRARIES.items() if use != "decode" else ():
        try:
            library = kind.from_dense(weight)
            runs[name] = partial(functional.linear, weight=library, bias=bias)
            x = sample(PREFILL_ROWS, weight)
            _compared(runs[name](x), runs["dense"](x))
        except Exception as error:
            runs.pop(name, None)
            missing[name] = _first_line(error)
    spent: dict[int, dict[str, float]] = {}
    for rows in ROWS:
        x = sample(rows, weight)
        fitting = {form: run for form, run in runs.items() if form != "decode" or rows <= decode_kernel.MAX_ROWS}
        spent[rows] = {form: milliseconds(partial(run, x)) for form, run in fitting.items()}
    return Plan(_steps(spent, use), schedules, spent, missing)


def _steps(spent: dict[int, dict[str, float]], use: str) -> tuple[tuple[float, str], ...]:
    """Which form for how many rows. Between two row counts whose best forms differ it is dense, the one that is never bad."""
    at_prefill = spent[PREFILL_ROWS]
    library = min(set(at_prefill) & set(LIBRARIES), key=at_prefill.get, default="dense")  # one is held, not both
    if use == "prefill":
        return ((math.inf, library),)
    if use == "decode":
        packed = "decode" in spent[1]
        return ((decode_kernel.MAX_ROWS, "decode"), (math.inf, "unpacked")) if packed else ((math.inf, "dense"),)
    best = []
    for rows, measured in sorted(spent.items()):
        form = min(set(measured) & {"dense", "decode", library}, key=measured.get)
        best.append((rows, form if measured["dense"] > NOISE * measured[form] else "dense"))
    steps: list[tuple[float, str]] = []
    for (rows, form), (more, other) in zip(best, best[1:]):
        if form != other:
            steps += [(rows, form)] if form != "dense" else []
            steps += [(more - 1, "dense")] if other != "dense" and (form == "dense" or more - 1 > rows) else []
    return *steps, (math.inf, best[-1][1])


def _tuned(values: Tensor, codes: Tensor, weight: Tensor) -> tuple[tuple[int, decode_kernel.Schedule], ...]:
    """The fastest schedule for one row, for two, four and more, each checked against the dense product."""
    tried = {rows: list(decode_kernel.Schedule.candidates(rows)) for rows in (1, 2, 4, decode_kernel.MAX_ROWS)}
    samples = {rows: sample(rows, weight) for rows in tried}

    def run(rows: int, schedule: decode_kernel.Schedule) -> Callable[[], Tensor]:
        return partial(decode_kernel.linear, samples[rows], values, codes, schedule)

    def compiled(job: tuple[int, decode_kernel.Schedule]) -> None:
        with contextlib.suppress(Exception):  # it will be told when it is timed
            run(*job)()

    if weight.is_cuda:
        with ThreadPoolExecutor() as pool:
            list(pool.map(compiled, {schedule: (rows, schedule) for rows in tried for schedule in tried[rows]}.values()))
    schedules = []
    for rows, candidates in tried.items():
        expected = functional.linear(samples[rows], weight)
        seconds, problem = {}, RuntimeError("no schedule to try")
        for schedule in candidates:
            try:
                _compared(run(rows, schedule)(), expected)
                seconds[schedule] = milliseconds(run(rows, schedule))
            except Exception as error:  # one that needs more than this GPU has
                problem = error
        if not seconds:
            raise problem
        schedules.append((rows, min(seconds, key=seconds.get)))
    return tuple(schedules)


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
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a replayed CUDA graph, with a cold cache, as in decoding, where every weight is read once a token."""
    return decode_kernel.triton.testing.do_bench(replayed(run), warmup=2, rep=8, return_mode="median")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _bytes_held(linear: SemiStructuredLinear) -> int:
    """By all forms of the weight of `linear`; what two of them share counts once."""
    held = [linear._parameters.get("weight"), linear.values, linear.codes]
    if linear.library is not None:  # its own nbytes would be those of the dense matrix
        held += [getattr(linear.library, name) for name in linear.library.__tensor_flatten__()[0]]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held if tensor is not None}.values())
