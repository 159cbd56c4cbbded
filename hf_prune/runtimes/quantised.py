"""Prune, then quantise: whether every pruned weight is still exactly zero, read from what the quantizer stored.

A mask says which weights must be zero; that they are is never concluded from the scheme's name. A scheme keeps them if zero is one of
its numbers: symmetric integers, a whole zero point, floats. Where zero falls between two numbers (a minimum and a scale, as in GGUF's
Q4_1) or kept weights' errors move into pruned ones (GPTQ), it does not. Leaves out how one quantises.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..masks import Masks, is_quantised
from ..serialization import PruningState, state_of
from .exported import report_of
from .graph import zeros_in_graphs


logger = logging.get_logger(__name__)

WAY_OUT = (
    "Quantise symmetrically, without GPTQ: torchao's Int8WeightOnlyConfig or IntxWeightOnlyConfig, nncf's INT8_SYM or INT4_SYM, "
    "ONNX Runtime's quantizers with WeightSymmetric."
)


def check_zeros(quantised: PreTrainedModel | str | Path, pruned: PreTrainedModel | Masks | str | Path | None = None) -> int:
    """Reads every pruned weight of a quantised model as its runtime does, and says how many there are: all exactly zero.

    Args:
        quantised: a model that torchao or another library quantised in place or at loading, or the folder of an export.
        pruned: the model before it was quantised, its folder or its masks; default the masks that `quantised` carries. A
            folder of an export needs the model itself.

    Raises:
        ValueError: some are not zero, or cannot be read; says how many, how they read, and what to do.
    """
    if not isinstance(quantised, nn.Module):
        if not isinstance(pruned, PreTrainedModel):
            raise ValueError("an exported folder is checked against the pruned model: check_zeros(folder, model).")
        found, missing = zeros_in_graphs(
            quantised, report_of(quantised)["format"], pruned, state_of(pruned, "check_zeros").masks
        )
        lost = [f"{one.linear}: {one.violations} of {one.pruned}" for one in found if one.violations]
        _refuse(lost + [f"{name}: not found" for name in missing], f"{quantised}")
        return sum(one.pruned for one in found)
    if isinstance(pruned, (str, Path)):
        pruned = PruningState.load(pruned).masks
    masks = pruned if isinstance(pruned, Masks) else state_of(quantised if pruned is None else pruned, "check_zeros").masks
    lost, total = [], 0
    for name in masks:
        path, _, attribute = name.rpartition(".")
        module, pruned_here = quantised.get_submodule(path), ~masks[name]
        total += int(pruned_here.sum())
        lost += _lost(name, module, attribute, pruned_here)
    _refuse(lost, type(quantised).__name__)
    return total


def quantise(model: PreTrainedModel, config: Any) -> int:
    """Quantises the linears of a pruned `model`, but for its head, in place as a torchao `config` says; if zeros would be lost, nothing.

    One pruned linear of every shape is tried on a copy. What torchao leaves as it is, such as fused experts, is named in a warning.
    Transformers saves no model that was quantised so: load the pruned folder with `quantization_config=TorchAoConfig(config)` for that.

    Returns:
        How many pruned weights of quantised linears were read back, all exactly zero.

    Raises:
        ValueError: the scheme would lose zeros, or quantises no pruned linear; the model is quantised already.
        ImportError: torchao is not installed.
    """
    try:
        from torchao.core.config import AOBaseConfig
        from torchao.quantization import quantize_
    except ImportError as error:
        raise ImportError("quantise needs torchao: pip install 'hf-prune[quantise]'.") from error
    if not isinstance(config, AOBaseConfig):
        raise TypeError(f"config must be one of torchao's, as Int8WeightOnlyConfig(), got {config!r}.")
    masks = state_of(model, "quantise").masks
    if done := [name for name, parameter in masks.parameters_of(model).items() if is_quantised(parameter)]:
        raise ValueError(
            f"{done[0]} is quantised already ({type(model.get_parameter(done[0])).__name__}): load the model anew."
        )
    linears = {name: module for name in masks if isinstance(module := model.get_submodule(name.rpartition(".")[0]), nn.Linear)}
    shapes, changed = {masks.shape(name): name for name in linears}, False
    for name in shapes.values():
        trial = nn.Sequential(copy.deepcopy(linears[name]))
        before = trial[0].weight
        quantize_(trial, config)
        changed |= trial[0].weight is not before
        _refuse(_lost(name, trial[0], "weight", ~masks[name]), type(config).__name__)
    if not changed:
        raise ValueError(
            f"{type(config).__name__} quantises no pruned weight of this {type(model).__name__}: torchao takes an nn.Linear, no "
            "Conv1D and no fused experts. Export it with hf_prune.export(model, folder, weights='int8') instead."
        )
    weights, head = {name: linear.weight for name, linear in linears.items()}, model.get_output_embeddings()
    quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head)
    done = [name for name in linears if model.get_submodule(name.rpartition(".")[0]).weight is not weights[name]]
    if left := [name for name in masks if name not in done]:
        logger.warning(f"{type(config).__name__} left {len(left)} pruned weights as they were: {', '.join(left)}.")
    return check_zeros(model, masks.renamed({name: name for name in done}))


@torch.no_grad()
def as_read(module: nn.Module, attribute: str) -> Tensor:
    """The numbers that `module` computes with, in the shape of its parameter `attribute`.

    What its tensor says of itself, or else, for kernels with a layout of their own, the module's outputs for unit vectors.
    """
    weight = getattr(module, attribute)
    if type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        return weight
    floats = next((p for p in module.parameters() if type(p) is nn.Parameter and p.is_floating_point()), torch.empty(0))
    unit = torch.eye(module.in_features, dtype=floats.dtype, device=weight.device)
    return (module(unit) - (0 if getattr(module, "bias", None) is None else module.bias)).t()


def _lost(name: str, module: nn.Module, attribute: str, pruned: Tensor) -> list[str]:
    read = as_read(module, attribute).detach()
    wrong = read[pruned.to(read.device) & (read != 0)]
    return [f"{name}: {len(wrong)} of {int(pruned.sum())}, such as {float(wrong[0]):.3g} for 0"] if len(wrong) else []


def _refuse(lost: list[str], what: str) -> None:
    if lost:
        more = f" and {len(lost) - 2} more linears" if len(lost) > 2 else ""
        raise ValueError(f"{what} does not keep pruned weights at zero ({'; '.join(lost[:2])}{more}). {WAY_OUT}")
