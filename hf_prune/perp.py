"""Retraining what pruning left: which parameters, in what form, and back into an ordinary model (PERP, arXiv 2312.15230).

An adapted linear keeps its name, its weight and its place; only its class changes, so checkpoints keep their keys. Its state
dict holds the effective weight, so that whatever is saved meanwhile loads as a plain model, and the two factors beside it, from
which training goes on. Under FSDP2 it is `merged_state` that makes the effective weights, of what was gathered. Masks are read as bits,
never from zeros. Owns no loop: see `callbacks` and `reconstruction`.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .masks import Masks, in_this_process, rows_here, zero_pruned_
from .patterns import check_count


ADAPTERS = ("lora", "lora_prune", "mask_lora", "scale_lora", "spp_lora")
KINDS = ("bias", "norm", "head", "added_bias", *ADAPTERS, "full")


@dataclass(frozen=True)
class Adapter:
    """How the factors B (out, r) and A (r, in) act on a weight W (out, in) with mask M (PERP, section 3; SPP from 2405.16057).

    lora, head: W + sBA, dense; mask_lora: W + s(BA)⊙M; lora_prune: trains as lora, merges as mask_lora; scale_lora: W⊙(BA);
    spp_lora: W + sW⊙(BA). `transposed` weights are stored (in, out).
    """

    kind: str
    scale: float
    transposed: bool = False

    def product(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of BA in the orientation of the stored weight."""
        return (a.t(), b.t()) if self.transposed else (b, a)

    def weight(self, weight: Tensor, a: Tensor, b: Tensor, bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective weight, a new tensor, made in `dtype`; +0.0 wherever the mask prunes, if there is one."""
        left, right = (factor.detach().to(dtype) for factor in self.product(a, b))
        own = weight.detach().to(dtype)
        if self.kind in ("scale_lora", "spp_lora"):
            result = (left @ right).mul_(own)
            if self.kind == "spp_lora":
                result.mul_(self.scale).add_(own)
        else:
            result = torch.addmm(own, left, right, alpha=self.scale)
        return result if self.kind in ("lora", "head") else zero_pruned_(result, bits)

    def backward(self, gradient: Tensor, weight: Tensor, a: Tensor, b: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of A and B, given that of the effective weight, which is overwritten."""
        if self.kind in ("scale_lora", "spp_lora"):
            gradient.mul_(weight)
        else:
            zero_pruned_(gradient, bits)
        if self.transposed:
            gradient = gradient.t()
        scale = 1.0 if self.kind == "scale_lora" else self.scale
        a, b = a.to(gradient.dtype), b.to(gradient.dtype)
        return (b.t() @ gradient).float().mul_(scale), (gradient @ a.t()).float().mul_(scale)


class _EffectiveProduct(torch.autograd.Function):
    """x times the effective weight, which is made anew in the backward pass instead of being held."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, module: Adapted) -> Tensor:
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.module, ctx.dtype, ctx.x_dtype = module, autocast or module.weight.dtype, x.dtype
        with torch.autocast(device, enabled=False):
            x = x.to(ctx.dtype)
            ctx.save_for_backward(x, a, b)
            # Under autocast in its precision; a model in half precision is to be the same, bit for bit, when it is merged.
            ctx.made = ctx.dtype if module.weight.dtype == torch.float32 else torch.float32
            weight = module.perp.weight(module.weight, a, b, module.perp_bits, ctx.made).to(ctx.dtype)
            bias = None if bias is None else bias.to(ctx.dtype)
            y = F.linear(x, weight.t() if module.perp.transposed else weight, bias)
            # With a bias it is a view, to which nobody may add in place, as Falcon does.
            return y if bias is None else torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        module, adapter = ctx.module, ctx.module.perp
        with torch.autocast(x.device.type, enabled=False):
            rows, inputs = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype), x.reshape(-1, x.shape[-1])
            grad_x = grad_a = grad_b = grad_bias = None
            if ctx.needs_input_grad[0]:
                weight = adapter.weight(module.weight, a, b, module.perp_bits, ctx.made).to(ctx.dtype)
                grad_x = (rows @ (weight.t() if adapter.transposed else weight)).view(x.shape).to(ctx.x_dtype)
                del weight
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                of_weight = inputs.t() @ rows if adapter.transposed else rows.t() @ inputs
                grad_a, grad_b = adapter.backward(of_weight, module.weight.detach(), a, b, module.perp_bits)
            if ctx.needs_input_grad[3]:
                grad_bias = rows.sum(0, dtype=torch.float32)
        return grad_x, grad_a, grad_b, grad_bias, None


class Adapted:
    """Put before `nn.Linear` or `Conv1D`: adds `perp_A` (r, in) and `perp_B` (out, r), float32, to the module in place."""

    def effective_weight(self) -> Tensor:
        """The weight that this linear has now, in the shape and dtype of `weight`; sharded by FSDP2 if that is."""
        weight, a, b, bits = self.weight.detach(), self.perp_A.detach(), self.perp_B.detach(), self.perp_bits
        if not hasattr(weight, "placements"):
            return self.perp.weight(weight, a, b, bits).to(weight.dtype)
        here, bits = in_this_process(weight, bits.cpu().numpy())
        left, right = self.perp.product(a.full_tensor(), b.full_tensor())
        left = rows_here(left.contiguous(), weight)
        a, b = (left.t(), right.t()) if self.perp.transposed else (right, left)
        made = self.perp.weight(here, a, b, bits.to(here.device)).to(here.dtype)
        how = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
        return type(weight).from_local(made, weight.device_mesh, weight.placements, **how)

    def forward(self, x: Tensor) -> Tensor:
        if self.perp.kind not in ("lora", "lora_prune", "head"):
            return _EffectiveProduct.apply(x, self.perp_A, self.perp_B, self.bias, self)
        low = F.linear(F.linear(x.to(self.perp_A.dtype), self.perp_A), self.perp_B) * self.perp.scale
        return super().forward(x) + low.to(low.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype)


class AdaptedLinear(Adapted, nn.Linear):
    """See `Adapted`."""


class AdaptedConv1D(Adapted, Conv1D):
    """See `Adapted`."""


class AdaptedEmbedding(nn.Embedding):
    """The embedding that shares its weight with an adapted head, and so its adapter."""

    def forward(self, ids: Tensor) -> Tensor:
        (head,) = self.perp_head
        rows = F.embedding(ids, head.perp_B.to(self.weight.dtype), self.padding_idx) @ head.perp_A.to(self.weight.dtype)
        return super().forward(ids) + head.perp.scale * rows


_CLASSES = {nn.Linear: AdaptedLinear, Conv1D: AdaptedConv1D, nn.Embedding: AdaptedEmbedding}
_OWN = ("perp_A", "perp_B", "perp_bits")


def merged_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, gathered from what FSDP2 has sharded of `model`, with effective weights, which load as a plain model."""
    merged, names = dict(state), {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        adapted = "perp" in module.__dict__ and module.perp.kind != "lora" and f"{name}.perp_A" in state
        if adapted and hasattr(module.weight, "placements"):
            weight, a, b = (state[f"{name}.{part}"] for part in ("weight", "perp_A", "perp_B"))
            made = module.perp.weight(weight, a, b, module.perp_bits.to(weight.device)).to(weight.dtype)
            tied = [names[other] for other in names if module in other.__dict__.get("perp_head", ())]
            merged.update({f"{shown}.weight": made for shown in (name, *tied)})
    return merged


class Attached:
    """What `attach` made of a model, until `merge` or `detach` ends it.

    Attributes:
        trainable: name -> parameter that requires a gradient.
        left_out: names of pruned weights that no adapter can be put on (fused experts): they stay as they are.
    """

    def __init__(self, model: nn.Module, masks: Masks):
        self.model, self.masks = model, masks
        self.adapted: dict[str, Adapted] = {}
        self.left_out: list[str] = []
        self._before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
        self._numel = sum(p.numel() for p in model.parameters())
        self._biases: list[nn.Module] = []
        self._embedding: nn.Module | None = None
        self._flags: dict[str, Any] = {}
        self._factors: dict[str, tuple[Tensor, Tensor, Adapter]] = {}  # of "lora", that PEFT has not taken over yet
        self._made: tuple[str | None, Tensor | None] = (None, None)  # the effective weight that is being written

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def share(self) -> float:
        """Trained numbers over the model's own."""
        return sum(p.numel() for p in self.trainable.values()) / self._numel

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the effective weights in place and makes every linear what it was; "lora" adapters become those of PEFT.

        After an interruption it goes on with the linears that are left.

        Raises:
            RuntimeError: a pruned weight is not zero.
        """
        self._end(merge=True)
        if wrong := self.masks.violations(self.model):
            raise RuntimeError(f"{len(wrong)} pruned parameters are not zero after merging, such as {next(iter(wrong))}.")
        if self._factors:
            _to_peft(self.model, self._factors)
            self._factors = {}

    @torch.no_grad()
    def detach(self) -> None:
        """Takes everything off again; what was trained in place stays trained, adapters and added biases are lost."""
        for module in self._biases:
            module.bias = None
        self._biases = []
        for name, value in self._flags.items():
            setattr(self.model.config, name, value)
        self._end()

    def _take_off(self, name: str, module: nn.Module) -> None:
        """Every step may be made twice: what interrupts one lets the next call begin with it."""
        if name == self._made[0]:
            module.weight.copy_(self._made[1])
        if isinstance(module, tuple(_CLASSES.values())):
            _swap(module, _plain(type(module), module.__dict__["perp_was"]))
        for own in _OWN:
            if hasattr(module, own):
                delattr(module, own)
        for handle in module.__dict__.get("perp_hooks", ()):
            handle.remove()
        for own in [own for own in module.__dict__ if own.startswith("perp")]:
            del module.__dict__[own]
        self.adapted.pop(name, None)

    def _end(self, merge: bool = False) -> None:
        _release_from_fsdp(self.model)
        for name, module in list(self.adapted.items()):
            if merge and name != self._made[0] and name not in self._factors:
                if module.perp.kind == "lora":
                    self._factors[name] = module.perp_A.detach(), module.perp_B.detach(), module.perp
                else:
                    self._made = name, module.effective_weight()
            self._take_off(name, module)
        if self._embedding is not None:
            self._take_off("", self._embedding)
        self._embedding, self._made = None, (None, None)
        take_hooks_off(self.model)
        for name, parameter in self.model.named_parameters():
            required, dtype = self._before.get(name, (parameter.requires_grad, parameter.dtype))
            parameter.requires_grad_(required)
            parameter.grad = None
            if not hasattr(parameter, "placements"):  # FSDP2 goes on training them in float32
                parameter.data = parameter.data.to(dtype)
        for module in self._biases:
            module.bias.data = module.bias.data.to(module.weight.dtype)
        self._biases = []
        self.model.__dict__.pop(ATTACHED, None)


def attach(
    model: nn.Module,
    masks: Masks,
    train: tuple[str, ...] | str = ("mask_lora", "norm"),
    *,
    rank: int = 16,
    alpha: float = 32.0,
    seed: int = 0,
    upcast: bool = False,
) -> Attached:
    """Freezes `model` but for what `train` names, and adds what it asks for, in place.

    Args:
        model: a pruned model, or a part of one with `masks` named from there.
        train: any of "bias", "norm" (scales and biases of every norm), "head" (a LoRA on the output embedding; tied ones stay
            tied), "added_bias" (new biases of zero where the config can carry them), one of the adapters "lora", "lora_prune",
            "mask_lora", "scale_lora", "spp_lora", and "full".
        rank, alpha: of the adapters; s = alpha / rank.
        seed: of their initialisation: A as `nn.Linear` has it, B zero; scale_lora begins with BA = 1.
        upcast: parameters that are trained in place become float32, as mixed precision needs, until `merge`.

    Raises:
        ValueError: unknown names, two kinds of adapters, a name for which this model has nothing to train, or a head that is
            pruned. The model is as it was.
    """
    train = check_kinds(train, rank)
    adapters = [kind for kind in train if kind in ADAPTERS]
    if ATTACHED in model.__dict__ or any("perp" in module.__dict__ for module in model.modules()):
        raise ValueError(
            "the model has adapters of an unfinished training: call merge() or detach() of its callback first, or "
            "hf_prune.perp.release(model)."
        )
    owners = masks.parameters_of(model)
    result = model.__dict__[ATTACHED] = Attached(model, masks)
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for kind in train:
            found = {
                "bias": _biases, "norm": _norms, "full": lambda model: list(model.parameters()),
                "added_bias": lambda model: _add_biases(result), "head": lambda model: _adapt_head(result, rank, alpha, generator),
            }.get(kind, lambda model: _adapt(result, owners, Adapter(adapters[0], alpha / rank), rank, generator))(model)  # fmt: skip
            if not found:
                raise ValueError(f"train={kind!r} finds nothing to train in this model. {_WAYS_OUT.get(kind, 'Leave it out.')}")
            for parameter in found:
                parameter.requires_grad_(True)
                if upcast:
                    parameter.data = parameter.data.float()
    except BaseException:
        result.detach()
        raise
    return result


def masked_gradients(model: nn.Module, masks: Masks) -> list[tuple[nn.Parameter, Tensor]]:
    """Until `take_hooks_off` pruned weights get no gradient, before anything clips or uses it: each parameter and its packed bits.
    Of parameters that FSDP2 has sharded, the bits of the rows in this process. Frozen ones may be trained later."""
    held = []
    for name, parameter in masks.parameters_of(model).items():
        if parameter.is_floating_point():
            trained = parameter.requires_grad
            mine, bits = in_this_process(parameter, masks.packed(name))
            bits = bits.to(mine.device) if trained else bits
            hook = parameter.requires_grad_(True).register_post_accumulate_grad_hook(partial(_fill_gradient, bits))
            parameter.requires_grad_(trained)
            add_hooks(model, hook)
            held.append((parameter, bits))
    return held


def _fill_gradient(bits: Tensor, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:  # an optimizer may have stepped within the backward pass
        zero_here_(parameter.grad, bits)


def zero_here_(tensor: Tensor, bits: Tensor) -> None:
    """`zero_pruned_` of what this process holds of `tensor`."""
    here = tensor.to_local() if hasattr(tensor, "placements") else tensor
    zero_pruned_(here, bits.to(here.device))


HOOKS, ATTACHED = "_hf_prune_hooks", "_hf_prune_attached"  # attributes of a model: of the training that goes on


def add_hooks(model: nn.Module, *hooks: Any) -> None:
    """From now on `take_hooks_off`, and so the end of what is `Attached`, removes them."""
    model.__dict__.setdefault(HOOKS, []).extend(hooks)


def take_hooks_off(model: nn.Module) -> None:
    """Removes the hooks that a training has put, or an interrupted one left, on `model`."""
    for hook in model.__dict__.pop(HOOKS, ()):
        hook.remove()


def let_gradients_through(model: nn.Module) -> None:
    """Of frozen embeddings checkpointed blocks would have no gradient. Transformers' own hook may be lost, not removed."""
    add_hooks(model, model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True)))


