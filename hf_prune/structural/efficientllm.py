"""EfficientLLM: what a group is worth, which one goes next, and what makes up for it (arXiv 2502.06663, sections 3.2 and 3.3).

The gradients of the training step itself say what each group is worth (Taylor expansion of the loss, LLM-Pruner's equation 5 in
2305.11627); the kind of group that is worth least per parameter loses one in every block. No code was published with the paper:
what its text leaves open (running mean, normalisation, order of removal) is a field here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Linear
from ..patterns import check_count, one_of
from ..ranks import ALONE, Ranks
from .groups import KINDS, Axis, Groups, Member, all_but
from .shrink import built_with, illegal, shapes_with


class Saliency:
    """A running mean of every group's Taylor saliency.

    S_g = sum over w in g of |w g| (order 1), or of |w g - F w^2 / 2| (order 2) with F = g^2, the diagonal of the Fisher matrix,
    from the gradient at hand.

    Args:
        order: 1 or 2.
        decay: of the running mean over updates; 0 keeps the last.
    """

    def __init__(self, groups: Groups | None, order: int = 2, decay: float = 0.9):
        one_of("order", order, (1, 2))
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}.")
        self.groups, self.order, self.decay = groups, order, decay
        self.values: dict[Axis, Tensor] = {}  # (groups,) float32, the mean but for its bias
        self.weight = 0.0  # of all updates so far, in [0, 1)

    @torch.no_grad()
    def update(self) -> bool:
        """Adds what the gradients that the parameters hold now say; nothing if they are not finite, and then returns False.

        Raises:
            ValueError: no member of any group has a gradient.
        """
        parts: dict[nn.Parameter, list[tuple[Axis, Member]]] = {}
        for axes in self.groups.axes.values():
            for axis in axes:
                for member in axis.members:
                    parts.setdefault(member.parameter, []).append((axis, member))
        sums: dict[Axis, Tensor] = {}
        for parameter, members in parts.items():
            if parameter.grad is None:
                continue
            product = parameter.detach().float() * parameter.grad.float()
            if self.order == 2:
                product.addcmul_(product, product, value=-0.5)
            product.abs_()
            for axis, member in members:
                found = member.sums(product).cpu()
                sums[axis] = sums[axis] + found if axis in sums else found
        if not sums:
            raise ValueError("no parameter of any group has a gradient: saliency is read after backward(), before zero_grad().")
        if not all(bool(found.isfinite().all()) for found in sums.values()):
            return False
        for axis, found in sums.items():
            before = self.values.get(axis, torch.zeros_like(found))
            self.values[axis] = torch.lerp(found, before, self.decay)
        self.weight = self.weight * self.decay + 1 - self.decay
        return True

    def of(self, axis: Axis) -> Tensor:
        """The mean saliency of each group, (groups,) float32."""
        return self.values[axis] / self.weight

    def lowest(self, gone: dict[str, int]) -> dict[Axis, Tensor]:
        """For every axis of each kind the positions of the `gone[kind]` groups that are worth least; nothing of kinds with 0."""
        kinds = [kind for kind, count in gone.items() if count]
        return {axis: self.of(axis).argsort(stable=True)[: gone[kind]] for kind in kinds for axis in self.groups.of(kind)}

    def forget(self, drop: dict[Axis, Tensor]) -> None:
        """Of the groups at positions `drop[axis]`, which vanish."""
        for axis, positions in drop.items():
            self.values[axis] = self.values[axis][all_but(positions, len(self.values[axis]))]

    def state(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `restore` reads them."""
        values = [[axis.kind, axis.block, self.values[axis].tolist()] for axis in self.values]
        return {"weight": self.weight, "values": values}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave, for a model of the same shape.

        Raises:
            ValueError: it is of another shape.
        """
        by_place = {(axis.kind, axis.block): axis for axes in self.groups.axes.values() for axis in axes}
        values = {by_place[kind, block]: torch.tensor(found, dtype=torch.float32) for kind, block, found in state["values"]}
        if wrong := next((axis for axis, found in values.items() if len(found) != axis.count), None):
            raise ValueError(f"the saliency is of {len(values[wrong])} {wrong.kind}, but the model has {wrong.count}.")
        self.weight, self.values = state["weight"], values


@dataclass
class Plan:
    """How small, and which kinds of groups may go.

    Attributes:
        parameters: of the decoder blocks that are to be left: a share in (0, 1) or a number.
        counts: or kind -> number of groups that are to be left in each block ("heads" counts keys and values).
        kinds, together: see `hf_prune.EfficientLLMCallback`.
        per_parameter: compares kinds by saliency per parameter; False by the sum, under which small groups go first.

    Raises:
        ValueError: none or both of `parameters` and `counts`, or values that cannot be.
    """

    parameters: float | int | None = None
    counts: dict[str, int] | None = None
    kinds: tuple[str, ...] | None = None
    together: dict[str, int] | None = None
    per_parameter: bool = True

    def __post_init__(self):
        self.kinds = tuple(self.kinds) if self.kinds else None
        self.together = {"ffn": 8, "hidden": 8} if self.together is None else dict(self.together)
        if (self.parameters is None) == (self.counts is None):
            raise ValueError("give either parameters, such as 0.7 of the blocks', or counts, such as {'ffn': 1024}.")
        if self.parameters is not None and not self.parameters > 0:
            raise ValueError(f"parameters must be a share in (0, 1) or a number of at least 1, got {self.parameters!r}.")
        for name in (*(self.kinds or ()), *(self.counts or ()), *self.together):
            one_of("kind", name, KINDS)
        for kind, count in (*self.together.items(), *(self.counts or {}).items()):
            check_count(f"the number of {kind}", count)

    def kinds_of(self, groups: Groups) -> tuple[str, ...]:
        """The kinds that may go."""
        return tuple(self.counts) if self.counts is not None else self.kinds or tuple(groups.axes)

    def check(self, groups: Groups) -> None:
        """Before anything is removed.

        Raises:
            ValueError: the model cannot lose a kind that was asked for, or has less than is to be left, or cannot be as small.
        """
        kinds = self.kinds_of(groups)
        for kind in kinds:
            count = groups.of(kind)[0].count
            if self.counts is not None and self.counts[kind] > count:
                raise ValueError(f"{self.counts[kind]} {kind} are to be left, but the model has {count}.")
        if not kinds:
            raise ValueError(f"this model can lose nothing: {groups.refused}.")
        if self.parameters is not None:
            total, smallest = block_parameters(groups), self._smallest(groups, kinds)
            if not smallest <= self.target(total) < total:
                raise ValueError(
                    f"parameters={self.parameters} means {self.target(total):,} in the blocks, which have {total:,}; the smallest shape "
                    f"with fewer {', '.join(kinds)} has {smallest:,}. It can lose: {', '.join(groups.axes)} (kinds=)."
                )

    def _smallest(self, groups: Groups, kinds: tuple[str, ...]) -> int:
        blocks = {id(p) for p in groups.decoder.parameters}
        shapes = shapes_with(groups, {kind: self.step(kind, groups) for kind in kinds})
        return sum(math.prod(shapes[name]) for name, p in groups.decoder.model.named_parameters() if id(p) in blocks)

    def step(self, kind: str, groups: Groups) -> int:
        """How many of a kind go at a time, and stay at least."""
        step = self.together.get(kind, 1)
        return step if groups.of(kind)[0].count > step else 1

    def target(self, total: int) -> int:
        """Parameters of the blocks that are to be left of `total`."""
        return int(total * self.parameters) if self.parameters < 1 else int(self.parameters)


def block_parameters(groups: Groups) -> int:
    """Numbers in the decoder blocks."""
    return sum(p.numel() for p in groups.decoder.parameters)


def chosen(groups: Groups, saliency: Saliency, plan: Plan, surplus: int) -> dict[Axis, Tensor]:
    """The groups that go next: of the kind that is worth least, as often as it takes to lose `surplus` block parameters.

    Returns:
        Axis -> positions, as many in every axis of a kind; empty if nothing may go.
    """
    kinds, within = plan.kinds_of(groups), {id(p) for p in groups.decoder.parameters}
    values = {axis: saliency.of(axis).sort().values for kind in kinds for axis in groups.of(kind)}
    gone = dict.fromkeys(kinds, 0)
    lost = 0
    while lost < surplus:
        costs = {}
        for kind in kinds:
            axes, step = groups.of(kind), plan.step(kind, groups)
            if axes[0].count - gone[kind] - step >= step:
                size = sum(axis.numel for axis in axes) if plan.per_parameter else 1
                worth = sum(float(values[axis][gone[kind] : gone[kind] + step].sum()) for axis in axes)
                costs[kind] = worth / (size * step)
        if not costs:
            break
        kind = min(costs, key=costs.get)
        step = plan.step(kind, groups)
        gone[kind] += step
        lost += step * sum(m.numel for axis in groups.of(kind) for m in axis.members if id(m.parameter) in within)
    return saliency.lowest(gone)


def made_legal(groups: Groups, drop: dict[Axis, Tensor], saliency: Saliency, plan: Plan) -> dict[Axis, Tensor]:
    """`drop`, and as many more residual channels as the architecture's own checks ask for (a width that its heads divide)."""
    if "hidden" not in plan.kinds_of(groups):
        return drop
    counts = {kind: axes[0].count for kind, axes in groups.axes.items()}
    counts.update({axis.kind: axis.count - len(positions) for axis, positions in drop.items()})
    for hidden in range(counts["hidden"], 0, -1):
        if illegal(built_with(groups, {**counts, "hidden": hidden}).config) is None:
            return {**drop, **saliency.lowest({"hidden": groups.of("hidden")[0].count - hidden})}
    return drop


