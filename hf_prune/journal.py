"""The journal of a pruning: every finished block on disk, so that a run that was killed goes on where it stopped.

A block's weights, masks and report go into one file, the hidden states after it into another, of which only the last is
kept; each file appears whole or not at all. A resumed run computes from the very tensors that the killed one had, so its
result is equal bit for bit. Only safetensors and JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic import readable, write_whole
from .ranks import ALONE, Ranks
from .report import BlockReport


class Journal:
    """A folder of finished work that belongs to one pruning.

    Args:
        folder: made if it is not there.
        identity: what the result depends on, each as a short text.
        ranks: the processes that prune together; each but the first has a folder of its own in `folder`.

    Raises:
        ValueError: the folder holds the journal of another pruning; says what differs.
    """

    way_out = "or another resume_dir"

    def __init__(self, folder: str | Path, identity: dict[str, str], ranks: Ranks = ALONE):
        self.ranks = ranks
        self.folder = Path(folder, f"rank-{self.ranks.index}") if self.ranks.index else Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "journal.json"
        if path.exists():
            with _part(path):
                known = dict(json.loads(path.read_text(encoding="utf-8")))
            differs = [
                f"{key} (then {known.get(key)}, now {identity.get(key)})"
                for key in sorted({*known, *identity})
                if known.get(key) != identity.get(key)
            ]
            if differs:
                raise ValueError(
                    f"{path} is of another pruning. What differs: {'; '.join(differs)}. Give the same, {self.way_out}."
                )
        else:
            write_whole(path, lambda temporary: temporary.write_text(json.dumps(identity, indent=1)))

    @property
    def finished(self) -> int:
        """How many blocks need not be done again."""
        hidden = [int(path.stem.removeprefix("hidden-")) for path in self.folder.glob("hidden-*.safetensors")]
        return self.ranks.lowest(max((n for n in hidden if all(self._is_done(i) for i in range(n))), default=0))

    def save_block(
        self,
        index: int,
        parameters: dict[str, nn.Parameter],
        masks: dict[str, Tensor],
        report: BlockReport,
        hidden: list[Tensor],
        shared: Sequence[MutableMapping] = (),
    ) -> None:
        """Block `index` is done: what it is now, the hidden states that leave it, and what a call's later blocks `share` with it."""
        tensors = {f"weight:{name}": parameter.detach().contiguous().cpu() for name, parameter in parameters.items()}
        tensors.update({f"mask:{name}": mask.contiguous().cpu() for name, mask in masks.items()})
        metadata = {"report": json.dumps(dataclasses.asdict(report))}
        write_whole(self._block(index), lambda path: save_file(tensors, path, metadata))
        states = {f"{i:06d}": state.detach().contiguous().cpu() for i, state in enumerate(hidden)}
        for i, mapping in enumerate(shared):
            states.update({f"{i}:{key}:{j}": x.contiguous().cpu() for key, pair in mapping.items() for j, x in enumerate(pair)})
        write_whole(self._hidden(index + 1), lambda path: save_file(states, path))
        self.ranks.wait()  # as long as one of them has not come that far, all have to begin again before it
        self._hidden(index).unlink(missing_ok=True)

    def load_block(self, index: int, parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], BlockReport]:
        """Writes the weights of block `index` into `parameters`; its masks and report."""
        with _part(self._block(index)):
            with safe_open(self._block(index), "pt") as file:
                report = BlockReport.from_dict(json.loads(file.metadata()["report"]))
            tensors = load_file(self._block(index))
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"weight:{name}"])
            return {key.removeprefix("mask:"): mask for key, mask in tensors.items() if key.startswith("mask:")}, report

    def hidden(self, finished: int, like: list[Tensor], shared: Sequence[MutableMapping] = ()) -> list[Tensor]:
        """The hidden states after that many finished blocks, on the devices of `like`; `shared` are filled as they were, on the CPU."""
        path = self._hidden(finished)
        with _part(path):
            states = load_file(path)
            for name in sorted(name for name in states if ":" in name):
                i, key, _ = name.split(":")
                mapping = shared[int(i)]
                mapping[key] = (*mapping.get(key, ()), states.pop(name))
            return [states[key].to(other.device) for key, other in zip(sorted(states), like, strict=True)]

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What an earlier run kept under `name`, or what `make` gives, kept from now on."""
        path = self.folder / f"{name}.safetensors"
        if not self.ranks.lowest(path.exists()):
            made = {key: tensor.contiguous().cpu() for key, tensor in make().items()}
            write_whole(path, lambda temporary: save_file(made, temporary))
            return made
        with _part(path):
            return load_file(path)

    def forget(self, name: str) -> None:
        """Removes what `tensors` kept."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def _is_done(self, index: int) -> bool:
        return self._block(index).exists()

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05d}.safetensors"


def on_disk(tensor: Tensor, folder: Path | None = None) -> Tensor:
    """`tensor` mapped from a file in `folder` that has no name and goes with it; memory holds of it what there is room for.

    Raises:
        OSError: no room.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(tensor.nbytes, 1))  # else a full disk would end the process
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over dtypes, shapes and bytes, its first 16 digits."""
    total = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


_part = partial(readable, what="a part of a journal", way_out=" Delete the folder to begin anew.")
