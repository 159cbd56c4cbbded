"""Pruning from disk to disk: a folder goes in, a folder with zeros and masks comes out, and one block at a time is in memory.

The procedure is that of `prune_model`, its blocks those of a `Checkpoint`. What is finished waits beside the output, in a folder whose
name ends in `.unfinished`; the output appears when it is complete. Hub models are downloaded first.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from .atomic import check_writable, move_whole
from .checkpoint import Checkpoint, dtype_of, write_index
from .config import PruningConfig
from .masks import Masks
from .model_card import CARD, card_of, write_card
from .pruning import check_device, prune_model
from .ranks import Ranks
from .report import PruningReport
from .serialization import ADAPTER, FOLDER, PruningState, check_causal, copy_entry, is_replaced, is_weight_file, skeleton_of


UNFINISHED, _DONE = ".unfinished", "done"
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors", ".ckpt"}
_NOT_FETCHED = [
    *(f"*{suffix}" for suffix in sorted(_OTHER_WEIGHTS - {".safetensors"})),
    "*.onnx_data",
    "original/*",
    "consolidated*",
]


def work_of(target: Path) -> Path:
    """Where is kept what is unfinished of `target`."""
    return target.with_name(f"{target.name}{UNFINISHED}")


def prune_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: PruningConfig | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    *,
    device: str | torch.device = "cpu",
    tokens_per_batch: int | None = None,
    store: str | torch.device | None = None,
    bf16: bool = False,
    trust_remote_code: bool = False,
) -> PruningReport:
    """Prunes the model in the folder `src` into a new folder `dst`, in the memory of one block and the hidden states.

    After an interruption, also a kill, the same call goes on from the last finished block; the result is that of
    `model.prune(...)`, bit for bit. `from_pretrained(dst)` of its class and `hf_prune.load(dst)` read it.

    Args:
        src: folder of a model with safetensors weights, or a Hub name; never changed.
        dst: folder to write; it must not be there.
        config, calibration, tokenizer, tokens_per_batch, bf16: as for `model.prune`.
        device: where blocks are computed.
        store: where hidden states wait between blocks: a device, or "disk"; None leaves them where blocks are computed.
        trust_remote_code: run the Python code that `src` brings for its model; it is copied to `dst`.

    Raises:
        ValueError, TypeError: anything that cannot be done as asked, before a file is written.
        OSError: no room; what is finished is kept, and the same call goes on.
    """
    config = PruningConfig() if config is None else config
    if not isinstance(config, PruningConfig):
        raise TypeError(f"config must be a PruningConfig, as PruningConfig(method='wanda'), got a {type(config).__name__}.")
    if config.method.structural or config.comparison_group == "model":
        what = f"method '{config.method.name}'" if config.method.structural else "comparison_group='model'"
        raise ValueError(f"{what} looks at all blocks at once: load the model and call model.prune(config).")
    check_device(device)
    ranks, target = Ranks.launched(), Path(dst).resolve()
    ranks.check_same({"dst": str(target)})
    source = _fetched(src)
    if target.is_relative_to(source.resolve()):
        raise ValueError(f"{dst} is the source or in it, and the source is not changed: give another folder.")
    work = work_of(target)
    if target.exists():
        if (work / _DONE).exists() and not (work / "model").exists():  # killed when that had become the output
            shutil.rmtree(work, ignore_errors=True)
        raise ValueError(f"{dst} exists already, and would appear only when it is complete: remove it or give another folder.")
    if (source / ADAPTER).exists():
        raise ValueError(f"{src} holds an adapter, which would be loaded over its weights: merge it into the model first.")
    check_writable(target)
    model = _skeleton(source, str(src), trust_remote_code)
    old = PruningState.load(source) if getattr(model.config, "pruning_config", None) else None
    if old and old.compact:
        raise ValueError(f"{src} is compact: make it ordinary with hf_prune.expand({str(src)!r}, ...) first.")
    if old:
        old.masks.parameters_of(model)
        old.check_files(source)
    checkpoint = Checkpoint(model, source, work, torch.device(device), ranks, old.masks if old else Masks())

    def keep(masks: Masks, report: PruningReport) -> None:
        report.follow(old.report if old else None)
        if not ranks.index:
            _finish(checkpoint, PruningState(masks, config.to_dict(), report), model, card_of(str(source)) if old else None)
            (work / _DONE).touch()
            move_whole(work / "model", target)
            shutil.rmtree(work, ignore_errors=True)
        ranks.wait()

    _, report = prune_model(
        model,
        config,
        calibration,
        tokenizer,
        old_masks=old and old.masks,
        tokens_per_batch=tokens_per_batch,
        store=store,
        bf16=bf16,
        keep=keep,
        checkpoint=checkpoint,
    )
    return report


def _fetched(src: str | Path) -> Path:
    """The folder `src`, or that into which the Hub's model of this name was downloaded."""
    if Path(src).is_dir():
        return Path(src)
    try:
        validate_repo_id("" if isinstance(src, Path) else src)
    except HFValidationError as error:
        raise ValueError(f"there is no folder {src}: give that of a model, or the name of one on the Hub.") from error
    return Path(snapshot_download(str(src), ignore_patterns=_NOT_FETCHED))


def _skeleton(source: Path, name: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model of the folder without its weights, which are on the "meta" device; buffers that no file holds are there."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    check_causal(config, name)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source} is quantized: prune the checkpoint in bfloat16 or float32, then quantize.")
    with init_empty_weights():
        model = skeleton_of(config, trust_remote_code, dtype=config.dtype or dtype_of(source))
    model.config._name_or_path = name
    model.tie_weights()  # each parameter became another one when it lost its values
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _finish(checkpoint: Checkpoint, state: PruningState, model: PreTrainedModel, card: str | None) -> None:
    """All that belongs into the folder beside the shards of the blocks; `card` is that of a source that was pruned before."""
    with checkpoint.present(None):
        checkpoint.write(None)
    folder, source = checkpoint.work / "model", checkpoint.source
    write_index(folder)
    for entry in source.iterdir():
        if not (entry.suffix in _OTHER_WEIGHTS or is_weight_file(entry.name) or is_replaced(entry.name)):
            if entry.name == CHAT_TEMPLATE_DIR or (entry.is_file() and entry.name != CARD and not entry.name.startswith(".")):
                copy_entry(entry, folder)
    model.config.pruning_config = state.summary()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    state.save(folder)
    write_card(folder, state.report, old=card, base=card_of(str(source)))
