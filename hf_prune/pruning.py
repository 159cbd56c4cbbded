"""The whole one-shot procedure in one function: check, calibrate, walk the blocks, report; or leave everything as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .atomic import alone_in
from .blocks import Block, Decoder, Linear, Store, as_it_was
from .calibration import batches_of, calibration_sequences, positions_of
from .checkpoint import Checkpoint, CheckpointJournal, check_finite
from .config import PruningConfig
from .gradients import gradients_by_block, model_gradients
from .journal import Journal, fingerprint, on_disk
from .masks import Masks, is_quantised
from .patterns import NM, Pattern, check_count, first_line
from .ranks import Ranks
from .reconstruction import Reconstruction
from .report import PruningReport, by_reason
from .sequential import Plan, prune_blocks, prune_without_data
from .statistics import GradientNorm
from .undo import Undo
from .weights import Weights


logger = logging.get_logger(__name__)

_CPU_BATCH_TOKENS = 2048  # intermediates of a block stay near the cache; two passes are as fast with a quarter, in less memory


def prune_model(
    model: PreTrainedModel,
    config: PruningConfig,
    calibration: Any = None,
    tokenizer: Any = None,
    *,
    old_masks: Masks | None = None,
    fixed_masks: Mapping[str, Tensor] | None = None,
    tokens_per_batch: int | None = None,
    store: str | torch.device | None = None,
    bf16: bool = False,
    resume_dir: str | Path | None = None,
    reconstruct: Reconstruction | bool | None = None,
    keep: Callable[[Masks, PruningReport], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Masks, PruningReport]:
    """As `PruningMixin.prune`, but the masks and the report are returned and `model` does not remember them.

    Args:
        old_masks: of an earlier pruning of this model; their zeros stay.
        fixed_masks: masks to use as they are, keyed by parameter name: a solver then only updates the kept weights.
        keep: is given the result as long as everything can still be undone.
        checkpoint: where the weights are, if `model` has none; the result goes there too, block by block.
    """
    started = time.perf_counter()
    _check_options(tokens_per_batch, store, reconstruct)
    ranks = checkpoint.ranks if checkpoint else Ranks.launched()
    check_model(model, elsewhere=True)
    weights = checkpoint or Weights.of(model)
    if not (weights.together or checkpoint) and (resume_dir is not None or config.comparison_group == "model"):
        what = "resume_dir" if resume_dir is not None else "comparison_group='model'"
        raise ValueError(f"{what} needs all weights in place, and some are offloaded or sharded: load the model whole.")
    old_masks = old_masks or Masks()
    if not isinstance(fixed_masks, Masks):
        if not isinstance(fixed_masks, Mapping | None):
            raise TypeError(f"masks must map names of parameters to bool tensors, got a {type(fixed_masks).__name__}.")
        fixed_masks = Masks(fixed_masks)
    peak = count_peak(weights.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_it_was(model))
        stack.enter_context(weights.in_charge())
        with ranks.agreeing():  # each may have other rows
            check_finite(weights.stored.items())
        decoder = Decoder(model, weights.present)
        linears, skipped = _targets(decoder, config)
        patterns = config.patterns_for([x.name for x in linears])
        chosen = [linear for linear in linears if linear.name in patterns]
        skipped.update({x.name: "excluded by the config" for x in linears if x.name not in patterns})
        _check_patterns(chosen, patterns, config, old_masks, fixed_masks)
        parameters = {linear.parameter_name: linear.parameter for linear in chosen}

        how = Reconstruction() if reconstruct is True else reconstruct or None
        if how and config.comparison_group == "model":
            raise ValueError("group='model' prunes all blocks at once: prune first, then call hf_prune.reconstruct.")
        scope = config.method.scope if GradientNorm in config.method.needs else None
        if how and scope == "block":
            raise ValueError("scope='block' runs sequences one by one: prune first, then call hf_prune.reconstruct.")
        if decoder.shared and not weights.together and scope == "model":
            name = type(model).__name__
            raise ValueError(
                f"blocks of {name} hand keys and values on to others: use GBLM(scope='block'), or prune it in memory."
            )
        needs_data = config.needs_calibration or how is not None
        sequences: list[Tensor] = []
        if needs_data:
            sequences = sequences_for(model, config, calibration, tokenizer)
        elif calibration is not None:
            logger.info(f"{config.method.name} needs no data: the calibration text is not used.")

        if how and ranks.count > 1:
            raise ValueError(f"reconstruction runs in one process, and there are {ranks.count}: prune first, then reconstruct.")
        journal = None
        if checkpoint or ranks.count > 1 or (resume_dir is not None and needs_data):
            identity = identity_of(model, config, sequences, weights.identity)
            identity |= {"reconstruct": str(how)} if how else {}
            identity |= {"bf16": "true"} if bf16 else {}
            identity |= {
                "earlier masks": old_masks.digest()[:16],
                "given masks": fixed_masks.digest()[:16],
                "tokens_per_batch": str(tokens_per_batch),
            }
            ranks.check_same(identity | {"resume_dir": "none" if resume_dir is None else "some"})
            identity |= {"processes": str(ranks.count)} if ranks.count > 1 else {}
            place = checkpoint.work if checkpoint else resume_dir if needs_data else None
            if place is not None:
                with ranks.agreeing():
                    if not ranks.index:
                        stack.enter_context(alone_in(Path(place)))
                journal = CheckpointJournal(checkpoint, identity) if checkpoint else Journal(place, identity, ranks)
        changed = parameters.values() if how is None else decoder.parameters
        with Undo(changed) as undo:
            masks = weights.masks
            masks.update(old_masks.renamed({name: name for name in old_masks if name not in parameters}))  # one at a time

            def before_change(parameter: nn.Parameter) -> None:
                if (kept := weights.kept_of(parameter)) is not None:
                    undo.save(kept)

            plan = Plan(
                decoder, patterns, config.method, config.comparison_group, config.propagate, old_masks, fixed_masks, masks,
                ranks=ranks, reconstruction=how, before_change=before_change, bf16=bf16 and model.dtype == torch.float32,
            )  # fmt: skip
            gradient_seconds = 0.0
            if not needs_data:
                blocks = prune_without_data(plan, journal)
            else:
                by_block = scope == "block"
                if scope and not by_block:
                    before = time.perf_counter()
                    some = sequences[: config.method.gradient_samples]
                    find, place = _gradients if weights.together else gradients_by_block, journal
                    if place is None and not weights.together:
                        place = Journal(stack.enter_context(tempfile.TemporaryDirectory()), {}, ranks)
                    plan.gradients_of = find(decoder, chosen, some, config.method, place, ranks)
                    gradient_seconds = time.perf_counter() - before
                fits = how.batch_tokens if how else _batch_tokens(model, weights.device, sequences, config.propagate)
                size = tokens_per_batch or fits
                if journal:  # hidden states were kept in batches of that size, and the memory there is may have changed
                    if not journal.finished:
                        journal.forget("batch")
                    size = int(journal.tensors("batch", lambda: {"tokens": torch.tensor(size)})["tokens"])
                mine = ranks.share(sequences)
                batches = [ids[None] for ids in mine] if by_block else batches_of(mine, size)
                if how:
                    how.split(len(batches))
                first = (config.method.gradient_samples or 8) if by_block else 0
                blocks = prune_blocks(
                    plan,
                    batches,
                    probe=sequences[0][None, :64],
                    store=_storage(store, checkpoint.work if checkpoint else None),
                    gradient_samples=len(ranks.share(sequences[:first])) if by_block else None,
                    journal=journal,
                )
            masks.patterns = {name: pattern for name, pattern in old_masks.patterns.items() if name not in parameters}
            for linear in chosen:  # the experts in one parameter may differ
                known = masks.patterns.setdefault(linear.parameter_name, str(patterns[linear.name]))
                if str(patterns[linear.name]) not in known.split(", "):
                    masks.patterns[linear.parameter_name] = f"{known}, {patterns[linear.name]}"
            sparsity = masks.sparsity()
            report = PruningReport(
                config={
                    **config.to_dict(),
                    **({"reconstruct": dataclasses.asdict(how)} if how else {}),
                    **({"bf16": True} if plan.bf16 and needs_data else {}),
                    **({"masks": len(fixed_masks)} if fixed_masks else {}),
                },
                blocks=blocks,
                sparsity=sparsity,
                model_sparsity=sparsity * masks.numel() / weights.numel,
                gradient_seconds=gradient_seconds,
                skipped=skipped,
                **facts_of(model, calibration, sequences, started),
                peak_memory=peak(),
            )
            if keep is not None:
                keep(masks, report)
    unasked = {name: why for name, why in skipped.items() if why not in ("router", "excluded by the config")}
    for line in by_reason({**unasked, **report.notes}):
        logger.warning(line)
    return masks, report


def _check_options(tokens_per_batch: Any, store: Any, reconstruct: Any) -> None:
    if tokens_per_batch is not None:
        check_count("tokens_per_batch", tokens_per_batch)
    if store is not None and store != "disk":
        check_device(store, "store", "'disk'")
    if not isinstance(reconstruct, Reconstruction | bool | None):
        raise TypeError(f"reconstruct must be True, False or a hf_prune.Reconstruction, got {reconstruct!r}.")


def check_device(device: str | torch.device, name: str = "device", *others: str) -> None:
    """Raises ValueError for one that is not here, under the `name` that the user gave it by; `others` are allowed in its place."""
    try:
        torch.ones(1, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:  # no such word, without CUDA, fewer GPUs, "meta"; no word
        there = " or ".join(["'cpu'", *(["'cuda'"] if torch.cuda.is_available() else []), *others])
        raise ValueError(f"{name} {str(device)!r} is not here ({first_line(error)}): give {there}.") from error


def check_model(model: nn.Module, elsewhere: bool = False) -> None:
    """Refuses what cannot be pruned; weights may be `elsewhere` where they are put in place part by part.

    Raises:
        TypeError, ValueError: no causal language model; quantized, offloaded or with adapters.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"hf_prune prunes models of Transformers, got a {type(model).__name__}.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder too: give a causal language model, with a decoder only.")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} is no causal language model: load it with AutoModelForCausalLM. A classifier is made of the "
            "folder of a pruned model, with its own class, and trained under the masks."
        )
    if name := wrapped_by_peft(model):
        raise ValueError(f"{name} is wrapped by PEFT, which would hide the pruned weight: {UNWRAP}.")
    for name, module in model.named_modules():
        if hasattr(module, "perp_A"):
            raise ValueError(
                f"{name} carries an adapter of PERPCallback: call its merge() or detach() first, or hf_prune.perp.release(model)."
            )
    for name, parameter in model.named_parameters():
        if is_quantised(parameter) or parameter.element_size() < 2:
            stored = f"{type(parameter).__name__}, {parameter.dtype}"
            raise ValueError(f"{name} is quantized ({stored}): prune in bfloat16, float16 or float32, then quantize.")
        if hasattr(parameter, "placements") and not elsewhere:  # a DTensor
            raise ValueError(f"{name} is sharded over processes: load the model whole, or call hf_prune.prune_checkpoint.")
        if parameter.is_meta and not elsewhere:
            raise ValueError(
                f"{name} is offloaded (device 'meta'): load the model without that, or call hf_prune.prune_checkpoint."
            )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not is_dequantized(model):
        raise ValueError(f"the model is quantized ({type(quantizer).__name__}): prune in bfloat16 or float32, then quantize.")


