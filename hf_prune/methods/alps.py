"""ALPS: which weights stay is found by optimisation, not by a score. Meng, Behdin, Wang, Mazumder, arXiv 2406.07831.

The least ‖X W^T - X D^T‖² over W, and over a D that has the pattern, with W = D, by ADMM: W answers to the Hessian, D is W without its
lowest weights, and the multiplier V carries into the next round what the two disagree about. The penalty ρ on their difference rises
as the masks settle. The Hessian is scaled to a unit diagonal, so that ρ means the same everywhere. Where the authors' code factors
it once, by its eigenvectors, here the inverse of H + ρI is made anew for each ρ: half of the products in an iteration, and no
eigenvectors, which take long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import check_count, check_number
from ..statistics import Hessian
from .base import Job, Method, Pruned, register
from .refit import refit


_PENALTY_HOLDS = 3  # iterations
_SETTLED = 3e-4  # share of the weights that change sides meanwhile; below it nothing more is to be gained
_AT_LEAST = 30  # iterations


@register
@dataclass(frozen=True)
class ALPS(Method):
    """Masks by ADMM (algorithm 1), then `refit` steps of conjugate gradients on the weights that they keep (algorithm 2).

    Attributes:
        iterations: of ADMM at most; it stops when the masks have settled.
        penalty: ρ at first; it rises by 1.3 while a tenth of the weights change sides, by 1.2 down to 0.5 %, then by 1.1.
        damping: added to the diagonal of H, relative to its mean.
    """

    iterations: int = 300
    penalty: float = 0.1
    damping: float = 0.01
    refit: int = 10

    name = "alps"
    paper = "arXiv 2406.07831"
    needs = (Hessian,)
    comparison_group = "matrix"
    propagate = "linear"

    def __post_init__(self):
        check_count("iterations of alps", self.iterations)
        check_count("refit of alps", self.refit)
        check_number("penalty of alps", self.penalty, above=True)
        check_number("damping of alps", self.damping, above=True)

    def prune(self, jobs: Sequence[Job], group: str) -> list[Pruned]:
        """As `Method.prune`; each weight alone, since how fast its masks settle decides what it becomes."""
        hessian = jobs[0].statistics[0].damped(self.damping)
        scale = hessian.diagonal().clamp_min(1e-30).sqrt()
        scaled, results = hessian / scale / scale[:, None], []
        for job in jobs:
            weight, mask = self._solve(job, scaled, scale, group)
            refit(weight, job.weight, mask, hessian, self.refit)
            results.append(Pruned(weight.add_(0.0), mask, self.damping))  # -0.0 + 0.0 is +0.0
        return results

    def _solve(self, job: Job, hessian: Tensor, scale: Tensor, group: str) -> tuple[Tensor, Tensor]:
        """D and its mask, (out, in) both, given the `hessian` of inputs that were divided by `scale` (in,)."""
        d = job.weight * scale
        target, multiplier = d @ hessian, torch.zeros_like(d)
        penalty, mask, before = self.penalty, _mask_of(job, d, group), None
        for i in range(self.iterations):
            if i % _PENALTY_HOLDS == 0:
                if before is not None:
                    changed = float((mask != before).float().mean())
                    if changed < _SETTLED and i >= _AT_LEAST:
                        break
                    penalty *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
                before = mask
                inverse = hessian.clone()
                inverse.diagonal().add_(penalty)
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
            w = (target - multiplier).add_(d, alpha=penalty) @ inverse
            d = torch.add(w, multiplier, alpha=1 / penalty)
            mask = _mask_of(job, d, group)
            d *= mask
            multiplier.add_(w.sub_(d), alpha=penalty)
        return d.div_(scale), mask


def _mask_of(job: Job, weight: Tensor, group: str) -> Tensor:
    """Of the greatest entries of `weight`, or the one that the job has."""
    return job.chosen(weight.abs(), group) if job.fixed is None else job.fixed
