"""The masks of a model: which weights are kept. The only file that knows how a mask is stored.

In memory a mask is bit-packed along its last dimension, one bit a weight, so that masks cost a sixteenth of a bf16 model. On
disk an exact 2:4 mask takes 8 bits for 12 weights (three groups, each one of six). Masks are stored, never re-derived from
`weight != 0`: a kept weight may be 0.0.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from .atomic import readable, written


FORMAT_VERSION = 1
MASK_FILE = "masks.safetensors"


class Masks(MutableMapping[str, Tensor]):
    """Maps a parameter's name (`"model.layers.0.mlp.up_proj.weight"`) to its mask: bool, shape of the parameter, True = kept.

    Args:
        folder: where the masks lie, instead of in memory.

    Attributes:
        patterns: parameter -> the pattern its mask was made for (`"2:4"`), where that is known.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None, folder: Path | None = None):
        self._packed: MutableMapping[str, tuple[numpy.ndarray, tuple[int, ...]]] = MaskFolder(folder) if folder else {}
        self._known: dict[str, tuple[tuple[int, ...], int]] = {}  # shapes and kept weights, so that no file is read for them
        self.patterns: dict[str, str] = {}
        for name, mask in (masks or {}).items():
            self[name] = mask

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise TypeError(f"the mask of {name} must be a bool tensor with True = kept, got {kind}.")
        packed, shape = _pack_anywhere(mask.detach()), tuple(mask.shape)
        self._packed[name] = packed, shape
        self._known[name] = shape, _count(packed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {"_known": {}, **state}  # a pickle of before has none

    def __getitem__(self, name: str) -> Tensor:
        return self.of(name)

    def __delitem__(self, name: str) -> None:
        del self._packed[name]
        self._known.pop(name, None)
        self.patterns.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, sparsity {self.sparsity():.4f})"

    def of(self, name: str, expert: int | None = None) -> Tensor:
        """One mask; of a fused parameter (experts, ., .) that of one `expert` (., .), without unpacking the others."""
        packed, shape = self._packed[name]
        return torch.from_numpy(unpack(packed if expert is None else packed[expert], shape[-1]))

    def renamed(self, names: Mapping[str, str]) -> Masks:
        """Those of `names`, new name -> known name, that there are; the same bits, not a copy."""
        found = Masks()
        found._packed = {new: self._packed[known] for new, known in names.items() if known in self._packed}
        found.patterns = {new: self.patterns[known] for new, known in names.items() if known in self.patterns}
        return found

    def packed(self, name: str) -> numpy.ndarray:
        """The bits of one mask, uint8 (..., ceil(in / 8)), the first weight in the lowest bit; not a copy, and not to be changed."""
        return self._packed[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one mask, without unpacking it."""
        return self._known[name][0] if name in self._known else self._packed[name][1]

    def kept(self, name: str, expert: int | None = None) -> int:
        """Number of weights that one mask keeps, or the part of it that is one `expert`'s, without unpacking it."""
        if expert is not None:
            return _count(self.packed(name)[expert])
        if name not in self._known:
            packed, shape = self._packed[name]
            self._known[name] = shape, _count(packed)
        return self._known[name][1]

    def numel(self) -> int:
        """Number of weights under all masks."""
        return sum(math.prod(self.shape(name)) for name in self)

    def sparsity(self) -> float:
        """Fraction of weights, over all masks, that are pruned."""
        return 1 - sum(self.kept(name) for name in self) / max(self.numel(), 1)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Writes +0.0 in place at every pruned weight of `model`.

        Raises:
            ValueError: a mask has no parameter of its name and shape, or that is quantised or on disk; no weight is changed then.
        """
        kept = {}
        for name, parameter in self.parameters_of(model).items():
            if is_quantised(parameter):
                raise ValueError(f"{name} is quantised, and is not changed there: load the model without that.")
            kept[name] = where_kept(model, name, parameter, to_change=True)
        for name, values in kept.items():
            weight, bits = in_this_process(values, self.packed(name))
            zero_pruned_(weight, bits.to(weight.device))

    @torch.no_grad()
    def violations(self, model: nn.Module, values: Mapping[str, Tensor] = {}) -> dict[str, int]:
        """Per parameter, how many pruned weights of `model` (of what this process has of it) are not zero; only those that have any.

        `values` of that name, where there are some, stand for a parameter's own.
        What a quantizer has stored in numbers of its own is passed over: `check_zeros` reads it.
        """
        found = {}
        for name, parameter in self.parameters_of(model).items():
            if is_quantised(parameter):
                continue
            weight = values[name] if name in values else where_kept(model, name, parameter)
            weight, bits = in_this_process(weight, self.packed(name))
            if weight.device.type == "cpu":  # ten times faster than what follows, which also knows that -0.0 is zero
                if not (pack(bit_patterns(weight) != 0) & ~bits.numpy()).any():
                    continue
            kept = torch.from_numpy(unpack(bits.numpy(), weight.shape[-1])).to(weight.device)
            if count := int(((weight != 0) & ~kept).count_nonzero()):
                found[name] = count
        return found

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `model` that the masks belong to, by name.

        Raises:
            ValueError: a mask has no parameter of its name, or of another shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self:
            if name not in parameters:
                hint = ""
                if "expert" in name:
                    hint = " Transformers 4.x and 5 name them differently: hf_prune.load(..., on_mismatch='drop'), and prune again."
                raise ValueError(f"the masks do not belong to this model: it has no parameter {name!r}.{hint}")
            if not is_quantised(parameters[name]) and tuple(parameters[name].shape) != self.shape(name):
                raise ValueError(
                    f"the masks do not belong to this model: {name} has shape {tuple(parameters[name].shape)}, its mask "
                    f"{self.shape(name)}. Take the masks that were saved with it."
                )
        return {name: parameters[name] for name in self}

    def digest(self) -> str:
        """SHA-256 over names, shapes, patterns and masks."""
        total = hashlib.sha256()
        for name in sorted(self):
            packed, shape = self._packed[name]
            total.update(json.dumps([name, shape, self.patterns.get(name)]).encode())
            total.update(numpy.ascontiguousarray(packed))
        return total.hexdigest()

    def save(self, folder: str | Path) -> str:
        """Writes `masks.safetensors` into `folder`: uint8 (..., ceil(in / 8)) a parameter, or (bytes,) if `coded`; shapes,
        patterns and digest beside. Returns the digest. One mask at a time is in memory, for those that lie on a disk."""
        metadata = {
            "format": "hf_prune.masks",
            "version": str(FORMAT_VERSION),
            "shapes": json.dumps({name: list(self.shape(name)) for name in self}),
            "patterns": json.dumps(self.patterns),
            "coded": json.dumps(sorted(self)),
            "digest": self.digest(),
        }
        longest = {name: _entry(self.shape(name), 1 << 60) for name in self}
        room = len(json.dumps({"__metadata__": metadata, **longest})) // 8 * 8 + 8  # for the header, which is known in the end
        header, coded, end = {}, [], 0
        with open(Path(folder) / MASK_FILE, "wb") as file:
            file.seek(8 + room)
            for name in self:
                data = self.packed(name)
                if (codes := _encode(data, self.shape(name))) is not None:
                    data = codes
                    coded.append(name)
                header[name] = _entry(data.shape, end, end + data.nbytes)
                end += file.write(numpy.ascontiguousarray(data).data)
            metadata["coded"] = json.dumps(sorted(coded))
            text = json.dumps({"__metadata__": metadata, **header}).encode()
            file.seek(0)
            file.write(room.to_bytes(8, "little") + text.ljust(room))
        return metadata["digest"]

    @classmethod
    def load(cls, folder: str | Path, digest: str | None = None) -> Masks:
        """Reads what `save` wrote, and gave `digest` for, if that is known.

        Raises:
            ValueError: not a mask file, of a newer version, truncated, changed since, or with contents that contradict
                each other.
        """
        path = Path(folder) / MASK_FILE
        masks = cls()
        with readable(path, "masks of hf_prune"), safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "hf_prune.masks":
                raise ValueError(f"{path} holds no masks of hf_prune: its format is {metadata.get('format')!r}.")
            check_version(path, metadata["version"])
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            masks.patterns = dict(json.loads(metadata["patterns"]))
            coded = set(json.loads(metadata.get("coded", "[]")))
            if set(file.keys()) != set(shapes):
                raise ValueError(f"{path}: its list of shapes and its masks are not of the same parameters.")
            for name, shape in shapes.items():
                packed = file.get_tensor(name)
                if name in coded:
                    packed = _decode(packed, shape)
                if packed.dtype != numpy.uint8 or packed.shape != (*shape[:-1], -(-shape[-1] // 8)):
                    raise ValueError(f"{path}: the mask of {name} has shape {packed.shape}, not that of {shape}.")
                masks._packed[name] = packed, shape
            if masks.digest() != metadata["digest"]:
                raise ValueError(f"{path} is damaged: its masks are not those that were saved (digest differs).")
            if digest not in (None, metadata["digest"]):
                raise ValueError(f"{path} is not the file that was saved with this model: its digest differs.")
        return masks


def _entry(shape: tuple[int, ...], start: int, end: int = 1 << 60) -> dict:
    """Of a tensor in the header of a safetensors file."""
    return {"dtype": "U8", "shape": list(shape), "data_offsets": [start, end]}


class MaskFolder(MutableMapping[str, tuple[numpy.ndarray, tuple[int, ...]]]):
    """Packed masks and their shapes, of which none is in memory: a file each in `folder`, where an earlier run may have put some."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __setitem__(self, name: str, value: tuple[numpy.ndarray, tuple[int, ...]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{name}.tmp"
        with written(self._path(name)):
            save_file({"mask": value[0]}, temporary, {"shape": json.dumps(value[1])})
        temporary.replace(self._path(name))  # not flushed: there are many, and one that a power cut damages is found to be so

    def __getitem__(self, name: str) -> tuple[numpy.ndarray, tuple[int, ...]]:
        if name not in self:
            raise KeyError(name)
        with readable(self._path(name), "a mask"), safe_open(self._path(name), "numpy") as file:
            return file.get_tensor("mask"), tuple(json.loads(file.metadata()["shape"]))

    def __contains__(self, name: object) -> bool:
        return self._path(name).exists()

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name.removesuffix(".safetensors") for path in self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def pack(bits: numpy.ndarray) -> numpy.ndarray:
    """uint8 (..., ceil(in / 8)) of bool (..., in), the first in the lowest bit."""
    return numpy.packbits(bits, axis=-1, bitorder="little")


def _pack_anywhere(mask: Tensor) -> numpy.ndarray:
    """`pack` of a bool tensor where it is: an eighth of it leaves a GPU."""
    if mask.device.type == "cpu":
        return pack(mask.contiguous().numpy())
    bits = nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8).cpu().numpy()


