"""The methods once more, slowly and plainly, from the papers' formulas: what the fast code is tested against."""

import torch


def keep_highest(scores, pattern, group):
    """Stable ascending sort, the first ones go."""
    if hasattr(pattern, "m"):
        parts = scores.reshape(-1, pattern.m)
        count = pattern.m - pattern.n
    else:
        parts = scores if group == "row" else scores.reshape(1, -1)
        count = pattern.count(parts.shape[1])
    gone = parts.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(parts, dtype=torch.bool).scatter(1, gone, False).view_as(scores)


def magnitude(weight, x, gradients):
    return weight.abs()


def wanda(weight, x, gradients):
    return weight.abs() * x.norm(dim=0)


def ria(weight, x, gradients):
    w = weight.abs()
    return (w / w.sum(0) + w / w.sum(1, keepdim=True)) * x.norm(dim=0) ** 0.5


def gblm_paper(weight, x, gradients):
    """The authors' code: N samples, squares summed over samples, times 100."""
    n = len(gradients)
    activation = ((x**2).sum(0) / n).sqrt()
    gradient = torch.stack([(100 * g) ** 2 for g in gradients]).sum(0).sqrt()
    return weight.abs() * activation + weight.abs() * gradient


def sparsegpt(weight, x, pattern, damping=0.01, block_size=128):
    """Algorithm 1 of the paper, by the Cholesky factor of the inverse; float64."""
    w = weight.double().clone()
    h = x.double().t() @ x.double()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    for a in range(0, w.shape[1], block_size):
        b = min(a + block_size, w.shape[1])
        if not hasattr(pattern, "m"):
            mask[:, a:b] = keep_highest(w[:, a:b] ** 2 / u.diagonal()[a:b] ** 2, pattern, "matrix")
        for j in range(a, b):
            if hasattr(pattern, "m") and j % pattern.m == 0:
                end = j + pattern.m
                mask[:, j:end] = keep_highest(w[:, j:end] ** 2 / u.diagonal()[j:end] ** 2, pattern, "row")
            error = (w[:, j] - w[:, j] * mask[:, j]) / u[j, j]
            w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return w * mask, mask


def alps(weight, x, pattern, damping=0.01, penalty=0.1):
    """By the eigenvectors of the Hessian, as the authors do, and the exact least-squares fit in the end; float64."""
    hessian = x.double().t() @ x.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    scale = hessian.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(hessian / scale / scale[:, None])
    d = weight.double() * scale
    target = d @ (vectors * values) @ vectors.t()
    v, mask, before = torch.zeros_like(d), keep_highest(d.abs(), pattern, "matrix"), None
    for i in range(300):
        if i % 3 == 0:
            if i:
                changed = (mask != before).double().mean()
                if changed < 3e-4 and i >= 30:
                    break
                penalty *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            before = mask
        w = (target - v + penalty * d) @ (vectors / (values + penalty)) @ vectors.t()
        d = w + v / penalty
        mask = keep_highest(d.abs(), pattern, "matrix")
        d = d * mask
        v = v + penalty * (w - d)
    fitted = torch.zeros_like(d)
    for row, kept, dense in zip(fitted, mask, weight.double()):
        row[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ dense)
    return fitted, mask
