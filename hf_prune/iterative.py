"""Iterative pruning: a little sparser, retrain, sparser again (Han et al., 1506.02626; PERP's baseline, 2312.15230, section 3)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from .blocks import Decoder, Linear
from .config import PruningConfig
from .patterns import NM, Pattern, Unstructured, check_count, one_of
from .perp import release
from .pruning import check_model
from .report import PruningReport
from .sequential import mask_of
from .serialization import settle


logger = logging.get_logger(__name__)


def prune_iteratively(
    model: PreTrainedModel,
    config: PruningConfig,
    train: Callable[[PreTrainedModel, PruningReport], Any],
    *,
    rounds: int = 5,
    schedule: str = "cubic",
    calibration: Any = None,
    tokenizer: Any = None,
) -> list[PruningReport]:
    """Prunes `model` in place to the pattern of `config` in `rounds` steps, and calls `train` after each.

    Weights that are pruned stay so. A model that is pruned already goes on at the first round that asks for more: after an
    interruption the same call does the rest, and calls `train` again if that had not ended, without the adapters that it left.

    Args:
        config: of the last round; `method="magnitude"` is what the papers do.
        train: is given the model and the report of its last pruning, and retrains it, under its masks: a `Trainer` with
            `PERPCallback` or `KeepMasksCallback`.
        schedule: of the sparsity s in round t of T. "linear": s t/T; "cubic": s (1 - (1 - t/T)^3), most of it early (Zhu and Gupta,
            1710.01878). N:M goes from M-1:M down to N:M, in as many of the rounds as there are such steps.
        calibration, tokenizer: as for `prune`, the same in every round.

    Returns:
        The report of every round that was run.

    Raises:
        ValueError: an unknown schedule, no round, or `train` left pruned weights that are not zero.
    """
    one_of("schedule", schedule, ("linear", "cubic"))
    check_count("rounds", rounds)
    if not callable(train):
        raise TypeError(f"train must be a function of the model and the report of its pruning, got {train!r}.")
    if config.method.structural:
        raise ValueError(f"'{config.pattern}' leaves no masks to go on from: EfficientLLMCallback takes groups out in steps.")
    if isinstance(model, PreTrainedModel):
        release(model)
    check_model(model)
    settle(model)
    reports = []
    shares = [t / rounds if schedule == "linear" else 1 - (1 - t / rounds) ** 3 for t in range(1, rounds + 1)]
    stages = [config_of_round(config, share) for share in shares]
    stages = [stage for stage, after in zip(stages, [*stages[1:], None]) if stage != after]
    for i, stage in enumerate(stages, 1):
        if not _is_reached(model, stage, last=stage is stages[-1]):
            reports.append(model.prune(stage, calibration, tokenizer))
        elif (report := settle(model).report) and not report.retrained and _plain(report.config) == _plain(stage.to_dict()):
            logger.warning(f"round {i} of {len(stages)}, {stage.pattern}: its retraining did not end, and begins anew.")
            reports.append(report)
        else:
            logger.warning(f"round {i} of {len(stages)}, {stage.pattern}: the model is as sparse as that already.")
            continue
        train(model, reports[-1])
        if wrong := settle(model).masks.violations(model):
            raise ValueError(
                f"after round {i} of {len(stages)} pruned weights of {next(iter(wrong))} and {len(wrong) - 1} more are not zero: "
                "give the Trainer in `train` a PERPCallback or a KeepMasksCallback."
            )
        reports[-1].retrained = True
    return reports


def config_of_round(config: PruningConfig, share: float) -> PruningConfig:
    """`config` with `share` in (0, 1] of its sparsity, overrides too; N:M by the whole steps that come after."""
    pattern = _partly(config.pattern, share)
    overrides = {glob: _partly(known, share) for glob, known in config.overrides.items()}
    return replace(config, method_options={}, pattern=pattern, sparsity=pattern.sparsity, overrides=overrides)


def _is_reached(model: PreTrainedModel, config: PruningConfig, last: bool) -> bool:
    """Whether all weights are as sparse as `config` asks; for the `last` round they must have its pattern, too."""
    known, decoder = settle(model), Decoder(model)
    patterns = config.patterns_for([linear.name for linear in decoder.linears])
    compared: dict[str, list[Linear]] = {}  # weights that compete with one another
    for block in decoder.blocks:
        for linear in block.linears:
            if linear.name in patterns:
                if known is None or linear.parameter_name not in known.masks:
                    return False
                group = {"model": "all", "block": block.name}.get(config.comparison_group, linear.name)
                compared.setdefault(group, []).append(linear)
    for linears in compared.values():
        total = sum(linear.weight.numel() for linear in linears)
        kept = sum(known.masks.kept(linear.parameter_name, linear.expert) for linear in linears)
        pattern, at_once = patterns[linears[0].name], linears[0].in_features if config.comparison_group == "row" else total
        wanted = pattern.sparsity if isinstance(pattern, NM) else pattern.count(at_once) / at_once
        if 1 - kept / total < wanted - 1e-6:
            return False
        if last and isinstance(pattern, NM) and any(pattern.violations(mask_of(known.masks, linear)) for linear in linears):
            return False
    return True


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As it is read from a file."""
    return json.loads(json.dumps(config))


def _partly(pattern: Pattern, share: float) -> Pattern:
    if isinstance(pattern, NM):
        return NM(pattern.m - max(1, round(share * (pattern.m - pattern.n))), pattern.m)
    return Unstructured(pattern.sparsity * share)
