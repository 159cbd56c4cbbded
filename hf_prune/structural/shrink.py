"""Makes groups vanish for good, in place: parameters, gradients, optimizer state and config lose the same entries.

What the config says of a shape is found by trying: a model without weights is built from the changed config, and its shapes
must be those that are left. A norm that took the mean over the groups is corrected for their smaller number: entries that were
zero may leave without a trace (an RMSNorm; the mean of a LayerNorm cannot be kept).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .groups import Axis, Groups, all_but, head_size


_FIELDS = {
    "heads": ("num_attention_heads", "num_key_value_heads"),
    "ffn": ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "d_inner", "ffn_hidden_size", "dff", "dim_ff"),
    "hidden": ("hidden_size", "word_embed_proj_dim"),
}


class _NumbersAreReal(TorchFunctionMode):
    """Within `torch.device("meta")` a tensor of one float has its value, such as the scale of Gemma's embedding."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], float):
            kwargs = {"dtype": torch.float64, **kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def built_with(groups: Groups, counts: dict[str, int]) -> nn.Module:
    """A model without weights of the model's config, but as many groups of each kind as `counts` says; others stay.

    Raises:
        ValueError: no config of this architecture has that shape.
    """
    model = groups.decoder.model
    config = copy.deepcopy(model.config)
    for name, value in _values(groups, counts).items():
        setattr(config.get_text_config(), name, value)
    try:
        with torch.device("meta"), _NumbersAreReal():
            fresh = type(model)(config)
    except Exception as error:  # an architecture's own checks
        raise ValueError(f"{type(config).__name__} allows no {_words(counts)}: {error}") from error
    wanted = shapes_with(groups, counts)
    found = {name: tuple(p.shape) for name, p in fresh.named_parameters()}
    if wrong := [name for name, shape in wanted.items() if found.get(name) != shape]:
        raise ValueError(
            f"{type(config).__name__} cannot say {_words(counts)}: {wrong[0]} would be {found.get(wrong[0])}, not "
            f"{wanted[wrong[0]]}."
        )
    return fresh


def illegal(config: Any) -> str | None:
    """Why a saved model of this config could not be loaded, in the architecture's own words; None if it could."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:
        return str(error).splitlines()[-1].strip()


def _values(groups: Groups, counts: dict[str, int]) -> dict[str, Any]:
    """Fields of the config that have to change."""
    config, values = groups.decoder.model.config.get_text_config(), {}
    for kind, count in counts.items():
        before = groups.of(kind)[0].count
        for name in _FIELDS[kind]:
            value = getattr(config, name, None)
            if isinstance(value, int) and value % before == 0:
                values[name] = value // before * count
            elif name in ("intermediate_size", "n_inner", "ffn_hidden_size") and hasattr(config, name):
                values[name] = count
    if "ffn" not in counts and getattr(config, "n_inner", 0) is None:
        values["n_inner"] = groups.of("ffn")[0].count
    # Models read a head_dim even where their config does not name one; without it they divide.
    if not isinstance(getattr(type(config), "head_dim", None), property):
        values["head_dim"] = head_size(config)
    if "hidden" in counts and (name := _epsilon_field(groups)):
        values[name] = getattr(config, name) * groups.of("hidden")[0].count / counts["hidden"]
    return values


def _words(counts: dict[str, int]) -> str:
    return " and ".join(f"{count} {kind}" for kind, count in counts.items())


def check(groups: Groups) -> None:
    """Refuses each kind of which the config cannot lose a single group; `groups` then says why."""
    for kind, axes in list(groups.axes.items()):
        try:
            if axes[0].count < 2:
                raise ValueError("there is only one")
            built_with(groups, {kind: axes[0].count - 1})
        except ValueError as error:
            groups.refused[kind] = str(error)
            del groups.axes[kind]


@torch.no_grad()
def remove(
    groups: Groups,
    drop: dict[Axis, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    compensate: Callable[[dict[Axis, Tensor]], None] | None = None,
) -> None:
    """Takes the groups at the positions `drop[axis]` (int64) out of the model of `groups`, in place.

    Parameters stay the same objects, so that an optimizer goes on with them; of its state what is shaped like the parameter is
    cut alike. As many groups must go from every block. `compensate` is called with `drop` once nothing more can be refused.

    Raises:
        ValueError: unequal numbers, nothing would be left, the config cannot say it, or a state that cannot be cut; nothing has
            changed.
    """
    model = groups.decoder.model
    counts: dict[str, int] = {}
    for axis, positions in drop.items():
        left = axis.count - len(positions)
        if counts.setdefault(axis.kind, left) != left or len(positions.unique()) != len(positions):
            raise ValueError(f"as many {axis.kind} must go from every block, each once.")
        if left < 1:
            raise ValueError(f"no {axis.kind} would be left.")
    for kind in counts:
        if any(axis not in drop for axis in groups.of(kind)):
            raise ValueError(f"{kind} must go from all blocks: a config has one number for all of them.")
    fresh = built_with(groups, counts)
    before, changed = {kind: groups.of(kind)[0].count for kind in counts}, _values(groups, counts)
    cuts = {axis: [(member, *_cut(member, positions)) for member in axis.members] for axis, positions in drop.items()}
    _check_state(optimizer, {member.parameter for found in cuts.values() for member, *_ in found})
    if compensate:
        compensate(drop)
    states = _first_states(groups) if "hidden" in counts else None
    kinds = {id(norm): _root_mean_square(norm) for axis in drop for norm in axis.norms}
    for found in cuts.values():
        for member, kept, index in found:
            _shrink(member.parameter, member.dim, kept, optimizer)
            member.index = index
    _adopt(model, fresh)
    for name, value in changed.items():
        setattr(model.config.get_text_config(), name, value)
    for axis in drop:
        factor = (before[axis.kind] / axis.count) ** 0.5
        for norm in axis.norms:
            if (offset := kinds[id(norm)]) is not None:
                norm.weight.copy_((norm.weight.double() + offset) * factor - offset)
    if states is not None:
        kept = next(kept for axis, found in cuts.items() if axis.kind == "hidden" for _, kept, _ in found[:1])
        _rescale_embedding(groups, states[..., kept])


def shape_to(groups: Groups, state: dict[str, Tensor]) -> None:
    """Gives the model of `groups` the shapes of a state dict whose values it is about to load, in place.

    Raises:
        ValueError: a shape that groups cannot give.
    """
    drop: dict[Axis, Tensor] = {}
    for axes in groups.axes.values():
        for axis in axes:
            member = next((m for m in axis.members if m.name in state), None)
            if member is None:
                continue
            gone, rest = divmod(
                member.parameter.shape[member.dim] - state[member.name].shape[member.dim], member.index.shape[1]
            )
            if gone < 0 or rest:
                raise ValueError(
                    f"{member.name} {tuple(state[member.name].shape)} of the checkpoint does not fit the model's "
                    f"{tuple(member.parameter.shape)}: begin with the model that the checkpoint's training began with."
                )
            if gone:
                drop[axis] = torch.arange(axis.count - gone, axis.count)
    if drop:
        remove(groups, drop)


def _cut(member, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions along the member's dimension that are kept, and the index of the groups that are left."""
    keep = all_but(member.index[positions].flatten(), member.parameter.shape[member.dim])
    stay = all_but(positions, len(member.index))
    return keep.nonzero().flatten(), (keep.long().cumsum(0) - 1)[member.index[stay]]


def _shrink(parameter: nn.Parameter, dim: int, kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    kept, shape = kept.to(parameter.device), parameter.shape
    gradient = parameter.grad
    parameter.grad = None
    left = parameter.data.index_select(dim, kept)
    parameter.data = torch.empty(0, dtype=torch.float64 if left.dtype != torch.float64 else torch.float32, device=left.device)
    parameter.data = left  # another dtype before makes autograd forget the old shape, which DistributedDataParallel holds on to
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, kept)
    state = optimizer.state.get(parameter, {}) if optimizer else {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[name] = value.index_select(dim, kept.to(value.device))


def _check_state(optimizer: torch.optim.Optimizer | None, parameters: set[nn.Parameter]) -> None:
    for parameter in parameters if optimizer else ():
        for name, value in optimizer.state.get(parameter, {}).items():
            of_its_own = type(value) is not Tensor  # such as torchao's 8-bit ones
            if isinstance(value, Tensor) and value.numel() > 1 and (of_its_own or value.shape != parameter.shape):
                inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
                raise ValueError(
                    f"{type(inner).__name__} keeps {name}, a {type(value).__name__} {tuple(value.shape)}, for a parameter "
                    f"{tuple(parameter.shape)}, which cannot be cut with it: use an optimizer whose state are ordinary tensors of "
                    "the parameter's shape, such as AdamW or SGD."
                )


def shapes_with(groups: Groups, counts: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Of every parameter, by name, with `counts` groups left."""
    model = groups.decoder.model
    shapes = {parameter: list(parameter.shape) for parameter in model.parameters()}
    for kind, count in counts.items():
        for axis in groups.of(kind):
            for member in axis.members:
                shapes[member.parameter][member.dim] -= (axis.count - count) * member.index.shape[1]
    return {name: tuple(shapes[parameter]) for name, parameter in model.named_parameters()}


def _adopt(model: nn.Module, fresh: nn.Module) -> None:
    """Numbers that modules keep besides their parameters become those of a model that was built with that shape."""
    modules = dict(model.named_modules())
    for name, module in fresh.named_modules():
        mine = modules[name]
        for attribute, value in vars(module).items():
            same = mine.__dict__.get(attribute)
            if type(value) in (int, float, tuple) and type(same) is type(value) and same != value:
                setattr(mine, attribute, copy.copy(value))
        for attribute, buffer in module.named_buffers(recurse=False):
            if attribute in module._non_persistent_buffers_set and buffer.numel() == 1 and not buffer.is_meta:
                mine._buffers[attribute].copy_(buffer)


def _root_mean_square(norm: nn.Module) -> float | None:
    """What is added to the weight of a norm that divides by the root mean square, 0.0 or 1.0; None of any other norm."""
    weight = norm.weight
    x = torch.rand(2, len(weight), dtype=weight.dtype, generator=torch.Generator().manual_seed(0)).to(weight.device) + 1
    scaled = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    y = norm(x).double()
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    for offset in (0.0, 1.0):
        wanted = scaled * (weight.double() + offset)
        if (y - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-12:
            return offset
    return None


def _epsilon_field(groups: Groups) -> str | None:
    norm = next(iter(groups.of("hidden")[0].norms), None)
    if norm is None or _root_mean_square(norm) is None:
        return None
    epsilon = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    config = groups.decoder.model.config
    return next((name for name in vars(config) if "eps" in name and getattr(config, name) == epsilon), None)


def _first_states(groups: Groups) -> Tensor:
    decoder = groups.decoder
    vocabulary = decoder.model.get_input_embeddings().weight.shape[0]
    return decoder.capture([torch.arange(8)[None] % vocabulary])[0][0]


def _rescale_embedding(groups: Groups, wanted: Tensor) -> None:
    """Some models multiply the embedding by a number that depends on its width (Gemma): then its weight makes up for it."""
    model = groups.decoder.model
    now = _first_states(groups)
    ratio = (wanted.double() * now.double()).sum() / now.double().square().sum()
    if abs(ratio - 1) < 1e-6 or (wanted - now * ratio).norm() > 1e-3 * wanted.norm():
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight.mul_(ratio)
    if head is not None and head.weight is embedding.weight:
        last = groups.of("hidden")[0].norms[-1]
        offset = _root_mean_square(last) or 0.0
        last.weight.copy_((last.weight.double() + offset) / ratio - offset)
