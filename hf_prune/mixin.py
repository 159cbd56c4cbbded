"""`prune()` on every `PreTrainedModel`: put there when hf_prune is imported, only under free names, the class unchanged."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel
from transformers.utils import logging

from .atomic import replaced_folder
from .compact import compress
from .config import PruningConfig
from .masks import Masks
from .pruning import check_model, is_dequantized, prune_model
from .report import PruningReport
from .serialization import FOLDER, STATE, PruningState, is_replaced, settle


logger = logging.get_logger(__name__)


class PruningMixin:
    """The methods that a model gains. They keep their state in one instance attribute, so deepcopy and pickle carry it."""

    def prune(
        self,
        config: PruningConfig | None = None,
        calibration: Any = None,
        tokenizer: Any = None,
        *,
        masks: Masks | None = None,
        tokens_per_batch: int | None = None,
        store: str | torch.device | None = None,
        resume_dir: str | Path | None = None,
    ) -> PruningReport:
        """Prunes the model in place.

        Args:
            config: what and how; default is Wanda at 50 %.
            calibration: texts, chats, token ids, a DataLoader, a `datasets` Dataset, a file, or a Hub data set's name.
            tokenizer: for text.
            masks: masks to use as they are; with method "sparsegpt" the kept weights make up for them.
            tokens_per_batch: calibration tokens that run through a block together; None goes by the memory there is.
            store: device on which hidden states wait between blocks, such as "cpu" for a model on a GPU.
            resume_dir: folder for a journal: the same call after an interruption goes on from the last finished block.

        Returns:
            A report; `print(report)` shows a table. The model saves with its masks from now on.

        Raises:
            ValueError, TypeError: anything that cannot be done as asked; no weight has changed then.
        """
        config = PruningConfig() if config is None else config
        if not isinstance(config, PruningConfig):
            raise TypeError(f"config must be a PruningConfig, got a {type(config).__name__}.")
        check_model(self)
        state = settle(self)
        new_masks, report = prune_model(
            self,
            config,
            calibration,
            tokenizer,
            old_masks=state.masks if state else None,
            fixed_masks=masks,
            tokens_per_batch=tokens_per_batch,
            store=store,
            resume_dir=resume_dir,
        )
        if is_dequantized(self):  # plain weights by now, but transformers would refuse to save them
            self.hf_quantizer = None
            self.is_quantized = False
            del self.config.quantization_config
        _attach(self, PruningState(new_masks, config.to_dict(), report))
        return report

    @property
    def pruning_masks(self) -> Masks | None:
        """The masks, parameter name -> bool tensor, True = kept; None if the model was not pruned.

        Raises:
            ValueError: masks that do not agree with the weights.
        """
        state = settle(self)
        return state.masks if state else None

    @property
    def pruning_report(self) -> PruningReport | None:
        """The report of the last `prune`; it is saved with the model."""
        state = settle(self)
        return state.report if state else None


def install() -> None:
    """Gives `PreTrainedModel` the public names of `PruningMixin`, and lets `save_pretrained` write the masks. Idempotent.

    `HF_PRUNE_NO_PATCH=1` in the environment prevents it; `prune_model` works without.
    """
    if os.environ.get("HF_PRUNE_NO_PATCH") == "1" or hasattr(PreTrainedModel.save_pretrained, "hf_prune"):
        return
    for name, value in vars(PruningMixin).items():
        if not name.startswith("_") and not hasattr(PreTrainedModel, name):
            setattr(PreTrainedModel, name, value)
    original = PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(
        self, save_directory, *args, is_main_process: bool = True, push_to_hub: bool = False, compact: bool = False, **kwargs
    ):
        state = None if getattr(self, "_hf_peft_config_loaded", False) else _state_to_save(self)
        if compact and not state:
            raise ValueError("compact=True leaves out what masks prune, and this model has none: prune it first.")
        if compact and kwargs.get("variant"):
            raise ValueError(f"compact=True has no variants: leave out variant={kwargs['variant']!r}.")
        if not state or not is_main_process or os.path.isfile(save_directory):
            return original(self, save_directory, *args, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs)
        hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
        with replaced_folder(save_directory, functools.partial(is_replaced, variant=kwargs.get("variant"))) as fresh:
            result = original(self, fresh, *args, **kwargs)
            if compact:
                compress(fresh, fresh / FOLDER, state.masks)
            state.save(fresh)
            made = [entry.name + "/*" * entry.is_dir() for entry in fresh.iterdir()]
        if push_to_hub:
            _push(save_directory, made, kwargs.get("token"), **hub)
        return result

    save_pretrained.hf_prune = True
    PreTrainedModel.save_pretrained = save_pretrained


_HUB_ARGUMENTS = ("repo_id", "private", "revision", "commit_message", "commit_description", "create_pr")


def _push(
    folder: str | Path, names: list[str], token: Any, repo_id: str | None = None, private: bool | None = None, **commit: Any
):
    """One commit with what was saved."""
    api = HfApi(token=token if isinstance(token, str) else None)
    repo = api.create_repo(repo_id or Path(folder).resolve().name, private=private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo, folder_path=folder, allow_patterns=names, **{"commit_message": "Upload pruned model", **commit}
    )


def _state_to_save(model: PreTrainedModel) -> PruningState | None:
    """The state, if it is true of the weights; a model that was changed after pruning saves without masks, and is told so."""
    try:
        state = settle(model)
        violations = state.masks.violations(model) if state else {}
        problem = (
            f"{len(violations)} parameters are no longer zero where they were pruned, such as {next(iter(violations))}"
            if violations
            else ""
        )
    except ValueError as error:
        state, problem = None, str(error)
    if problem:
        logger.warning(f"saving without pruning masks: {problem}")
        model.config.pruning_config = None
        model.__dict__.pop(STATE, None)
        return None
    return state


def _attach(model: PreTrainedModel, state: PruningState) -> None:
    model.__dict__[STATE] = state
    model.config.pruning_config = state.summary()