def unpack(packed: numpy.ndarray, width: int) -> numpy.ndarray:
    """The bool (..., width) that `pack` was given."""
    return numpy.unpackbits(packed, axis=-1, count=width, bitorder="little").view(numpy.bool_)


def _count(packed: numpy.ndarray) -> int:
    """Number of bits that are set."""
    return int(numpy.bitwise_count(packed).sum())


def is_quantised(parameter: Tensor) -> bool:
    """Whether a quantizer has stored it in numbers of its own; torchao's tensors have the dtype that they were quantised from."""
    return not parameter.is_floating_point() or type(parameter).dequantize is not Tensor.dequantize


def in_this_process(parameter: Tensor, packed: numpy.ndarray) -> tuple[Tensor, Tensor]:
    """`parameter` and its `packed` mask, on the CPU; of one that FSDP2 has sharded, the rows that this process holds.

    Raises:
        ValueError: it is sharded along its last dimension, across which masks are packed.
    """
    bits = torch.from_numpy(packed)
    if placements := getattr(parameter, "placements", None):  # a DTensor
        from torch.distributed.tensor import Replicate, Shard

        if any(type(p) is not Replicate and (type(p) is not Shard or p.dim == parameter.dim() - 1) for p in placements):
            raise ValueError(f"masks hold under FSDP2, which shards rows, not under tensor parallelism: got {placements}.")
        bits, parameter = rows_here(bits.to(parameter.device), parameter).cpu(), parameter.to_local()
    return parameter, bits


