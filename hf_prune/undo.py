"""Keeps what pruning overwrites, so that a run that fails or is interrupted leaves the weights as they were.

The originals go to an unnamed file in the temporary folder: a copy of all that is pruned, of which nothing is left behind if the
process dies. It costs no memory, but where that folder is in memory itself, as /tmp often is: TMPDIR names another. Where the
folder is too small the originals stay in memory. A GPU goes on while its weights are written: they leave it through pinned memory.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn


_WAITING = 2**30  # bytes that may lie in pinned memory, if it is more than one parameter


class Undo:
    """Saves parameters before they are changed; a `with` that ends in an exception writes them back in place."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        needed = sum(p.numel() * p.element_size() for p in parameters)
        enough = shutil.disk_usage(tempfile.gettempdir()).free > needed * 1.1 + 2**28
        self._file = tempfile.TemporaryFile(buffering=0) if enough else io.BytesIO()
        self._places: dict[nn.Parameter, int] = {}
        self._end = 0
        self._unwritten: dict[int, Tensor] = {}  # place -> what the file does not have yet
        self._writer = ThreadPoolExecutor(1)
        self._writes: deque[Future] = deque()

    def save(self, parameter: nn.Parameter) -> None:
        """Keeps the present values of `parameter`, once.

        Raises:
            OSError: the file took not all that was saved; what it did not take is kept in memory.
        """
        if parameter in self._places or not parameter.numel():  # of one that FSDP2 has sharded, this process may have no rows
            return
        values, place = parameter.detach().contiguous(), self._end
        copied = None
        if values.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.current_stream(parameter.device).record_event()
        else:
            values = values.cpu()
        self._unwritten[place] = values
        self._places[parameter], self._end = place, place + values.nbytes
        self._writes.append(self._writer.submit(self._write, place, copied))
        while self._writes and (copied is None or sum(v.nbytes for v in list(self._unwritten.values())) > _WAITING):
            self._writes[0].result()
            self._writes.popleft()

    def _write(self, place: int, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        values = self._unwritten[place]
        self._file.seek(place)
        rest = memoryview(values.view(-1).view(torch.uint8).numpy())
        while rest:  # a file may take less than it is given
            rest = rest[self._file.write(rest) :]
        del self._unwritten[place]

    @torch.no_grad()
    def restore(self) -> None:
        self._writer.submit(int).result()  # its turn is after all writes
        for parameter, place in self._places.items():
            values = self._unwritten.get(place)
            if values is None:
                self._file.seek(place)
                data = bytearray(parameter.numel() * parameter.element_size())
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.readinto(rest) :]
                values = torch.frombuffer(data, dtype=torch.uint8).view(parameter.dtype).view(parameter.shape)
            parameter.copy_(values)

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None:
            self.restore()
        self._writer.shutdown()
        self._file.close()
