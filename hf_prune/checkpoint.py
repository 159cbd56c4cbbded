"""A model that stays on disk: its safetensors are read part by part, and written part by part as they were pruned.

A part is one decoder block, or all that is outside of blocks. The model is a skeleton on the "meta" device, into which Transformers'
own loader puts a part's tensors, fused or renamed as that model needs it, and takes them apart again when they are written. While
a part is worked on, a thread reads the next one. What is written is a shard a part, whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .atomic import readable, write_whole
from .blocks import blocks_of
from .journal import Journal
from .masks import Masks
from .ranks import Ranks
from .report import BlockReport
from .weights import Weights


logger = logging.get_logger(__name__)

INDEX = "model.safetensors.index.json"


class Checkpoint(Weights):
    """The weights of `model`, a skeleton without any, in a folder of safetensors files; checked when they are read.

    Args:
        source: the folder; only read.
        work: a folder for what is unfinished, made if it is not there.
        device: where a part is put while it is worked on.
        ranks: the processes that prune together; only the first writes.
        earlier: masks of what was pruned before.

    Raises:
        ValueError: no safetensors, one is missing or damaged, or they do not hold this model's weights part by part.
    """

    together = False

    def __init__(self, model: PreTrainedModel, source: Path, work: Path, device: torch.device, ranks: Ranks, earlier: Masks):
        self.stored, self._earlier = {}, earlier
        self.source, self.work, self.device, self.ranks = source, work, device, ranks
        self.masks = Masks(folder=(work / f"rank-{ranks.index}" if ranks.index else work) / "masks")
        self._model, self._loader, files = model, _Loader(model, device), files_of(source)
        self._paths = sorted(set(files.values()))
        self._at_first = self._state()
        prefixes = [f"{block.name}." for block in blocks_of(model)]
        self._parts: list[int | None] = [None, *range(len(prefixes))]
        by_number = {prefix.split(".")[-2]: part for part, prefix in enumerate(prefixes)}
        stack = prefixes[0].removesuffix("0.")

        def part_of(name: str) -> int | None:
            return by_number[name.removeprefix(stack).split(".")[0]] if name.startswith(stack) else None

        self._names = {part: [name for name in self._loader.expected if part_of(name) == part] for part in self._parts}
        self._keys: dict[int | None, dict[str, Path]] = {part: {} for part in self._parts}
        for key, path in files.items():
            if (target := self._loader.target(key)) in self._loader.expected:
                self._keys[part_of(target)][key] = path
        if unused := sorted(set(files).difference(*self._keys.values())):
            logger.warning(f"{source}: {len(unused)} tensors are not of this model and are left out, such as {unused[0]}.")
        self._places = _places(model, self._names)
        for module in model.modules():
            module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None})
        self._checked: set[int | None] = set()
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future] | None = None
        self._last = -1

    @property
    def identity(self) -> str:
        """Of names, sizes and times of the files."""
        return hashlib.sha256(json.dumps(self._at_first).encode()).hexdigest()[:16]

    @contextlib.contextmanager
    def present(self, part: int | None) -> Iterator[None]:
        """As of `Weights`.

        Raises:
            ValueError: they are damaged, incomplete, not finite, not zero where they were pruned, or the files were changed meanwhile.
        """
        places = self._places[part]
        there: dict[int, nn.Parameter] = {}  # by the parameter of the skeleton: one may have several places
        try:
            self._loader.load(self._tensors(part))
            for name, (module, attribute, meta) in places.items():
                if not (parameter := getattr(module, attribute)).is_meta:
                    tied = there.setdefault(id(meta), parameter.requires_grad_(False))
                    if part not in self._checked and tied is not parameter and not torch.equal(tied, parameter):
                        first = next(known for known, place in places.items() if place[2] is meta)
                        raise ValueError(
                            f"{self.source} has other values for {name} than for {first}, to which its config ties it: set "
                            "tie_word_embeddings to false there."
                        )
            for name, (module, attribute, meta) in places.items():
                if id(meta) not in there:
                    raise ValueError(f"{self.source} lacks the weights of {name}: download it again.")
                setattr(module, attribute, there[id(meta)])
            if part not in self._checked:
                check_finite((name, getattr(module, attribute)) for name, (module, attribute, _) in places.items())
                if wrong := self._earlier.renamed({name: name for name in places}).violations(self._model):
                    name, count = next(iter(wrong.items()))
                    raise ValueError(
                        f"{self.source}: {count} pruned weights of {name} are not zero: hf_prune.load(..., on_mismatch='reapply') "
                        "and save_pretrained set them to zero again."
                    )
                self._checked.add(part)
            if part is not None:
                self._read_ahead(part)
            yield
        finally:
            for module, attribute, meta in places.values():
                setattr(module, attribute, meta)

    def kept_of(self, parameter: nn.Parameter) -> None:
        """The files are not overwritten."""

    def write(self, part: int | None) -> None:
        """The shard of a part that is present, as it is now.

        Raises:
            OSError: no room; the other shards are as they were.
        """
        (self.work / "model").mkdir(parents=True, exist_ok=True)
        path, state = self.shard(part), {name: attrgetter(name)(self._model) for name in self._names[part]}
        once = {id(state[name]): name for name in reversed(self._names[part])}  # tied ones under their first name
        mine = self._loader.reverted({name: state[name].detach() for name in once.values()})
        tensors = {name: tensor.cpu().contiguous() for name, tensor in mine.items()}
        write_whole(path, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))

    def shard(self, part: int | None) -> Path:
        return self.work / "model" / f"model-{self._parts.index(part) + 1:05d}-of-{len(self._parts):05d}.safetensors"

    def _tensors(self, part: int | None) -> dict[str, Tensor]:
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead and ahead[0] == part else self._read(part)

    def _read_ahead(self, part: int) -> None:
        """The block that follows in the direction of the last step."""
        following = part + (1 if part >= self._last else -1)
        if 0 <= following < len(self._parts) - 1:
            self._ahead = following, self._reader.submit(self._read, following)
        self._last = part

    def _read(self, part: int | None) -> dict[str, Tensor]:
        if self._state() != self._at_first:
            raise ValueError(f"{self.source} was changed while it was pruned: begin anew, without {self.work}.")
        tensors = {}
        for path in sorted(set(self._keys[part].values())):
            with readable(path, "weights"), safe_open(path, "pt", backend="pread") as file:  # of a mapped file all would stay
                tensors.update({key: file.get_tensor(key) for key, place in self._keys[part].items() if place == path})
        return tensors

    def _state(self) -> dict[str, list[int]]:
        if missing := [path for path in self._paths if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing: download it again.")
        return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self._paths}


class CheckpointJournal(Journal):
    """A journal whose blocks are the shards of `checkpoint`, so that a block is written once."""

    def __init__(self, checkpoint: Checkpoint, identity: dict[str, str]):
        self.way_out = f"or delete {checkpoint.work} to begin anew"
        super().__init__(checkpoint.work, identity, checkpoint.ranks)
        self._checkpoint = checkpoint

    def save_block(self, index: int, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor], *rest: Any) -> None:
        if not self.ranks.index:
            self._checkpoint.write(index)
        super().save_block(index, {}, {}, *rest)

    def _is_done(self, index: int) -> bool:  # shards may have become the output already
        return super()._is_done(index) and self._checkpoint.shard(index).exists()

    def load_block(self, index: int, parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], BlockReport]:
        return super().load_block(index, {})


class _Loader:
    """Transformers' way from the tensors in its files to those of a model and back, for a part of them at a time."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
            from transformers.modeling_utils import LoadStateDictConfig
        except ImportError as error:
            raise ValueError(f"pruning from disk to disk needs transformers 5: {error}.") from error
        self.model, self.expected = model, model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        plan = model._get_dtype_plan(model.dtype)
        self._how = LoadStateDictConfig(device_map={"": device}, dtype=model.dtype, dtype_plan=plan, weight_mapping=mapping)

    def target(self, key: str) -> str:
        """The name in the model that the tensor `key` goes into, or the first of several."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, _ = rename_source_key(key, self._renamings, self._converters, prefix, self.expected)
        if name not in self.expected and key in self.expected:
            return key
        return name

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts `tensors` into the model.

        Raises:
            ValueError: they are of another shape, or cannot be converted.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._how)
        finally:
            logging.enable_progress_bar() if shown else None
        if info.mismatched_keys:
            name, found, expected = sorted(info.mismatched_keys)[0]
            raise ValueError(f"{name} has shape {tuple(found)} in the checkpoint, but {tuple(expected)} by its config.")
        if info.conversion_errors:
            raise ValueError(f"Transformers cannot convert this checkpoint: {next(iter(info.conversion_errors.values()))}")

    def reverted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`state` under the names, and in the pieces, of a checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        self.model._weight_conversions = [entry for entry in self._how.weight_mapping if entry.was_used()]
        return revert_weight_conversion(self.model, state)


def check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError for weights that are NaN or infinite."""
    for name, parameter in parameters:
        # A sum is NaN or inf if any summand is; only then is a closer look needed. bfloat16, with float32's range, is summed as it is.
        dtype = parameter.dtype if parameter.dtype == torch.bfloat16 else torch.float32
        if not torch.isfinite(parameter.detach().sum(dtype=dtype)) and not torch.isfinite(parameter).all():
            raise ValueError(f"the weights of {name} are not finite: load the checkpoint again, in bfloat16 or float32.")


