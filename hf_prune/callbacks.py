"""Callbacks for `Trainer`: masks that hold while a pruned model trains, and that are pushed with it."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .model_card import CARD, card_of, write_card
from .serialization import FOLDER, STATE, settle


class KeepMasksCallback(TrainerCallback):
    """Keeps pruned weights at zero while a `Trainer` trains, whatever the optimizer and its momentum do.

    After each step of the optimizer pruned weights are set to zero again; checkpoints then carry their masks. With
    `push_to_hub=True` each push takes masks and model card along, which Trainer alone leaves behind.

    Raises:
        ValueError: training begins and the model has no masks.
    """

    def __init__(self):
        self._pruned: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _pushes_take_masks_along()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        known = settle(model)
        if known is None:
            raise ValueError("KeepMasksCallback needs a pruned model, and this one has no masks: call model.prune(...) first.")
        parameters = known.masks.parameters_of(model)
        self._pruned = [(parameter, ~known.masks[name].to(parameter.device)) for name, parameter in parameters.items()]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, pruned in self._pruned:
            parameter.masked_fill_(pruned, 0.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pruned = []


def _pushes_take_masks_along() -> None:
    """Trainer copies known names from a checkpoint before it pushes, and writes a card of its own at the end: here our folder
    is copied too, and our section is added to that card. Models without masks see no difference."""
    from transformers import Trainer
    from transformers.trainer_utils import HubStrategy

    push, write = Trainer._push_from_checkpoint, Trainer.create_model_card
    if hasattr(write, "hf_prune"):
        return

    @functools.wraps(push)
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        output, checkpoint = Path(self.args.output_dir), Path(checkpoint_folder)
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and not busy
        if pushes and (checkpoint / FOLDER).is_dir():
            shutil.rmtree(output / FOLDER, ignore_errors=True)
            shutil.copytree(checkpoint / FOLDER, output / FOLDER)
            _write_card(self.model, checkpoint, old=card_of(str(output)), base=None)
            if (checkpoint / CARD).exists():
                shutil.copy2(checkpoint / CARD, output / CARD)
        push(self, checkpoint_folder)

    @functools.wraps(write)
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir)
        before = card_of(str(folder))
        write(self, *args, **kwargs)
        if self.is_world_process_zero():
            _write_card(self.model, folder, old=card_of(str(folder)), base=before)

    create_model_card.hf_prune = True
    Trainer._push_from_checkpoint, Trainer.create_model_card = _push_from_checkpoint, create_model_card


def _write_card(model: Any, folder: Path, old: str | None, base: str | None) -> None:
    known = model.__dict__.get(STATE)
    if known and known.report and (folder / FOLDER).is_dir():
        write_card(folder, known.report, old=old, base=base)
