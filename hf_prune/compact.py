"""Compact weight files: only the values that a mask keeps, beside the masks. How they are written, and how they are read.

In a compact folder `pruning/values-*.safetensors` stand for the weight files. A tensor under a mask has its kept values there,
one after another, and its shape in the metadata; a tensor that a file calls otherwise than the model does (experts that
Transformers fuses when it loads) brings bits of its own. The index that every loader looks for names one file that is not there,
and whose name says what to do. `as_ordinary` lets Transformers read such a folder: each tensor is expanded when it is its turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import modeling_utils

from .atomic import readable
from .checkpoint import INDEX
from .masks import FORMAT_VERSION, Masks, bit_patterns, check_version, pack, unpack


SIGN = "COMPACT_FOLDER--load_with_hf_prune.load--or_make_ordinary_with--hf-prune_expand_FOLDER_OUT.safetensors"

_FORMAT = "hf_prune.values"
_PIECE = 1 << 18  # weights that are unpacked together: they stay in the cache


def compress(folder: Path, target: Path, masks: Masks) -> None:
    """Replaces the ordinary weight files of `folder` by compact ones in `target`, shard by shard, and by an index that tells.

    Raises:
        ValueError: `folder` has no `model*.safetensors`.
    """
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        raise ValueError("compact=True needs weights in safetensors files: leave out safe_serialization=False.")
    target.mkdir(exist_ok=True)
    names, total = [], 0
    for i, shard in enumerate(tqdm(shards, desc="compact", unit="shard", disable=len(shards) == 1)):
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, list[int]] = {}
        own: list[str] = []
        with safe_open(shard, "pt") as file:
            shard_names = list(file.keys())
            names += shard_names
            for name in shard_names:
                tensor = file.get_tensor(name)
                total += tensor.nbytes
                values, bits = _kept(
                    tensor, masks.packed(name) if name in masks and masks.shape(name) == tensor.shape else None
                )
                tensors[name] = values
                if values is not tensor:
                    shapes[name] = list(tensor.shape)
                if bits is not None:
                    own.append(name)
                    tensors[f"{name}:bits"] = bits
        if len(tensors) != len(shard_names) + len(own):
            raise ValueError("compact=True cannot save tensors whose names differ by ':bits' only.")
        metadata = {"format": _FORMAT, "version": str(FORMAT_VERSION), "shapes": json.dumps(shapes), "bits": json.dumps(own)}
        save_file(tensors, target / f"values-{i + 1:05d}-of-{len(shards):05d}.safetensors", metadata)
        shard.unlink()
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, SIGN)}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _kept(tensor: Tensor, packed: numpy.ndarray | None) -> tuple[Tensor, Tensor | None]:
    """The kept values of `tensor`, and bits if they are not those of the mask; the tensor itself where that is no gain."""
    if tensor.dim() < 2 or not tensor.numel():
        return tensor, None
    raw = bit_patterns(tensor).reshape(-1)
    if packed is not None:
        values = numpy.concatenate([raw[start:][where] for start, where in _positions(packed, tensor.shape)])
        if numpy.count_nonzero(values) == numpy.count_nonzero(raw):  # else a pruned weight is -0.0
            return torch.from_numpy(values).view(tensor.dtype), None
    bits = pack((raw != 0).reshape(tensor.shape))
    values = raw[raw != 0]
    if values.nbytes + bits.nbytes > 0.9 * raw.nbytes:
        return tensor, None
    return torch.from_numpy(values).view(tensor.dtype), torch.from_numpy(bits)


def expanded(values: Tensor, packed: numpy.ndarray, shape: tuple[int, ...]) -> Tensor:
    """The dense tensor of `shape` with `values` (kept,) where `packed` (..., ceil(in / 8)) has bits, and +0.0 elsewhere.

    Raises:
        ValueError: there are more or fewer values than bits.
    """
    if packed.shape != (*shape[:-1], -(-shape[-1] // 8)):
        raise ValueError(f"bits of shape {packed.shape} for a tensor of shape {tuple(shape)}")
    dense = torch.zeros(shape, dtype=values.dtype)
    raw, source, used = bit_patterns(dense).reshape(-1), bit_patterns(values), 0
    for start, where in _positions(packed, shape):
        piece = source[used : used + len(where)]
        if len(piece) == len(where):
            raw[start:][where] = piece
        used += len(where)
    if used != len(source):
        raise ValueError(f"{len(source)} values, but its mask keeps {used}")
    return dense


def _positions(packed: numpy.ndarray, shape: tuple[int, ...]) -> Iterator[tuple[int, numpy.ndarray]]:
    """Where bits are set, in pieces of rows: the flat index at which a piece starts, and positions from there."""
    width = shape[-1]
    rows = packed.reshape(-1, packed.shape[-1])
    step = max(1, _PIECE // width)
    for i in range(0, len(rows), step):
        yield i * width, unpack(rows[i : i + step], width).reshape(-1).nonzero()[0]  # of bool it needs no branch per bit


class CompactFiles(contextlib.ExitStack):
    """The weight files of a compact folder as one, with the interface of `safetensors.safe_open`.

    Args:
        paths: the files; others that lie beside them do not count.
        masks: of the model.

    Raises:
        ValueError: not readable as compact files of this version, or not of these masks; a tensor tells when it is asked for.
    """

    def __init__(self, paths: Iterable[Path], masks: Masks, device: str | torch.device = "cpu"):
        super().__init__()
        self._slices: dict[str, _Slice] = {}
        self.shards: dict[Path, list[str]] = {}
        for path in sorted(paths):
            with readable(path, "compact weights of hf_prune"):
                file = self.enter_context(safe_open(path, "pt"))
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no values of hf_prune: its format is {metadata.get('format')!r}.")
                check_version(path, metadata["version"])
                shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
                own = set(json.loads(metadata["bits"]))
            self.shards[path] = [name for name in file.keys() if name.removesuffix(":bits") not in own or name in own]
            for name in self.shards[path]:
                if name in self._slices:
                    raise ValueError(f"{path} and {self._slices[name].path} both hold {name}.")
                self._slices[name] = _Slice(path, file, name, shapes.get(name), name in own, masks, device)

    def keys(self) -> list[str]:
        return list(self._slices)

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def get_tensor(self, name: str) -> Tensor:
        """The dense tensor of that name."""
        return self._slices[name][...]

    def get_slice(self, name: str) -> _Slice:
        return self._slices[name]


@dataclass(frozen=True)
class _Slice:
    """A tensor that is expanded when it is indexed."""

    path: Path
    file: Any
    name: str
    shape: tuple[int, ...] | None  # of a tensor that has to be expanded
    own: bool  # has bits of its own
    masks: Masks
    device: str | torch.device

    def get_shape(self) -> list[int]:
        return list(self.shape or self.file.get_slice(self.name).get_shape())

    def get_dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        values = self.file.get_tensor(self.name)
        if self.shape is not None:
            try:
                packed = self.file.get_tensor(f"{self.name}:bits").numpy() if self.own else self.masks.packed(self.name)
                values = expanded(values, packed, self.shape)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{self.path} does not go with its masks: {self.name}: {error}.") from error
        return values.to(self.device)[index]


_patching = threading.Lock()


@contextlib.contextmanager
def as_ordinary(folder: Path, paths: list[Path], masks: Masks) -> Iterator[None]:
    """Within, Transformers reads the file `SIGN` in the compact `folder` as if it held all weights; one thread at a time.

    Raises:
        ValueError: nobody asked for that file, so the weights that were loaded are others.
    """

    def opened(path: str | os.PathLike, *args: Any, device: str | torch.device = "cpu", **kwargs: Any) -> Any:
        if Path(path) != folder / SIGN:
            return original(path, *args, device=device, **kwargs)
        asked.append(path)
        return CompactFiles(paths, masks, device)

    asked: list[Any] = []
    with _patching:
        original = modeling_utils.safe_open
        modeling_utils.safe_open = opened
        try:
            yield
        finally:
            modeling_utils.safe_open = original
    if not asked:
        raise ValueError(f"{folder} is compact, but Transformers took its weights from elsewhere: something in it says so.")