def write_index(folder: Path) -> None:
    """Names the shards in `folder`, which are all there."""
    weights, total = {}, 0
    for path in folder.glob("model-?????-of-?????.safetensors"):
        with open(path, "rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        with safe_open(path, "pt") as file:
            weights.update(dict.fromkeys(file.keys(), path.name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def files_of(folder: Path, check: Callable[[Path, Path], None] = lambda path, folder: None) -> dict[str, Path]:
    """Key of a tensor -> the file that holds it; each may be refused by `check` before it is opened.

    Raises:
        ValueError: no safetensors, one is missing or damaged.
    """
    if (folder / "model.safetensors").is_file():  # before an index, as Transformers has it
        named = {"": "model.safetensors"}
    elif (folder / INDEX).is_file():
        with readable(folder / INDEX, "an index of weights"):
            named = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    else:
        raise ValueError(
            f"{folder} has no model.safetensors and no {INDEX}: only those are read from disk to disk. Write them once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    found = {}
    for name in sorted(set(named.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: download it again.")
        check(folder / name, folder)
        with readable(folder / name, "weights"), safe_open(folder / name, "pt") as file:
            found.update(dict.fromkeys(file.keys(), folder / name))
    if lost := sorted(set(named) - {""} - set(found)):
        raise ValueError(f"{folder / named[lost[0]]} lacks {lost[0]}, which {INDEX} says it holds: download it again.")
    return found


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dtype_of(folder: Path) -> torch.dtype:
    """Of the first tensor of floating point, which is what Transformers takes where a config says none.

    Raises:
        ValueError: no safetensors, or damaged ones.
    """
    path = min(files_of(folder).values(), default=None)
    with readable(path, "weights"), safe_open(path, "pt") as file:
        stored = [file.get_slice(key).get_dtype() for key in file.keys()]
    return next((_DTYPES[name] for name in stored if name in _DTYPES), torch.float32)


_Place = tuple[nn.Module, str, nn.Parameter]


def _places(model: nn.Module, names: dict[int | None, list[str]]) -> dict[int | None, dict[str, _Place]]:
    """Where the parameters of each part are, and those of the skeleton."""
    skeleton = dict(model.named_parameters(remove_duplicate=False))
    places: dict[int | None, dict[str, _Place]] = {}
    owner: dict[int, int | None] = {}
    for part, inside in names.items():
        places[part] = {}
        for name in inside:
            if name in skeleton:  # else a buffer
                if owner.setdefault(id(skeleton[name]), part) != part:
                    raise ValueError(f"{name} is shared between blocks: prune this model in memory, with model.prune().")
                path, _, attribute = name.rpartition(".")
                places[part][name] = model.get_submodule(path), attribute, skeleton[name]
    return places
