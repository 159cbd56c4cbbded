"""Wanda: weight times the norm of its input. Sun et al., "A Simple and Effective Pruning Approach", arXiv 2306.11695."""

from dataclasses import dataclass

from torch import Tensor

from ..statistics import ActivationNorm
from .base import Method, register


@register
@dataclass(frozen=True)
class Wanda(Method):
    """Score |W_ij| * ||X_j||_2 (equation 1), compared within each row; kept weights are unchanged."""

    name = "wanda"
    paper = "arXiv 2306.11695"
    needs = (ActivationNorm,)

    def score(self, weight: Tensor, activation: ActivationNorm) -> Tensor:
        """|W| (out, in) times the activation norm (in,)."""
        return weight.abs() * activation.norm
