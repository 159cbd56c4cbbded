"""A pruned model for ONNX Runtime or OpenVINO, and the proof that its zeros arrived.

Transformers' own exporters write the graph where they are (5.23), else Optimum's. Then every mask is looked for in that graph, its
outputs are compared with torch's, and what was found is written beside it. A folder that fails appears nowhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging

from ..atomic import check_writable, replaced_folder
from ..blocks import Decoder, as_it_was
from ..masks import Masks, is_quantised
from ..patterns import first_line, one_of
from ..serialization import load, settle
from .exported import REPORT, SETTINGS, in_runtime
from .graph import SUFFIXES, Found, zeros_in_graphs


logger = logging.get_logger(__name__)

TOLERANCE = 1e-4  # of the largest logit, for fp32 weights in fp32 graphs
NATIVE = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
LEGACY = {"onnx": ("optimum-onnx", "onnx-legacy"), "openvino": ("optimum-intel", "openvino")}  # distribution, our extra

Write = Callable[[PreTrainedModel, Path], None]


@dataclass
class ExportReport:
    """What `export` wrote and found.

    Attributes:
        exporter: library and version.
        weights: "int8", "int4", or None if they are as the model's.
        linears: every linear under a mask, where it is in the graph and what became of its zeros.
        problems: what is not as it should be; empty unless `strict=False`.
        max_difference, largest_logit: of a logit from torch's, over a prompt and one step with its cache; and torch's largest.
        same_choice: share of these positions where the likeliest token is the same.
        size: bytes of all files but the tokenizer's.
        settings, measured: what `load_exported` tells the runtime, and what is known of its effect.
    """

    format: str
    exporter: str
    weights: str | None = None
    linears: list[Found] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    max_difference: float = math.nan
    largest_logit: float = math.nan
    same_choice: float = math.nan
    size: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        pruned = sum(one.pruned for one in self.linears)
        off = [one.off_pattern for one in self.linears if one.off_pattern is not None]
        lines = [
            f"{self.format} by {self.exporter}, weights {self.weights or 'as they were'}, {self.size / 2**20:.1f} MiB",
            f"{len({one.linear for one in self.linears})} pruned linears in the graph, stored as "
            f"{', '.join(sorted({one.stored for one in self.linears})) or '-'}: {pruned} pruned weights, "
            f"{sum(one.violations for one in self.linears)} of them not zero; {sum(off)} groups in {len(off)} N:M matrices off pattern",
            f"logits up to {self.largest_logit:.3g} differ from torch's by at most {self.max_difference:.2g}, same choice in {self.same_choice:.0%} of the positions",
            *(f"{name}: {effect}" for name, effect in self.measured.items()),
        ]
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


def export(
    model: PreTrainedModel | str | Path,
    out: str | Path,
    *,
    format: str = "onnx",
    tokenizer: Any = None,
    weights: str | None = None,
    pattern: str | None = None,
    strict: bool = True,
) -> ExportReport:
    """Writes a folder that ONNX Runtime or OpenVINO runs, with a cache for generation; `load_exported` loads it.

    Args:
        model: pruned, smaller or dense, or the folder or Hub name of one. ONNX Runtime runs no bfloat16 on a CPU: for "onnx" a
            folder in bfloat16 is read as float32, and a model is refused.
        out: folder; must not hold anything yet.
        format: "onnx" or "openvino".
        tokenizer: saved beside it; of a folder or Hub name its own.
        weights: "int8" or "int4" to quantise the weights, symmetrically, so that zeros stay zeros (needs nncf).
        pattern: refuse a model that is not pruned in this pattern, such as "2:4", throughout.
        strict: a mask that is lost or not found in the graph is an error; else it is a warning, and in the report.

    Raises:
        ValueError: wrong words, a folder that is not empty, a model that the exporter cannot write or the runtime cannot run (with
            the reason), a lost mask.
        ImportError: no exporter is installed; says which extra to install.
    """
    one_of("format", format, tuple(SUFFIXES))
    one_of("weights", weights, (None, "int8", "int4"))
    if (folder := Path(out)).exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder. Give a new one, or remove it first.")
    exporter, write = _exporter(format, weights)
    check_writable(out)
    if not isinstance(model, PreTrainedModel):
        name, tokenizer, model = model, tokenizer or _tokenizer(model), load(model)
        if format == "onnx" and _has_bfloat16(model):
            logger.warning(f"{name} is in bfloat16, which ONNX Runtime does not run on a CPU: it is exported in float32.")
            model.float()
    if stored := [name for name, parameter in model.named_parameters() if is_quantised(parameter)]:
        raise ValueError(f"{stored[0]} is quantised, and cannot be exported so: export the model itself, with weights='int8'.")
    if format == "onnx" and _has_bfloat16(model):
        raise ValueError(
            "ONNX Runtime does not run bfloat16 on a CPU: export model.float() or model.half(), or take format='openvino'."
        )
    masks = state.masks if (state := settle(model)) else Masks()
    if pattern and set(map(masks.patterns.get, masks)) != {pattern}:
        made = ", ".join(sorted({str(masks.patterns.get(name)) for name in masks})) or "none"
        raise ValueError(f"pattern={pattern!r} was asked for, but the masks of this model are: {made}. Prune it so first.")
    if pattern and (dense := [linear.name for linear in Decoder(model).linears if linear.parameter_name not in masks]):
        raise ValueError(
            f"pattern={pattern!r} was asked for throughout, but {len(dense)} linears have no mask, such as {dense[0]}: prune them "
            "too, or leave out pattern=."
        )
    report = ExportReport(format, exporter, weights)
    with replaced_folder(out, lambda name: True) as fresh, as_it_was(model), torch.no_grad():
        try:
            write(model, fresh)
        except Exception as error:
            reason = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            raise ValueError(f"{exporter} cannot export this {type(model).__name__}: {reason}") from error
        _examine(report, fresh, model, masks)
        if report.problems and strict:
            listed = "; ".join(report.problems[:3]) + (f"; and {len(report.problems) - 3} more" if report.problems[3:] else "")
            raise ValueError(f"nothing was written, since the graph is not the pruned model: {listed}. strict=False writes it.")
        for problem in report.problems:
            logger.warning(f"{out}: {problem}")
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return report


def _has_bfloat16(model: PreTrainedModel) -> bool:
    return any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def _examine(report: ExportReport, folder: Path, model: PreTrainedModel, masks: Masks) -> None:
    """Fills `report` with what is in `folder`, and writes it there."""
    report.size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report.settings = {name: value for name, (value, _) in SETTINGS[report.format].items()}
    report.measured = {name: known for name, (_, known) in SETTINGS[report.format].items()}
    report.linears, missing = zeros_in_graphs(folder, report.format, model, masks)
    try:
        found = _difference(model, in_runtime(folder, report.format, report.settings))
    except Exception as error:  # a runtime's own exceptions have no other base
        kind = f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"the exported {kind} does not run: {first_line(error)}. Try another dtype, or the other format."
        ) from error
    report.max_difference, report.largest_logit, report.same_choice = found
    report.problems = [*(f"not found: {name}" for name in missing), *_problems(report, model.dtype)]
    (folder / REPORT).parent.mkdir(exist_ok=True)
    (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


def _exporter(format: str, weights: str | None) -> tuple[str, Write]:
    """Name and version of the exporter that is installed, and a function that writes with it."""
    if weights and find_spec("nncf") is None:
        raise ImportError(f"weights={weights!r} needs nncf: pip install 'hf-prune[quantise]'.")
    if _is_native():
        if absent := [name for name in NATIVE[format] if find_spec(name) is None]:
            raise ImportError(f"exporting to {format} needs {', '.join(absent)}: pip install 'hf-prune[export]'.")
        return f"transformers {transformers.__version__}", lambda model, folder: _write_native(model, folder, format, weights)
    distribution, extra = LEGACY[format]
    try:
        exporter = f"{distribution} {version(distribution)}"
    except PackageNotFoundError as error:
        raise ImportError(
            f"exporting to {format} needs transformers 5.23 or newer, pip install 'hf-prune[export]', or {distribution}, "
            f"pip install 'hf-prune[{extra}]'; here is transformers {transformers.__version__} without it."
        ) from error
    if weights:
        raise ValueError(
            f"weights={weights!r} needs the exporters of transformers 5.23; or quantise the folder and check_zeros(folder, model)."
        )
    return exporter, lambda model, folder: _write_optimum(model, folder, format)


def _is_native() -> bool:
    try:
        from transformers.exporters import ExportedModel  # noqa: F401 - before 5.23 export() returned something else
    except ImportError:
        return False
    return True


def _write_native(model: PreTrainedModel, folder: Path, format: str, weights: str | None) -> None:
    from transformers import exporters

    exporter, config = {
        "onnx": (exporters.OnnxExporter, exporters.OnnxConfig),
        "openvino": (exporters.OpenVINOExporter, exporters.OpenVINOConfig),
    }[format]
    options: dict[str, Any] = {"stateful": False} if format == "openvino" else {}
    if weights:
        quantizer = {"onnx": exporters.NNCFOnnxQuantizer, "openvino": exporters.NNCFOpenVINOQuantizer}[format]
        options["quantizer"] = quantizer(exporters.NNCFWeightCompressionConfig(**_symmetric(model, weights)))
    exported = exporter().export(model, _example(model), config(dynamic=True, **options))
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Three more tokens after four, of two sequences: no size is 1 or equal to another, so that each may vary.

    The cache is a plain one also for models that see a window: theirs counts positions in Python, which a graph would keep.
    """
    ids = torch.arange(14, device=model.device).view(2, 7)
    past = model(ids[:, :4], use_cache=True).past_key_values
    layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(past, "layers", [])]
    if not layers or any(tensor is None for pair in layers for tensor in pair):
        raise ValueError("only models whose cache is the keys and values of every block can be exported.")
    positions = torch.arange(4, 7, device=model.device).expand(2, -1).contiguous()
    return {
        "input_ids": ids[:, 4:].contiguous(),
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions,
        "past_key_values": DynamicCache(layers),
    }


