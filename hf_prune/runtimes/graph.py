"""The zeros of the masks in an exported graph: every constant matrix that it multiplies by, found again and compared.

Exporters rename, transpose, merge, split, convert and quantise weights. So a matrix is what reaches the product after all of that,
computed from the stored constants alone, as (out, in) with `in` the axis that the graph sums over; and a linear is recognised by its
numbers. The only file that knows what ONNX and OpenVINO call things; it runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view

from ..blocks import Decoder, Linear
from ..masks import Masks
from ..patterns import NM, parse
from ..sequential import mask_of


SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
LIKENESS = 0.5  # relative distance of two sketches: 0 to 0.2 for one linear, 4-bit ones included, about 1.4 for two
PROBED = 16  # rows that look for their place in a larger matrix


@dataclass
class Found:
    """One linear, or some of its rows, in one graph.

    Attributes:
        rows: first and last but one, of the linear.
        constant, at: the matrix, and its row that the first of `rows` is: several linears may have become one.
        stored: dtype in the file.
        pruned, violations: weights that the mask prunes; how many of them are not zero in the graph.
        off_pattern: groups along the axis that the graph sums over with more non-zero weights than N:M allows; None without N:M.
    """

    linear: str
    rows: tuple[int, int]
    graph: str
    constant: str
    at: int
    stored: str
    pattern: str
    pruned: int
    violations: int
    off_pattern: int | None


@dataclass
class Matrix:
    """A constant that the graph multiplies by; `values` (out, in) fp32, up to one factor a row."""

    name: str
    stored: str
    values: ndarray


def zeros_in_graphs(folder: str | Path, format: str, model: torch.nn.Module, masks: Masks) -> tuple[list[Found], list[str]]:
    """Looks for every linear of the pruned `model` under `masks` in every graph in `folder`.

    Returns:
        What was found, and "linear in graph" for all that was not.

    Raises:
        ValueError: no graph is there.
    """
    paths = [path for path in sorted(Path(folder).glob(f"*{SUFFIXES[format]}")) if "tokenizer" not in path.stem]
    if not paths:
        raise ValueError(f"{folder} holds no graph: a file that ends with {SUFFIXES[format]} is needed.")
    linears = {linear.name: linear for linear in Decoder(model).linears if linear.parameter_name in masks} if masks else {}
    assert {linear.parameter_name for linear in linears.values()} == set(masks)
    found, missing = [], []
    for path in paths:
        here = _compare(path, format, linears, masks)
        found += here
        covered = dict.fromkeys(linears, 0)
        for one in here:
            covered[one.linear] += one.rows[1] - one.rows[0]
        missing += [f"{name} in {path.name}" for name, linear in linears.items() if covered[name] < linear.out_features]
    return found, missing


def _compare(path: Path, format: str, linears: dict[str, Linear], masks: Masks) -> list[Found]:
    sketches = {name: _sketch(linear.weight.float().cpu().numpy()) for name, linear in linears.items()}
    found: dict[tuple[str, int], tuple[float, Found]] = {}  # linear and its first row -> distance, and what is there
    for matrix in (_onnx_matrices if format == "onnx" else _openvino_matrices)(path):
        there = _sketch(matrix.values)
        for name, linear in linears.items():
            here = sketches[name]
            if linear.in_features != matrix.values.shape[1] or len(there) < min(len(here), PROBED):
                continue
            row, at, count, distance = _place(here, there)
            if distance < found.get((name, row), (LIKENESS,))[0]:
                kept = mask_of(masks, linear).numpy()[row : row + count]
                pattern = masks.patterns.get(linear.parameter_name, "")
                counts = _counts(matrix.values[at : at + count] != 0, kept, pattern)
                one = Found(name, (row, row + count), path.name, matrix.name, at, matrix.stored, pattern, *counts)
                found[name, row] = distance, one
    return [one for _, one in found.values()]


def _counts(filled: ndarray, kept: ndarray, pattern: str) -> tuple[int, int, int | None]:
    nm = parse(pattern) if pattern and ", " not in pattern else None  # which expert has which of several is not known
    off = nm.violations(torch.from_numpy(filled)) if isinstance(nm, NM) else None
    return kept.size - int(numpy.count_nonzero(kept)), int(numpy.count_nonzero(filled & ~kept)), off


def _sketch(weight: ndarray) -> ndarray:
    """One number for each row of (out, in): its product with a fixed vector, over its norm, so that a scale a row is no matter."""
    probe = numpy.random.default_rng(0).standard_normal(weight.shape[1], dtype=numpy.float32)
    norm = numpy.linalg.norm(weight, axis=1)
    return weight @ probe / numpy.where(norm == 0, 1, norm)


def _place(linear: ndarray, matrix: ndarray) -> tuple[int, int, int, float]:
    """Where the shorter of two sketches begins most likely in the longer: row of the linear, row of the matrix, rows, distance."""
    short, long = (linear, matrix) if len(linear) <= len(matrix) else (matrix, linear)
    windows = sliding_window_view(long, min(PROBED, len(short)))[: len(long) - len(short) + 1]
    start = int(((windows - short[:PROBED]) ** 2).sum(1).argmin())
    distance = numpy.linalg.norm(long[start : start + len(short)] - short) / max(numpy.linalg.norm(short), 1e-12)
    return (0, start, len(short), distance) if short is linear else (start, 0, len(short), distance)


def _split(name: str, stored: str, values: ndarray, in_last: bool) -> Iterator[Matrix]:
    """The matrices (out, in) of a constant of two or more dimensions, `in` its last or last but one."""
    values = numpy.asarray(values, dtype=numpy.float32)
    if values.ndim < 2 or 1 in values.shape[-2:]:
        return
    values = values if in_last else values.swapaxes(-1, -2)
    pieces = values.reshape(-1, *values.shape[-2:])
    for index, piece in enumerate(pieces):
        yield Matrix(name if len(pieces) == 1 else f"{name}[{index}]", stored, piece)


def _onnx_matrices(path: Path) -> Iterator[Matrix]:
    """Of `MatMul`, `Gemm`, `MatMulInteger` and `MatMulNBits`."""
    import onnx
    from onnx.numpy_helper import to_array
    from onnx.reference import ReferenceEvaluator

    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    maker, constant = {}, set(stored)
    for node in graph.node:  # in the order of computation
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            maker.update(dict.fromkeys(node.output, node))
    last: dict[str, dict[str, ndarray]] = {}  # an expert's matrix is one of many outputs of a Split: keep the latest

    def value(name: str) -> ndarray:
        if name in stored:
            return to_array(stored[name], base_dir=str(path.parent))
        node = maker[name]
        key = " ".join(node.output)
        if key not in last:
            outputs = ReferenceEvaluator(node).run(None, {given: value(given) for given in node.input if given})
            last.clear()
            last[key] = dict(zip(node.output, outputs))
        return last[key][name]

    def origin(name: str) -> tuple[str, str]:
        while name not in stored and maker[name].input:
            name = maker[name].input[0]
        return name, onnx.TensorProto.DataType.Name(stored[name].data_type).lower() if name in stored else "constant"

    seen = set()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            yield Matrix(node.input[1], *_blocks_of_bits(node, value))
        for side, name in enumerate(node.input[:2] if node.op_type in ("MatMul", "Gemm", "MatMulInteger") else ()):
            if name not in constant or (name, side) in seen:
                continue
            seen.add((name, side))
            flag = next((a.i for a in node.attribute if a.name == ("transA", "transB")[side]), 0)
            values = numpy.asarray(value(name), dtype=numpy.float32)
            if node.op_type == "MatMulInteger" and len(node.input) > 2 + side and node.input[2 + side]:
                values = values - numpy.asarray(value(node.input[2 + side]), dtype=numpy.float32)
            yield from _split(*origin(name), values, in_last=bool(flag) == bool(side))


def _blocks_of_bits(node: Any, value: Callable[[str], ndarray]) -> tuple[str, ndarray]:
    """Of ONNX Runtime's `MatMulNBits`: weights (out, blocks, bytes), scales (out * blocks), perhaps zero points (out, bytes)."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    out, bits = attributes["N"], attributes["bits"]

    def numbers(packed: ndarray) -> ndarray:
        halves = packed.astype(numpy.float32) if bits == 8 else numpy.stack([packed & 15, packed >> 4], axis=-1)
        return halves.reshape(out, -1).astype(numpy.float32)

    assert bits in (4, 8), bits
    scales = value(node.input[2]).astype(numpy.float32).reshape(out, -1, 1)
    zero = numpy.float32(1 << bits - 1)
    if len(node.input) > 3 and node.input[3]:
        stored = value(node.input[3])
        stored = numbers(stored) if stored.dtype == numpy.uint8 else stored.astype(numpy.float32).reshape(out, -1)
        zero = stored[:, : scales.shape[1], None]
    values = (numbers(value(node.input[1])).reshape(out, scales.shape[1], -1) - zero) * scales
    return f"uint{bits}", values.reshape(out, -1)[:, : attributes["K"]]