def release(model: nn.Module, merge: bool = False) -> None:
    """Takes off what an interrupted training left on `model`, whose callback may be gone: hooks, and adapters, which are lost or
    `merge`d."""
    take_hooks_off(model)
    if attached := model.__dict__.get(ATTACHED):
        attached.merge() if merge else attached.detach()


_WAYS_OUT = {
    "bias": "It has no biases: take 'norm' or 'mask_lora', or 'added_bias' to give it some.",
    "added_bias": "Its config has no flag for biases that it lacks: take 'norm' or 'mask_lora'.",
}


def check_kinds(train: tuple[str, ...] | str, rank: int) -> tuple[str, ...]:
    """The names in `train`.

    Raises:
        ValueError: unknown ones, or such as do not go together.
    """
    train = (train,) if isinstance(train, str) else tuple(train)
    if not train or (unknown := [kind for kind in train if kind not in KINDS]):
        given = repr(unknown[0]) if train else "nothing"
        raise ValueError(f"train must name some of {', '.join(KINDS)}; got {given}.")
    adapters = [kind for kind in train if kind in ADAPTERS]
    if len(adapters) > 1 or ("full" in train and len(train) > 1):
        raise ValueError(f"train={train}: one adapter at a time, and 'full' only alone.")
    check_count("rank", rank)
    return train


