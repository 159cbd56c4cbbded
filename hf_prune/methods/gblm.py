"""GBLM-Pruner: gradients of the dense model join the score. Das et al., "Beyond Size", arXiv 2311.04902.

The authors' code adds ||X_j||_2 / sqrt(N) and 100 * G with G a sum over the N samples: what the 100 means depends on N and on the
sequence length (with 32 x 512 tokens it changes 0.4 % of Wanda's mask). Our default multiplies instead: a weighted geometric
mean has no unit, and a row whose gradients are all large or all small is compared as any other. And its norm is over tokens: a
sample's gradient is a sum in which those of its tokens cancel at random, and of a few dozen such sums the norm is noisy. "paper"
is theirs.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..patterns import check_count, check_flag, one_of
from ..statistics import ActivationNorm, GradientNorm
from .base import Method, register


@register
@dataclass(frozen=True)
class GBLM(Method):
    """Score |W_ij| * ||X_j||_2^(1 - alpha) * ||G_ij||_p^alpha, compared within each row; kept weights are unchanged.

    Attributes:
        alpha: share of the gradient, from 0 (Wanda) to 1 (gradients alone). "paper" is the authors' score (equation 4), the
            sum |W_ij| * (||X_j||_2 + 100 * ||G_ij||_p) with their normalisation, in which both norms are of the same N sequences: it
            goes with scope "model" and all samples.
        norm: "l1" or "l2".
        over: whose gradients the norm is of: "tokens", or "samples" as in the paper; None is samples with alpha "paper", else
            tokens. Experts that are fused in one parameter are taken by samples.
        scope: "model" takes the gradient of the language-model loss through the dense model, once (the paper); "block" that
            of ||block(x)||_2, block by block on the pruned model's hidden states (Wanda++, arXiv 2503.04992, equation 3):
            only one block's gradients are ever alive.
        gradient_samples: how many calibration sequences have a backward pass; None is all for scope "model", 8 for "block".
        gradient_checkpointing: with scope "model", keep only the blocks' inputs for the backward pass: less memory, and a
            third more time.
    """

    alpha: float | str = 0.5
    norm: str = "l2"
    over: str | None = None
    scope: str = "model"
    gradient_samples: int | None = None
    gradient_checkpointing: bool = False

    name = "gblm"
    paper = "arXiv 2311.04902"
    needs = (ActivationNorm, GradientNorm)
    PAPER_ALPHA: ClassVar[float] = 100.0

    def __post_init__(self):
        if self.alpha != "paper" and not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha of gblm must be a number from 0 to 1 or 'paper', got {self.alpha!r}.")
        one_of("norm of gblm", self.norm, ("l1", "l2"))
        one_of("over of gblm", self.over, (None, "tokens", "samples"))
        if self.alpha == "paper" and self.over == "tokens":
            raise ValueError("alpha='paper' of gblm weighs gradients of samples: leave out over='tokens'.")
        one_of("scope of gblm", self.scope, ("model", "block"))
        if self.gradient_samples is not None:
            check_count("gradient_samples of gblm", self.gradient_samples)
        if self.alpha == "paper" and (self.scope == "block" or self.gradient_samples is not None):
            raise ValueError(
                "alpha='paper' of gblm weighs activations and gradients of the same sequences: leave out scope='block' and "
                "gradient_samples."
            )
        check_flag("gradient_checkpointing of gblm", self.gradient_checkpointing)

    @property
    def order(self) -> int:
        """Of the norm over samples: 1 or 2."""
        return 1 if self.norm == "l1" else 2

    @property
    def by_token(self) -> bool:
        """Whether the norm is over tokens."""
        return self.alpha != "paper" and self.over != "samples"

    def score(self, weight: Tensor, activation: ActivationNorm, gradient: GradientNorm) -> Tensor:
        """(out, in) from |W| (out, in), the activation norm (in,) and the gradient norm (out, in)."""
        if self.alpha == "paper":
            n = gradient.samples
            total = gradient.value * (n if gradient.order == 1 else n**0.5)
            return weight.abs() * (activation.norm / n**0.5 + self.PAPER_ALPHA * total)
        if self.alpha == 0:
            return weight.abs() * activation.norm
        # A row without any gradient, as of an expert that no sample reached, is left with its other factors.
        by_gradient = gradient.value.clamp_min_(1e-30).pow_(self.alpha)
        return by_gradient.mul_(activation.norm.pow(1 - self.alpha)).mul_(weight.abs())
