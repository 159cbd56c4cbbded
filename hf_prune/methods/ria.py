"""RIA: relative importance and activations. Zhang et al., "Plug-and-Play", ICLR 2024."""

from dataclasses import dataclass

from torch import Tensor

from ..patterns import check_number
from ..statistics import ActivationNorm
from .base import Method, register


@register
@dataclass(frozen=True)
class RIA(Method):
    """Score |W_ij| (1 / sum_i |W_ij| + 1 / sum_j |W_ij|) ||X_j||_2^power, compared over each matrix.

    A weight counts by its share of its row and of its column, so that no whole channel is pruned away.
    """

    power: float = 0.5

    name = "ria"
    paper = "ICLR 2024, openreview Tr0lPx9woF"
    needs = (ActivationNorm,)
    comparison_group = "matrix"

    def __post_init__(self):
        check_number("power of ria", self.power)

    def score(self, weight: Tensor, activation: ActivationNorm) -> Tensor:
        """(out, in) from |W| (out, in) and the activation norm (in,)."""
        size = weight.abs()
        share = size / size.sum(dim=0).clamp_min(1e-30) + size / size.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return share * activation.norm.pow(self.power)
