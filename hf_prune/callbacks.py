"""Callbacks for `Trainer`: masks that hold while a pruned model trains, and that are pushed with it."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging, strtobool

from .distillation import Distillation
from .model_card import CARD, card_of, write_card
from .perp import Attached, add_hooks, attach, check_kinds, let_gradients_through, masked_gradients, take_hooks_off, zero_here_
from .pruning import check_model, wrapped_by_peft
from .ranks import Ranks
from .report import PruningReport
from .serialization import FOLDER, STATE, is_weight_file, state_of


logger = logging.get_logger(__name__)


class TrainingCallback(TrainerCallback):
    """A callback with hooks on the model, which an interruption may leave there."""

    def __init__(self):
        _teach_trainer()
        self._model: Any = None

    def release(self) -> None:
        """Takes off the hooks that an interrupted training left on the model; the next training does so by itself."""
        if self._model is not None:
            take_hooks_off(self._model)
        self._model = None

    def _before_load(self, model: Any, state: dict[str, Any], *rest: Any) -> None:
        """Is given what `model` is about to load from a checkpoint."""

    def _before_save(self) -> None:
        """Is called in every process before a checkpoint is saved."""


def sharding_of(args: Any) -> tuple[str, bool]:
    """What shards parameters, "FSDP1", "FSDP2", "DeepSpeed" or "", by `TrainingArguments` or `accelerate launch`, which says it in
    the environment alone; and whether the model is emptied and loaded again meanwhile."""

    def said(name: str) -> bool:
        return bool(strtobool(os.environ.get(name) or "false"))

    if getattr(args, "deepspeed", None) or said("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed", False
    if args.fsdp:
        config = getattr(args, "fsdp_config", None) or {}
        return f"FSDP{config.get('version', 2)}", str(config.get("cpu_ram_efficient_loading", False)).lower() == "true"
    if said("ACCELERATE_USE_FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', 1)}", said("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return "", False


class KeepMasksCallback(TrainingCallback):
    """Keeps pruned weights at zero while a `Trainer` trains, whatever the optimizer and its momentum do.

    Gradients of pruned weights are set to zero before they are clipped, and the weights again after each step, also where they
    were frozen at first; checkpoints then carry their masks. The report says from then on that the model was trained, and forgets
    what was measured before. With `push_to_hub=True` each push takes masks and model card along, which Trainer alone leaves
    behind. Over a pruned model with adapters of PEFT it holds whatever else is trained, and from then on an adapter that would
    fill pruned weights is not merged (`peft_adapters.refuse_densifying_merge`). Under FSDP2 each process masks the rows that it
    holds.

    Raises:
        ValueError: training begins and the model has no masks, or other ones than in another process, or is sharded other than by
            rows (tensor parallelism, FSDP1, ZeRO-3).
    """

    def __init__(self):
        super().__init__()
        self._held: list[tuple[torch.nn.Parameter, torch.Tensor]] = []  # with their bits
        self._report: PruningReport | None = None
        self._said: dict[str, Any] = {}  # in the report

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.release()  # of a training that was interrupted
        whole, model = model, getattr(model, "get_base_model", lambda: model)()
        if any("_fsdp_wrapped_module" in name or hasattr(p, "ds_id") for name, p in model.named_parameters()):
            raise ValueError("masks hold under DDP and FSDP2 (fsdp_config={'version': 2}), not under FSDP1 or ZeRO-3.")
        names = {name: _WITHIN_PEFT.sub("", name) for name, _ in model.named_parameters(remove_duplicate=False)}
        known = state_of(model, type(self).__name__)
        if (ranks := Ranks.launched()).count > 1:
            ranks.check_same({"masks": known.masks.digest()[:12]})
        take_hooks_off(model)
        self._held, self._model, self._report = masked_gradients(model, known.masks.renamed(names)), model, known.report
        if state is None or not state.global_step:
            self._said = {}
        if whole is not model and hasattr(whole.base_model, "merge_and_unload"):  # prompts are not
            from .peft_adapters import refuse_densifying_merge

            refuse_densifying_merge(whole, known.masks)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, bits in self._held:
            if parameter.requires_grad or parameter.grad is not None:
                zero_here_(parameter, bits)
        if self._report:
            self._report.evaluations, self._report.timings = [], []  # of the weights that were
            if not self._said:
                self._said = self._says()
                self._report.trained.append(self._said)
            self._said["steps"] = state.global_step + 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()

    def release(self) -> None:
        super().release()
        self._held, self._report = [], None

    def _says(self) -> dict[str, Any]:
        return {"callback": type(self).__name__}


class PERPCallback(KeepMasksCallback):
    """Retrains a sliver of a pruned model in a `Trainer`, and merges it exactly at the end (PERP, arXiv 2312.15230).

    Args:
        train, rank, alpha, seed: see `hf_prune.perp.attach`.
        distillation: adds the divergence from the dense model to the loss.

    Checkpoints hold the effective weights, which load as an ordinary model (with "lora" the pruned ones), and the adapters, from
    which `resume_from_checkpoint` goes on. A gradient that is not finite stops the training with the last good state.

    Raises:
        ValueError: the model has no masks, the callback came too late for the optimizer, `train` finds nothing to train, or
            the parameters are sharded other than by FSDP2.
    """

    def __init__(
        self,
        train: tuple[str, ...] | str = ("mask_lora", "norm"),
        *,
        rank: int = 16,
        alpha: float = 32.0,
        seed: int = 0,
        distillation: Distillation | None = None,
    ):
        super().__init__()
        self._how = {"train": train, "rank": rank, "alpha": alpha, "seed": seed}
        self._distillation = distillation
        self._attached: Attached | None = None
        self._ended = False

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        sharding, emptied = sharding_of(args)
        if sharding not in ("", "FSDP2"):
            raise ValueError("PERPCallback trains under DDP and FSDP2 (fsdp_config={'version': 2}), not FSDP1 or DeepSpeed.")
        if emptied:
            raise ValueError(
                "PERPCallback under FSDP2 needs fsdp_config={'cpu_ram_efficient_loading': False}, or accelerate launch "
                "--fsdp_cpu_ram_efficient_loading false: otherwise the model is emptied and loaded again after the adapters were put on it."
            )
        if sharding and "lora" in check_kinds(self._how["train"], self._how["rank"]):
            raise ValueError(
                "train='lora' ends as an adapter of PEFT, which a sharded model takes no more: train PEFT's own LoRA, with KeepMasksCallback."
            )
        _check_retrainable(model)
        check_model(model)
        masks = state_of(model, "PERPCallback").masks
        attached = attach(model, masks, upcast=args.bf16 or args.fp16, **self._how)
        if sharding and len(dtypes := {str(p.dtype).removeprefix("torch.") for p in attached.trainable.values()}) > 1:
            attached.detach()
            raise ValueError(
                f"FSDP2 trains parameters of one dtype, but train={self._how['train']} gives {' and '.join(sorted(dtypes))}: set "
                "bf16=True, which trains all of them in float32."
            )
        self._attached, self._ended = attached, False
        if state.is_world_process_zero:
            found = self._attached.trainable
            print(f"PERP trains {sum(p.numel() for p in found.values()):,} numbers, {self._attached.share:.3%} of the model's.")
        for name in self._attached.left_out:
            logger.warning(f"{name} takes no adapter and stays as it is.")

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._ended:
            raise ValueError("the training of this PERPCallback has ended: give a new one to a new Trainer.")
        if self._attached is None or self._attached.model is not model:
            raise ValueError("PERPCallback came too late: give it to Trainer(model, callbacks=[...]), without model_init.")
        _check_retrainable(model)  # PEFT may have come since
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in self._attached.trainable.items() if id(p) not in known]:
            raise ValueError(f"the optimizer does not know {missing[0]} and {len(missing) - 1} more: let Trainer make it.")
        super().on_train_begin(args, state, control, model=model)
        if self._distillation:
            self._distillation.used = False
            add_hooks(model, model.register_forward_hook(self._distillation, with_kwargs=True))
        if args.gradient_checkpointing:
            let_gradients_through(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:  # there the scaler looks for overflows and skips the step
            return
        gradients = {name: p.grad for name, p in self._attached.trainable.items() if p.grad is not None}
        if all(bool(torch.isfinite(gradient.sum())) for gradient in gradients.values()):
            return
        wrong = next((name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), None)
        if wrong:
            for parameter in self._attached.trainable.values():
                parameter.grad = None
            control.should_training_stop = True
            logger.error(
                f"step {state.global_step + 1}: the gradient of {wrong} is not finite. Training stops, as the step before left it."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._distillation and not self._distillation.used:
            raise ValueError(
                "the model was given no labels, so that distillation had no loss to be added to: leave out label_smoothing_factor "
                "and compute_loss_func."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        getattr(optimizer, "eval", lambda: None)()  # a schedule-free one holds other weights while it trains
        self.merge()

    def merge(self) -> None:
        """Ends an interrupted training with what was learned so far: an ordinary pruned model. An interrupted merge goes on."""
        self._end(Attached.merge)

    def detach(self) -> None:
        """Gives the model back without the adapters."""
        self._end(Attached.detach)

    def _says(self) -> dict[str, Any]:
        said = {**super()._says(), **self._how}
        if (d := self._distillation) is not None:
            said["distillation"] = {"weight": d.weight, "temperature": d.temperature, "top_k": d.top_k}
        return said

    def _end(self, how: Callable[[Attached], None]) -> None:
        self.release()
        if self._attached:
            how(self._attached)
        self._attached, self._ended = None, True


def _check_retrainable(model: Any) -> None:
    """Raises ValueError for what KeepMasksCallback trains and PERPCallback does not: adapters of PEFT, and other heads."""
    if hasattr(model, "get_base_model") or wrapped_by_peft(model):
        raise ValueError(
            "PERPCallback makes its own adapters, and PEFT has wrapped layers of this model: leave out peft_config=, get_peft_model "
            "and add_adapter, or train PEFT's adapter with KeepMasksCallback."
        )
    if isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder and model.get_output_embeddings() is None:
        raise ValueError(
            f"PERPCallback retrains causal language models, and {type(model).__name__} is none: KeepMasksCallback holds its masks."
        )


_WITHIN_PEFT = re.compile(r"\.base_layer|\.original_module|\.modules_to_save\.[^.]+")  # in names of parameters


def _teach_trainer() -> None:
    """Trainer copies known names from a checkpoint before it pushes, and writes a card of its own at the end: here our folder
    is copied too, and our section is added to that card. It loads a checkpoint by the names that are in its files: here what those
    do not name is loaded too. Models without our callbacks see no difference."""
    from transformers import Trainer
    from transformers.trainer_utils import HubStrategy

    push_checkpoint, push = Trainer._push_from_checkpoint, Trainer.push_to_hub
    load, load_best, save = Trainer._load_from_checkpoint, Trainer._load_best_model, Trainer._save_checkpoint
    if hasattr(push, "hf_prune"):
        return

    @functools.wraps(push_checkpoint)
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        output, checkpoint = Path(self.args.output_dir), Path(checkpoint_folder)
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and not busy
        if pushes and (checkpoint / FOLDER).is_dir():
            self._finish_current_push()  # with hub_always_push one may still read what is replaced now
            shutil.rmtree(output / FOLDER, ignore_errors=True)
            shutil.copytree(checkpoint / FOLDER, output / FOLDER)
            _write_card(self.model, checkpoint, old=card_of(str(output)), base=None)
            if (checkpoint / CARD).exists():
                shutil.copy2(checkpoint / CARD, output / CARD)
        push_checkpoint(self, checkpoint_folder)

    @functools.wraps(push)
    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        _keep_section(type(self))  # TRL's trainers write another card
        return push(self, *args, **kwargs)

    @functools.wraps(load)
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        hooks = [self.model.register_load_state_dict_pre_hook(callback._before_load) for callback in _ours(self)]
        try:
            load(self, resume_from_checkpoint, model)
        finally:
            for hook in hooks:
                hook.remove()
        _load_rest(self, resume_from_checkpoint)

    @functools.wraps(load_best)
    def _load_best_model(self) -> None:
        load_best(self)
        _load_rest(self, self.state.best_model_checkpoint)

    @functools.wraps(save)
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        for callback in _ours(self):
            callback._before_save()
        save(self, *args, **kwargs)

    push_to_hub.hf_prune = True
    Trainer._push_from_checkpoint, Trainer.push_to_hub = _push_from_checkpoint, push_to_hub
    Trainer._load_from_checkpoint, Trainer._load_best_model = _load_from_checkpoint, _load_best_model
    Trainer._save_checkpoint = _save_checkpoint
    _keep_section(Trainer)


def _keep_section(trainer: type) -> None:
    write = trainer.create_model_card
    if hasattr(write, "hf_prune"):
        return

    @functools.wraps(write)
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir)
        before = card_of(str(folder))
        write(self, *args, **kwargs)
        if self.is_world_process_zero():
            _write_card(self.model, folder, old=card_of(str(folder)), base=before)

    create_model_card.hf_prune = True
    trainer.create_model_card = create_model_card


def _ours(trainer: Any) -> list[TrainingCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TrainingCallback)]


@torch.no_grad()
def _load_rest(trainer: Any, folder: str) -> None:
    """What the files of a checkpoint call otherwise: experts, which Transformers fuses while it reads a model.

    Raises:
        ValueError: the checkpoint does not have it.
    """
    model, stored = trainer.model, set()
    if not _ours(trainer) or not isinstance(model, PreTrainedModel) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    for path in filter(lambda path: is_weight_file(path.name), Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored.update(file.keys())
    names: dict[torch.nn.Parameter, list[str]] = {}  # of tied ones several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    missing = {known[0]: parameter for parameter, known in names.items() if stored and not stored.intersection(known)}
    if not missing:
        return
    dtype = next(iter(missing.values())).dtype
    whole, found = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    values = {name: value for name, value in whole.named_parameters() if name not in found["missing_keys"]}
    if lost := [name for name in missing if name not in values]:
        raise ValueError(f"the checkpoint {folder} has no {lost[0]}, and {len(lost) - 1} more: begin with another checkpoint.")
    for name, parameter in missing.items():
        parameter.copy_(values[name])


def _write_card(model: Any, folder: Path, old: str | None, base: str | None) -> None:
    known = model.__dict__.get(STATE)
    if known and known.report and (folder / FOLDER).is_dir():
        write_card(folder, known.report, old=old, base=base)
