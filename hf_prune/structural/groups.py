"""Groups: every slice of every parameter that vanishes with one head, one FFN channel or one channel of the residual stream.

Found by running a block, not from a table of architectures: with its norms made elementwise and every linear's output cut
loose, an entry of the output matters to an entry of the next linear's input exactly where the gradient is not zero (the groups
are those of LLM-Pruner, arXiv 2305.11627, section 3.1, and of EfficientLLM, 2502.06663, figure 2). Query heads that share a key
and value vanish together. Knows structure alone: what a group is worth is `efficientllm`'s business, how it vanishes `shrink`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block, Call, Decoder, Linear, eager_experts
from ..patterns import one_of


KINDS = ("heads", "ffn", "hidden")


@dataclass(eq=False)
class Member:
    """The slices of one parameter.

    Attributes:
        name: of the parameter within the model.
        dim: along which it is cut.
        index: (groups, width) int64, the positions along `dim` that vanish with each group.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor

    @property
    def numel(self) -> int:
        """Numbers of one group."""
        return self.index.shape[1] * (self.parameter.numel() // self.parameter.shape[self.dim])

    def sums(self, values: Tensor) -> Tensor:
        """Of `values`, shaped like the parameter, the sum over each group's slice: (groups,) in float32."""
        others = [d for d in range(values.dim()) if d != self.dim]
        along = values.sum(others, dtype=torch.float32) if others else values.float()
        return along[self.index.to(along.device)].sum(1)


@dataclass(eq=False)
class Axis:
    """Groups of which one can vanish without another: the heads or FFN channels of a block, or the residual stream's channels.

    Attributes:
        kind: "heads", "ffn" or "hidden".
        block: its index; None of the residual stream.
        inputs: linears that read the groups, each with its member's `index` among their inputs: what a second-order update
            changes.
        norms: that take the mean over the groups.
    """

    kind: str
    block: int | None
    members: list[Member]
    inputs: list[tuple[Linear, Member]] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Groups that are left."""
        return len(self.members[0].index)

    @property
    def numel(self) -> int:
        """Numbers that vanish with one group."""
        return sum(member.numel for member in self.members)


@dataclass(eq=False)
class Groups:
    """All axes of a model, and why there are none of some kind.

    Attributes:
        axes: by kind; of "heads" and "ffn" one a block, in order, all of one count.
        refused: kind -> the reason why it cannot be pruned.
    """

    decoder: Decoder
    axes: dict[str, list[Axis]]
    refused: dict[str, str]

    def of(self, kind: str) -> list[Axis]:
        """The axes of a kind.

        Raises:
            ValueError: an unknown kind, or one that this model cannot lose.
        """
        one_of("kind", kind, KINDS)
        if kind in self.refused:
            allowed = ", ".join(self.axes) or "nothing"
            name = type(self.decoder.model).__name__
            raise ValueError(f"{name} cannot lose {kind}: {self.refused[kind].rstrip('.')}. It can lose: {allowed}.")
        return self.axes[kind]


def groups_of(model: nn.Module) -> Groups:
    """The groups of any decoder that `Decoder` can read. The model is not changed.

    Raises:
        ValueError: the model is no such decoder.
    """
    decoder = Decoder(model)
    states, calls = decoder.capture([torch.arange(16)[None] % model.get_input_embeddings().weight.shape[0]])
    axes: dict[str, list[Axis]] = {"heads": [], "ffn": []}
    refused: dict[str, str] = {}
    known: dict[Any, _Structure] = {}
    for index, block in enumerate(decoder.blocks):
        signature = tuple((name, p.shape) for name, p in block.module.named_parameters())
        if signature not in known:
            try:
                with eager_experts(model):
                    known[signature] = _Structure(block, calls[index][0], states[0], model.config.get_text_config())
            except Exception as error:  # of code that was not written to be run with other norms, or in float64
                reason = f"{block.name} cannot be traced ({type(error).__name__}: {error})"
                return Groups(decoder, {}, dict.fromkeys(KINDS, reason))
        structure = known[signature]
        refused.update({kind: reason for kind, reason in structure.refused.items() if kind not in refused})
        for kind, found in structure.found.items():
            axes[kind].append(found.on(kind, index, block))
    for kind in list(axes):
        if kind not in refused and len(axes[kind]) != len(decoder.blocks):
            refused[kind] = "not every block has them"
        if kind in refused:
            del axes[kind]
    hidden = states[0].shape[-1]
    sliced = {
        member.name for found in axes.values() for axis in found for member in axis.members if member.parameter.dim() == 1
    }
    stream = _residual_stream(decoder, hidden, known.values(), sliced)
    if isinstance(stream, str):
        refused["hidden"] = stream
    else:
        axes["hidden"] = [stream]
    return Groups(decoder, axes, refused)


@dataclass(eq=False)
class _Found:
    """One axis of a block, by names within the block."""

    rows: dict[str, Tensor]  # linear -> (groups, width) of its output
    columns: dict[str, Tensor]  # linear -> (groups, width) of its input
    others: dict[str, Tensor]  # other parameter of one dimension -> (groups, width)
    norms: list[str]

    def on(self, kind: str, index: int, block: Block) -> Axis:
        linears = {linear.name.removeprefix(f"{block.name}."): linear for linear in block.linears}
        members, inputs = [], []
        for name, rows in self.rows.items():
            members += output_members(linears[name], rows)
        for name, columns in self.columns.items():
            members.append(input_member(linears[name], columns))
            inputs.append((linears[name], members[-1]))
        for name, entries in self.others.items():
            members.append(Member(f"{block.name}.{name}", block.module.get_parameter(name), 0, entries))
        return Axis(kind, index, members, inputs, [block.module.get_submodule(name) for name in self.norms])


def output_members(linear: Linear, index: Tensor) -> list[Member]:
    """Rows of a linear, and of its bias."""
    members = [Member(linear.parameter_name, linear.parameter, int(linear.transposed), index)]
    if (bias := getattr(linear.module, "bias", None)) is not None:
        members.append(Member(linear.parameter_name.removesuffix("weight") + "bias", bias, 0, index))
    return members


def input_member(linear: Linear, index: Tensor) -> Member:
    """Columns of a linear."""
    return Member(linear.parameter_name, linear.parameter, 1 - int(linear.transposed), index)


class _Structure:
    """What one kind of block is made of: `found` by kind, or the reason why not in `refused`; who reads and who writes the stream."""

    def __init__(self, block: Block, call: Call, hidden: Tensor, config: Any):
        self.found: dict[str, _Found] = {}
        self.refused: dict[str, str] = {}
        fused = any(linear.expert is not None for linear in block.linears)
        self.mixture = fused or "router" in block.left_dense.values()
        own = [linear for linear in block.linears if linear.expert is None and linear.called]
        self._names = [linear.name.removeprefix(f"{block.name}.") for linear in own]
        module = copy.deepcopy(block.module).double().requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(block.device).requires_grad_()
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        with torch.enable_grad():
            self._entered = _elementwise_norms(module)
            for name in self._names:
                module.get_submodule(name).register_forward_hook(self._cut_loose(name))
            Call(_doubled(call.args), _doubled(call.kwargs)).run(Block(block.name, module), x)
            order = [name for name in self._names if name in self._outputs]
            reads = {name: self._sources(name, order, x) for name in order}
            self.readers = [name for name in order if reads[name] is None]
            self.writers = [name for name in order if reads[name] is not None]
            for writer in self.writers:
                self._axis(module, writer, reads[writer], config, call)
        if self.mixture:
            self.refused["ffn"] = "a mixture of experts chooses among its FFNs, and its router has learned which"
            self.found.pop("ffn", None)
        for kind in ("heads", "ffn"):
            if kind not in self.found and kind not in self.refused:
                self.refused[kind] = "no linears that follow one another as attention or as FFN"

    def _cut_loose(self, name: str) -> Callable:
        def hook(module, args, output):
            self._inputs.setdefault(name, args[0])
            leaf = output.detach().requires_grad_()
            self._outputs.setdefault(name, leaf)
            return leaf.clone()  # which a block may change in place

        return hook

    def _sources(self, name: str, order: list[str], x: Tensor) -> list[str] | None:
        """The linears whose outputs a linear reads; None if it reads the residual stream."""
        entry = self._inputs[name]
        names = [other for other in order if other != name]
        leaves = [self._outputs[other] for other in names]
        if not entry.requires_grad:
            return None
        of_stream, *rest = torch.autograd.grad(_weighted(entry), [x, *leaves], allow_unused=True, retain_graph=True)
        if of_stream is not None and bool(of_stream.any()):
            return None
        return [other for other, g in zip(names, rest) if g is not None and bool(g.any())]

    def _axis(self, module: nn.Module, writer: str, sources: list[str], config: Any, call: Call) -> None:
        entry = self._inputs[writer]
        leaves = [self._outputs[name] for name in sources]
        mixes = torch.autograd.grad(entry[:, -1].sum(), leaves, allow_unused=True, retain_graph=True)
        kind = "heads" if any(g is not None and bool(g[:, :-1].any()) for g in mixes) else "ffn"
        if kind == "ffn" and self.mixture:
            return
        if kind in self.found:
            self.refused[kind] = f"its block has more than one place with {kind}, such as {writer}"
            return
        try:
            groups = self._heads(module, writer, sources, config, call) if kind == "heads" else self._channels(writer, sources)
        except ValueError as error:
            self.refused[kind] = str(error)
            return
        self.found[kind] = groups

    def _channels(self, writer: str, sources: list[str]) -> _Found:
        """Which output of each source makes which input of `writer`: gradients of a sum, and of one weighted by position."""
        entry = self._inputs[writer]
        n = entry.shape[-1]
        position = torch.arange(1, n + 1, dtype=torch.float64, device=entry.device)
        check = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(entry.device) + 1
        rows = {}
        for name in sources:
            leaf = self._outputs[name]
            plain, placed, random = (
                torch.autograd.grad((entry * w).sum(), leaf, retain_graph=True)[0].reshape(-1, leaf.shape[-1])
                for w in (torch.ones_like(position), position, check)
            )
            at = plain.abs().argmax(0, keepdim=True)
            plain, placed, random = (g.gather(0, at).squeeze(0) for g in (plain, placed, random))
            alive = plain.abs() > 1e-12 * plain.abs().max()
            place = (placed / plain).round().long() - 1
            place[~alive] = -1
            if not alive.all():  # a ReLU may be shut for every token: rows follow one another as the others do
                shift = torch.arange(len(place), device=place.device) - place
                first = int(shift[alive].mode().values)
                place = torch.where(alive, place, torch.arange(len(place), device=place.device) - first).clamp(0, n - 1)
            wrong = (check[place] * plain - random).abs() > 1e-6 * plain.abs()
            counts = torch.bincount(place, minlength=n)
            if bool((wrong & alive).any()) or int(counts.min()) != int(counts.max()):
                raise ValueError(f"the outputs of {name} do not go one by one into {writer}")
            rows[name] = place.argsort(stable=True).view(n, -1).cpu()
        return _Found(rows, {writer: torch.arange(n)[:, None]}, {}, [])

    def _heads(self, module: nn.Module, writer: str, sources: list[str], config: Any, call: Call) -> _Found:
        entry = self._inputs[writer]
        size = head_size(config)
        n = entry.shape[-1] // size
        if entry.shape[-1] % size:
            raise ValueError(f"the input of {writer} is not made of heads of {size}")
        if any(call.kwargs.get(name) is not None for name in ("alibi", "position_bias")):
            raise ValueError("its position bias (ALiBi) is computed from the number of heads, and would change for those left")
        others = {
            name: p for name, p in module.named_parameters()
            if p.dim() == 1 and not any(name.startswith(f"{linear}.") for linear in self._names)
        }  # fmt: skip
        tensors = {**{name: self._outputs[name] for name in sources}, **others}
        weights = torch.rand(n * size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(entry.device) + 1
        touched: dict[str, list[Tensor]] = {name: [] for name in tensors}
        for h in range(n):
            part = (entry[..., h * size : (h + 1) * size] * weights[h * size : (h + 1) * size]).sum()
            gradients = torch.autograd.grad(part, list(tensors.values()), allow_unused=True, retain_graph=True)
            for (name, tensor), g in zip(tensors.items(), gradients):
                g = torch.zeros_like(tensor) if g is None else g
                touched[name].append((g.reshape(-1, g.shape[-1]) != 0).any(0).cpu())
        table = {name: torch.stack(rows) for name, rows in touched.items()}  # (heads, entries) bool
        # What every head reads stays: one key and value for all, or a norm within heads.
        table = {name: t & ~(t.all(0) if n > 1 else False) for name, t in table.items()}
        joint = torch.cat(list(table.values()), 1).double()
        together = joint @ joint.t() > 0
        groups: list[list[int]] = []
        for h in range(n):
            mates = together[h].nonzero().flatten().tolist() or [h]
            if mates[0] == h or h not in [other for group in groups for other in group]:
                groups.append(mates)
        if sorted(h for group in groups for h in group) != list(range(n)) or len({len(group) for group in groups}) != 1:
            raise ValueError("its heads do not fall into groups of one size")
        if len(groups) < 2:
            raise ValueError(f"all of its {n} heads hang together")
        found: dict[str, Tensor] = {}
        for name, t in table.items():
            entries = [t[group].any(0).nonzero().flatten() for group in groups]
            if len({len(e) for e in entries}) != 1:
                raise ValueError(f"the groups of its heads have unequal parts of {name}")
            if len(entries[0]):
                found[name] = torch.stack(entries)
        columns = torch.tensor(groups)[:, :, None] * size + torch.arange(size)
        norms = [name for name, width in self._entered.items() if f"{name}.weight" in found and width > size]
        return _Found(
            {name: found[name] for name in sources if name in found},
            {writer: columns.flatten(1)},
            {name: found[name] for name in others if name in found},
            norms,
        )


def all_but(positions: Tensor, count: int) -> Tensor:
    """Bool (count,), False at `positions`."""
    return torch.ones(count, dtype=torch.bool).index_fill(0, positions, False)


def head_size(config: Any) -> int:
    """Numbers of one attention head.

    Raises:
        ValueError: the config names no heads.
    """
    if size := getattr(config, "head_dim", None):
        return size
    if not (heads := getattr(config, "num_attention_heads", None)):
        raise ValueError(f"{type(config).__name__} names no attention heads")
    return config.hidden_size // heads


def _residual_stream(decoder: Decoder, d: int, structures: Any, sliced: set[str]) -> Axis | str:
    """The channels of the residual stream, or why they cannot be pruned."""
    model = decoder.model
    index = torch.arange(d)[:, None]
    axis = Axis("hidden", None, [])
    if any(structure.mixture for structure in structures):
        return "a mixture's router and experts would lose what they read"
    by_names = {tuple(structure._names): structure for structure in structures}
    seen: set[int] = set()
    for block in decoder.blocks:
        linears = {linear.name.removeprefix(f"{block.name}."): linear for linear in block.linears}
        structure = by_names.get(tuple(name for name in linears))
        if structure is None or len(structure.readers) + len(structure.writers) != len(linears):
            return f"{block.name} has linears that its run did not reach"
        for name in structure.readers:
            axis.members.append(input_member(linears[name], index))
            axis.inputs.append((linears[name], axis.members[-1]))
        for name in structure.writers:
            if linears[name].out_features != d:
                return f"{linears[name].name} does not write into the residual stream"
            axis.members += output_members(linears[name], index)
        seen |= {id(p) for linear in block.linears for p in linear.module.parameters(recurse=False)}
    within = {id(parameter) for parameter in decoder.parameters}
    for path, module in chain(*(b.module.named_modules(prefix=b.name) for b in decoder.blocks), model.named_modules()):
        for attribute, parameter in module.named_parameters(recurse=False):
            name, in_block = f"{path}.{attribute}", id(parameter) in within
            if id(parameter) in seen or name in sliced:
                continue
            seen.add(id(parameter))
            if parameter.shape == (d,) and (in_block or "norm" in type(module).__name__.lower()):
                axis.members.append(Member(name, parameter, 0, index))
                axis.norms += [module] if attribute == "weight" else []
            elif (
                isinstance(module, (nn.Embedding, nn.Linear))
                and not in_block
                and parameter.dim() == 2
                and parameter.shape[1] == d
            ):
                axis.members.append(Member(name, parameter, 1, index))
                if isinstance(module, nn.Linear) and parameter is not model.get_input_embeddings().weight:  # the head, untied
                    axis.inputs.append((Linear(path, name, module, attribute, group=path), axis.members[-1]))
            elif d in parameter.shape or (parameter.dim() != 1 and not in_block):
                return f"{name} {tuple(parameter.shape)} is of a kind that hf_prune does not know"
    return axis


def _elementwise_norms(module: nn.Module) -> dict[str, int]:
    """From now on the norms in `module` only scale, so that they couple nothing; how many entries each was given, by name."""
    entered: dict[str, int] = {}
    for name, child in module.named_modules():
        if "norm" in type(child).__name__.lower() and not list(child.children()):

            def forward(x, *args, child=child, name=name, **kwargs):
                entered[name] = x.shape[-1]
                weight = getattr(child, "weight", None)
                return x if weight is None else x * weight.exp()

            child.forward = forward
    return entered


def _weighted(x: Tensor) -> Tensor:
    weights = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)).to(x.device)
    return (x * (weights + 0.5)).sum()


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_doubled(v) for v in value) if type(value) in (tuple, list) else value
    return {k: _doubled(v) for k, v in value.items()} if type(value) is dict else value
