"""One-shot structured pruning: the gradients of some calibration text choose the groups, and all of them vanish at once."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .blocks import as_it_was
from .calibration import batches_of
from .checkpoint import check_finite
from .config import PruningConfig
from .journal import fingerprint
from .patterns import check_count
from .pruning import check_model, count_peak, facts_of, identity_of, sequences_for
from .ranks import Ranks
from .report import PruningReport
from .structural import Groups, built_with, check, groups_of, remove
from .structural.efficientllm import Compensation, Plan, Saliency, block_parameters, chosen, made_legal
from .structural.groups import Axis
from .structural.shrink import illegal
from .undo import Undo


_BATCH_TOKENS = 1024


def shrink_model(
    model: PreTrainedModel,
    config: PruningConfig,
    calibration: Any = None,
    tokenizer: Any = None,
    tokens_per_batch: int | None = None,
) -> PruningReport:
    """Takes groups out of `model`, in place, as `config` with a structural method and pattern says.

    As many go from every block, so that the result is an ordinary model with a config of its own; of a share so many that the nearest
    multiple of `together` below what there was is left, if there is one. Gradients that parameters held are gone. Of several processes,
    which must all be given the same, each does all of the work.

    Raises:
        ValueError, TypeError: what cannot be done as asked; the model has not changed then.
    """
    started = time.perf_counter()
    if tokens_per_batch is not None:
        check_count("tokens_per_batch", tokens_per_batch)
    check_model(model)
    peak = count_peak(model.device)
    method, pattern = config.method, config.pattern
    for parameter in model.parameters():
        parameter.grad = None
    with as_it_was(model):
        check_finite(model.named_parameters())
        groups = groups_of(model)
        check(groups)
        counts = {kind: groups.of(kind)[0].count for kind, _ in pattern.shares}
        for kind, share in pattern.shares:
            if not round(share * counts[kind]):
                raise ValueError(
                    f"pattern '{pattern}': {share:g} of {counts[kind]} {kind} a block rounds to none: ask for more."
                )
        counts = {kind: counts[kind] - round(share * counts[kind]) for kind, share in pattern.shares}
        plan = Plan(pattern.parameters, counts or None, method.kinds, method.together, method.per_parameter)
        for kind, count in counts.items():
            step, before = plan.step(kind, groups), groups.of(kind)[0].count
            counts[kind] = min(round(count / step) * step, (before - 1) // step * step) or count
        plan.check(groups)
        if counts and (reason := illegal(built_with(groups, counts).config)):
            raise ValueError(f"pattern '{pattern}' leaves {counts}, which no model of this architecture has: {reason}")
        sequences = sequences_for(model, config, calibration, tokenizer)
        if (ranks := Ranks.launched()).count > 1:
            given = {"tokens_per_batch": str(tokens_per_batch)}
            ranks.check_same(identity_of(model, config, sequences, fingerprint(model.parameters())) | given)
        shape = _shape(groups, sequences[0])
        saliency = Saliency(groups, method.order, decay=0.0)
        listening = Compensation(groups, plan.kinds_of(groups), decay=None) if method.compensate else None
        try:
            _accumulate(model, sequences, tokens_per_batch)
            if not saliency.update():
                raise ValueError("gradients of the calibration text are not finite: load the model in bfloat16 or float32.")
        finally:
            if listening:
                listening.close()
            model.zero_grad(set_to_none=True)
        if counts:
            drop = saliency.lowest({kind: groups.of(kind)[0].count - count for kind, count in counts.items()})
        else:
            total = block_parameters(groups)
            drop = made_legal(groups, chosen(groups, saliency, plan, total - plan.target(total)), saliency, plan)
        if drop:
            remove(groups, drop, compensate=listening and partial(_compensate, listening))
    after = _shape(groups, sequences[0])
    return PruningReport(
        config=config.to_dict(),
        skipped=dict(groups.refused),
        **facts_of(model, calibration, sequences, started),
        peak_memory=peak(),
        structure={key: [shape[key], after[key]] for key in shape},
    )


def _compensate(listening: Compensation, drop: dict[Axis, torch.Tensor]) -> None:
    """As `listening.apply`; if it fails, the readers are as before."""
    readers = listening.readers(drop)
    with Undo(readers) as undo:
        for parameter in readers:
            undo.save(parameter)
        listening.apply(drop)


def _accumulate(model: PreTrainedModel, sequences: list[torch.Tensor], tokens_per_batch: int | None) -> None:
    """The gradient of the mean loss of all predicted tokens of `sequences`, in every parameter."""
    model.requires_grad_(True)
    device, tokens = model.get_input_embeddings().weight.device, sum(len(ids) - 1 for ids in sequences)
    with torch.enable_grad():
        for ids in tqdm(batches_of(sequences, tokens_per_batch or _BATCH_TOKENS), desc="saliency", unit="batch"):
            ids = ids.to(device)
            if ids.shape[1] < 2:
                raise ValueError("a calibration sequence has one token, which predicts nothing: leave it out.")
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of the calibration text is {float(loss)}: load the model in bfloat16 or float32.")
            (loss * (ids[:, 1:].numel() / tokens)).backward()


def _shape(groups: Groups, ids: torch.Tensor) -> dict[str, float]:
    """How large and how fast the model is now."""
    model = groups.decoder.model
    shape: dict[str, float] = {kind: axes[0].count for kind, axes in groups.axes.items()}
    shape["block_parameters"] = block_parameters(groups)
    shape["parameters"] = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in groups.decoder.parameters if p.dim() > 1)
    shape["flops_per_token"] = 2 * (matrices + model.get_output_embeddings().weight.numel())
    ids, times = ids[None, :256].to(model.get_input_embeddings().weight.device), []
    with as_it_was(model), torch.no_grad():
        for _ in range(3):
            begun = time.perf_counter()
            model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()
            times.append(time.perf_counter() - begun)
    shape["forward_seconds"] = min(times)
    return shape
