"""Which form of a sparse weight is fastest for how many rows on the device at hand, found by timing them all, once a shape.

Leaves out the forms' products (`products.py`) and the model that holds them (`semi_structured.py`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..patterns import first_line
from . import products
from .products import KERNELS, LEAST_ROWS, LIBRARIES, at, decode_kernel, eight_bits, form_of, packed_product


ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # what is measured
PREFILL_ROWS = 2048
NOISE = 1.1  # another form is taken where dense takes this much longer; within a model a gain of 1.07 was a loss of 2 %


@dataclass(frozen=True)
class Plan:
    """What runs for how many rows of one shape.

    Attributes:
        steps: (most rows, form) in ascending order; a form is "decode" (our kernel for 2:4), "bitmask" (ours for zeros anywhere),
            "cusparselt", "cutlass", "dense" or "unpacked", which makes the dense weight anew at each call.
        schedules: (most rows, schedule of our kernel).
        algorithms: most rows, and cuSPARSELt's number of the fastest of its kernels, in turn; its default's are far slower.
        eager: as `steps`, where a call is neither captured nor compiled, so that the host's time counts too; empty: the same.
        milliseconds: rows -> form -> what was measured; empty in Triton's interpreter.
        missing: form -> why it could not be measured.
    """

    steps: tuple[tuple[float, str], ...]
    schedules: tuple[tuple[float, tuple], ...] = ()
    algorithms: tuple[int, ...] = ()
    eager: tuple[tuple[float, str], ...] = ()
    milliseconds: dict[int, dict[str, float]] = field(default_factory=dict, compare=False)
    missing: dict[str, str] = field(default_factory=dict, compare=False)

    def form(self, rows: int, eager: bool = False) -> str:
        return at(self.eager if eager and self.eager else self.steps, rows)

    def trials(self) -> Iterator[tuple[str, int]]:
        """Forms and numbers of rows with which everything that this plan may run has run once."""
        bounds = {"cusparselt": self.algorithms[::2], **dict.fromkeys(KERNELS, [most for most, _ in self.schedules])}
        for form in self.forms - {"unpacked"}:
            yield from ((form, int(rows)) for rows in bounds.get(form) or [1] if rows < math.inf)

    @property
    def dense_eagerly(self) -> bool:
        return self.eager == ((math.inf, "dense"),)

    @property
    def forms(self) -> set[str]:
        return {form for _, form in self.steps + self.eager}

    def __str__(self) -> str:
        eager = f"; eager: {_told(self.eager)}" if self.eager and self.eager != self.steps else ""
        return _told(self.steps) + eager


def _told(steps: tuple[tuple[float, str], ...]) -> str:
    bounds = [f"{form} to {most} rows" if most < math.inf else f"{form} above" for most, form in steps]
    return ", ".join(bounds) if len(bounds) > 1 else steps[0][1]


def interpreted_plan(weight: Tensor, bias: Tensor | None, use: str, dtype: torch.dtype | None = None) -> Plan:
    """What Triton's interpreter can run, for tests: nothing is measured."""
    if use == "prefill":
        raise ValueError("use='prefill' needs sparse tensor cores, which Triton's interpreter has not: use 'any' or 'decode'.")
    form, missing = form_of(weight), dict.fromkeys(LIBRARIES, "no CUDA device")
    kernel = KERNELS[form]
    if form == "decode":
        tile = kernel.Schedule(min(256, 1 << (len(weight) - 1).bit_length()), block_words=32, rows=kernel.MAX_ROWS)
    else:
        tile, missing = kernel.Schedule(block_out=4), {}
    steps = (kernel.MAX_ROWS, form), (math.inf, "dense" if use == "any" else "unpacked")
    return Plan(steps, ((math.inf, tile),), missing=missing)


def measured_plan(weight: Tensor, bias: Tensor | None, use: str = "any", dtype: torch.dtype | None = None) -> Plan:
    """The fastest forms for a sparse `weight` (out, in) on its GPU, held in `dtype` (int8 or float8_e4m3fn; None: its own); what fails
    there is in `missing`. "dense" is the product with `weight` as it is."""
    missing: dict[str, str] = {}
    # Form -> its product, and what that reads besides x.
    forms: dict[str, tuple] = {"dense": (partial(functional.linear, bias=bias), weight)}
    schedules: tuple = ()
    algorithms: tuple = ()
    ours = form_of(weight)
    kernel = KERNELS[ours]
    source, weight, *scales = held_in(dtype, weight)
    if use != "prefill":
        try:
            held = *kernel.pack(source), *scales
            schedules = _tuned(kernel, held, weight)
            forms[ours] = partial(packed_product, bias=bias, schedules=schedules), *held
        except Exception as error:  # no compiler, an old GPU, ...: whatever it is, dense still runs, and the report says why
            missing[ours] = _survived(error, weight)
    for name in LIBRARIES if use != "decode" and ours == "decode" else ():
        try:
            if why := _untried(name, source):
                raise TypeError(why)
            library = products.library_of(name, source)
            run = partial(functional.linear, bias=bias)
            if name == "cusparselt":
                algorithms = _searched(library, weight, bias if dtype is None else None)
                run = partial(products.cusparselt_product, bias=bias, algorithms=algorithms, out_features=len(weight))
            x = sample(PREFILL_ROWS, weight)
            _compared(run(x, library, *scales), functional.linear(x, weight, bias), eight_bits.TOLERANCE.get(dtype, 0.02))
            forms[name] = run, library, *scales
        except Exception as error:
            missing[name] = _survived(error, weight)
    spent: dict[int, dict[str, float]] = {}
    for rows in ROWS:
        fitting = {name: form for name, form in forms.items() if name not in KERNELS or rows <= kernel.MAX_ROWS}
        spent[rows] = {name: milliseconds(run, sample(rows, weight), *held) for name, (run, *held) in fitting.items()}
    hosts = {name: _host_milliseconds(run, sample(1, weight), *held) for name, (run, *held) in forms.items()}
    at_prefill = spent[PREFILL_ROWS]
    library = min(set(at_prefill) & set(LIBRARIES), key=at_prefill.get, default=None)  # one is held, not both
    eager = {rows: {name: took + hosts[name] for name, took in by_form.items()} for rows, by_form in spent.items()}
    return Plan(
        steps_of(spent, use, library), schedules, algorithms, steps_of(eager, use, library) if use == "any" else (), spent, missing
    )  # fmt: skip


