"""Each pruned block is trained to give the dense block's output: half a block at a time, in the memory of one block.

EBFT (arXiv 2402.12419) and "A Free Lunch in LLM Compression" (2510.14444): local reconstruction does what retraining the whole
model does, with less data. Targets follow the dense model ("dense": the block also makes up for the errors of those before it)
or the dense block on what reaches it now ("sparse"). A block whose error on held-out calibration text does not fall keeps its
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .blocks import Block, Call, Decoder, Part, Store, eager_experts, halves_of
from .masks import Masks
from .patterns import check_count, one_of
from .perp import attach, check_kinds, masked_gradients


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are reconstructed.

    Attributes:
        train: as for `hf_prune.perp.attach`; "full" trains all of a unit under its masks.
        unit: "half" trains attention and MLP one after the other, each towards its own place in the residual stream (2510.14444:
            as good and cheapest); a block whose branches do not follow one another is trained whole, as with "block".
        targets: "dense" or "sparse", see above.
        epochs: over the calibration sequences that are not held out.
        learning_rate: of AdamW without weight decay, linear decay after 10 % of warm-up; None is 4e-3 for "full", and 2.3 /
            width for models wider than 576, else 2e-3: on SmolLM2-135M at 2:4 the held-out error fell with every doubling from 5e-4.
        batch_tokens: calibration tokens a step.
        held_out: share of the calibration batches that decide when to stop, at least one batch.
        bf16: trains under bfloat16 autocast, as `TrainingArguments.bf16`; a model in half precision always does.
        rank, alpha: of adapters.
        seed: of the order of batches.

    Raises:
        ValueError: a value that cannot be.
    """

    train: tuple[str, ...] | str = "full"
    unit: str = "half"
    targets: str = "dense"
    epochs: int = 4
    learning_rate: float | None = None
    batch_tokens: int = 1024
    held_out: float = 0.1
    bf16: bool = False
    rank: int = 16
    alpha: float = 32.0
    seed: int = 0

    def __post_init__(self):
        if wrong := [kind for kind in check_kinds(self.train, self.rank) if kind in ("lora", "head", "added_bias")]:
            raise ValueError(f"train={wrong[0]!r} is of a whole model: a block takes 'full', 'mask_lora' or another kind.")
        one_of("targets", self.targets, ("dense", "sparse"))
        one_of("unit", self.unit, ("half", "block"))
        check_count("epochs", self.epochs)
        check_count("batch_tokens", self.batch_tokens)
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, or None for the default, got {self.learning_rate!r}.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a share in (0, 1), got {self.held_out!r}.")

    def rate(self, width: int) -> float:
        """The learning rate for a model of that `width`."""
        return self.learning_rate or (min(4e-3, 2.3 / width) if "full" in self.train else 2e-3)

    def split(self, n_batches: int) -> tuple[list[int], list[int]]:
        """Indices of the batches to train on and of those that are held out.

        Raises:
            ValueError: fewer than two batches.
        """
        if n_batches < 2:
            raise ValueError(
                f"reconstruction needs at least two batches, got {n_batches}: give more data, or lower batch_tokens."
            )
        held = min(max(1, round(n_batches * self.held_out)), n_batches - 1)
        return list(range(n_batches - held)), list(range(n_batches - held, n_batches))


def parts_of(block: Block, call: Call, hidden: Tensor, how: Reconstruction) -> list[Part]:
    """What of `block` is trained at a time."""
    return halves_of(block, call, hidden) if how.unit == "half" else [Part(block)]


@torch.no_grad()
def outputs_of(parts: list[Part], calls: list[Call], inputs: list[Tensor], store: Store = lambda x: x) -> list[list[Tensor]]:
    """For each part the hidden states after it, a tensor (sequences, length, d) a batch as `inputs`."""
    outputs = []
    for part in parts:
        inputs = [store(part.run(call, x)) for call, x in zip(calls, inputs)]
        outputs.append(inputs)
    return outputs


def reconstruct_block(
    parts: list[Part], masks: Masks, calls: list[Call], inputs: list[Tensor], targets: list[list[Tensor]], how: Reconstruction
) -> tuple[float, float]:
    """Trains the `parts` of a block in place, one after the other, each towards its `targets` (see `outputs_of`).

    Args:
        masks: of the block's parameters, by their names within the model.

    Returns:
        Relative squared error of the block on the held-out batches before and after; equal if it did not fall, and then
        nothing has changed.

    Raises:
        ValueError: that error is not finite at first.
    """
    _, held = how.split(len(inputs))
    block = parts[0].block
    whole, states = Part(block), inputs
    if len(parts) > 1 and not all(_trainable(part, masks, how) for part in parts):  # biases of the attention only, say
        parts, targets = [whole], targets[-1:]
    before = [(p, p.detach().clone()) for p in block.module.parameters()]
    first = _error(whole, calls, inputs, targets[-1], held)
    if not math.isfinite(first):
        raise ValueError(
            f"the output of {block.name} on held-out text is not finite, here or in the dense model: load both in bfloat16 or float32."
        )
    for part, wanted in zip(parts, targets):
        _train(part, masks, calls, states, wanted, how)
        if part is not parts[-1]:
            (states,) = outputs_of([part], calls, states)
    now = _error(whole, calls, inputs, targets[-1], held)
    if now < first:
        return first, now
    with torch.no_grad():
        for parameter, value in before:
            parameter.copy_(value)
    return first, first


