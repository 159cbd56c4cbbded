"""SparseGPT: prunes column by column and lets the weights that are left make up for it. Frantar, Alistarh, arXiv 2301.00774.

The paper walks through U, the upper Cholesky factor of the inverse Hessian. Here H = F D F^T with F unit upper triangular, one
factorisation and no inverse: U = D^-1/2 F^-1. With E the original minus the new weights of the columns that are done, a slab
of 128 columns starts from W + E F V, where V is the inverse of F's diagonal block: two products on the original weights (as in
arXiv 2307.13304, theorem 6) instead of an update of all columns to come. Slabs are held transposed, so that a column is
contiguous. An input that is always zero needs no special case: damping gives it a small score that grows with |W|.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import NM, Pattern, Unstructured, lowest
from ..statistics import Hessian
from .base import Method, Pruned, forget, register


_TILE = 16  # columns whose rank-1 updates stay within the cache; the rest of the slab takes them in one product


@register
@dataclass(frozen=True)
class SparseGPT(Method):
    """Score W_ij^2 / [H^-1]_jj of the compensated weights, compared over each slab of `block_size` columns (algorithm 1).

    Attributes:
        block_size: columns whose mask is chosen together, after compensation for all columns before them.
        damping: added to the diagonal of H, relative to its mean; raised tenfold, and reported, if H has no Cholesky factor.
    """

    block_size: int = 128
    damping: float = 0.01

    name = "sparsegpt"
    paper = "arXiv 2301.00774"
    needs = (Hessian,)
    comparison_group = "matrix"
    propagate = "linear"

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size of sparsegpt must be at least 1, got {self.block_size!r}.")
        if not self.damping >= 0:
            raise ValueError(f"damping of sparsegpt must be at least 0, got {self.damping!r}.")

    def prune(
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[tuple[Hessian]],
        patterns: Sequence[Pattern],
        group: str,
        kept: Sequence[Tensor | None],
        fixed: Sequence[Tensor | None],
    ) -> list[Pruned]:
        """As `Method.prune`; the rows of all weights go through one solve, because they share their Hessian."""
        feedback, curvature, damping = statistics[0][0].factor(self.damping)
        sizes = [len(weight) for weight in weights]
        columns = torch.cat([weight.t() for weight in weights], dim=1)  # (in, rows), W^T
        mask = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
        choices = [
            _Choice(pattern, part, group, None if old is None else old.t(), None if given is None else given.t())
            for pattern, part, old, given in zip(patterns, mask.split(sizes, dim=1), kept, fixed)
        ]
        solved = self._solve(columns, feedback, curvature, choices, mask).split(sizes, dim=1)
        return [Pruned(w.t(), m.t(), damping) for w, m in zip(solved, mask.split(sizes, dim=1))]

    def _solve(self, w: Tensor, feedback: Tensor, curvature: Tensor, choices: list[_Choice], mask: Tensor) -> Tensor:
        """The new W^T (in, rows); fills in `mask`, which the choices hold views of."""
        n, rows = len(w), [choice.rows for choice in choices]
        error = torch.empty_like(w)  # original minus new weight, of the columns that are done
        new = torch.empty_like(w)
        step, tile = _multiple(self.block_size, choices), _multiple(_TILE, choices)
        starts = itertools.accumulate(rows, initial=0)
        by_group = [
            (choice, slice(start, start + choice.rows))
            for choice, start in zip(choices, starts)
            if isinstance(choice.pattern, NM) and not choice.is_fixed
        ]
        for a in range(0, n, step):
            b = min(a + step, n)
            block = feedback[a:b, a:b]
            decay = torch.linalg.solve_triangular(block, torch.eye(b - a, device=w.device), upper=True, unitriangular=True)
            slab = w[a:b].clone()
            if a:
                slab.addmm_(decay.t(), feedback[:a, a:b].t() @ error[:a])
            for choice, part in zip(choices, slab.split(rows, dim=1)):
                choice.at_slab(a, part, curvature[a:b])
            for c in range(0, b - a, tile):
                d = min(c + tile, b - a)
                change = error[a + c : a + d]  # of the compensated weights; the buffer is filled for good below
                for j in range(c, d):
                    for choice, part in by_group:
                        if j % choice.pattern.m == 0:
                            choice.at_group(a + j, slab[j : j + choice.pattern.m, part], curvature)
                    torch.mul(slab[j], mask[a + j], out=new[a + j])
                    torch.sub(slab[j], new[a + j], out=change[j - c])
                    if j + 1 < d:
                        slab[j + 1 : d].addr_(decay[j, j + 1 : d], change[j - c], alpha=-1)
                if d < b - a:
                    slab[d:].addmm_(decay[c:d, d:].t(), change, alpha=-1)
            torch.sub(w[a:b], new[a:b], out=error[a:b])
        return new


class _Choice:
    """Chooses the mask of one linear while its columns are solved; `mask` (in, rows) is a view into that of all linears."""

    def __init__(self, pattern: Pattern, mask: Tensor, group: str, kept: Tensor | None, fixed: Tensor | None):
        self.pattern, self.mask, self.by_row, self.kept = pattern, mask, group == "row", kept
        self.rows = mask.shape[1]
        self.is_fixed = fixed is not None
        self.pruned = 0  # so far, per row or over the matrix
        if fixed is not None:
            mask.copy_(fixed)

    def at_slab(self, a: int, columns: Tensor, curvature: Tensor) -> None:
        """Unstructured: columns `a` onwards (columns, rows), as many as bring the count up to what is due by then."""
        if self.is_fixed or not isinstance(self.pattern, Unstructured):
            return
        b = a + len(columns)
        scores = columns.square().mul_(curvature[:, None])
        scores = forget(scores, None if self.kept is None else self.kept[a:b])
        due = self.pattern.count(b if self.by_row else b * self.rows) - self.pruned
        if self.by_row:
            chosen = lowest(scores.t(), min(due, b - a)).t()
        else:
            chosen = lowest(scores.reshape(1, -1), min(due, scores.numel())).view_as(scores)
        self.pruned += due
        self._set(a, b, ~chosen)

    def at_group(self, j: int, columns: Tensor, curvature: Tensor) -> None:
        """N:M: columns `j` to `j + m` (the first of `columns`, (., rows)), compensated up to here."""
        end = j + self.pattern.m
        scores = columns[: self.pattern.m].square() * curvature[j:end, None]
        self._set(j, end, self.pattern.keep(forget(scores, None if self.kept is None else self.kept[j:end])))

    def _set(self, a: int, b: int, keep: Tensor) -> None:
        self.mask[a:b] = keep if self.kept is None else keep & self.kept[a:b]


def _multiple(size: int, choices: list[_Choice]) -> int:
    """`size` rounded up so that no group of M lies across its end."""
    whole = 1
    for choice in choices:
        if isinstance(choice.pattern, NM):
            whole = math.lcm(whole, choice.pattern.m)
    return -(-size // whole) * whole