class Compensation:
    """Gram matrices of what the readers of groups read, from which what is left of a reader makes up for what goes.

    W_K <- W_K + W_Q (H_QK)(H_KK + damping)^-1, the least-squares refit of the reader on its kept inputs K, which is OBS'
    update for the removal of Q (EfficientLLM's variant B). H is a running mean of x x^T; removal cuts it like everything else.

    Positions that the model is told not to attend to (`attention_mask` (batch, length) of its last call with gradients) are not
    heard.

    Args:
        decay: of the running mean over forward passes; None is the mean over all tokens.
        grams: by the name of a linear that reads the input, (in, in) float32; filled, and gone on from, in place.
        ranks: the processes that train together, each of which hears its own share.
    """

    def __init__(
        self,
        groups: Groups,
        kinds: tuple[str, ...],
        decay: float | None = 0.9,
        grams: dict[str, Tensor] | None = None,
        ranks: Ranks = ALONE,
    ):
        self.decay, self.ranks = decay, ranks
        self.grams = {} if grams is None else grams
        self._of: dict[Axis, list[tuple[Linear, Member, str]]] = {}
        self.handles, self._heard = [groups.decoder.model.register_forward_pre_hook(self._note(), with_kwargs=True)], {}
        self._attended: Tensor | None = None
        block_of = {linear.name: block.name for block in groups.decoder.blocks for linear in block.linears}
        first: dict[tuple, str] = {}  # linears that share an input share its Gram matrix
        for kind in kinds:
            for axis in groups.of(kind):
                for linear, member in axis.inputs:
                    key = first.setdefault((block_of.get(linear.name), linear.group), linear.name)
                    self._of.setdefault(axis, []).append((linear, member, key))
                    if key == linear.name:
                        self.handles.append(linear.module.register_forward_pre_hook(self._listen(key)))

    def _note(self):
        def hook(model, args, kwargs):
            if torch.is_grad_enabled():
                mask = kwargs.get("attention_mask")
                self._attended = mask.bool().flatten() if isinstance(mask, Tensor) and mask.dim() == 2 else None

        return hook

    def _listen(self, key: str):
        def hook(module, args):
            if not torch.is_grad_enabled():  # an evaluation, or the first run of a checkpointed block
                return
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if self._attended is not None and len(self._attended) == len(x):
                x = x[self._attended.to(x.device)]
            if not len(x):
                return
            x = x.float()
            with torch.autocast(x.device.type, enabled=False):
                gram = x.t() @ x / len(x)
            self._heard[key] = heard = self._heard.get(key, 0) + len(x)
            before = 1 - len(x) / heard if self.decay is None else self.decay
            self.grams[key] = torch.lerp(gram, self.grams[key], before) if key in self.grams else gram

        return hook

    def average(self, keys: Iterable[str] | None = None) -> None:
        """Gives every process the mean of all processes' Gram matrices, of all or of `keys`, in place; all must call it."""
        for key in self.grams if keys is None else keys:
            self.ranks.add_up(self.grams[key])
            self.grams[key] /= self.ranks.count

    @torch.no_grad()
    def apply(self, drop: dict[Axis, Tensor]) -> None:
        """Changes the readers of the groups at positions `drop[axis]`, in place, before those are removed; cuts the Gram matrices.

        Every process must call it with the same groups: they take the mean of their Gram matrices first.
        """
        self.average({key: None for axis in drop for _, _, key in self._of.get(axis, ()) if key in self.grams})
        cut: dict[str, Tensor] = {}
        for axis, positions in drop.items():
            for linear, member, key in self._of.get(axis, ()):
                if key not in self.grams:
                    continue
                gram, weight = self.grams[key], linear.weight
                cut[key] = keep = all_but(member.index[positions].flatten(), len(gram))
                refit(weight, gram, keep)
        for key, keep in cut.items():
            self.grams[key] = self.grams[key][keep][:, keep].clone()

    def readers(self, drop: dict[Axis, Tensor]) -> list[nn.Parameter]:
        """What `apply` would change."""
        return list({linear.parameter: None for axis in drop for linear, *_ in self._of.get(axis, ())})

    def close(self) -> None:
        """Listens no more."""
        for handle in self.handles:
            handle.remove()


def refit(weight: Tensor, gram: Tensor, keep: Tensor, damping: float = 0.01) -> None:
    """Least-squares refit of `weight` (out, in), in place, on its inputs where `keep` (in,) is True, given their `gram` (in, in).

    `damping` is of the mean diagonal.
    """
    kept, gone = keep.nonzero().flatten().to(gram.device), (~keep).nonzero().flatten().to(gram.device)
    inner = gram[kept][:, kept].clone()
    inner.diagonal().add_(damping * float(gram.diagonal().mean()))
    factor = torch.linalg.cholesky(inner)
    share = torch.cholesky_solve(gram[kept][:, gone], factor)  # (kept, gone)
    kept, gone = kept.to(weight.device), gone.to(weight.device)
    added = weight[:, gone].to(gram.dtype) @ share.t().to(weight.device)
    weight[:, kept] = (weight[:, kept] + added).to(weight.dtype)