def rows_here(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of the `whole` of a sharded `parameter`, which each process has."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def where_kept(model: nn.Module, name: str, parameter: nn.Parameter, to_change: bool = False) -> Tensor:
    """The tensor that keeps the values of a `parameter`: itself, or where accelerate has offloaded it to.

    Raises:
        ValueError: it has no values; or they are on disk, from where they come anew each time, and are `to_change`.
    """
    if not parameter.is_meta:
        return parameter
    path, _, attribute = name.rpartition(".")
    hook = offloading_hook(model.get_submodule(path))
    if hook is None or attribute not in hook.weights_map:
        raise ValueError(f"{name} is on the device 'meta' and has no values: load the weights of the model.")
    values = hook.weights_map[attribute]
    if to_change and values is not hook.weights_map[attribute]:
        raise ValueError(
            f"{name} is on disk, where it is not changed: load the model with more memory in max_memory=, or call "
            "hf_prune.prune_checkpoint(src, dst, ...), which prunes from disk to disk."
        )
    return values


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def input_device(model: nn.Module) -> torch.device:
    """Where `model` takes its inputs; what accelerate offloads runs elsewhere than it is kept."""
    devices = (hook.execution_device for hook in map(offloading_hook, model.modules()) if hook)
    return torch.device(next((device for device in devices if device is not None), next(model.parameters()).device))


def zero_pruned_(tensor: Tensor, bits: Tensor) -> Tensor:
    """Writes +0.0 at the pruned places of `tensor` (..., in), in place, given its mask packed as uint8 (..., ceil(in / 8)).

    One look-up for eight weights and a bitwise "and": an eighth of the time of `masked_fill_`, which has to guess every branch.
    """
    size = tensor.element_size()
    kept = _kept_by_byte(size, bits.device).index_select(0, bits.reshape(-1).int()).view(_INTEGERS[size])
    tensor.view(kept.dtype).bitwise_and_(kept.view(*bits.shape[:-1], -1)[..., : tensor.shape[-1]])
    return tensor


@functools.cache
def _kept_by_byte(size: int, device: torch.device) -> Tensor:
    """For each byte of a mask its eight integers of `size` bytes, as int64 (256, size)."""
    kept = torch.from_numpy(unpack(numpy.arange(256, dtype=numpy.uint8)[:, None], 8))
    return torch.where(kept, -1, 0).to(_INTEGERS[size]).view(torch.int64).to(device)


_PAIRS = numpy.array([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], numpy.uint8)  # the ways to keep 2 of 4
_CODES = numpy.full(16, 255, numpy.uint8)
_CODES[_PAIRS] = numpy.arange(6)
_TRIPLES = (_PAIRS[numpy.arange(256)[:, None] // (1, 6, 36) % 6].astype(numpy.uint32) << (0, 4, 8)).sum(-1, dtype="<u4")


def _encode(packed: numpy.ndarray, shape: tuple[int, ...]) -> numpy.ndarray | None:
    """Three groups of four weights in a byte, (ceil(groups / 3),); None if any four keep not exactly two."""
    if shape[-1] % 8 or not packed.size:
        return None
    codes = _CODES[numpy.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)]
    if codes.max() > 5:
        return None
    triples = numpy.pad(codes, (0, -len(codes) % 3)).reshape(-1, 3)
    return triples[:, 0] + 6 * triples[:, 1] + 36 * triples[:, 2]


def _decode(coded: numpy.ndarray, shape: tuple[int, ...]) -> numpy.ndarray:
    """The packed mask of `shape` that `_encode` was given."""
    groups = math.prod(shape) // 4
    if coded.dtype != numpy.uint8 or coded.shape != (-(-groups // 3),):
        raise TypeError(f"codes of shape {coded.shape} for a mask of shape {shape}")
    twelve = _TRIPLES[numpy.pad(coded, (0, len(coded) % 2))].reshape(-1, 2)
    three = (twelve[:, 0] | twelve[:, 1] << 12).astype("<u4").view(numpy.uint8).reshape(-1, 4)[:, :3]
    return three.reshape(-1)[: groups // 2].reshape(*shape[:-1], shape[-1] // 8)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_patterns(tensor: Tensor) -> numpy.ndarray:
    """The bits of every element as an integer, in the same memory and shape; numpy knows no bfloat16."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()


def check_version(path: Path, version: str | int) -> None:
    """Raises ValueError for a format that is newer than this library."""
    if not str(version).isdigit() or int(version) > FORMAT_VERSION:
        raise ValueError(f"{path} has version {version}, this hf_prune reads up to {FORMAT_VERSION}: update it.")
