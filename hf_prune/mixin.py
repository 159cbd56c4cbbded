"""`prune()` on every `PreTrainedModel`: put there when hf_prune is imported, only under free names, the class unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel
from transformers.utils import logging

from .atomic import replaced_folder
from .blocks import Decoder, as_it_was, replaced
from .calibration import batches_of
from .checkpoint import check_finite
from .compact import compress
from .config import PruningConfig
from .journal import fingerprint
from .masks import Masks, is_quantised
from .model_card import base_card, card_of, of_others, without_section, write_card, write_text
from .perp import merged_state
from .pruning import UNWRAP, check_model, identity_of, is_dequantized, prune_model, sequences_for, wrapped_by_peft
from .ranks import Ranks
from .reconstruction import Reconstruction, reconstruct_blocks
from .report import PruningReport
from .serialization import (
    ADAPTER,
    FOLDER,
    SHRUNK,
    STATE,
    PruningState,
    is_replaced,
    remember_source,
    replaced_variants,
    settle,
    state_of,
    written_in,
)
from .shrinking import shrink_model
from .undo import Undo


logger = logging.get_logger(__name__)


def _outside_inference_mode(function: Callable) -> Callable:
    """Gradients may be needed; the parameters of a model that was made in that mode do without them, and are changed in it only."""

    @functools.wraps(function)
    def call(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        stay = torch.is_inference_mode_enabled() and any(p.is_inference() for p in model.parameters())
        with torch.inference_mode(stay):
            return function(model, *args, **kwargs)

    return call


class PruningMixin:
    """The methods that a model gains. They keep their state in one instance attribute, so deepcopy and pickle carry it."""

    @_outside_inference_mode
    def prune(
        self,
        config: PruningConfig | None = None,
        calibration: Any = None,
        tokenizer: Any = None,
        *,
        masks: Mapping[str, torch.Tensor] | None = None,
        tokens_per_batch: int | None = None,
        store: str | torch.device | None = None,
        bf16: bool = False,
        resume_dir: str | Path | None = None,
        reconstruct: Reconstruction | bool | None = None,
    ) -> PruningReport:
        """Prunes the model in place.

        Args:
            config: what and how; default is Wanda at 50 %.
            calibration: texts, chats, token ids, a DataLoader, a `datasets` Dataset, a file, or a Hub data set's name; only methods
                that need data read it.
            tokenizer: for text.
            masks: masks to use as they are, by name of the parameter; with method "sparsegpt" the kept weights make up for them.
            tokens_per_batch: calibration tokens that run through a block together; None goes by the memory there is.
            store: where hidden states wait between blocks: a device, such as "cpu" for a model on a GPU, or "disk".
            bf16: runs the calibration of a float32 model under bfloat16 autocast, as `TrainingArguments.bf16`; statistics and
                solvers stay in float32. On a CPU with bfloat16 SmolLM2-135M took 0.6 (Wanda) to 0.8 (SparseGPT) of the time; perplexity
                changed by 0.3 % at 50 %, and at 2:4 from 113.1 to 112.3 (SparseGPT) and from 214.5 to 203.6 (Wanda).
            resume_dir: folder for a journal of finished blocks: the same call after an interruption goes on from it, with a
                result equal bit for bit. It takes the size of the pruned weights and of one block's hidden states; delete it
                when the model is saved. Methods that need no data take seconds and keep no journal.
            reconstruct: train each block, once it is pruned, to give the dense model's output; True takes the defaults.

        Returns:
            A report; `print(report)` shows a table. The model saves with its masks from now on.

        Raises:
            ValueError, TypeError: anything that cannot be done as asked; no weight has changed then.
        """
        config = PruningConfig() if config is None else config
        if not isinstance(config, PruningConfig):
            raise TypeError(f"config must be a PruningConfig, as PruningConfig(method='wanda'), got a {type(config).__name__}.")
        check_model(self, elsewhere=not config.method.structural)
        known, state = STATE in self.__dict__, settle(self)  # which looks at masks that it reads
        if known and state and (problem := next(filter(None, Ranks.launched().gathered(_changed(self, state))), "")):
            logger.warning(f"pruning without the masks there were: {problem}")
            state = None

        if config.method.structural:
            extra = {"masks": masks, "resume_dir": resume_dir, "reconstruct": reconstruct, "store": store, "bf16": bf16}
            if state or any(extra.values()):
                given = "a model with masks" if state else " and ".join(name for name, value in extra.items() if value)
                raise ValueError(f"{given}: not with '{config.pattern}'. Take whole groups out first, then prune what is left.")
            report = shrink_model(self, config, calibration, tokenizer, tokens_per_batch)
            report.follow(self.__dict__.get(SHRUNK))
            self.__dict__[SHRUNK], self.__dict__[STATE] = report, None
            forget_quantization(self)
            return report

        def keep(masks: Masks, report: PruningReport) -> None:
            report.follow(state.report if state else self.__dict__.get(SHRUNK))
            _attach(self, PruningState(masks, config.to_dict(), report))

        _, report = prune_model(
            self,
            config,
            calibration,
            tokenizer,
            old_masks=state.masks if state else None,
            fixed_masks=masks,
            tokens_per_batch=tokens_per_batch,
            store=store,
            bf16=bf16,
            resume_dir=resume_dir,
            reconstruct=reconstruct,
            keep=keep,
        )
        forget_quantization(self)
        return report

    @property
    def pruning_masks(self) -> Masks | None:
        """The masks, parameter name -> bool tensor, True = kept; None if the model was not pruned.

        Raises:
            ValueError: masks that do not agree with the weights.
        """
        state = settle(self)
        return state.masks if state else None

    @pruning_masks.deleter
    def pruning_masks(self) -> None:
        """Forgets masks and their report, as of a model that never had any; its weights stay."""
        self.__dict__[STATE] = None

    @property
    def pruning_report(self) -> PruningReport | None:
        """The report of the last `prune`. It is saved with the masks; that of structured pruning, which leaves none, is not saved, but
        that of a later `prune` tells of it."""
        state = settle(self)
        return state.report if state else self.__dict__.get(SHRUNK)


def forget_quantization(model: PreTrainedModel) -> None:
    """A model that was read from a GGUF file has plain weights by now, but transformers would neither save nor train it."""
    if is_dequantized(model):
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config


@_outside_inference_mode
def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    calibration: Any,
    tokenizer: Any = None,
    *,
    how: Reconstruction | None = None,
    n_samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Trains every block of a pruned `model` in place to give the output of the `dense` model's, its masks held.

    Of several processes, which must all be given the same, each does all of the work.

    Args:
        calibration, tokenizer, n_samples, sequence_length, seed: as in `calibration_sequences`.

    Returns:
        Block -> relative squared error on held-out calibration text before and after; equal where that did not fall, and the
        block was left as it was.

    Raises:
        ValueError, TypeError: nothing has changed then, also after KeyboardInterrupt.
    """
    how, state = how or Reconstruction(), state_of(model, "reconstruct")
    check_model(model)
    check_model(dense)
    config = PruningConfig(n_samples=n_samples, sequence_length=sequence_length, seed=seed)
    with as_it_was(model), as_it_was(dense):
        check_finite([*model.named_parameters(), *((f"{n} of the dense model", p) for n, p in dense.named_parameters())])
        decoder, original = Decoder(model), Decoder(dense)
        shapes = [[(n, p.shape) for n, p in model.named_parameters()] for model in (model, dense)]
        if model is dense or shapes[0] != shapes[1]:
            raise ValueError("dense must be the model before pruning: another instance, with parameters of the same shapes.")
        sequences = sequences_for(model, config, calibration, tokenizer)
        batches = batches_of(sequences, how.batch_tokens)
        how.split(len(batches))
        if (ranks := Ranks.launched()).count > 1:
            given = {"how": str(how), "masks": state.masks.digest()[:16], "dense weights": fingerprint(dense.parameters())}
            ranks.check_same(identity_of(model, config, sequences, fingerprint(model.parameters())) | given)
        with Undo(decoder.parameters) as undo:
            errors = reconstruct_blocks(decoder, original, state.masks, batches, how, undo.save)
    if state.report:
        for block in state.report.blocks:
            block.reconstruction = errors.get(block.name)
        data = {"n_samples": n_samples, "sequence_length": sequence_length, "seed": seed}
        state.report.reconstructed = {"how": dataclasses.asdict(how), **data}
        state.report.evaluations, state.report.timings = [], []  # of the weights that were
    return errors


