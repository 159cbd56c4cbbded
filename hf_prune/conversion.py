"""Folders that only some loaders read, rewritten as ordinary ones: our compact form, and the sparse forms of compressed-tensors.

compressed-tensors wrote "sparse-bitmask" and "sparse-24-bitmask" until 0.14 and reads neither since 0.15.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from .atomic import replaced_folder
from .compact import INDEX, CompactFiles, expanded
from .config import CONFIG_FILE, PruningConfig
from .masks import Masks
from .serialization import FOLDER, PruningState, is_replaced, is_weight_file


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
    if not (source / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json.")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if (source / FOLDER / CONFIG_FILE).exists():
        state = PruningState.load(source)
        if not state.compact:
            raise ValueError(f"{folder} is an ordinary folder already.")
        state.check_files(source)
        files = CompactFiles(source / FOLDER, state.masks)
        shards = ({name: files.get_tensor(name) for name in names} for names in files.shards.values())
        count, legacy = len(files.shards), None
    else:
        legacy = _Legacy(source, config)
        config.pop("quantization_config", None)
        config.pop("compression_config", None)
        shards, count = legacy.shards(), len(legacy.plan)
    with replaced_folder(out, is_replaced) as fresh:
        for entry in source.iterdir():
            if entry.is_file() and not is_weight_file(entry.name):
                shutil.copy2(entry, fresh / entry.name)
        _write(fresh, shards, count)
        if legacy:
            state = _state_of(legacy, config)
            if state:
                config["pruning_config"] = state.summary()
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if state:
            state.save(fresh)


def _write(folder: Path, shards: Iterator[dict[str, Tensor]], count: int) -> None:
    weight_map, total = {}, 0
    for i, tensors in enumerate(tqdm(shards, desc="expand", unit="shard", total=count)):
        name = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class _Legacy:
    """A checkpoint of compressed-tensors: `<module>.compressed` (kept values), `.bitmask` (out, ceil(in / 8)), `.shape`.

    Raises:
        ValueError: another format, quantized as well, or a part is missing.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        how = config.get("quantization_config") or config.get("compression_config") or {}
        sparsity = how.get("sparsity_config") or {}
        self.format = sparsity.get("format")
        if self.format not in _LEGACY:
            raise ValueError(f"{folder} is no compact folder, nor one of compressed-tensors in {' or '.join(_LEGACY)}.")
        if how.get("config_groups"):
            raise ValueError(f"{folder} is quantized as well as {self.format}: only sparse weights can be expanded.")
        self.masks = Masks()
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}.") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        self._folder = folder
        self._pruned = [key.removesuffix(".compressed") for key in self._files if key.endswith(".compressed")]
        parts = {f"{name}.{part}" for name in self._pruned for part in ("compressed", "bitmask", "shape", "row_offsets")}
        self._sizes = {f"{name}.weight": self._shape(name) for name in self._pruned}
        self._sizes.update({name: file.get_slice(name).get_shape() for name, file in self._files.items() if name not in parts})
        if not self._pruned:
            raise ValueError(f"{folder} says it is {self.format}, but has no compressed weight.")
        like = {name: torch.empty(size, dtype=self._dtype(name), device="meta") for name, size in self._sizes.items()}
        self.plan = list(split_torch_state_dict_into_shards(like).filename_to_tensors.values())

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """Dense tensors by name, a shard at a time; the masks grow along."""
        for names in self.plan:
            yield {name: self._tensor(name) for name in names}

    def _tensor(self, name: str) -> Tensor:
        if name in self._files:
            return self._files[name].get_tensor(name)
        module, shape = name.removesuffix(".weight"), self._sizes[name]
        bits = self._part(module, "bitmask").numpy()
        try:
            dense = expanded(self._part(module, "compressed").flatten(), bits, shape)
        except ValueError as error:
            raise ValueError(f"{self._folder} is damaged: {name}: {error}.") from error
        kept = numpy.unpackbits(bits, axis=-1, count=shape[-1], bitorder="little")
        self.masks[name] = torch.from_numpy(kept).bool()
        return dense

    def _shape(self, module: str) -> tuple[int, ...]:
        return tuple(self._part(module, "shape").flatten().tolist())

    def _part(self, module: str, part: str) -> Tensor:
        key = f"{module}.{part}"
        if key not in self._files:
            raise ValueError(f"{self._folder} is damaged: {key} is missing.")
        return self._files[key].get_tensor(key)

    def _dtype(self, name: str) -> torch.dtype:
        key = name if name in self._files else f"{name.removesuffix('.weight')}.compressed"
        return self._files[key].get_slice(key)[:0].dtype


def _state_of(legacy: _Legacy, config: dict[str, Any]) -> PruningState | None:
    """A state for masks that somebody else made; None if the model calls its weights otherwise than the file."""
    values = {key: value for key, value in config.items() if key != "architectures"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    try:
        legacy.masks.parameters_of(model)
    except ValueError as error:
        logger.warning(f"written without masks: {error}")
        return None
    pattern = "2:4" if "24" in legacy.format else "unstructured"
    made = PruningConfig(method="magnitude", pattern=pattern, sparsity=legacy.masks.sparsity()).to_dict()
    return PruningState(legacy.masks, {**made, "method": "unknown"})
