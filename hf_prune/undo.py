"""Keeps what pruning overwrites, so that a run that fails or is interrupted leaves the weights as they were.

The originals go to an unnamed temporary file: they cost no memory, and nothing is left behind if the process dies. Where the
temporary folder is too small they stay in memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Undo:
    """Saves parameters before they are changed; `restore` writes them back in place, `close` forgets them."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        needed = sum(p.numel() * p.element_size() for p in parameters)
        enough = shutil.disk_usage(tempfile.gettempdir()).free > needed * 1.1 + 2**28
        self._file = tempfile.TemporaryFile() if enough else None
        self._saved: list[tuple[nn.Parameter, int | Tensor]] = []
        self._known: set[int] = set()

    def save(self, parameter: nn.Parameter) -> None:
        """Keeps the present values of `parameter`, once."""
        if id(parameter) in self._known:
            return
        values = parameter.detach().contiguous().cpu()
        if self._file is None:
            place: int | Tensor = values.clone()
        else:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(memoryview(values.view(-1).view(torch.uint8).numpy()))
        self._known.add(id(parameter))
        self._saved.append((parameter, place))

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, place in self._saved:
            if isinstance(place, Tensor):
                parameter.copy_(place)
            else:
                self._file.seek(place)
                data = bytearray(self._file.read(parameter.numel() * parameter.element_size()))
                parameter.copy_(torch.frombuffer(data, dtype=torch.uint8).view(parameter.dtype).view(parameter.shape))

    def close(self) -> None:
        self._saved.clear()
        if self._file is not None:
            self._file.close()
