"""What a method is: statistics it needs, and a score per weight, or a solver that also rewrites the kept weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..patterns import Pattern


class Job(NamedTuple):
    """One linear to prune: its `weight` (out, in) fp32, not to be changed; what `needs` lists, shared by the linears of one input;
    `kept`, a mask (out, in) of an earlier pruning, whose zeros stay; `fixed`, a mask within it to use as it is."""

    weight: Tensor
    statistics: tuple
    pattern: Pattern
    kept: Tensor | None = None
    fixed: Tensor | None = None

    def chosen(self, scores: Tensor, group: str) -> Tensor:
        """The mask that keeps the highest `scores` (out, in) as the pattern says, and nothing that is gone already."""
        mask = self.pattern.mask(forget(scores, self.kept), group)
        return mask if self.kept is None else mask & self.kept


class Pruned(NamedTuple):
    """The outcome for one linear: new `weight` (out, in) fp32, zero where `mask` (out, in) bool is False; a solver's damping."""

    weight: Tensor
    mask: Tensor
    damping: float | None = None


class Method:
    """Base of all methods: a frozen dataclass whose fields are the paper's options.

    A method that only scores defines `score`; a solver overrides `prune`. `needs` lists statistics of
    `hf_prune.statistics`; `comparison_group` and `propagate` are the defaults of a config that leaves them open.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[type, ...]] = ()
    comparison_group: ClassVar[str] = "row"
    propagate: ClassVar[str] = "block"
    structural: ClassVar[bool] = False  # takes whole groups, not weights

    def score(self, weight: Tensor, *statistics: Any) -> Tensor:
        """One score per weight, the lowest go first: fp32 (out, in) from `weight` fp32 (out, in) and what `needs` lists."""
        raise NotImplementedError

    def prune(self, jobs: Sequence[Job], group: str) -> list[Pruned]:
        """Prunes the linears that read one input; scores compete within each "row" or the "matrix" (`group`)."""
        results = []
        for job in jobs:
            mask = job.fixed
            if mask is None:
                mask = job.chosen(self.score(job.weight, *job.statistics), group)
            results.append(Pruned((job.weight * mask).add_(0.0), mask))  # twice as fast as masked_fill; -0.0 + 0.0 is +0.0
        return results


def forget(scores: Tensor, kept: Tensor | None) -> Tensor:
    """`scores` with -inf where `kept` is False, so that weights which are gone already go first."""
    return scores if kept is None else scores.masked_fill(~kept, -float("inf"))


REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Makes a method known by its `name`, to config, command line and reports."""
    REGISTRY[cls.name] = cls
    return cls


def make(name: str, options: dict[str, Any] | None = None) -> Method:
    """The method of that name with those options.

    Raises:
        ValueError: no such method, or no such option.
    """
    if name not in REGISTRY:
        raise ValueError(f"method {name!r} is not known. Allowed: {', '.join(sorted(REGISTRY))}, or an instance of a Method.")
    cls, options = REGISTRY[name], options or {}
    allowed = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"method {name!r} has no option {', '.join(unknown)}. Allowed: {', '.join(allowed) or 'none'}.")
    return cls(**options)
