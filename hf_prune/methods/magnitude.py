"""Magnitude pruning: the smallest weights go. Needs no data. Han et al., arXiv 1506.02626."""

from dataclasses import dataclass

from torch import Tensor

from .base import Method, register


@register
@dataclass(frozen=True)
class Magnitude(Method):
    """Score |W|, compared over each matrix: the baseline of all papers on language models."""

    name = "magnitude"
    paper = "arXiv 1506.02626"
    comparison_group = "matrix"

    def score(self, weight: Tensor) -> Tensor:
        """|W|, (out, in)."""
        return weight.abs()
