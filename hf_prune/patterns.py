"""Which zeros are allowed, and the selection that turns scores into a mask with exactly that many.

Owns `Unstructured`, `NM`, `parse` and every selection in the library: lowest score goes first, equal scores go in index
order, and the count is exact in every dtype (a `score <= threshold` prunes all ties at once: on bf16 magnitudes that is
0.5003 instead of 0.5). Knows nothing of models, methods or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


COMPARISON_GROUPS = ("row", "matrix", "block", "model")


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; `sparsity` is the fraction that does, in [0, 1).

    `count(n)` is `floor(n * sparsity)`, as in the papers' code, safe against `0.29 * 100 == 28.999...`.
    """

    sparsity: float = 0.5

    def __post_init__(self):
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise TypeError(f"sparsity must be a number in [0, 1), got {self.sparsity!r}.")
        if not 0.0 <= self.sparsity < 1.0:  # also refuses NaN
            raise ValueError(f"sparsity must be in [0, 1), for example 0.5 for half of the weights; got {self.sparsity}.")

    def __str__(self) -> str:
        return f"unstructured:{self.sparsity:g}"

    def count(self, n: int) -> int:
        """How many of `n` weights are pruned."""
        return math.floor(n * self.sparsity + 1e-6)

    def mask(self, scores: Tensor, group: str = "row") -> Tensor:
        """Keep mask of `scores` (out, in), compared within each `"row"` or over the `"matrix"`; bool, True = kept."""
        if group == "row":
            return ~lowest(scores, self.count(scores.shape[1]))
        assert group == "matrix", group
        return ~lowest(scores.reshape(1, -1), self.count(scores.numel())).view_as(scores)


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive weights along `in` (NVIDIA's convention; the papers' code counts the pruned)."""

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n < self.m:
            raise ValueError(
                f"pattern '{self.n}:{self.m}' is impossible: N:M keeps N of every M weights, so 0 < N < M, "
                f"as in '2:4'{f' or {self.m}:{self.n}' if 0 < self.m < self.n else ''}."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def mask(self, scores: Tensor, group: str = "row") -> Tensor:
        """Keep mask of `scores` (out, in); `group` is ignored, each group of `m` competes for itself."""
        rows, columns = scores.shape
        by_position = scores.reshape(rows * columns // self.m, self.m).t().contiguous()
        return self.keep(by_position).t().reshape(rows, columns)

    def keep(self, scores: Tensor) -> Tensor:
        """Keep mask of `scores` (m, ...): the `n` highest along the first dimension, later index wins a tie."""
        if self.m > 8:
            order = scores.argsort(dim=0, stable=True)
            return torch.ones_like(scores, dtype=torch.bool).scatter_(0, order[: self.m - self.n], False)
        beaten = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)  # by how many of its group
        for i in range(self.m):
            for j in range(i + 1, self.m):
                later_wins = scores[i] <= scores[j]
                beaten[i] += later_wins
                beaten[j] += later_wins.logical_not_()
        return beaten < self.n

    def violations(self, mask: Tensor) -> int:
        """Number of groups of `m` along the last dimension of `mask` in which more than `n` are kept."""
        return int((mask.reshape(-1, self.m).sum(1) > self.n).sum())


Pattern = Unstructured | NM


def parse(pattern: str | float | Pattern, sparsity: float = 0.5) -> Pattern:
    """The pattern that a user's words mean: `"2:4"`, `"unstructured"` (with `sparsity`), `"unstructured:0.6"`, `0.6`.

    Raises:
        ValueError: neither of these, or out of range.
    """
    if isinstance(pattern, (Unstructured, NM)):
        return pattern
    if isinstance(pattern, (int, float)) and not isinstance(pattern, bool):
        return Unstructured(float(pattern))
    if isinstance(pattern, str):
        words = pattern.strip().lower()
        if words == "unstructured":
            return Unstructured(sparsity)
        if match := re.fullmatch(r"(\d+):(\d+)", words):
            return NM(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"(?:unstructured:)?(\d*\.?\d+)(%?)", words):
            return Unstructured(float(match[1]) / (100 if match[2] else 1))
    raise ValueError(
        f"pattern {pattern!r} is not known. Allowed: 'unstructured' with sparsity=0.5, 'unstructured:0.6', "
        "or 'N:M' that keeps N of every M weights, such as '2:4'."
    )


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for exactly the `count` lowest of each row of `scores` (groups, n) floating, ties in index order; bool.

    A selection, not a sort: the `count`-th smallest value, then the ties on it where they are too many.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, count)
    chosen = scores <= threshold
    surplus = chosen.sum(dim=1) - count
    for row in surplus.nonzero().flatten().tolist():
        ties = (scores[row] == threshold[row]).nonzero().flatten()
        chosen[row, ties[len(ties) - surplus[row] :]] = False
    return chosen


def lowest_of_all(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """`lowest` over several tensors of any shapes as one set: for the comparison groups `"block"` and `"model"`."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    chosen = lowest(flat[None], count)[0]
    return [part.view_as(s) for part, s in zip(chosen.split([s.numel() for s in scores]), scores)]


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    if scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    # numpy's partition is a vectorised quickselect: 3 to 7 times faster than torch's kthvalue on a CPU
    import numpy

    values = scores.detach().float().numpy()
    return torch.from_numpy(numpy.partition(values, k - 1, axis=1)[:, k - 1 : k].copy()).to(scores.dtype)
