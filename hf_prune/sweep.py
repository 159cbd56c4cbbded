"""Which learning rate to retrain a pruned model with: a few steps with each, and every time the model is put back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .blocks import as_it_was
from .distillation import Distillation
from .masks import Masks
from .patterns import check_count
from .perp import add_hooks, attach, let_gradients_through, masked_gradients
from .pruning import check_model
from .reconstruction import optimizer_of
from .serialization import state_of
from .undo import Undo


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LearningRateSweep:
    """What `sweep_learning_rate` measured.

    Attributes:
        losses: learning rate -> mean loss a token on held-out data, inf where it was not finite.
        best: the rate of the lowest loss.
        start: the loss before any training.
    """

    losses: dict[float, float]
    best: float
    start: float

    def __str__(self) -> str:
        rows = [("learning rate", "held-out loss"), ("none", f"{self.start:.4f}")]
        rows += [(f"{rate:.3g}", f"{loss:.4f}" + "  best" * (rate == self.best)) for rate, loss in self.losses.items()]
        return "\n".join(f"{rate:>13}  {loss}" for rate, loss in rows)


def sweep_learning_rate(
    model: PreTrainedModel,
    train_dataset: Sequence[Any],
    held_out: Sequence[Any],
    *,
    train: tuple[str, ...] | str = ("mask_lora", "norm"),
    rates: Sequence[float] | None = None,
    steps: int = 20,
    batch_size: int = 2,
    rank: int = 16,
    alpha: float = 32.0,
    distillation: Distillation | None = None,
    seed: int = 0,
) -> LearningRateSweep:
    """Trains a pruned `model` for `steps` steps with each rate, from the same start on the same batches, and puts it back.

    The rate warms up for a tenth of the steps and then falls linearly to zero (AdamW, no weight decay), as a whole training's.

    Args:
        train_dataset, held_out: sequences of token ids, or dicts of "input_ids" and, if not the same, "labels".
        train, rank, alpha, seed: see `hf_prune.perp.attach`; the seed is also that of the batches and of dropout.
        rates: default five, each 10^(1/2) of the one before, around what was good on SmolLM2-135M: 3e-4 for "full", 2e-3 for
            MaskLoRA with norms, and for the others, which were not measured.
        distillation: added to the loss that is trained on, not to the held-out one.

    Raises:
        ValueError: no masks, no data, or no rate with a finite loss. The model is bit for bit as it was, after any error.
    """
    check_model(model)
    masks = state_of(model, "sweep_learning_rate").masks
    kinds = (train,) if isinstance(train, str) else tuple(train)
    centre = 3e-4 if "full" in kinds else 2e-3
    rates = [float(f"{centre * 10 ** (i / 2):.2g}") for i in range(-2, 3)] if rates is None else sorted({*map(float, rates)})
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates must be some positive learning rates, or None for five around {centre:g}; got {rates}.")
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    rows, held = _rows(model, train_dataset, "train_dataset"), _rows(model, held_out, "held_out")
    held = [_batch(held[i : i + batch_size], model.device) for i in range(0, len(held), batch_size)]
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(rows), generator=generator).tolist()
    batches = [[rows[i] for i in order[step * batch_size :][:batch_size]] for step in range(steps)]
    how, losses = dict(train=train, rank=rank, alpha=alpha, seed=seed), {}
    half = any(p.dtype != torch.float32 for p in model.parameters())
    with as_it_was(model), torch.random.fork_rng(range(torch.cuda.device_count())):
        start = _loss(model, held, half)
        for rate in (bar := tqdm(rates, desc="learning rates", unit="rate")):
            bar.set_postfix_str(f"{rate:.3g}")
            with _retrained(model, masks, how, half, distillation) as parameters:
                torch.manual_seed(seed)
                loss = _loss(model, held, half) if _train(model, parameters, batches, rate, half) else math.inf
            losses[rate] = loss if math.isfinite(loss) else math.inf
    best = min(losses, key=losses.get)
    if losses[best] == math.inf:
        raise ValueError(
            f"no rate of {', '.join(f'{rate:.3g}' for rate in rates)} gave a finite loss (before training: {start:.4f}): give lower rates."
        )
    if len(rates) > 1 and best in (rates[0], rates[-1]):
        side = "lowest" if best == rates[0] else "highest"
        logger.warning(f"the best learning rate {best:.3g} is the {side} of those tried: give rates beyond it.")
    if losses[best] >= start:
        logger.warning(f"no learning rate brought the held-out loss below {start:.4f}, its start: give more steps or data.")
    return LearningRateSweep(losses, best, start)


def _rows(model: PreTrainedModel, data: Sequence[Any], name: str) -> list[dict[str, Tensor]]:
    vocabulary, rows = model.get_input_embeddings().weight.shape[0], []
    for i, row in enumerate(data):
        row = row if isinstance(row, Mapping) else {"input_ids": row}
        if "input_ids" not in row:
            raise ValueError(f"{name}[{i}] must be token ids or a dict with 'input_ids', got {', '.join(row) or 'nothing'}.")
        ids = torch.as_tensor(row["input_ids"]).cpu()
        labels = ids if row.get("labels") is None else torch.as_tensor(row["labels"]).cpu()
        if ids.dim() != 1 or len(ids) < 2 or ids.is_floating_point() or labels.shape != ids.shape:
            raise ValueError(
                f"{name}[{i}] must be one sequence of two or more ids, with labels alike: {ids.shape}, {labels.shape}."
            )
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ValueError(f"{name}[{i}] has ids {int(ids.min())} to {int(ids.max())}, the vocabulary to {vocabulary - 1}.")
        if row.get("attention_mask") is not None and not torch.as_tensor(row["attention_mask"]).all():
            raise ValueError(f"{name}[{i}] is padded: give sequences without padding, which may differ in length.")
        rows.append({"input_ids": ids.long(), "labels": labels.long(), "attention_mask": torch.ones_like(ids)})
    if not any((row["labels"][1:] != -100).any() for row in rows):
        raise ValueError(f"{name} has {len(rows)} sequences and no token to predict: give at least one that has labels.")
    return rows


def _batch(rows: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {name: pad([row[name] for row in rows], padding_value=value).to(device) for name, value in padding.items()}


def _forward(model: nn.Module, batch: dict[str, Tensor], half: bool) -> Tensor:
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):  # no longer: it keeps copies of the weights
        return model(**batch, use_cache=False).loss


@torch.no_grad()
def _loss(model: nn.Module, batches: list[dict[str, Tensor]], half: bool) -> float:
    """Mean over the predicted tokens."""
    model.eval()
    total = count = 0
    for batch in batches:
        if n := int((batch["labels"][:, 1:] != -100).sum()):
            total += n * float(_forward(model, batch, half))
            count += n
    return total / count


@torch.enable_grad()
def _train(model: nn.Module, parameters: list[nn.Parameter], batches: list[list[dict]], rate: float, half: bool) -> bool:
    """Whether the loss stayed finite."""
    model.train()
    optimizer, schedule = optimizer_of(parameters, rate, len(batches))
    for rows in batches:
        batch = _batch(rows, model.device)
        if (batch["labels"][:, 1:] != -100).any():
            loss = _forward(model, batch, half)
            if not torch.isfinite(loss):
                return False
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return True


@contextmanager
def _retrained(
    model: nn.Module, masks: Masks, how: dict[str, Any], upcast: bool, distillation: Distillation | None
) -> Iterator[list[nn.Parameter]]:
    """What is to be trained; whatever happens to it is undone."""
    own = list(model.parameters())
    attached = attach(model, masks, upcast=upcast, **how)
    with ExitStack() as undone:  # last in, first out
        undone.callback(attached.detach)
        undo = undone.enter_context(Undo(own))
        undone.callback(undo.restore)
        for parameter in own:
            if parameter.requires_grad:
                undo.save(parameter)
        masked_gradients(model, masks)
        if distillation is not None:
            add_hooks(model, model.register_forward_hook(distillation, with_kwargs=True))
        if model.is_gradient_checkpointing:
            let_gradients_through(model)
        yield list(attached.trainable.values())