def install() -> None:
    """Gives `PreTrainedModel` the public names of `PruningMixin`, and lets its `save_pretrained` and `push_to_hub` write masks and
    card; `from_pretrained` remembers of which revision it read a pruned model. Idempotent.

    `HF_PRUNE_NO_PATCH=1` in the environment prevents it; `prune_model` works without.
    """
    if os.environ.get("HF_PRUNE_NO_PATCH") == "1" or hasattr(PreTrainedModel.save_pretrained, "hf_prune"):
        return
    for name, value in vars(PruningMixin).items():
        if not name.startswith("_") and not hasattr(PreTrainedModel, name):
            setattr(PreTrainedModel, name, value)
    original, original_push = PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub
    original_load = PreTrainedModel.from_pretrained.__func__

    named = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, compact: bool = False, **kwargs):
        if args:  # by their names, which differ between versions
            kwargs.update(dict(list(named.bind(self, save_directory, *args).arguments.items())[2:]))
        variant, push, token = kwargs.get("variant"), kwargs.get("push_to_hub", False), kwargs.get("token")
        if kwargs.get("state_dict"):
            kwargs["state_dict"] = merged_state(self, kwargs["state_dict"])
        state = _state_to_save(self, compact, variant, kwargs.get("state_dict") or {})
        decides = getattr(self, "should_save_on_this_rank", bool)  # Transformers 5 writes in the first process, whoever calls
        writes = decides(kwargs.get("is_main_process", True))
        if _is_adapted(self) or not writes or os.path.isfile(save_directory):
            return original(self, save_directory, **kwargs)
        if state and os.path.exists(os.path.join(save_directory, ADAPTER)):
            raise ValueError(f"{save_directory} holds an adapter, which would be loaded instead: save to another folder.")
        hub, tags = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}, kwargs.get("tags") or []
        name = hub.pop("repo_id", None) or Path(save_directory).resolve().name
        before, before_there = written_in(save_directory) if Path(save_directory).is_dir() else None, None
        if state is None and before is None and not (push and _has_masks(name, token, hub.get("revision"))):
            with _telling(self.config, state):
                return original(self, save_directory, **kwargs)
        if push:
            repo = _repository(name, token, hub)
            newest = HfApi().model_info(repo, revision=hub.get("revision"), token=token).sha  # what was before may be cached
            before_there = written_in(repo, token=token, revision=newest)
        kwargs = {key: value for key, value in kwargs.items() if key not in (*_HUB_ARGUMENTS, "push_to_hub", "tags")}
        old = card_of(str(save_directory)) if Path(save_directory).is_dir() else None
        if push:
            old = _newer_card(old, repo, token, newest)
        stale = functools.partial(is_replaced, variants=replaced_variants(variant, before))
        with replaced_folder(save_directory, stale) as fresh, _telling(self.config, state):
            result = original(self, fresh, **kwargs)
            if compact:
                compress(fresh, fresh / FOLDER, state.masks)
            if state:
                state.save(fresh, variant, (before, before_there))
            tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self, "model_tags", None) or [])]
            if state and state.report:
                base = base_card(self.config._name_or_path, token, local_files_only=not push)
                write_card(fresh, state.report, old=old, base=base, tags=tags)
            elif old is not None and not state:
                write_text(fresh, of_others(old, tags))
            made = [entry.name + "/*" * entry.is_dir() for entry in fresh.iterdir()]
        return _upload(save_directory, repo, made, replaced_variants(variant, before_there), token, hub) if push else result

    @functools.wraps(original_push)
    def push_to_hub(self, repo_id: str, *args, **kwargs):
        """As Transformers', for a pruned model in one commit with masks and card. `compact=True`, `max_shard_size` as for
        `save_pretrained`."""
        compact = kwargs.pop("compact", False)
        if not _state_to_save(self, compact) and (
            _is_adapted(self) or not _has_masks(repo_id, kwargs.get("token"), kwargs.get("revision"))
        ):
            with _telling(self.config, None):
                return original_push(self, repo_id, *args, **kwargs)
        if args:
            raise TypeError("push_to_hub of a pruned model, or in place of one, takes all arguments but repo_id by name.")
        kwargs.pop("use_temp_dir", None)
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(Path(folder) / "model", push_to_hub=True, repo_id=repo_id, compact=compact, **kwargs)

    @functools.wraps(original_load)
    def from_pretrained(cls, *args, **kwargs):
        result = original_load(cls, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if getattr(model.config, "pruning_config", None) is not None:  # masks are read later, from the same revision
            remember_source(model, kwargs)
        return result

    save_pretrained.hf_prune = True
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub = save_pretrained, push_to_hub


_HUB_ARGUMENTS = ("repo_id", "private", "revision", "commit_message", "commit_description", "create_pr")


def _repository(name: str, token: Any, hub: dict[str, Any]) -> str:
    """The full name of the repository, which exists from now on, as does the branch that is to be pushed."""
    api = HfApi()
    repo = api.create_repo(name, token=token, private=hub.pop("private", None), exist_ok=True).repo_id
    revision = hub.get("revision")
    if revision and not revision.startswith("refs/pr") and not hub.get("create_pr"):
        api.create_branch(repo, branch=revision, token=token, exist_ok=True)
    return repo


def _has_masks(name: str, token: Any, revision: str | None) -> bool:
    """Whether masks are in the repository that is to be pushed to, which need not exist."""
    repo = name if "/" in name else f"{HfApi().whoami(token=token)['name']}/{name}"
    try:
        return written_in(repo, token=token, revision=revision) is not None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return False


def _newer_card(local: str | None, repo: str, token: Any, revision: str) -> str | None:
    """The card to go on from: that of the folder, else that of the Hub."""
    there = card_of(repo, token=token, revision=revision)
    if local is None or there is None:
        return local or there
    if without_section(local) != without_section(there):
        logger.warning(f"README.md of {repo} was edited there; it is replaced by that of the folder, and stays in its history.")
    return local


def _upload(folder: str | Path, repo: str, names: list[str], variants: set[str | None], token: Any, hub: dict[str, Any]) -> Any:
    """One commit with what was saved, and without masks and the weights of `variants`, which it replaces."""
    api = HfApi()
    there = api.list_repo_files(repo, revision=hub.get("revision"), token=token)
    stale = [name for name in there if is_replaced(name.split("/")[0], variants)]
    hub = {"commit_message": "Upload model", **{key: value for key, value in hub.items() if value is not None}}
    return api.upload_folder(
        repo_id=repo, folder_path=folder, allow_patterns=names, delete_patterns=stale or None, token=token, **hub
    )


def _state_to_save(
    model: PreTrainedModel, compact: bool, variant: str | None = None, values: Mapping[str, torch.Tensor] = {}
) -> PruningState | None:
    """The state, if it is true of the weights, or of the `values` that are saved as such; a model that was changed after pruning
    saves without masks, and is told so, and forgets them.

    With an adapter it is the adapter that is saved, without masks; the model keeps them, as it does while PEFT wraps its layers.

    Raises:
        ValueError: what cannot be saved `compact`.
    """
    adapted = _is_adapted(model)
    state, problem, lasts = (None, "", False) if adapted else _checked(model, values)
    if compact and not problem and any(map(is_quantised, model.parameters())):
        problem = "a quantizer has stored its weights in numbers of its own"
    if compact and (variant or problem or not state):
        none = f"its adapter would be saved: {UNWRAP}" if adapted else "it has none: prune it first"
        why = problem or (f"it has no variants: leave out {variant!r}" if state else none)
        raise ValueError(f"compact=True leaves out what the masks of a model prune, but {why}.")
    if problem:
        logger.warning(f"saving without pruning masks: {problem}")
        if lasts and not values:
            model.__dict__[STATE] = None
        return None
    return state


def _checked(model: PreTrainedModel, values: Mapping[str, torch.Tensor]) -> tuple[PruningState | None, str, bool]:
    """The state, what is wrong with it, and whether that lasts: what PEFT has wrapped has its name again when it is unloaded."""
    maybe = model.__dict__.get(STATE, getattr(model.config, "pruning_config", None)) is not None
    if maybe and (name := wrapped_by_peft(model)):
        return None, f"{name} is wrapped by PEFT. The model keeps its masks; before it is saved, {UNWRAP}", False
    try:
        state = settle(model)
        return state, _changed(model, state, values) if state else "", True
    except ValueError as error:
        return None, str(error), True


def _changed(model: PreTrainedModel, state: PruningState, values: Mapping[str, torch.Tensor] = {}) -> str:
    """What is no longer zero where `state` says so; empty if all is."""
    if violations := state.masks.violations(model, values):
        return f"{len(violations)} parameters are no longer zero where they were pruned, such as {next(iter(violations))}"
    return ""


def _attach(model: PreTrainedModel, state: PruningState) -> None:
    """The state is on the instance. Its config may be that of other models too, and tells of it only while it is saved."""
    model.__dict__[STATE] = state
    if getattr(model.config, "pruning_config", None) is not None:  # of the folder that it was loaded from
        model.config.pruning_config = state.summary()


def _telling(config: Any, state: PruningState | None) -> contextlib.AbstractContextManager[None]:
    """Within, `config` is that of a model with this `state`."""
    if state is None and getattr(config, "pruning_config", None) is None:
        return contextlib.nullcontext()
    return replaced(config, "pruning_config", state.summary() if state else None)


def _is_adapted(model: PreTrainedModel) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)