UNWRAP = (
    "call unload() or merge_and_unload() of the PeftModel. Transformers' own add_adapter leaves layers wrapped, even after "
    "delete_adapter(name): then peft.get_peft_model(model, config).unload(), with the config of the adapter, takes that off"
)


def wrapped_by_peft(model: nn.Module) -> str:
    """The first module that PEFT has put another around, whose parameters have other names then; empty if there is none."""
    return next((name for name, m in model.named_modules() if hasattr(m, "base_layer") or hasattr(m, "original_module")), "")


def is_dequantized(model: nn.Module) -> bool:
    """True of a model that was read from a quantized file (GGUF) into plain floating-point modules."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = str(getattr(getattr(quantizer, "quantization_config", None), "quant_method", "")).lower()
    return "gguf" in method and not getattr(quantizer, "packed_modules", None)


def _targets(decoder: Decoder, config: PruningConfig) -> tuple[list[Linear], dict[str, str]]:
    skipped = {name: why for block in decoder.blocks for name, why in block.left_dense.items()}
    outside = {id(p) for p in (decoder.model.get_input_embeddings().weight, decoder.model.get_output_embeddings().weight)}
    known: set[tuple[int, int | None]] = set()
    linears = []
    for linear in decoder.linears:
        key = id(linear.parameter), linear.expert
        if key[0] in outside:
            skipped[linear.name] = "shares its weight with the embedding"
        elif key in known:
            skipped[linear.name] = "is a block's before it as well, and pruned there"
        else:
            known.add(key)
            linears.append(linear)
    kept = {linear.name for linear in linears}
    for block in decoder.blocks:
        block.linears = [linear for linear in block.linears if linear.name in kept]
    return linears, skipped


def _check_patterns(
    linears: list[Linear], patterns: dict[str, Pattern], config: PruningConfig, old: Masks, fixed: Masks
) -> None:
    for linear in linears:
        pattern = patterns[linear.name]
        if isinstance(pattern, NM) and linear.in_features % pattern.m:
            raise ValueError(
                f"pattern '{pattern}' needs in_features divisible by {pattern.m}, but {linear.name} has "
                f"{linear.in_features}. Leave it out with exclude=['*.{_leaf(linear)}'] or use "
                "pattern='unstructured'."
            )
    wide = config.comparison_group in ("block", "model")
    for together in [] if fixed else [linears] if wide else [[linear] for linear in linears]:
        pruned = [linear for linear in together if linear.parameter_name in old]
        gone = sum(linear.weight.numel() - old.kept(linear.parameter_name, linear.expert) for linear in pruned)
        gone /= sum(linear.weight.numel() for linear in together)
        pattern = patterns[together[0].name]
        if gone > pattern.sparsity + 1e-3:
            what = together[0].name if len(together) == 1 else f"the {config.comparison_group}"
            raise ValueError(
                f"{what} is pruned to {gone:.3f} already, and {pattern} asks for less ({pattern.sparsity:.3f}). "
                "Pruned weights do not come back: load the dense model, or ask for more."
            )
    if fixed:
        if wide:
            raise ValueError(
                f"masks= leaves nothing to compare within a {config.comparison_group}: take comparison_group='row'."
            )
        known = {linear.parameter_name: linear for linear in linears}
        for name in fixed:
            if name not in known or fixed.shape(name) != tuple(known[name].parameter.shape):
                raise ValueError(f"the mask of {name} belongs to no linear that is to be pruned.")
        if missing := [name for name in known if name not in fixed]:
            raise ValueError(f"masks were given, but none for {missing[0]}. Exclude it or add its mask.")
        _check_given(linears, patterns, fixed)


def _check_given(linears: list[Linear], patterns: dict[str, Pattern], fixed: Masks) -> None:
    """Refuses given masks that keep more of a group than an N:M pattern does."""
    name = mask = None
    for linear in linears:
        if not isinstance(pattern := patterns[linear.name], NM):
            continue
        if linear.parameter_name != name:  # the experts in one parameter come one after the other
            name, mask = linear.parameter_name, fixed[linear.parameter_name]
        if broken := pattern.violations(linear.matrix(mask)):
            raise ValueError(
                f"the given mask of {linear.name} is not '{pattern}': {broken} of {linear.weight.numel() // pattern.m} groups keep "
                f"more than {pattern.n}. Give a config whose pattern is that of the masks, such as pattern='unstructured'."
            )


def _leaf(linear: Linear) -> str:
    """What a glob calls it: the last word of its name that is no number of an expert."""
    return linear.name.removesuffix(f".{linear.expert}").split(".")[-1]


def sequences_for(model: PreTrainedModel, config: PruningConfig, calibration: Any, tokenizer: Any) -> list[Tensor]:
    if calibration is None:
        raise ValueError(f"{config.method.name} needs calibration text: prune(config, calibration=[...], tokenizer=tokenizer).")
    positions = positions_of(model.config)
    length = config.sequence_length
    if length is None:
        length = min(2048, positions or 2048)
    elif positions and length > positions:
        raise ValueError(f"sequence_length={length} is more than the model's {positions} positions: give at most {positions}.")
    return calibration_sequences(
        calibration,
        tokenizer,
        n_samples=config.n_samples,
        sequence_length=length,
        seed=config.seed,
        sampling=config.sampling,
        vocab_size=model.get_input_embeddings().weight.shape[0],
    )


def identity_of(model: PreTrainedModel, config: PruningConfig, sequences: list[Tensor], weights: str) -> dict[str, str]:
    """What every result depends on, each as a short text; `weights` tells of those of `model`."""
    identity = {key: json.dumps(value, sort_keys=True) for key, value in config.to_dict().items()}
    identity |= {"calibration": fingerprint(sequences), "weights": weights, "versions": json.dumps(_versions())}
    # The last three are set where the model is saved, maybe not in all processes.
    unsaid = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    values = {"dtype": str(model.dtype), **{key: value for key, value in model.config.to_dict().items() if key not in unsaid}}
    return identity | {f"model's {key}": json.dumps(value, sort_keys=True, default=str) for key, value in values.items()}


def facts_of(model: PreTrainedModel, calibration: Any, sequences: list[Tensor], started: float) -> dict[str, Any]:
    """What every report tells: of the model, by the Hub name that it was loaded from or the name of its folder; of the data; of the
    time since `started`; and of the libraries that a result depends on."""
    name = getattr(model.config, "_name_or_path", None) or None
    return {
        "model": type(model).__name__,
        "base_model": Path(name).name if name and Path(name).is_dir() else name,
        "calibration": _described(calibration) if sequences else "",
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "seconds": time.perf_counter() - started,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {library: sys.modules[library].__version__ for library in (__package__, "torch", "transformers")}


def _described(calibration: Any) -> str:
    """The data's name, if it has one: a file's without its folder, a Hub data set's."""
    if isinstance(calibration, (str, Path)):
        return Path(calibration).name if Path(calibration).exists() else str(calibration)
    return str(getattr(getattr(calibration, "info", None), "dataset_name", None) or "")


