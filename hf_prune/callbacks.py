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
        _keep_section_in_trainer_cards()

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

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Trainer copies the weights of its newest checkpoint beside the older ones; masks and card follow them."""
        checkpoint, output = Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir)
        if not (checkpoint / FOLDER).is_dir() or not state.is_world_process_zero:
            return
        shutil.copytree(checkpoint / FOLDER, output / FOLDER, dirs_exist_ok=True)
        known = model.__dict__.get(STATE)
        if known and known.report:
            write_card(checkpoint, known.report, old=card_of(str(output)), base=card_of(str(checkpoint)))
            shutil.copy2(checkpoint / CARD, output / CARD)


def _keep_section_in_trainer_cards() -> None:
    """Trainer writes a card of its own at the end; the section about pruning is added to it."""
    from transformers import Trainer

    original = Trainer.create_model_card
    if hasattr(original, "hf_prune"):
        return

    @functools.wraps(original)
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir)
        before = card_of(str(folder))
        original(self, *args, **kwargs)
        known = self.model.__dict__.get(STATE)
        if known and known.report and self.is_world_process_zero():
            write_card(folder, known.report, old=card_of(str(folder)), base=before)

    create_model_card.hf_prune = True
    Trainer.create_model_card = create_model_card
