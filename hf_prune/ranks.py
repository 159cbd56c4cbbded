"""The processes that prune one model together: calibration is split over them, statistics are added up, results are sent around.

`ALONE` is a process that works by itself; every call is then free and changes nothing. Knows neither models nor methods.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


T = TypeVar("T")


class Ranks:
    """All processes, this one being number `index` of `count`. Each call but `share` and `owners` must be made by all of them.

    Raises:
        RuntimeError: from every call, if another process ended or does not answer.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    @classmethod
    def launched(cls) -> Ranks:
        """Those that `accelerate launch` or `torchrun` started; one that works alone if nothing did."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            PartialState()  # chooses between gloo and NCCL
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th of `items`: this process's."""
        return items[self.index :: self.count]

    def owners(self, costs: list[float]) -> list[int]:
        """Who does which work, for about the same sum of `costs` each."""
        load, owners = [0.0] * self.count, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = load.index(min(load))
            load[owners[i]] += costs[i]
        return owners

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over all processes, in place."""
        if self.count > 1:
            with self._answering():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def gathered(self, value: T) -> list[T]:
        """What every process gave, in the order of their numbers; small values only."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._answering():
            dist.all_gather_object(found, value)
        return found

    def lowest(self, value: int) -> int:
        """The lowest `value` of any process."""
        return min(self.gathered(value))

    def sent(self, tensor: Tensor, owner: int) -> Tensor:
        """The `tensor` of process `owner`, which the others give in its shape and dtype."""
        if self.count > 1:
            tensor = tensor.contiguous()
            with self._answering():
                dist.broadcast(tensor.view(torch.uint8), owner)
        return tensor

    def wait(self) -> None:
        """Until all are here."""
        self.gathered(None)

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """A ValueError within, in one process or another, is one in all of them."""
        problem = ""
        try:
            yield
        except ValueError as error:
            problem = str(error)
        if problems := [told for told in self.gathered(problem) if told]:
            raise ValueError(problems[0])

    def check_same(self, identity: dict[str, str]) -> None:
        """Refuses, in all processes, to begin where they were given different things.

        Raises:
            ValueError: says what differs.
        """
        everybody = self.gathered(identity)
        for key in dict.fromkeys(key for known in everybody for key in known):
            if len(set(values := [known.get(key) for known in everybody])) > 1:
                given = ", ".join(f"rank {i} {value}" for i, value in enumerate(values))
                raise ValueError(f"the processes were given different {key} ({given}): give all of them the same.")

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.index} of {self.count}: another process ended or does not answer, so this one stops too: {error}"
            ) from error


ALONE = Ranks()