def _gradients(
    decoder: Decoder, linears: list[Linear], samples: list[Tensor], method: Any, journal: Journal | None, ranks: Ranks
) -> Callable[[Block], dict[str, GradientNorm]]:
    def compute() -> dict[str, Tensor]:
        how = method.order, method.gradient_checkpointing, method.by_token, ranks
        found = model_gradients(decoder.model, decoder.blocks, linears, samples, *how)
        return {name: norm.sum for name, norm in found.items()}

    sums = journal.tensors("gradients", compute) if journal else compute()
    parameters = {linear.parameter_name: linear.parameter for linear in linears}
    norms = {name: GradientNorm.of(sums[name].to(p.device), method.order, len(samples)) for name, p in parameters.items()}
    return lambda block: norms


def _storage(store: str | torch.device | None, folder: Path | None) -> Store:
    """What moves hidden states to `store`: nothing at all, a device, or "disk": files in `folder`, or temporary ones."""
    if store == "disk":
        return partial(on_disk, folder=folder)
    device = None if store is None else torch.device(store)
    return lambda x: x.to(device)


def _batch_tokens(model: PreTrainedModel, device: torch.device, sequences: list[Tensor], propagate: str) -> int:
    """On a CPU as many tokens as run fastest; on a GPU as many as a third of its free memory holds of one block's work."""
    if device.type != "cuda":
        return _CPU_BATCH_TOKENS // (4 if propagate == "block" else 1)
    text = model.config.get_text_config()
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    scores = 4 * getattr(text, "num_attention_heads", 32) * max(map(len, sequences))  # if attention is not fused
    per_token = 4 * (8 * text.hidden_size + 4 * width) + scores
    return max(_CPU_BATCH_TOKENS, torch.cuda.mem_get_info(device)[0] // (3 * per_token))


def count_peak(device: torch.device) -> Callable[[], int | None]:
    """Counts the highest memory of `device` from now on; tells it in bytes when called, or None where the system does not."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")

    def peak() -> int | None:
        with contextlib.suppress(OSError), open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), None)

    return peak
