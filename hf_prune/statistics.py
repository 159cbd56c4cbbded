"""Streaming sums over calibration tokens: what each adds up, and by what it is normalised.

A statistic is made for one input (shared by all linears that read it) or for one weight, takes one batch after another, and
holds fp32 whatever the model's dtype. Nothing here knows a model; padding never arrives, so every row counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    """Products of fp32 on a CPU with AVX-512 by oneDNN, in 3/4 of the time of torch's default (MKL) on an AMD one.

    Where a CPU multiplies bfloat16 in tiles (AMX), oneDNN rounds the factors to bfloat16 and adds their products up in fp32:
    a Gram matrix is then the exact one of the rounded activations, positive semidefinite as ever.
    """
    precision = getattr(torch.backends.mkldnn, "matmul", None)
    if precision is None:  # torch < 2.9
        yield
        return
    before = precision.fp32_precision
    precision.fp32_precision = "bf16"
    try:
        yield
    finally:
        precision.fp32_precision = before


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """Adds `alpha` * `left` @ `right` to `total`, fp32. On a GPU tensor cores multiply factors of 16 bits, and add in fp32."""
    in_place = getattr(torch.ops.aten.addmm, "dtype_out", None)  # torch >= 2.8
    if in_place and left.is_cuda and left.element_size() == 2:
        in_place(total, left, right, torch.float32, alpha=alpha, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=alpha)


class ActivationNorm:
    """Per input channel, the l2 norm of the activations over all calibration tokens: `norm` (in,), fp32.

    Wanda's code divides the sum of squares by the number of sequences (arXiv 2306.11695, section 3); `norm` does not:
    a constant factor changes no comparison.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.sum_of_squares = torch.zeros(in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """Adds `x` (tokens, in), any float dtype."""
        if x.device.type == "cpu":  # row upon row, in sums that stay in the cache: 7 times faster than squaring all of x first
            sums = torch.zeros(min(128, max(len(x), 1)), x.shape[1], dtype=torch.float32)
            for piece in x.split(len(sums)):
                piece = piece.float()
                sums[: len(piece)].addcmul_(piece, piece)
        else:
            sums = x.float().square()
        self.sum_of_squares += sums.sum(dim=0)

    @property
    def norm(self) -> Tensor:
        return self.sum_of_squares.sqrt()

    def is_finite(self) -> bool:
        return bool(self.sum_of_squares.isfinite().all())


class Hessian:
    """Sum of x x^T over all calibration tokens (the Gram matrix), fp32 (in, in); only the upper triangle is kept.

    SparseGPT's Hessian is this times 2/N (arXiv 2301.00774, equation 3); damping is relative to its diagonal, so the
    factor plays no part.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """Adds `x` (tokens, in), any float dtype."""
        n, on_cpu = x.shape[1], x.device.type == "cpu"
        x = x.float() if on_cpu else x
        # Block rows of the upper triangle only: little more than half the products of x^T x.
        step = 96 if on_cpu else max(1024, -(-n // 4))
        with _onednn() if on_cpu else contextlib.nullcontext():
            for i in range(0, n, step):
                _add_product(self.gram[i : i + step, i:], x[:, i : i + step].t(), x[:, i:])

    def is_finite(self) -> bool:
        return bool(self.gram.diagonal().isfinite().all())

    def damped(self, damping: float) -> Tensor:
        """gram + damping * mean(diag) * I, both triangles."""
        matrix = self.gram.triu()
        matrix += self.gram.triu(1).t()
        matrix.diagonal().add_(damping * self._mean())
        return matrix

    def _mean(self) -> Tensor:
        mean = self.gram.diagonal().mean()
        return torch.where(mean > 0, mean, 1.0)  # nothing but zeros arrived: all columns are alike

    def factor(self, damping: float) -> tuple[Tensor, Tensor, float]:
        """The unit upper triangular `feedback` (in, in) and `curvature` (in,) with
        gram + damping * mean(diag) * I = feedback @ diag(curvature) @ feedback^T, and the damping that was used.

        One Cholesky factorisation of the matrix with rows and columns reversed. In the papers' terms, with U the upper
        Cholesky factor of the inverse, curvature_j = 1 / U_jj^2 and feedback = U^-1 diag(U).

        Raises:
            ValueError: not factorised even with damping 1.0.
        """
        mean = self._mean()
        while True:
            matrix = self.gram.flip(0, 1)  # upper triangle becomes lower, the one that is read
            matrix.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                break
            if damping >= 1.0:
                raise ValueError(
                    "the Gram matrix of the activations has no Cholesky factor even with damping 1.0: the "
                    "activations are not finite or too large for fp32. Load the model in bfloat16 or float32."
                )
            damping = max(damping * 10, 1e-4)
        upper = lower.flip(0, 1)
        scale = upper.diagonal().clone()
        return upper.div_(scale), scale.square_(), damping


class GradientNorm:
    """Per weight, the norm over samples, or over tokens, of the gradient of the loss; fp32, shape of the weight.

    `order` 1 adds |g|, 2 adds g^2 (arXiv 2311.04902, equation 4). Gradients of opposite sign do not cancel. Normalised by
    the number of samples: `value` is mean |g| or the root mean square of g.
    """

    def __init__(self, shape: torch.Size, order: int, device: torch.device | str = "cpu"):
        self.order = order
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.samples = 0

    @classmethod
    def of(cls, total: Tensor, order: int, samples: int) -> GradientNorm:
        """One whose sum is `total` already; not copied."""
        norm = cls(torch.Size(), order, total.device)
        norm.sum, norm.samples = total, samples
        return norm

    def update(self, gradient: Tensor, scale: float = 1.0) -> None:
        """Adds one sample's `gradient` (shape of the weight), times `scale`."""
        gradient = gradient.to(self.sum)
        if self.order == 1:
            self.sum.add_(gradient.abs_() if gradient.dtype == torch.float32 else gradient.abs(), alpha=scale)
        else:
            self.sum.addcmul_(gradient, gradient, value=scale * scale)
        self.samples += 1

    def update_tokens(self, gradient: Tensor, x: Tensor, scale: float = 1.0) -> None:
        """Adds every token's gradient, the outer products of `gradient` (..., out) times `scale` with `x` (..., in)."""
        left, right = gradient.flatten(0, -2), x.flatten(0, -2)
        if not (left.is_cuda and left.dtype == right.dtype == torch.bfloat16):
            left, right = left.float(), right.float()  # on a GPU a square may lose up to 2^-9, to either side: it averages out
        left, right = (left.abs(), right.abs()) if self.order == 1 else (left.square(), right.square())
        _add_product(self.sum, left.t(), right, scale**self.order)

    @property
    def value(self) -> Tensor:
        mean = self.sum / max(self.samples, 1)
        return mean.sqrt_() if self.order == 2 else mean

    def is_finite(self) -> bool:
        return bool(self.sum.sum().isfinite())