def held_in(dtype: torch.dtype | None, weight: Tensor) -> tuple[Tensor, ...]:
    """What is packed of `weight`, the weight that it stands for, and, of 8 bits, the scales of its rows."""
    if dtype is None:
        return weight, weight
    q, scales = eight_bits.quantised(weight, dtype)
    return q, eight_bits.dequantised(q, scales, weight.dtype), scales


def _untried(library: str, weight: Tensor) -> str | None:
    """Why `weight` is not given to a library that would take it."""
    if library == "cutlass" and weight.dtype.itemsize == 1:
        return "torch's CUTLASS has no product of 8 bits that gives floats"
    broken = weight.dtype == torch.float16 and (not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (9, 0))
    if library == "cusparselt" and broken:
        return "float16 is broken on an H100 (cuSPARSELt of torch 2.11: its search fails, its products end in an illegal instruction)"
    return None


def steps_of(spent: dict[int, dict[str, float]], use: str, library: str | None) -> tuple[tuple[float, str], ...]:
    """Which form for how many rows, by what was measured of dense, our form and that of a `library`. Between two row counts whose best
    forms differ it is the latter's, if that is sure to be faster than dense there, or dense, the one that is never bad."""
    if use == "prefill":
        return ((math.inf, library or "dense"),)
    if use == "decode":
        ours = next((form for form in KERNELS if form in spent[1]), None)
        return ((KERNELS[ours].MAX_ROWS, ours), (math.inf, "unpacked")) if ours else ((math.inf, "dense"),)
    best = []
    for rows, measured in sorted(spent.items()):
        form = min(set(measured) & {"dense", *KERNELS, library}, key=measured.get)
        best.append((rows, form if measured["dense"] > NOISE * measured[form] else "dense"))
    steps: list[tuple[float, str]] = []
    for (rows, form), (more, other) in zip(best, best[1:]):
        if form == other:
            continue
        # In between a form takes hardly longer than for `more` rows, and dense no less than for `rows`.
        safe = spent[rows]["dense"] > NOISE * spent[more][other]
        steps += [(rows, form)] if form != "dense" or safe else []
        steps += [(more - 1, "dense")] if not safe and other != "dense" and (form == "dense" or more - 1 > rows) else []
    return *steps, (math.inf, best[-1][1])


def _searched(packed: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """cuSPARSELt's fastest kernel for each number of rows, by its own search: rows and number in turn."""
    words = {"bias": bias, "transpose_result": True}
    algorithms: list[int] = []
    for rows in ROWS:
        if rows >= LEAST_ROWS[packed.dtype.itemsize]:
            x = sample(rows, weight)
            if packed.dtype.itemsize == 1:
                x, words["out_dtype"] = eight_bits.quantised(x, packed.dtype)[0], torch.bfloat16
            algorithms += rows, torch._cslt_sparse_mm_search(packed, x.t(), **words)
    return tuple(algorithms)


def _tuned(kernel: Any, held: tuple[Tensor, ...], weight: Tensor) -> tuple[tuple[float, tuple], ...]:
    """The fastest schedule of one of our kernels for each number of rows, checked against the dense product with `weight`."""
    tried = {rows: list(kernel.Schedule.candidates(rows)) for rows in kernel.TUNED_ROWS}
    samples = {rows: sample(rows, weight) for rows in tried}

    def run(x: Tensor, *held: Tensor, how: tuple) -> Tensor:
        return kernel.linear(x, *held[:2], how, *held[2:])

    def compiled(job: tuple[int, tuple]) -> None:
        with contextlib.suppress(Exception):  # it will be told when it is timed
            run(samples[job[0]], *held, how=job[1])

    if weight.is_cuda:
        with ThreadPoolExecutor() as pool:
            list(pool.map(compiled, {schedule: (rows, schedule) for rows in tried for schedule in tried[rows]}.values()))
    schedules = []
    for rows, candidates in tried.items():
        expected = functional.linear(samples[rows], weight)
        seconds, problem = {}, RuntimeError("no schedule to try")
        for schedule in candidates:
            try:
                _compared(run(samples[rows], *held, how=schedule), expected)
                seconds[schedule] = milliseconds(partial(run, how=schedule), samples[rows], *held)
            except Exception as error:  # one that needs more than this GPU has
                problem = error
        if not seconds:
            raise problem
        schedules.append((rows, min(seconds, key=seconds.get)))
    return *schedules, (math.inf, schedules[-1][1])


def _compared(y: Tensor, expected: Tensor, within: float = 0.02) -> None:
    """Raises RuntimeError unless `y` is `expected`, to that share of its largest number: what 16 bits can hold."""
    if not (y.float() - expected.float()).abs().max() <= within * expected.float().abs().max():
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