def _biases(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("bias")]


def _norms(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)]


def _adapt(result: Attached, owners: dict[str, nn.Parameter], adapter: Adapter, rank: int, generator) -> list[nn.Parameter]:
    added = []
    for name in owners:
        path, _, attribute = name.rpartition(".")
        module = result.model.get_submodule(path)
        if attribute != "weight" or _class_of(module) is None:
            result.left_out.append(name)
            continue
        bits = torch.from_numpy(result.masks.packed(name))
        added += _put_on(module, adapter, rank, bits, generator)
        result.adapted[path] = module
    return added


def _adapt_head(result: Attached, rank: int, alpha: float, generator) -> list[nn.Parameter]:
    model = result.model
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and any(p is head.weight for p in result.masks.parameters_of(model).values()):
        raise ValueError("train='head': the head is pruned, and a dense LoRA would fill it. Leave 'head' out.")
    if type(head) is not nn.Linear:
        return []
    embedding = model.get_input_embeddings()
    tied = embedding.weight is head.weight
    if tied and type(embedding) is not nn.Embedding:
        raise ValueError(f"train='head': the head is tied to a {type(embedding).__name__}, which takes no adapter.")
    added = _put_on(head, Adapter("head", alpha / rank), rank, torch.empty(0, dtype=torch.uint8), generator)
    result.adapted[next(name for name, module in model.named_modules() if module is head)] = head
    if tied:
        embedding.__dict__["perp_head"] = (head,)  # within a tuple it is no submodule
        result._embedding = _become(embedding, AdaptedEmbedding)
    return added


