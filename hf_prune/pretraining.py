"""Pruning-aware pretraining: a callback under which a model loses heads, channels and width while it trains (EfficientLLM)."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .callbacks import TrainingCallback, sharding_of
from .patterns import check_count
from .perp import add_hooks, take_hooks_off
from .pruning import check_model
from .ranks import Ranks
from .serialization import STATE
from .structural import check, groups_of, remove
from .structural.efficientllm import Compensation, Plan, Saliency, block_parameters, chosen, made_legal
from .structural.shrink import illegal, shape_to


logger = logging.get_logger(__name__)

_GRAMS = "efficientllm_gram"


class EfficientLLMCallback(TrainingCallback, ExportableState):
    """Shrinks the model of a `Trainer` while it trains, until it has its target size (EfficientLLM, arXiv 2502.06663).

    What vanishes is gone for good: parameters, gradients and the optimizer's moments are cut in place, steps get faster and
    memory falls. The result is an ordinary, smaller model. Checkpoints on the way have the shapes of their moment, and
    `resume_from_checkpoint` goes on from them; `load_state_dict` by hand is a mismatch of sizes while the model is larger, since only
    what Trainer loads shapes it. A share is of what the model has when its training begins: training once more takes it again.

    Args:
        parameters: of the decoder blocks that are to be left: a share in (0, 1) or a number.
        counts: or kind -> number of groups to be left in each block: "heads" (of keys and values, with their query heads), "ffn",
            "hidden" (channels of the residual stream).
        kinds: that may go with `parameters`; None are all that the model can lose. On SmolLM2-135M at 0.7, compensated
            and trained on 41,000 tokens, FFN channels alone gave a perplexity of 49.8, all kinds 114.4: the saliency holds the width
            for cheaper than it is.
        together: kind -> how many go at a time, so that multiples that kernels like last; None is 8 of "ffn" and "hidden".
        warm_up, recovery: shares of the steps before the first and after the last removal; between them the number of
            parameters falls linearly. Slow removal was worth more than a long recovery (see README).
        every: steps between two removals.
        order, decay, per_parameter: of the saliency, see `structural.efficientllm`; its gradients are those that the optimizer gets,
            after clipping.
        compensate: readers are refitted to what is left ("EfficientLLM-B"), which keeps a Gram matrix of what each reads, fp32 (in, in):
            in a 7B model 15 GB for FFN channels. Without it SmolLM2-135M ended at a perplexity of 49.8, with it at 45.6.

    Raises:
        ValueError: the model cannot lose what is asked for, has masks or adapters, or its parameters are sharded or frozen.
    """

    def __init__(
        self,
        parameters: float | int | None = None,
        counts: dict[str, int] | None = None,
        *,
        kinds: tuple[str, ...] | None = ("ffn",),
        together: dict[str, int] | None = None,
        warm_up: float = 0.05,
        recovery: float = 0.2,
        every: int = 1,
        order: int = 2,
        decay: float = 0.9,
        per_parameter: bool = True,
        compensate: bool = True,
    ):
        if not 0 <= warm_up < 1 or not 0 <= recovery < 1 or warm_up + recovery >= 1:
            raise ValueError(f"warm_up and recovery are shares of the steps, together below 1: got {warm_up} and {recovery}.")
        check_count("every", every)
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._plan = Plan(parameters, counts, kinds, together, per_parameter)
        self._warm_up, self._recovery, self._every, self._compensates = warm_up, recovery, every, compensate
        self._order, self._decay = order, decay
        Saliency(None, order, decay)  # says what is wrong with them
        self._groups = self._saliency = self._compensation = None
        self._total = 0
        self._began: dict[str, int] = {}
        self.removed: list[tuple[int, str, int]] = []  # (step, kind, groups a block)

    def state(self) -> dict[str, Any]:
        """For Trainer's checkpoints."""
        return {
            "args": self._arguments,
            "attributes": {
                "saliency": self._saliency.state() if self._saliency and self._saliency.values else None,
                "total": self._total,
                "began": self._began,
                "removed": self.removed,
            },
        }

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if sharding_of(args)[0]:
            raise ValueError("EfficientLLMCallback cuts whole parameters: use DDP, not FSDP or DeepSpeed.")
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end may load a model that is larger than the last one: set it to False.")
        if args.fp16 and not args.max_grad_norm:
            raise ValueError("fp16 scales gradients, and only clipping unscales them: set max_grad_norm above 0, or use bf16.")
        self._find(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._groups is None or self._groups.decoder.model is not model:
            self._find(model, begun=bool(state.global_step or self.removed))
        for axis in (axis for axes in self._groups.axes.values() for axis in axes):
            if axis.kind in self._plan.kinds_of(self._groups) and not any(m.parameter.requires_grad for m in axis.members):
                raise ValueError(
                    f"{axis.members[0].name} and all that goes with it is frozen, so that no gradient says which {axis.kind} are "
                    "worth least: let it be trained, or take other kinds=."
                )
        self._saliency = Saliency(self._groups, self._order, self._decay)
        known = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        # After an interruption the same training begins with a model that is smaller than it was.
        self._total = known.get("total") or self._total or block_parameters(self._groups)
        self._began = known.get("began") or self._began or {kind: axes[0].count for kind, axes in self._groups.axes.items()}
        self.removed = known.get("removed", [])
        if known.get("saliency"):
            self._saliency.restore(known["saliency"])
        self._close_compensation()  # of a training that was interrupted
        first, last = self._span(state.max_steps)
        if first >= last:
            raise ValueError(
                f"the {state.max_steps} steps leave none to remove anything in: make them more, or warm_up and recovery less."
            )
        if self._compensates and state.global_step < last:
            grams = optimizer.param_groups[0].setdefault(_GRAMS, {})  # checkpoints hold what the optimizer holds
            kinds = self._plan.kinds_of(self._groups)
            self._compensation = Compensation(self._groups, kinds, grams=grams, ranks=Ranks.launched())
            self._model = model
            take_hooks_off(model)
            add_hooks(model, *self._compensation.handles)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self._span(state.max_steps)[1]:
            self._saliency.update()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        step, (first, last) = state.global_step, self._span(state.max_steps)
        if not first < step <= last or (step % self._every and step != last):
            return
        if not self._saliency.values:
            logger.warning(f"step {step}: no gradient was finite so far, so that nothing is removed.")
            return
        done = (step - first) / (last - first)
        drop = self._drop(done)
        if step == last:
            drop = made_legal(self._groups, drop, self._saliency, self._plan)
        if drop:
            remove(self._groups, drop, optimizer, self._compensation and self._compensation.apply)
            self._saliency.forget(drop)
            for kind in {axis.kind: None for axis in drop}:
                self.removed.append((step, kind, len(next(d for axis, d in drop.items() if axis.kind == kind))))
            _rebuild(model)
        if step == last:
            self._close_compensation(optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self._groups is None or logs is None or "loss" not in logs:
            return
        more: dict[str, Any] = {"block_parameters": block_parameters(self._groups)}
        for kind, axes in self._groups.axes.items():
            more[f"groups/{kind}"] = axes[0].count
            if all(axis in self._saliency.values for axis in axes):
                worth = sum(float(self._saliency.of(axis).min()) for axis in axes)
                more[f"saliency/{kind}"] = worth / sum(axis.numel for axis in axes)
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._close_compensation(optimizer)
        left = block_parameters(self._groups)
        if reason := illegal(model.config):
            logger.error(f"the model has a shape that cannot be loaded: {reason} Training ended before its last removal.")
        logger.info(f"the blocks have {left:,} of {self._total:,} parameters left.")
        self._total, self._began = 0, {}
        self._groups = self._saliency = None  # they hold the model

    def _find(self, model: Any, begun: bool = False) -> None:
        check_model(model)
        if model.__dict__.get(STATE) is not None:
            raise ValueError("the model has masks, which would not fit what is left of it: shrink it first, then prune it.")
        self._groups = groups_of(model)
        check(self._groups)
        if not begun:
            self._plan.check(self._groups)

    def _close_compensation(self, optimizer: Any = None) -> None:
        self.release()
        if optimizer:
            optimizer.param_groups[0].pop(_GRAMS, None)
        self._compensation = None

    def _before_load(self, model: Any, state: dict[str, Any], *rest: Any) -> None:
        if self._groups is None or self._groups.decoder.model is not model:  # of model_init
            self._find(model, begun=True)
        shape_to(self._groups, state)

    def _before_save(self) -> None:
        if self._compensation:  # only one process saves, and all of them go on from what it saved
            self._compensation.average()

    def _span(self, steps: int) -> tuple[int, int]:
        """The step after which removal begins, and that of the last removal."""
        return int(steps * self._warm_up), int(steps * (1 - self._recovery))

    def _drop(self, done: float) -> dict:
        groups, plan = self._groups, self._plan
        if plan.parameters is not None:
            target = plan.target(self._total)
            allowed = self._total - done * (self._total - target)
            return chosen(groups, self._saliency, plan, block_parameters(groups) - int(allowed))
        gone = {}
        for kind, count in plan.counts.items():
            before = self._began[kind]
            step = plan.step(kind, groups) if done < 1 else 1
            gone[kind] = max(0, groups.of(kind)[0].count - round(before - done * (before - count))) // step * step
        return self._saliency.lowest(gone)


def _rebuild(model: Any) -> None:
    """DistributedDataParallel lays out its buckets anew over what is left; it averages gradients, so that every rank has
    removed the same groups."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    for wrapper in [o for o in gc.get_objects() if type(o) is DistributedDataParallel and o.module is model]:
        parameters, sparse = wrapper._build_params_for_reducer()
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)


def plot(log: list[dict[str, Any]], path: str | Path) -> None:
    """Draws what `Trainer.state.log_history` tells of a run (EfficientLLM's figure A0): loss and parameters, groups left and
    saliency by kind, over the steps, as an image at `path`.

    Raises:
        ValueError: no entries of an `EfficientLLMCallback`.
        ImportError: matplotlib is not installed (`pip install 'hf-prune[plot]'`).
    """
    from matplotlib.figure import Figure

    log = [entry for entry in log if "block_parameters" in entry]
    if not log:
        raise ValueError("the log has no entries of an EfficientLLMCallback: give trainer.state.log_history.")
    steps = [entry["step"] for entry in log]
    figure = Figure(figsize=(9, 6), layout="constrained")
    (loss, size), (left, worth) = figure.subplots(2, 2)
    loss.plot(steps, [entry["loss"] for entry in log], color="black")
    loss.set_title("training loss")
    size.plot(steps, [entry["block_parameters"] / 1e6 for entry in log], color="black")
    size.set_title("parameters of the blocks, millions")
    for key in sorted({key for entry in log for key in entry if key.startswith("groups/")}):
        kind = key.removeprefix("groups/")
        left.plot(steps, [entry[key] / log[0][key] for entry in log], label=kind)
        found = [(entry["step"], entry[f"saliency/{kind}"]) for entry in log if f"saliency/{kind}" in entry]
        worth.plot(*zip(*found), label=kind)
    left.set_title("share of groups left")
    worth.set_title("least saliency per parameter")
    worth.set_yscale("log")
    for axes in (left, worth):
        axes.legend()
        axes.set_xlabel("step")
    figure.savefig(path, dpi=120)
