"""Which zeros are allowed, and the selection that turns scores into a mask with exactly that many.

Owns `Unstructured`, `NM`, `parse` and every selection in the library: lowest score goes first, equal scores go in index
order, and the count is exact in every dtype (a `score <= threshold` prunes all ties at once: on bf16 magnitudes that is
0.5003 instead of 0.5). Knows nothing of models, methods or files.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor


COMPARISON_GROUPS = ("row", "matrix", "block", "model")


def one_of(name: str, value: object, allowed: Sequence) -> None:
    """Raises ValueError for a word that is not among those."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Raises ValueError for what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raises ValueError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_number(name: str, value: object, least: float = 0.0, above: bool = False) -> None:
    """Raises ValueError for what is no finite number of at least `least`, or `above` it."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < least or (above and value == least):
        raise ValueError(f"{name} must be a number {'above' if above else 'of at least'} {least:g}, got {value!r}.")


def first_line(error: Exception) -> str:
    """Of what it says; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; `sparsity` is the fraction that does, in [0, 1).

    `count(n)` is `floor(n * sparsity)`, as in the papers' code, safe against `0.29 * 100 == 28.999...`.
    """

    sparsity: float = 0.5

    def __post_init__(self):
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise TypeError(f"sparsity must be a number in [0, 1), got {self.sparsity!r}.")
        if not 0.0 <= self.sparsity < 1.0:  # also refuses NaN
            raise ValueError(f"sparsity must be in [0, 1), for example 0.5 for half of the weights; got {self.sparsity}.")

    def __str__(self) -> str:
        return f"unstructured:{self.sparsity:.15g}"

    def count(self, n: int) -> int:
        """How many of `n` weights are pruned."""
        return math.floor(n * self.sparsity + 1e-6)

    def mask(self, scores: Tensor, group: str = "row") -> Tensor:
        """Keep mask of `scores` (out, in), compared within each `"row"` or over the `"matrix"`; bool, True = kept."""
        if group == "row":
            return ~lowest(scores, self.count(scores.shape[1]))
        assert group == "matrix", group
        return ~lowest(scores.reshape(1, -1), self.count(scores.numel())).view_as(scores)


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive weights along `in` (NVIDIA's convention; the papers' code counts the pruned)."""

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n < self.m:
            raise ValueError(
                f"pattern '{self.n}:{self.m}' is impossible: N:M keeps N of every M weights, so 0 < N < M, "
                f"as in '{f'{self.m}:{self.n}' if 0 < self.m < self.n else '2:4'}'."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def mask(self, scores: Tensor, group: str = "row") -> Tensor:
        """Keep mask of `scores` (out, in); `group` is ignored, each group of `m` competes for itself."""
        if (self.n, self.m) == (2, 4):
            return self._two_of_four(scores.reshape(-1, 4)).view(scores.shape)
        by_position = scores.reshape(-1, self.m).t()
        # On a CPU in pieces that stay in the cache.
        pieces = by_position.split(8192, dim=1) if scores.device.type == "cpu" else (by_position,)
        return torch.cat([(self.better(piece) < self.n).t() for piece in pieces]).view(scores.shape)

    def _two_of_four(self, groups: Tensor) -> Tensor:
        """The same for `groups` (groups, 4), three times as fast: against the second highest of each, then those with ties."""
        a, b, c, d = groups.unbind(1)
        second = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
        second = torch.maximum(second, torch.maximum(torch.minimum(a, b), torch.minimum(c, d)))
        mask = groups >= second[:, None]
        if int(mask.count_nonzero()) != 2 * len(mask):
            tied = (kept_by_group(mask, 4) != 2).nonzero().squeeze(1)
            mask[tied] = (self.better(groups[tied].t()) < 2).t()
        return mask

    def better(self, scores: Tensor) -> Tensor:
        """How many of the `m` rivals along the first dimension of `scores` (m, groups) are higher, or as high and later; fp32.

        The ones with less than `n` of them are kept.
        """
        if self.m > 8:
            order = scores.argsort(dim=0, stable=True).flip(0)
            ranks = torch.arange(self.m, dtype=torch.float32, device=scores.device)[:, None]
            return torch.empty_like(scores, dtype=torch.float32).scatter_(0, order, ranks.expand_as(scores))
        # One row for each pair of positions i < j: does j win? Then it is a small product.
        first, second, signs, start = _pairs(self.m, scores.device)
        later_wins = torch.empty(len(first), scores.shape[1], dtype=torch.float32, device=scores.device)
        torch.le(scores.index_select(0, first), scores.index_select(0, second), out=later_wins)
        return torch.addmm(start, signs, later_wins)

    def violations(self, mask: Tensor) -> int:
        """Number of groups of `m` along the last dimension of `mask` in which more than `n` are kept."""
        return int((kept_by_group(mask, self.m) > self.n).count_nonzero())


def kept_by_group(mask: Tensor, m: int) -> Tensor:
    """How many of every `m` weights along the last dimension of `mask`, bool, are kept: (groups,), of some integer dtype."""
    if m > 255:
        return mask.reshape(-1, m).sum(1)
    counted = mask.contiguous().view(torch.uint8).reshape(-1, m)
    if m != 4:
        return counted.sum(1, dtype=torch.uint8)
    if counted.data_ptr() % 4 or counted.storage_offset() % 4:
        counted = counted.clone()
    # Four weights as one integer: its bytes are added up in the highest byte, thirty times faster than by `sum`.
    return counted.view(torch.int32).squeeze(1).mul(0x01010101).bitwise_right_shift_(24)


@functools.lru_cache
def _pairs(m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All i < j < m as two (pairs,) int64; and the defeats of each of m as `start` (m, 1) + `signs` (m, pairs) @ wins of j."""
    first, second = torch.triu_indices(m, m, offset=1)
    positions = torch.arange(m)[:, None]
    loses_to_later, loses_to_earlier = (positions == first).float(), (positions == second).float()
    start = loses_to_earlier.sum(dim=1, keepdim=True)  # every earlier rival wins, unless the later one does
    return tuple(t.to(device) for t in (first, second, loses_to_later - loses_to_earlier, start))


@dataclass(frozen=True)
class Structured:
    """Whole groups go for good: `shares` of each kind, or of all kinds so many that `parameters` of the blocks' are left."""

    shares: tuple[tuple[str, float], ...] = ()
    parameters: float | int | None = None

    sparsity = 0.0  # it leaves no zeros

    def __post_init__(self):
        if bool(self.shares) == (self.parameters is not None):
            raise ValueError("give either shares, as in 'heads:0.25,ffn:0.25', or parameters=0.8.")
        if len({kind for kind, _ in self.shares}) < len(self.shares):
            raise ValueError(f"a kind has one share, got {self}.")
        for kind, share in self.shares:
            if not 0 < share < 1:
                raise ValueError(f"a share must be in (0, 1), got {share} of {kind}.")
        if self.parameters is not None and not self.parameters > 0:
            raise ValueError(f"parameters must be a share in (0, 1) or a number of parameters, got {self.parameters!r}.")

    def __str__(self) -> str:
        return ",".join(f"{kind}:{share:.15g}" for kind, share in self.shares) or f"parameters:{self.parameters:.15g}"


Pattern = Unstructured | NM | Structured


def parse(pattern: str | float | Pattern, sparsity: float = 0.5) -> Pattern:
    """The pattern that a user's words mean: `"2:4"`, `"unstructured"` (with `sparsity`), `"unstructured:0.6"`, `0.6`.

    Raises:
        ValueError: neither of these, or out of range.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, (int, float)) and not isinstance(pattern, bool):
        return Unstructured(float(pattern))
    if isinstance(pattern, str):
        words = pattern.strip().lower()
        if words == "unstructured":
            return Unstructured(sparsity)
        if match := re.fullmatch(r"parameters:([\d.]+)", words):
            return Structured(parameters=float(match[1]))
        if re.fullmatch(r"(heads|ffn|hidden):[\d.]+(,\s*(heads|ffn|hidden):[\d.]+)*", words):
            parts = (part.strip().split(":") for part in words.split(","))
            return Structured(tuple((kind, float(share)) for kind, share in parts))
        if match := re.fullmatch(r"(\d+):(\d+)", words):
            return NM(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"(?:unstructured:)?(\d*\.?\d+)(%?)", words):
            return Unstructured(float(match[1]) / (100 if match[2] else 1))
    raise ValueError(
        f"pattern {pattern!r} is not known. Allowed: 'unstructured' with sparsity=0.5, 'unstructured:0.6', "
        "'N:M' that keeps N of every M weights, such as '2:4', or 'heads:0.25,ffn:0.25' for whole groups."
    )


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for exactly the `count` lowest of each row of `scores` (groups, n) floating, ties in index order; bool.

    A selection, not a sort: the `count`-th smallest value, then the ties on it where they are too many.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, count)
    chosen = scores <= threshold
    surplus = chosen.sum(dim=1) - count
    for row in surplus.nonzero().flatten().tolist():
        ties = (scores[row] == threshold[row]).nonzero().flatten()
        chosen[row, ties[len(ties) - surplus[row] :]] = False
    return chosen


def lowest_by_row(scores: Tensor, counts: Tensor) -> Tensor:
    """`lowest` where row i of `scores` (groups, n) has a count of its own, `counts` (groups,); bool. It sorts."""
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.empty_like(chosen).scatter_(1, scores.argsort(dim=1, stable=True), chosen)


def lowest_of_all(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """`lowest` over several tensors of any shapes as one set: for the comparison groups `"block"` and `"model"`."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    chosen = lowest(flat[None], count)[0]
    return [part.view_as(s) for part, s in zip(chosen.split([s.numel() for s in scores]), scores)]


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    if scores.device.type != "cpu":
        if len(scores) > 8:
            return scores.kthvalue(k, dim=1, keepdim=True).values
        # kthvalue has one thread block a row, topk many.
        return scores.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    # numpy's partition is a vectorised quickselect: 3 to 7 times faster than torch's kthvalue on a CPU
    import numpy

    def kth(rows: numpy.ndarray) -> numpy.ndarray:
        return numpy.partition(rows, k - 1, axis=1)[:, k - 1 : k].copy()

    values = scores.detach().float().numpy()
    threads = min(torch.get_num_threads(), len(values), values.size >> 16)
    if threads > 1:  # it lets other threads run
        with ThreadPoolExecutor(threads) as pool:
            found = numpy.concatenate(list(pool.map(kth, numpy.array_split(values, threads))))
    else:
        found = kth(values)
    return torch.from_numpy(found).to(scores.dtype)
