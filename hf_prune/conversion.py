"""Folders that only some loaders read, rewritten as ordinary ones: our compact form, and the sparse forms of compressed-tensors.

compressed-tensors wrote "sparse-bitmask" and "sparse-24-bitmask" until 0.14 and reads neither since 0.15.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from .atomic import readable, replaced_folder
from .checkpoint import files_of, write_index
from .compact import CompactFiles, expanded
from .config import CONFIG_FILE, PruningConfig
from .masks import Masks, unpack
from .model_card import card_of, write_card
from .serialization import FOLDER, PruningState, check_inside, copy_entry, is_replaced, variant_of


logger = logging.get_logger(__name__)

_LEGACY = ("sparse-bitmask", "sparse-24-bitmask")


def expand(folder: str | Path, out: str | Path) -> None:
    """Writes the ordinary form of a compact folder, which every tool loads; one shard at a time is in memory.

    Also reads checkpoints that compressed-tensors wrote as "sparse-bitmask" or "sparse-24-bitmask" (llm-compressor, until 2026):
    their bit masks become masks of hf_prune.

    Args:
        folder: a compact folder.
        out: folder to write; may be `folder` itself.

    Raises:
        ValueError: `folder` is neither, or is damaged; `out` is as it was.
    """
    source = Path(folder)
    config = _config_of(source)
    legacy = None
    if (source / FOLDER / CONFIG_FILE).exists():
        state = PruningState.load(source)
        if not state.compact:
            raise ValueError(f"{folder} is an ordinary folder already.")
        for variant in sorted(set(map(variant_of, state.files)), key=str):  # others move along, and get new digests
            state.check_files(source, variant)
        files: Any = CompactFiles([source / name for name in state.compact], state.masks)
        plan = list(files.shards.values())
    else:
        files = legacy = _Legacy(source, config)
        plan = files.plan
        state = _state_of(legacy, config)
    others = [entry for entry in source.iterdir() if not is_replaced(entry.name)]
    for entry in others:
        for path in (entry, *entry.rglob("*")):
            check_inside(path, source)
    with replaced_folder(out, is_replaced) as fresh, files:
        for entry in others:
            copy_entry(entry, fresh)
        _write(fresh, files, plan)
        if legacy:
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if state:
            state.save(fresh)
            if state.report:
                write_card(fresh, state.report, old=card_of(str(source)), base=None)


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json.")
    with readable(path, "the config of a model"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.items  # noqa: B018 - of anything but a dict it is an error
        return config


def _write(folder: Path, files: Any, plan: list[list[str]]) -> None:
    for i, names in enumerate(tqdm(plan, desc="expand", unit="shard")):
        path = folder / ("model.safetensors" if len(plan) == 1 else f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors")
        save_file({name: files.get_tensor(name) for name in names}, path, {"format": "pt"})
    if len(plan) > 1:
        write_index(folder)


class _Legacy(contextlib.ExitStack):
    """A checkpoint of compressed-tensors: `<module>.compressed` (kept values), `.bitmask` (out, ceil(in / 8)), `.shape`.

    Raises:
        ValueError: another format, quantized as well, or a part is missing.
    """

    PARTS = ("compressed", "bitmask", "shape", "row_offsets")

    def __init__(self, folder: Path, config: dict[str, Any]):
        super().__init__()
        how = config.get("quantization_config") or config.get("compression_config") or {}
        self.format = (how.get("sparsity_config") or {}).get("format")
        if self.format not in _LEGACY:
            raise ValueError(f"{folder} is no compact folder, nor one of compressed-tensors in {' or '.join(_LEGACY)}.")
        if how.get("config_groups"):
            raise ValueError(f"{folder} is quantized as well as {self.format}: only sparse weights can be expanded.")
        self._folder = folder
        with readable(folder, self.format):
            paths = files_of(folder, check_inside)
            opened = {path: self.enter_context(safe_open(path, "pt")) for path in set(paths.values())}
            self._files = {key: opened[path] for key, path in paths.items()}
            self.bits, self.shapes = {}, {}
            for module in [key.removesuffix(".compressed") for key in self._files if key.endswith(".compressed")]:
                self.shapes[f"{module}.weight"] = tuple(self._part(module, "shape").flatten().tolist())
                self.bits[f"{module}.weight"] = self._part(module, "bitmask").numpy()
        if not self.shapes:
            raise ValueError(f"{folder} says it is {self.format}, but has no compressed weight.")
        parts = {f"{name.removesuffix('weight')}{part}" for name in self.shapes for part in self.PARTS}
        names = [*self.shapes, *(name for name in self._files if name not in parts)]
        like = {name: self.get_tensor(name).to("meta") for name in names}  # finds damage before anything is written
        self.plan = list(split_torch_state_dict_into_shards(like).filename_to_tensors.values())

    def get_tensor(self, name: str) -> Tensor:
        """The dense tensor of that name."""
        if name not in self.shapes:
            return self._files[name].get_tensor(name)
        values = self._part(name.removesuffix(".weight"), "compressed").flatten()
        try:
            return expanded(values, self.bits[name], self.shapes[name])
        except (ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"{self._folder} is damaged: {name}: {error}.") from error

    def _part(self, module: str, part: str) -> Tensor:
        key = f"{module}.{part}"
        if key not in self._files:
            raise ValueError(f"{self._folder} is damaged: {key} is missing.")
        return self._files[key].get_tensor(key)


def _state_of(legacy: _Legacy, config: dict[str, Any]) -> PruningState | None:
    """A state for masks that somebody else made, and `config` changed to match; None if the model's names are not the file's."""
    config.pop("quantization_config", None)
    config.pop("compression_config", None)
    masks = Masks({name: torch.from_numpy(unpack(bits, legacy.shapes[name][-1])) for name, bits in legacy.bits.items()})
    try:
        values = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
        masks.parameters_of(model)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(f"written without masks: {error}")
        return None
    pattern = "2:4" if "24" in legacy.format else "unstructured"
    made = PruningConfig(method="magnitude", pattern=pattern, sparsity=masks.sparsity()).to_dict()
    state = PruningState(masks, {**made, "method": "unknown"})
    config["pruning_config"] = state.summary()
    return state
