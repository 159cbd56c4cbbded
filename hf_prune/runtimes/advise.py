"""What pruning would gain on this machine, told before anyone prunes: shapes, speed, sizes, and a recommendation.

Speed is that of the model's linears, each distinct shape timed on random weights with the zeros in question; no checkpoint is read. A
backend that is not here has no number. Leaves out quality, and what no pattern makes faster: attention, norms, the head.
"""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..patterns import first_line
from ..report import by_reason, table
from ..serialization import check_causal, skeleton_of


ROWS = (1, 16, 512)  # decoding, a small batch, a prompt
KEPT = 0.7  # of each matrix, by the structured contender
GAIN = 1.1  # what a pattern has to gain to be recommended
COLD = 2**25  # bytes of weights that pass before one comes again: decoding does not find them in a cache
LARGEST = 2**22  # weights of a matrix that is timed on a CPU: of larger ones some rows

DENSE, STRUCTURED = "dense, torch", f"structured, {KEPT:.0%} kept"
FORMS = {"cutlass": "2:4, torch CUTLASS", "cusparselt": "2:4, cuSPARSELt", "decode": "2:4, our decode kernel"}
BITMASK = "50 %, our bitmask kernel"
EIGHT_BITS = {"2:4 int8, packed": torch.int8, "2:4 fp8, packed": torch.float8_e4m3fn}
LIBRARIES = {  # whose kernels have least sizes
    FORMS["cutlass"]: torch.sparse.SparseSemiStructuredTensorCUTLASS,
    FORMS["cusparselt"]: torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
}
ON_CPU = ("2:4, torch.sparse", "50 %, torch.sparse", "2:4, ONNX Runtime CPU", "2:4, OpenVINO CPU")


@dataclass
class Shape:
    """Linears of one shape: globs of their names, and what cannot be had, as backend (or "2:4") -> why."""

    out_features: int
    in_features: int
    count: int = 0
    names: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"({self.out_features}, {self.in_features})"


@dataclass
class Advice:
    """What `advise` found; prints as tables.

    Attributes:
        speed: contender -> rows -> seconds of torch's dense linears over its own, all of the model together.
        not_measured: contender -> why it has no number.
        sizes: form -> (bytes of its files, bytes of its weights in memory).
        recommendation: "2:4", "unstructured", "structured" or "nothing".
    """

    model: str
    device: str
    dtype: str
    parameters: int
    shapes: list[Shape]
    speed: dict[str, dict[int, float]]
    not_measured: dict[str, str]
    sizes: dict[str, tuple[int, int]]
    recommendation: str
    reason: str
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        checked = ("2:4", *FORMS.values())
        fits = [("shape", "linears", *checked)]
        for shape in self.shapes:
            fits.append((str(shape), str(shape.count), *("no" if name in shape.problems else "fits" for name in checked)))
        speed = [("linears", *(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS)), (DENSE, *["1.00x"] * len(ROWS))]
        speed += [(name, *(f"{by_rows[rows]:.2f}x" for rows in ROWS)) for name, by_rows in self.speed.items()]
        speed += [(name, f"not measured here: {why}") for name, why in self.not_measured.items()]
        sizes = [("size", "files", "weights in memory")]
        for name, both in self.sizes.items():
            sizes.append((name, *(f"{n / 2**20:.0f} MiB ({n / dense:.2f})" for n, dense in zip(both, self.sizes["dense"]))))
        problems = {
            f"{', '.join(shape.names)} {shape}": "; ".join(sorted(set(shape.problems.values()))) for shape in self.shapes
        }
        problems = by_reason({name: why for name, why in problems.items() if why})
        head = f"{self.model}, {self.parameters / 1e6:.1f} M parameters, {self.dtype}; {self.device}; {self.seconds:.0f} s"
        end = [*problems, f"recommendation: {self.recommendation}. {self.reason}"]
        return "\n\n".join([head, table(fits), table(speed), table(sizes), "\n".join(end)])


