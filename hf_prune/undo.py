"""Keeps what pruning overwrites, so that a run that fails or is interrupted leaves the weights as they were.

The originals go to an unnamed temporary file: they cost no memory, and nothing is left behind if the process dies. Where the
temporary folder is too small they stay in memory.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterable

import torch
from torch import nn


class Undo:
    """Saves parameters before they are changed; a `with` that ends in an exception writes them back in place."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        needed = sum(p.numel() * p.element_size() for p in parameters)
        enough = shutil.disk_usage(tempfile.gettempdir()).free > needed * 1.1 + 2**28
        self._file = tempfile.TemporaryFile() if enough else io.BytesIO()
        self._places: dict[nn.Parameter, int] = {}

    def save(self, parameter: nn.Parameter) -> None:
        """Keeps the present values of `parameter`, once."""
        if parameter not in self._places:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(memoryview(parameter.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()))
            self._places[parameter] = place

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, place in self._places.items():
            self._file.seek(place)
            data = bytearray(self._file.read(parameter.numel() * parameter.element_size()))
            parameter.copy_(torch.frombuffer(data, dtype=torch.uint8).view(parameter.dtype).view(parameter.shape))

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None:
            self.restore()
        self._file.close()