def _put_on(module: nn.Module, adapter: Adapter, rank: int, bits: Tensor, generator: torch.Generator) -> list[nn.Parameter]:
    transposed = isinstance(module, Conv1D)
    n_out, n_in = reversed(module.weight.shape) if transposed else module.weight.shape
    if adapter.kind == "scale_lora":
        a, b = (torch.full(shape, rank**-0.5, dtype=torch.float32) for shape in ((rank, n_in), (n_out, rank)))
    else:
        a = (torch.rand((rank, n_in), generator=generator, dtype=torch.float32) * 2 - 1) * n_in**-0.5
        b = torch.zeros(n_out, rank, dtype=torch.float32)
    device = module.weight.device
    module.perp_A, module.perp_B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
    module.register_buffer("perp_bits", bits.to(device), persistent=False)
    module.__dict__["perp"] = Adapter(adapter.kind, adapter.scale, transposed)
    _become(module, AdaptedConv1D if transposed else AdaptedLinear)
    return [module.perp_A, module.perp_B]


@torch.no_grad()
def _class_of(module: nn.Module) -> type | None:
    """`nn.Linear` or `Conv1D`, whose product `module` makes, also if it is of one derived from `nn.Linear`, as Falcon's are; or None."""
    if type(module) in (nn.Linear, Conv1D):
        return type(module)
    if not isinstance(module, nn.Linear) or module.weight.is_meta:
        return None
    x = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)[None]
    expected = F.linear(x, module.weight, module.bias).float()
    try:
        same = (module(x).float() - expected).abs().max() <= 1e-2 * expected.abs().max()
    except RuntimeError:  # it takes no such input
        return None
    return nn.Linear if same else None


