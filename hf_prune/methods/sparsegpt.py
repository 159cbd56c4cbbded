"""SparseGPT: prunes column by column and lets the weights that are left make up for it. Frantar, Alistarh, arXiv 2301.00774.

The paper walks through U, the upper Cholesky factor of the inverse Hessian. Here H = F D F^T with F unit upper triangular, one
factorisation and no inverse: U = D^-1/2 F^-1. With E the original minus the new weights of the columns that are done, a slab
of 128 columns starts from W + E F V, where V is the inverse of F's diagonal block: two products on the original weights (as in
arXiv 2307.13304, theorem 6) instead of an update of all columns to come. Slabs are held transposed, so that a column is
contiguous. An input that is always zero needs no special case: damping gives it a small score that grows with |W|.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..patterns import NM, check_count, check_number, first_line, lowest, lowest_by_row
from ..statistics import Hessian
from .base import Job, Method, Pruned, register
from .refit import refit


_TILE = 8  # columns that take one another's changes before the rest of the slab does


@register
@dataclass(frozen=True)
class SparseGPT(Method):
    """Score W_ij^2 / [H^-1]_jj of the compensated weights, compared over each slab of `block_size` columns (algorithm 1).

    Attributes:
        block_size: columns whose mask is chosen together, after compensation for all columns before them.
        damping: added to the diagonal of H, relative to its mean; raised tenfold, and reported, if H has no Cholesky factor.
        refit: steps of conjugate gradients after the last column. The walk has fitted each column to those before it; now that
            the mask is known, all that is left of a row comes nearer to its least-squares fit (ALPS, arXiv 2406.07831, section 3.3).
            10 took half a forward pass of SmolLM2, and 30 gained little more; 0 is the paper's SparseGPT.
    """

    block_size: int = 128
    damping: float = 0.01
    refit: int = 0

    name = "sparsegpt"
    paper = "arXiv 2301.00774"
    needs = (Hessian,)
    comparison_group = "matrix"
    propagate = "linear"

    def __post_init__(self):
        check_count("block_size of sparsegpt", self.block_size)
        check_number("damping of sparsegpt", self.damping)
        if self.refit != 0:
            check_count("refit of sparsegpt", self.refit)

    def prune(self, jobs: Sequence[Job], group: str) -> list[Pruned]:
        """As `Method.prune`; the rows of all weights go through one solve, because they share their Hessian."""
        feedback, curvature, damping = jobs[0].statistics[0].factor(self.damping)
        results: dict[int, Pruned] = {}
        keys = [(job.pattern, job.fixed is None) for job in jobs]
        for key in dict.fromkeys(keys):
            members = [i for i, known in enumerate(keys) if known == key]
            columns = torch.cat([jobs[i].weight.t() for i in members], dim=1)  # (in, rows), W^T
            choice = _Choice([jobs[i] for i in members], group)
            dense = columns.clone() if self.refit else None
            self._solve(columns, feedback, curvature, choice)
            if self.refit:
                hessian = jobs[0].statistics[0].damped(damping)
                refit(columns.t(), dense.t(), ~choice.gone.t(), hessian, self.refit)
            for i, weight, gone in zip(members, columns.split(choice.sizes, 1), choice.gone.split(choice.sizes, 1)):
                results[i] = Pruned(weight.t().contiguous(), gone.t().contiguous().logical_not_(), damping)
        return [results[i] for i in range(len(jobs))]

    def _solve(self, w: Tensor, feedback: Tensor, curvature: Tensor, choice: _Choice) -> None:
        """Turns W^T `w` (in, rows) into the new one, in place; what is pruned is in `choice.gone`."""
        n, rows = w.shape
        step = min(n, -(-self.block_size // (choice.columns or 1)) * (choice.columns or 1))
        kernel = _slab_kernel(w.device, step)
        error = torch.empty_like(w)  # original minus new weight, of the columns that are done
        slab, gone = w.new_empty(2, step, rows)
        decay = w.new_zeros(step, step)  # [j, i]: what column j takes over of a change of column i
        walk = None if kernel else _Walk(slab, gone, decay, choice)
        for a in range(0, n, step):
            size = min(step, n - a)
            b = a + size
            block, unit = feedback[a:b, a:b], torch.eye(size, dtype=w.dtype, device=w.device)
            decay[:size, :size] = torch.linalg.solve_triangular(block, unit, upper=True, unitriangular=True).t()
            slab[:size] = w[a:b]
            if a:
                slab[:size].addmm_(decay[:size, :size], feedback[:a, a:b].t() @ error[:a])
            choice.at_slab(a, slab[:size], curvature, gone[:size])
            if kernel:
                dropped = None if choice.dropped is None else choice.dropped[a:b]
                nm = (choice.pattern.n, choice.pattern.m) if choice.columns else (0, 0)
                kernel.solve_slab(slab[:size], decay, gone[:size], curvature[a:b], dropped, nm)
            else:
                walk.solve(a, size, curvature)
            torch.sub(w[a:b], slab[:size], out=error[a:b])
            w[a:b] = slab[:size]
            if choice.columns:
                choice.gone[a:b] = gone[:size]


def _slab_kernel(device: torch.device, columns: int) -> ModuleType | None:
    """What solves a slab of so many columns in one launch, on a GPU."""
    kernel = _kernel_on(device) if device.type == "cuda" else None
    return kernel if kernel and columns <= kernel.MOST_COLUMNS else None


@functools.cache
def _kernel_on(device: torch.device) -> ModuleType | None:
    """The kernel, if it runs there; imported late, for Triton takes its time."""
    try:
        from . import slab_kernel

        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=device)
        slab_kernel.solve_slab(zeros(4, 1), zeros(4, 4), zeros(4, 1), zeros(4), nm=(2, 4))
        return slab_kernel
    except Exception as error:  # no Triton, no C compiler for its launchers, an old GPU, ...
        told = f"the kernel of SparseGPT does not run on {device}, which makes it slower: {first_line(error)}"
        warnings.warn(told, stacklevel=2)
        return None


class _Walk:
    """Solves a slab column after column, where no kernel does: `slab` (columns, rows) in place, `gone` being what is pruned of it."""

    def __init__(self, slab: Tensor, gone: Tensor, decay: Tensor, choice: _Choice):
        self._slab, self._gone, self._decay, self._choice = slab, gone, decay, choice
        # Columns of a span take one another's changes as they come; later spans of a tile in one product, later tiles in another.
        self._span = choice.columns or _TILE
        self._tile = -(-_TILE // self._span) * self._span
        self._change = torch.empty_like(slab)
        # Making a view takes as long as the arithmetic on a column, so all are made here.
        self._columns, self._changes, self._is_gone = slab.unbind(), self._change.unbind(), gone.unbind()
        self._within, self._across = [], []
        for j in range(0, len(slab), self._span):
            t, own = slice(j // self._tile * self._tile, j // self._tile * self._tile + self._tile), slice(j, j + self._span)
            self._across.append((slab[own], decay[own, t], self._change[t]))
            self._within += [(self._change[own].t(), row) for row in decay[own, own].unbind()]

    def solve(self, a: int, size: int, curvature: Tensor) -> None:
        """The slab's first `size` columns, which are those from `a` on of the weight."""
        slab, change, tile = self._slab, self._change, self._tile
        change.zero_()  # of the compensated weights; those still to come count for nothing
        for j in range(0, size, self._span):
            end = min(j + self._span, size)
            if self._choice.columns:
                part, taken, before = self._across[j // self._span]
                if j % tile:
                    part.addmm_(taken, before, alpha=-1)
                self._choice.at_span(a + j, part, curvature, self._gone[j : j + self._span])
            for i in range(j, end):
                if i > j:
                    self._columns[i].addmv_(*self._within[i], alpha=-1)
                torch.mul(self._columns[i], self._is_gone[i], out=self._changes[i])
            if end % tile == 0 and end < size:
                slab[end:size].addmm_(self._decay[end:size, end - tile : end], change[end - tile : end], alpha=-1)
        slab[:size].sub_(change[:size])  # kept weights stay as they are, the others are exactly zero


class _Choice:
    """Chooses what goes while the columns are solved, for linears of one pattern, side by side in the rows of W^T."""

    def __init__(self, jobs: list[Job], group: str):
        self.pattern, self.by_row = jobs[0].pattern, group == "row"
        self.sizes = [len(job.weight) for job in jobs]
        self.fixed = jobs[0].fixed is not None
        self.dropped = None
        if not self.fixed and any(job.kept is not None for job in jobs):
            every = [torch.ones_like(job.weight, dtype=torch.bool) if job.kept is None else job.kept for job in jobs]
            self.dropped = ~torch.cat([mask.t() for mask in every], dim=1)
        if self.fixed:
            self.gone = ~torch.cat([job.fixed.t() for job in jobs], dim=1)
        else:
            first = jobs[0].weight
            self.gone = torch.empty(first.shape[1], sum(self.sizes), dtype=torch.bool, device=first.device)
        self._counted: list[int | Tensor] = [0] * len(jobs)  # pruned so far, per row or over the matrix

    @property
    def columns(self) -> int:
        """How many columns are chosen from together once they are compensated; 0 if a slab is."""
        return self.pattern.m if isinstance(self.pattern, NM) and not self.fixed else 0

    def at_slab(self, a: int, slab: Tensor, curvature: Tensor, gone: Tensor) -> None:
        """Unstructured: of columns `a` onwards as many as are due by then; fills in `gone`."""
        if self.columns:
            return
        b = a + len(slab)
        if not self.fixed:
            scores = self._scores(a, slab, curvature).split(self.sizes, dim=1)
            for i, (part, out) in enumerate(zip(scores, self.gone[a:b].split(self.sizes, dim=1))):
                due = self._due(i, a, b)
                self._counted[i] += due
                if not self.by_row:
                    out.copy_(lowest(part.reshape(1, -1), int(due)).view_as(part))
                else:
                    out.copy_((lowest if self.dropped is None else lowest_by_row)(part.t(), due).t())
        gone.copy_(self.gone[a:b])

    def _due(self, i: int, a: int, b: int) -> int | Tensor:
        """How many of columns `a` to `b` of linear `i` go, over the matrix or in each row: what brings the count up to the share of
        these columns, but all that are gone already, and no more than leaves room for those that are so in later columns."""
        each = 1 if self.by_row else self.sizes[i]
        due = self.pattern.count(b * each) - self._counted[i]
        if self.dropped is None:
            return min(due, (b - a) * each)
        earlier = self.dropped.split(self.sizes, dim=1)[i]
        here, later = (part.sum(0) if self.by_row else part.sum() for part in (earlier[a:b], earlier[b:]))
        room = self.pattern.count(len(earlier) * each) - self._counted[i] - later
        return room.clamp(max=due).clamp(max=(b - a) * each).maximum(here)

    def at_span(self, a: int, columns: Tensor, curvature: Tensor, gone: Tensor) -> None:
        """N:M: the M columns from `a` on; fills in `gone`."""
        torch.ge(self.pattern.better(self._scores(a, columns, curvature)), self.pattern.n, out=gone)
        if self.dropped is not None:
            gone.masked_fill_(self.dropped[a : a + len(gone)], 1.0)

    def _scores(self, a: int, columns: Tensor, curvature: Tensor) -> Tensor:
        scores = columns.square().mul_(curvature[a : a + len(columns), None])
        return scores if self.dropped is None else scores.masked_fill_(self.dropped[a : a + len(columns)], -float("inf"))
