"""What is left of a weight becomes the least-squares fit of the dense one, given the mask (ALPS, arXiv 2406.07831, section 3.3)."""

from __future__ import annotations

from torch import Tensor


def refit(weight: Tensor, dense: Tensor, mask: Tensor, hessian: Tensor, steps: int) -> None:
    """Brings `weight` (rows, in), in place, nearer to the least of tr((W - dense) H (W - dense)^T) that is zero where `mask` is False.

    Conjugate gradients, preconditioned by the diagonal of the `hessian` H (in, in), both triangles: each row has a problem of its
    own, and all share their products with H.
    """
    kept, scale = mask.to(weight.dtype), hessian.diagonal().clamp_min(1e-30).reciprocal()
    residual = ((dense - weight) @ hessian).mul_(kept)
    direction = residual * scale
    slope = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ hessian).mul_(kept)
        length = slope / (direction * curved).sum(1, keepdim=True).clamp_min_(1e-30)
        weight.addcmul_(direction, length)
        residual.addcmul_(curved, length, value=-1)
        steepest = residual * scale
        before, slope = slope, (residual * steepest).sum(1, keepdim=True)
        direction.mul_(slope / before.clamp_min_(1e-30)).add_(steepest)