def _release_from_fsdp(model: nn.Module) -> None:
    """FSDP2 would put the factors on their modules again in the next forward pass."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group.fsdp_params = [p for p in group.fsdp_params if p._module_info.param_name not in _OWN]


def _plain(cls: type, was: type) -> type:
    """The class that a module `was` of; FSDP2 derives one of its own from that of each module that it shards alone."""
    adapted = next(adapted for adapted in _CLASSES.values() if issubclass(cls, adapted))
    if cls is adapted:
        return was
    bases = tuple(was if base is adapted else base for base in cls.__bases__)
    return type(cls.__name__.replace(adapted.__name__, was.__name__), bases, dict(vars(cls)))


def _become(module: nn.Module, cls: type) -> nn.Module:
    module.__dict__["perp_was"] = type(module)
    module.__dict__["perp_hooks"] = [
        module.register_state_dict_post_hook(_show_effective),
        module.register_load_state_dict_pre_hook(_keep_own_weight),
    ]
    _swap(module, cls)
    return module


def _swap(module: nn.Module, cls: type) -> None:
    module.__class__ = cls
    if "_old_forward" in module.__dict__:  # accelerate moves the inputs of a dispatched model, then calls this
        module._old_forward = types.MethodType(cls.forward, module)


def _show_effective(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """What is saved is an ordinary weight, tied ones one and the same tensor; a "lora" is not merged, so not saved merged.

    Of weights that FSDP2 has sharded their own values are in the state, since torch loads by overwriting them: see `merged_state`.
    """
    if f"{prefix}weight" not in state or hasattr(module.weight, "placements"):
        return
    (owner,) = module.__dict__.get("perp_head", (module,))
    version = owner.perp_A._version, owner.perp_B._version
    shown, known = owner.__dict__.pop("perp_shown", (None, None))
    if owner.perp.kind != "lora":
        state[f"{prefix}weight"] = shown if known == version else owner.effective_weight()
    if owner is not module:  # the embedding comes before its head
        owner.__dict__["perp_shown"] = state[f"{prefix}weight"], version


def _keep_own_weight(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """What is loaded is what `_show_effective` gave: the factors are taken, the weight is known already, and compared.

    Raises:
        ValueError: the checkpoint is of another model, or has no factors.
    """
    weight, a, b = (state.get(prefix + name) for name in ("weight", "perp_A", "perp_B"))
    if weight is None or hasattr(module.weight, "placements"):  # it was not shown
        return
    state[f"{prefix}weight"] = module.weight.detach()
    if a is None and b is None:  # of sharded checkpoints they may come with another file
        return
    device, then = module.weight.device, module.weight.detach()
    if module.perp.kind != "lora":
        then = module.perp.weight(module.weight, a.to(device), b.to(device), module.perp_bits).to(then.dtype)
    if not torch.allclose(then, weight.to(then), rtol=1e-2, atol=1e-4):
        raise ValueError(
            f"{prefix}weight of the checkpoint is not this model's weight with the checkpoint's adapter on it: begin with the "
            "pruned model that the checkpoint's training began with."
        )


def _add_biases(result: Attached) -> list[nn.Parameter]:
    """New biases of zero, where a config of this architecture can carry them; sets the config's flags."""
    config = getattr(result.model, "config", None)
    if config is None:
        return []
    added = []
    flags = {name: value for name, value in vars(config).items() if name.endswith("bias") and value is False}
    for name in flags:
        try:
            with torch.device("meta"):
                wider = type(result.model)(type(config).from_dict({**config.to_dict(), name: True}))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            continue
        new = [p for p, module in wider.named_modules() if isinstance(module, nn.Linear) and module.bias is not None]
        modules = [m for m in map(result.model.get_submodule, new) if m.bias is None]
        for module in modules:
            module.bias = nn.Parameter(
                torch.zeros(module.weight.shape[0], dtype=module.weight.dtype, device=module.weight.device)
            )
            result._biases.append(module)
            added.append(module.bias)
        if modules:
            result._flags[name] = False
            setattr(config, name, True)
    return added


def _to_peft(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor, Adapter]]) -> None:
    """Dense adapters go on as PEFT's: merging them would undo the pruning."""
    from peft import LoraConfig, set_peft_model_state_dict

    rank, scale = next((a.shape[0], adapter.scale) for a, _, adapter in factors.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=list(factors),
        fan_in_fan_out=any(f[2].transposed for f in factors.values()),
    )
    model.add_adapter(config)
    state = {}
    for name, (a, b, _) in factors.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = a, b
    set_peft_model_state_dict(model, state)