def _openvino_matrices(path: Path) -> Iterator[Matrix]:
    """Of `MatMul`; what leads from a constant to it (conversion, scale, zero point, shape) is computed by OpenVINO."""
    import openvino

    core, constant = openvino.Core(), set()
    for node in core.read_model(path).get_ordered_ops():
        inputs = [source.get_source_output().get_node() for source in node.inputs()]
        if node.get_type_name() == "Constant" or inputs and all(one.get_friendly_name() in constant for one in inputs):
            constant.add(node.get_friendly_name())
        if node.get_type_name() != "MatMul":
            continue
        for side, source in enumerate(inputs):
            if source.get_friendly_name() in constant:
                flag = node.get_attributes()[("transpose_a", "transpose_b")[side]]
                yield from _split(*_openvino_constant(core, source), in_last=flag == bool(side))


def _openvino_constant(core: Any, node: Any) -> tuple[str, str, ndarray]:
    import openvino

    origin = node
    while origin.inputs():
        origin = origin.input_value(0).get_node()
    stored = origin.get_element_type().get_type_name()
    if node is origin or node.get_type_name() == "Constant":
        return origin.get_friendly_name(), stored, node.get_data(dtype=numpy.float32)
    compiled = core.compile_model(openvino.Model([node.output(0)], [], ""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return origin.get_friendly_name(), stored, compiled({})[0]