@torch.enable_grad()
def _train(
    part: Part, masks: Masks, calls: list[Call], inputs: list[Tensor], targets: list[Tensor], how: Reconstruction
) -> None:
    """Leaves `part` with what was best on the held-out batches, which may be what it was."""
    trained, held = how.split(len(inputs))
    local = _masks_within(part, masks)
    attached = attach(part.module, local, how.train, rank=how.rank, alpha=how.alpha, seed=how.seed, upcast=True)
    for name in attached.left_out:
        logger.warning(f"{part.block.name}.{name} takes no adapter and stays as it is.")
    half = how.bf16 or next(part.module.parameters()).dtype != torch.float32 or inputs[0].dtype != torch.float32
    device = part.block.device
    try:
        parameters = list(attached.trainable.values())
        masked_gradients(part.module, local)
        optimizer, schedule = optimizer_of(parameters, how.rate(inputs[0].shape[-1]), how.epochs * len(trained))
        order = torch.Generator().manual_seed(how.seed)
        # Its cache would go on serving the weights of the first step.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half, cache_enabled=False):
            best, worse = _error(part, calls, inputs, targets, held), 0
            kept = [p.detach().clone() for p in parameters]
            for _ in range(how.epochs):
                for i in torch.randperm(len(trained), generator=order).tolist():
                    output, target = part.run(calls[i], inputs[i]), targets[i].to(device)
                    (_squares(output, target) / _squares(inputs[i].to(device), target)).backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                now = _error(part, calls, inputs, targets, held)
                if now < best:
                    best, kept, worse = now, [p.detach().clone() for p in parameters], 0
                elif (worse := worse + 1) == 2 or not math.isfinite(now):
                    break
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                parameter.copy_(value)
        attached.merge()
    except BaseException:
        attached.detach()
        raise


def _masks_within(part: Part, masks: Masks) -> Masks:
    return masks.renamed({name: f"{part.block.name}.{name}" for name, _ in part.module.named_parameters()})


def _trainable(part: Part, masks: Masks, how: Reconstruction) -> bool:
    try:
        attach(part.module, _masks_within(part, masks), how.train, rank=how.rank).detach()
    except ValueError:
        return False
    return True


@torch.no_grad()
def reconstruct_blocks(
    decoder: Decoder,
    dense: Decoder,
    masks: Masks,
    batches: list[Tensor],
    how: Reconstruction,
    before_change: Callable[[nn.Parameter], None],
) -> dict[str, tuple[float, float]]:
    """Reconstructs every block of a model that is pruned already, in place, towards those of the `dense` one.

    Returns:
        Block -> relative squared error on the held-out batches before and after.
    """
    errors = {}
    with eager_experts(decoder.model), eager_experts(dense.model):
        states, calls = decoder.capture(batches)
        wanted, dense_calls = dense.capture(batches)
        for index, block in enumerate(tqdm(decoder.blocks, desc="reconstruction", unit="block")):
            wanted = wanted if how.targets == "dense" else states
            parts = parts_of(block, calls[index][0], states[0], how)
            originals = parts_of(dense.blocks[index], dense_calls[index][0], wanted[0], how)
            if len(parts) != len(originals):
                parts, originals = [Part(block)], [Part(dense.blocks[index])]
            targets = outputs_of(originals, dense_calls[index], wanted)
            for parameter in block.module.parameters():
                before_change(parameter)
            errors[block.name] = reconstruct_block(parts, masks, calls[index], states, targets, how)
            wanted = targets[-1]
            states = [call.run(block, x) for call, x in zip(calls[index], states)]
            calls[index].clear()
            dense_calls[index].clear()
    return errors


def optimizer_of(parameters: list[nn.Parameter], rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW without weight decay; its rate warms up for a tenth of the `steps` and then falls linearly."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    up = max(1, steps // 10)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / up if step < up else (steps - step) / max(1, steps - up)
    )


@torch.no_grad()
def _error(part: Part, calls: list[Call], inputs: list[Tensor], targets: list[Tensor], which: Iterable[int]) -> float:
    """What is left of the part's change; 1.0 would be a part that does nothing."""
    missed = change = 0.0
    for i in which:
        target = targets[i].to(part.block.device)
        missed += float(_squares(part.run(calls[i], inputs[i]), target))
        change += float(_squares(inputs[i].to(part.block.device), target))
    return missed / change


def _squares(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().sum().clamp_min(1e-30)