def _write_optimum(model: PreTrainedModel, folder: Path, format: str) -> None:
    known = getattr(model.config, "pruning_config", None)
    model.config.pruning_config = None  # tracing asks a bare copy for all attributes, and that has no masks
    try:
        if format == "onnx":
            from optimum.exporters.onnx import onnx_export_from_model

            onnx_export_from_model(model, folder, task="text-generation-with-past", do_validation=False)
        else:
            from optimum.exporters.openvino import export_from_model
            from optimum.intel import OVConfig

            export_from_model(model, folder, task="text-generation-with-past", ov_config=OVConfig(dtype="fp32"))
    finally:
        model.config.pruning_config = known
    model.config.save_pretrained(folder)


def _symmetric(model: PreTrainedModel, weights: str) -> dict[str, Any]:
    """How nncf leaves a zero a zero: without a zero point, also where it falls back from 4 bits to 8."""
    import nncf

    if weights == "int8":
        return {"mode": nncf.CompressWeightsMode.INT8_SYM}
    widths = [parameter.shape[-1] for parameter in model.parameters() if parameter.dim() > 1]
    group = math.gcd(128, *widths)
    group = group if group >= 16 else -1  # a scale a row
    return {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": group, "backup_mode": nncf.BackupMode.INT8_SYM}


def _difference(model: PreTrainedModel, exported: Any) -> tuple[float, float, float]:
    """Largest difference of a logit, largest logit, share of equal choices: eleven tokens at once, then a twelfth with their cache."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = model(ids.to(model.device)).logits.float().cpu()
    first = exported(input_ids=ids[:, :11], attention_mask=torch.ones(2, 11, dtype=torch.long))
    second = exported(
        input_ids=ids[:, 11:], attention_mask=torch.ones(2, 12, dtype=torch.long), past_key_values=first.past_key_values
    )
    got = torch.cat([first.logits, second.logits], dim=1).float()
    return (
        float((got - wanted).abs().max()),
        float(wanted.abs().max()),
        float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
    )


def _problems(report: ExportReport, dtype: torch.dtype) -> list[str]:
    found = [f"{one.linear}: {one.violations} pruned weights are not zero" for one in report.linears if one.violations]
    found += [f"{one.linear}: {one.off_pattern} groups are not {one.pattern}" for one in report.linears if one.off_pattern]
    exact = report.weights is None and dtype == torch.float32
    if not report.max_difference <= (TOLERANCE * report.largest_logit if exact else math.inf):
        found.append(f"logits differ from torch's by {report.max_difference:.2g}")
    return found


def _tokenizer(name: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # each version fails in another way
        logger.warning(f"{name} has no tokenizer to export with it: {error}")
        return None
