"""An exported model in its runtime: loaded with the settings that let the runtime use the zeros, called and generated with as before.

`export` writes the settings beside the model, each with what is known of its effect. What Transformers' own exporters wrote has one
graph, which takes and returns its keys and values; what Optimum's wrote is left to Optimum's own classes.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin

from ..atomic import readable


REPORT = "pruning/export_report.json"
SETTINGS = {  # format -> setting -> value and what is known of it
    "onnx": {"trt_sparsity_enable": ("1", "not measured; for ONNX Runtime's TensorRT provider, where there is one")},
    "openvino": {
        "INFERENCE_PRECISION_HINT": ("f32", "measured: bf16, the default of CPUs that have it, moves logits by 3e-3"),
        "KV_CACHE_PRECISION": ("f32", "measured: the default of Optimum's exports moves the logits by 1e-4"),
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": (0.4, "measured: no effect on an AMD EPYC with AVX-512"),
    },
}


def load_exported(folder: str | Path, *, options: dict[str, Any] | None = None) -> Any:
    """Loads what `hf_prune.export` wrote into ONNX Runtime or OpenVINO.

    Args:
        options: over the settings in the folder: OpenVINO's properties, or options of ONNX Runtime's TensorRT provider.

    Returns:
        A model to call with `input_ids`, `attention_mask`, `past_key_values`, and with `generate`.

    Raises:
        ValueError: not such a folder, or a damaged one.
        ImportError: its runtime is not installed.
    """
    report = report_of(folder)
    if report["exporter"].startswith("transformers") and not (Path(folder) / "export.json").exists():
        raise ValueError(f"{folder} is damaged: it has no export.json.")
    try:
        return in_runtime(folder, report["format"], {**report["settings"], **(options or {})})
    except ImportError:
        raise
    except Exception as error:  # each runtime has its own
        raise ValueError(f"{folder} cannot be loaded: it is damaged, or these options do not fit. {error!r}") from error


def in_runtime(folder: str | Path, format: str, settings: dict[str, Any]) -> Any:
    """As `load_exported`, with these settings and no others."""
    if (Path(folder) / "export.json").exists():
        from transformers.exporters import ExportedModel

        runner = {"config": settings, "device": "cpu"} if format == "openvino" else {"providers": _providers(settings)}
        return ExportedCausalLM(ExportedModel.from_pretrained(folder, **runner))
    if format == "openvino":
        from optimum.intel import OVModelForCausalLM

        return OVModelForCausalLM.from_pretrained(folder, ov_config=settings)
    from optimum.onnxruntime import ORTModelForCausalLM

    providers, provider_options = map(list, zip(*_providers(settings)))
    return ORTModelForCausalLM.from_pretrained(folder, providers=providers, provider_options=provider_options)


def report_of(folder: str | Path) -> dict[str, Any]:
    """What `export` wrote of itself.

    Raises:
        ValueError: it did not write this folder, or the report is damaged.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise ValueError(f"{folder} was not written by hf_prune.export: it has no {REPORT}.")
    with readable(path, "the report of an export"):
        report = json.loads(path.read_text(encoding="utf-8"))
        SETTINGS[report["format"]], dict(report["settings"]), report["exporter"].lower  # noqa: B018 - without them it is none
    return report


def _providers(settings: dict[str, Any]) -> list[Any]:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    wanted = [("TensorrtExecutionProvider", settings), ("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})]
    return [(name, values) for name, values in wanted if name in there]


class ExportedCausalLM(GenerationMixin):
    """A graph of Transformers' exporters with the interface of a causal language model.

    Keys and values of all positions are kept, also where the model looks only at a window of them.
    """

    main_input_name, base_model_prefix, _is_stateful = "input_ids", "", False

    def __init__(self, exported: Any):
        self.exported, self.config = exported, exported.config
        self.generation_config = exported.generation_config or GenerationConfig.from_model_config(self.config)
        self.device, self.dtype = exported.device, exported.dtype
        runner = exported.runners["model"]
        if hasattr(runner, "session"):
            shapes = {port.name: port.shape for port in runner.session.get_inputs()}
        else:
            shapes = {port.any_name: [str(n) for n in port.partial_shape] for port in runner.compiled_model.inputs}
        self._heads = [(int(shape[1]), int(shape[3])) for name, shape in shapes.items() if name.endswith((".keys", ".values"))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`logits` (batch, length, vocabulary) and `past_key_values` for `input_ids` (batch, length), which come after those in
        the cache; `attention_mask` (batch, past and length), 1 = seen."""
        batch, length = input_ids.shape
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            empty = [torch.zeros(batch, heads, 0, width, dtype=self.dtype) for heads, width in self._heads]
            past_key_values = DynamicCache(list(zip(empty[::2], empty[1::2])))
        if attention_mask is None:
            attention_mask = torch.ones(batch, past_key_values.get_seq_length() + length, dtype=torch.long)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return self.exported(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values
        )

    def can_generate(self) -> bool:
        """Asked by `generate`, as the next two."""
        return True

    def is_remote_code(self) -> bool:
        return False

    def _optimize_model_for_decode(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()