def advise(
    model: PreTrainedModel | PretrainedConfig | str | Path,
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> Advice:
    """What 2:4, unstructured and structured pruning would gain for `model` on this machine; `print` it.

    Args:
        model: a model, its config, or a folder or Hub name; weights are not read.
        device: "cpu" or "cuda"; default is "cuda" where there is one.
        dtype: of the weights, as torch.bfloat16 or "bfloat16"; "auto" is the model's own.
        gguf_file: name of a GGUF file in the folder that is to be read instead of config.json.
        trust_remote_code: run the Python code that the folder brings for its model.

    Raises:
        TypeError, ValueError: no causal language model, or a device that is not here.
    """
    started = time.perf_counter()
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"advise measures on 'cpu', or on 'cuda' where there is one; got device {device!r}.")
    kind = str(dtype).removeprefix("torch.")
    if kind not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be 'auto', 'float32', 'float16' or 'bfloat16', got {kind!r}.")
    model, device = _skeleton(model, gguf_file, trust_remote_code), torch.device(device)
    dtype = model.dtype if kind == "auto" else getattr(torch, kind)
    shapes = _shapes_of(model, dtype)
    speed, not_measured = _measure(shapes, device, dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            not_measured[_glob(name)] = "fused experts, which no backend here packs; they count as dense"
    sizes = _sizes(model, shapes, dtype)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words = type(model).__name__, where, str(dtype).removeprefix("torch."), parameters
    advice = Advice(*words, shapes, speed, not_measured, sizes, *_recommendation(speed))
    advice.seconds = time.perf_counter() - started
    return advice


def _skeleton(model: Any, gguf_file: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model, on the meta device if it was only named."""
    if isinstance(model, PreTrainedModel):
        return model
    name = "the config"
    if isinstance(model, (str, Path)):
        name = str(model)
        try:
            files = {"gguf_file": gguf_file} if gguf_file else {}
            model = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **files)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise
            raise ValueError(f"{name!r} is no folder or Hub name of a model: {first_line(error)}") from error
    if not isinstance(model, PretrainedConfig):
        raise TypeError(
            f"advise takes a model of Transformers, its config, or a folder or Hub name, got a {type(model).__name__}."
        )
    check_causal(model, name)
    with torch.device("meta"):
        return skeleton_of(model, trust_remote_code)


def _shapes_of(model: PreTrainedModel, dtype: torch.dtype) -> list[Shape]:
    shapes: dict[tuple[int, int], Shape] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            size = tuple(module.weight.shape)[:: -1 if isinstance(module, Conv1D) else 1]
            shape = shapes.setdefault(size, Shape(*size, problems=_problems(*size, dtype)))
            shape.count += 1
            shape.names += [glob] if (glob := _glob(name)) not in shape.names else []
    if not shapes:
        raise ValueError(f"{type(model).__name__} has no linears but its head: it cannot be told what pruning would gain.")
    return list(shapes.values())


def _glob(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _problems(out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, str]:
    if in_features % 4:
        why = f"2:4 is impossible, since in_features {in_features} is not divisible by 4"
        return dict.fromkeys(("2:4", *FORMS.values(), *EIGHT_BITS), why)
    if dtype not in (torch.float16, torch.bfloat16):
        why = f"packed weights on a GPU need float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
        return dict.fromkeys((*FORMS.values(), BITMASK, *EIGHT_BITS), why)
    least = {name: tuple(kind._DTYPE_SHAPE_CONSTRAINTS[dtype][:2]) for name, kind in LIBRARIES.items()}
    return {
        name: f"{name} needs multiples of {of}" for name, of in least.items() if out_features % of[0] or in_features % of[1]
    }


def _measure(
    shapes: list[Shape], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Contender -> rows -> speed over dense, of all linears together; and why others have none."""
    elsewhere = ON_CPU if device.type == "cuda" else (*FORMS.values(), BITMASK, *EIGHT_BITS)
    missing = dict.fromkeys(elsewhere, "a CPU's" if device.type == "cuda" else "no CUDA device")
    missing["2:4, TensorRT"] = "it runs exported models, and none is made here"
    if device.type == "cpu":
        missing["2:4, ONNX Runtime CPU"] = "it multiplies zeros as all else, as fast as dense"
    measured: list[tuple[int, dict[str, dict[int, float]]]] = []
    for shape in shapes:
        seconds, why = _on_gpu(shape, device, dtype) if device.type == "cuda" else _on_cpu(shape, dtype)
        missing |= why
        measured.append((shape.count, seconds))

    def total(name: str, rows: int) -> float:  # where a shape cannot have the pattern, it stays dense
        return sum(count * seconds.get(name, seconds[DENSE])[rows] for count, seconds in measured)

    names = dict.fromkeys(name for _, seconds in measured for name in seconds if name not in {DENSE, *missing})
    return {name: {rows: total(DENSE, rows) / total(name, rows) for rows in ROWS} for name in names}, missing


def _on_gpu(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Contender -> rows -> milliseconds, and why others have none; as `to_semi_structured` would find them."""
    from .plans import measured_plan, milliseconds, sample
    from .semi_structured import check_triton

    check_triton()
    weight = torch.randn(shape.out_features, shape.in_features, device=device, dtype=dtype)
    smaller = weight[: math.ceil(KEPT * len(weight))].clone()
    sparse = {pattern: _with_zeros(weight, pattern) for pattern in ("50 %", "2:4") if pattern not in shape.problems}
    plans = [measured_plan(values, None) for values in sparse.values()]
    eight = {
        name: measured_plan(sparse["2:4"], None, dtype=of) for name, of in EIGHT_BITS.items() if name not in shape.problems
    }
    names = {"dense": DENSE, "bitmask": BITMASK, **FORMS}
    spent: dict[str, dict[int, float]] = {STRUCTURED: {}}
    for rows in ROWS:
        spent[STRUCTURED][rows] = milliseconds(functional.linear, sample(rows, weight), smaller)
        for plan in plans:
            by_form = plan.milliseconds[rows]
            for form in plan.milliseconds[ROWS[0]]:  # our kernels are for a few rows: above, dense runs
                spent.setdefault(names[form], {})[rows] = by_form.get(form, by_form["dense"])
        for name, plan in eight.items():
            if len(plan.milliseconds[ROWS[0]]) > 1:
                spent.setdefault(name, {})[rows] = plan.milliseconds[rows][plan.form(rows)]
    missing = {names[form]: f"{shape}: {why}" for plan in plans for form, why in plan.missing.items()}
    for name, plan in eight.items():
        if name not in spent:
            missing[name] = f"{shape}: {'; '.join(plan.missing.values())}"
    return spent, missing


def _on_cpu(shape: Shape, dtype: torch.dtype) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Contender -> rows -> seconds for one linear, and why others have none."""
    out_features = max(1, min(shape.out_features, LARGEST // shape.in_features))
    weight = torch.randn(out_features, shape.in_features, dtype=dtype)
    makers: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
        DENSE: partial(_in_torch, weight),
        STRUCTURED: partial(_in_torch, weight[: math.ceil(KEPT * out_features)]),
        "50 %, torch.sparse": partial(_in_torch_sparse, _with_zeros(weight, "50 %")),
    }
    contenders = {"dense": weight}
    if "2:4" not in shape.problems:
        contenders["2:4"] = _with_zeros(weight, "2:4")
        makers["2:4, torch.sparse"] = partial(_in_torch_sparse, contenders["2:4"])
    # Graphs of so many matrices: to start one takes as long as a small product.
    graphs: dict[str, Callable[[int], Callable[[Tensor], Any]]] = {"dense, ONNX Runtime CPU": partial(_in_onnxruntime, weight)}
    graphs |= {f"{pattern}, OpenVINO CPU": partial(_in_openvino, values) for pattern, values in contenders.items()}
    seconds: dict[str, dict[int, float]] = {name: {} for name in [*makers, *graphs]}
    missing: dict[str, str] = {}
    many = max(1, min(shape.count, COLD // weight.nbytes))
    for copies, row_counts in ((many, ROWS[:2]), (1, ROWS[2:])):  # many rows are bound by arithmetic, cold or not
        for names in (list(makers), *([name] for name in graphs)):
            runs: dict[str, list[Callable[[Tensor], Any]]] = {}
            time.sleep(0.05)  # a runtime's threads go on waiting for more work, which takes the cores from the next one
            for name in [name for name in names if name not in missing]:
                try:
                    runs[name] = [graphs[name](copies)] if name in graphs else [makers[name]() for _ in range(copies)]
                    runs[name][0](weight[:1])
                except ModuleNotFoundError as error:
                    missing[name] = f"{error.name} is not installed: pip install 'hf-prune[export]'"
                except Exception as error:  # torch.sparse knows no bfloat16 on some machines: no number then, but the reason
                    runs.pop(name, None)
                    missing[name] = first_line(error)
            for rows in row_counts:
                x = torch.randn(rows, shape.in_features, dtype=dtype)
                for name, spent in _in_turns(runs, x).items():
                    seconds[name][rows] = spent / (copies if name in graphs else 1) * shape.out_features / out_features
    return {name: by_rows for name, by_rows in seconds.items() if name not in missing}, missing


def _in_turns(runs: dict[str, list[Callable[[Tensor], Any]]], x: Tensor) -> dict[str, float]:
    """Lower quartile of the seconds of single calls, whatever else the machine does meanwhile; slow contenders get fewer turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(12):
        for name, calls in runs.items():
            if turn < 3 or sum(times[name]) < 0.2:
                for call in calls:
                    started = time.perf_counter()
                    call(x)
                    times[name].append(time.perf_counter() - started)
    return {name: sorted(spent)[len(spent) // 4] for name, spent in times.items()}


def _in_torch(weight: Tensor) -> Callable[[Tensor], Any]:
    weight = weight.clone()
    return lambda x: functional.linear(x, weight)


def _in_torch_sparse(weight: Tensor) -> Callable[[Tensor], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's word that CSR is in beta
        sparse = weight.to_sparse_csr()
    return lambda x: sparse @ x.t()


def _in_onnxruntime(weight: Tensor, copies: int) -> Callable[[Tensor], Any]:
    """The sum of products with `copies` matrices, none equal to another."""
    _only_float32(weight)
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    matrices = [numpy_helper.from_array(weight.roll(i, 0).t().contiguous().numpy(), f"w{i}") for i in range(copies)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(copies)]
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(copies)], ["y"]))
    graph = helper.make_graph(nodes, "linears", ends[:1], ends[1:], matrices)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def _in_openvino(weight: Tensor, copies: int) -> Callable[[Tensor], Any]:
    """The same."""
    _only_float32(weight)
    import openvino
    from openvino import opset13

    x = opset13.parameter([-1, weight.shape[1]], openvino.Type.f32)
    products = [opset13.matmul(x, opset13.constant(weight.roll(i, 0).numpy()), False, True) for i in range(copies)]
    model = openvino.Model([functools.reduce(opset13.add, products).output(0)], [x], "linears")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    if bool((weight == 0).any()):
        settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = 0.4  # use zeros where there are more than that
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True)[0]


def _only_float32(weight: Tensor) -> None:
    if weight.dtype != torch.float32:
        raise ValueError("timed in float32 only: dtype='float32'")


def _with_zeros(weight: Tensor, pattern: str) -> Tensor:
    """`weight` with random weights kept: two of each four, or half of all."""
    chance = torch.rand(weight.shape, device=weight.device)
    kept = (chance.unflatten(1, (-1, 4)).argsort(-1) < 2).flatten(1) if pattern == "2:4" else chance < 0.5
    return weight.masked_fill(~kept, 0.0)


def _sizes(model: PreTrainedModel, shapes: list[Shape], dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Form -> bytes of files and of weights in memory; embeddings, head and norms stay dense in all of them."""
    whole = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    linears = bits = coded = 0
    for shape in shapes:
        rows = shape.count * shape.out_features
        linears += rows * shape.in_features * dtype.itemsize
        bits += rows * -(-shape.in_features // 8)
        coded += (
            rows * -(-shape.in_features // 8) if shape.in_features % 8 else rows * shape.in_features // 12
        )  # as masks.py stores them
    rest = whole - linears
    sizes = {"dense": (whole, whole)}
    if not any("2:4" in shape.problems for shape in shapes):
        sizes["2:4, ordinary folder"] = whole + coded, whole
        sizes["2:4, compact folder"] = rest + linears // 2 + coded, whole
        if dtype.itemsize == 2:
            sizes["2:4, packed for decoding on a GPU"] = whole + coded, rest + linears * 9 // 16
            sizes["2:4 in 8 bits, packed for decoding on a GPU"] = whole + coded, rest + linears * 5 // 16
    sizes["50 %, compact folder"] = rest + linears // 2 + bits, whole
    if dtype.itemsize == 2:
        sizes["50 %, packed for decoding on a GPU"] = whole + bits, rest + linears * 5 // 8
    return sizes | {STRUCTURED: (rest + int(linears * KEPT),) * 2}


def _recommendation(speed: dict[str, dict[int, float]]) -> tuple[str, str]:
    """The pattern that gains most over all row counts and loses at none, over dense in torch and in the same runtime, and why."""
    dense = {name.partition(", ")[2]: by_rows for name, by_rows in speed.items() if name.startswith("dense")}
    gains: dict[str, list[float]] = {}
    for name, by_rows in speed.items():
        pattern, _, runtime = name.partition(", ")
        if pattern != "dense":
            gains[name] = [gain / max(1.0, dense.get(runtime, {}).get(rows, 1.0)) for rows, gain in by_rows.items()]
    if forms := [gains.pop(name) for name in FORMS.values() if name in gains]:
        gains["2:4, to_semi_structured"] = [max(1.0, *at_rows) for at_rows in zip(*forms)]
    eight_bits = {name: gains.pop(name) for name in EIGHT_BITS if name in gains}
    lossy = [f"{name} ({_words(of)})" for name, of in eight_bits.items() if _mean(of) > GAIN]
    words = {name: _words(of) for name, of in gains.items()}
    good = {name: _mean(of) for name, of in gains.items() if min(of) > 0.95}
    best = max(good, key=good.get, default=None)
    vain = [f"{name} ({words[name]})" for name in gains if not name.startswith("structured") and good.get(name, 0) < GAIN]
    rest = f" No gain in speed: {'; '.join(vain)}; zeros still make compact files smaller." if vain else ""
    faster = [f"{name} ({_words(of.values())})" for name, of in dense.items() if _mean(of.values()) > GAIN]
    rest += f" Faster without any pruning, exported: {'; '.join(faster)}." if faster else ""
    rest += f" Faster, but quantised too: {'; '.join(lossy)}." if lossy else ""
    if best is None or good[best] < GAIN:
        return "nothing", f"No pattern gains {GAIN}x here.{rest}"
    pattern = {"2:4": "2:4", "50 %": "unstructured"}.get(best.split(", ")[0], "structured")
    runtime = best.partition(", ")[2]
    over = f" in torch and in {runtime}, whichever is faster" if runtime in dense else ""
    return pattern, f"{best}: {words[best]} rows, over dense{over}.{rest}"


def _mean(gains: Collection[float]) -> float:
    return math.prod(gains) ** (1 / len(gains))


def _words(gains: Iterable[float]) -> str:
    return ", ".join(f"{gain:.2f}x at {rows}" for rows, gain in zip(ROWS, gains))
