"""MaskLoRA for PEFT: W + s(BA)⊙M, which may be merged and leaves every pruned weight exactly zero (PERP, arXiv 2312.15230).

    model = get_peft_model(model, MaskLoraConfig.of(model, r=16, lora_alpha=32))
    ...; model.save_pretrained("adapter"); model = model.merge_and_unload()
    model = load_masked_adapter(hf_prune.load("pruned"), "adapter")

The masks are those that were stored, never read from zeros, and the mathematics are those of `perp`. The adapter's files name a
LoRA: PEFT's own `from_pretrained` and `load_adapter` would put it on without the masks, with a mere warning of an unexpected
"mask_lora", or fail.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .masks import Masks, zero_pruned_
from .perp import Adapted, Adapter
from .serialization import state_of


logger = logging.get_logger(__name__)

if not hasattr(lora.LoraLayer, "resolve_lora_variant"):
    raise ImportError("hf_prune.peft_adapters needs PEFT 0.21 or newer: pip install -U peft.")

_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the weight that is adapted
_UNMASKED = ("lora_dropout", "lora_bias", "use_qalora", "target_parameters", "layer_replication")


@dataclass
class MaskLoraConfig(LoraConfig):
    """A `LoraConfig` whose adapters leave out what the masks prune; made by `MaskLoraConfig.of(model, r=16, lora_alpha=32)`.

    Linears without a mask get an ordinary LoRA. Half-precision weights: the effective weight is rounded as the merged one is.

    Attributes:
        masks: of the model; not saved.
        masks_digest: in a saved adapter, of the masks it was trained with.

    Raises:
        ValueError: an option that acts on the input of BA, or would change pruned weights.
    """

    masks: Masks | None = field(default=None, repr=False, compare=False)
    masks_digest: str | None = field(default=None, repr=False)
    mask_lora: bool = field(default=True, repr=False, metadata={"is_lora_variant": True})  # other layers of PEFT refuse it

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, **options: Any) -> MaskLoraConfig:
        """For a pruned model, or one that has adapters already.

        Args:
            **options: of `LoraConfig`; without `target_modules` every pruned linear is adapted.

        Raises:
            ValueError: the model has no masks, or none on linears.
        """
        base, masks = _base_and_masks(model)
        if options.get("target_modules") is None:
            modules = {name: base.get_submodule(name.rpartition(".")[0]) for name in masks}
            layers = {name: getattr(module, "base_layer", module) for name, module in modules.items()}
            linears = [name for name in masks if name.endswith(".weight") and isinstance(layers[name], (nn.Linear, Conv1D))]
            if not linears:
                raise ValueError("none of the masks is on an nn.Linear or Conv1D, and nothing else takes a MaskLoRA.")
            if rest := [name for name in masks if name not in linears]:
                logger.warning(f"{len(rest)} pruned parameters take no MaskLoRA and stay as they are, such as {rest[0]}.")
            options["target_modules"] = [name.removesuffix(".weight") for name in linears]
        return cls(masks=masks, **options)

    def __post_init__(self):
        super().__post_init__()
        self._register_custom_module({nn.Linear: MaskLoraLinear, Conv1D: MaskLoraLinear})
        self.check()

    def check(self) -> None:
        """Raises ValueError for options that a MaskLoRA cannot have."""
        variants = [f.name for f in fields(self) if f.metadata.get("is_lora_variant") and f.name != "mask_lora"]
        if wrong := [name for name in (*_UNMASKED, *variants) if getattr(self, name, None)]:
            raise ValueError(
                f"{wrong[0]}={getattr(self, wrong[0])!r} cannot be had with a MaskLoRA, where BA is made and masked before it "
                "meets the input: leave it out."
            )
        if self.init_lora_weights not in _INITIALISATIONS or not self.mask_lora:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r}, mask_lora={self.mask_lora!r}: a MaskLoRA takes one of "
                f"{', '.join(map(repr, _INITIALISATIONS))}, which leave pruned weights alone, and mask_lora=True."
            )
        for name in self.masks or ():
            if wrong := set(name.split(".")) & set(self.modules_to_save or ()):
                raise ValueError(f"modules_to_save={wrong} would train {name} without its mask: make it a target module.")

    def to_dict(self) -> dict[str, Any]:
        digest = self.masks_digest if self.masks is None else self.masks.digest()
        values = super(MaskLoraConfig, replace(self, masks=None, masks_digest=digest)).to_dict()
        return {name: value for name, value in values.items() if name != "masks"}

    @classmethod
    def from_peft_type(cls, **values: Any) -> MaskLoraConfig:
        """What `from_pretrained` makes of adapter_config.json; masks are still to be put in."""
        if not values.get("mask_lora"):
            kind = values.get("peft_type")
            raise ValueError(f"the adapter is a {kind} that was trained without masks: use PeftModel.from_pretrained.")
        return cls(**values)


class _Effective(Adapted):
    """Some adapters of a layer as the one that `Adapted` knows: their factors side by side, the scales within B."""

    def __init__(self, layer: MaskLoraLinear, names: list[str], sign: float = 1.0):
        base = layer.get_base_layer()
        self.weight, self.bias, self.perp_bits = base.weight, base.bias, layer.mask_bits.to(base.weight.device)
        self.perp = Adapter("mask_lora", sign, isinstance(base, Conv1D))
        self.perp_A = torch.cat([layer.lora_A[name].weight.float() for name in names])
        self.perp_B = torch.cat([layer.scaling[name] * layer.lora_B[name].weight.float() for name in names], 1)


class _MaskVariant(LoraVariant):
    """What PEFT asks of one adapter of a `MaskLoraLinear`."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module, adapter_name, **options) -> None: ...

    @staticmethod
    def merge_safe(module, active_adapter, orig_weight):
        return _Effective(module, [active_adapter]).effective_weight()

    @staticmethod
    def merge_unsafe(module, active_adapter, orig_weight):
        orig_weight.data.copy_(_Effective(module, [active_adapter]).effective_weight())

    @staticmethod
    def unmerge(module, active_adapter, orig_weight):
        return _Effective(module, [active_adapter], -1.0).effective_weight()

    @staticmethod
    def forward(module, active_adapter, x, result, **options):
        """For batches of mixed adapters: the rows of one of them."""
        return _Effective(module, [active_adapter]).forward(x)


class MaskLoraLinear(lora.Linear):
    """PEFT's layer over a pruned `nn.Linear` or `Conv1D`; no second weight is kept between forward and backward pass."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        if not isinstance(config, MaskLoraConfig):
            raise ValueError(
                f"{adapter_name!r} is an ordinary LoRA, and {options.get('target_name')} has MaskLoRAs: use MaskLoraConfig.of, "
                "load a saved MaskLoRA with hf_prune.peft_adapters.load_masked_adapter, or unload() first."
            )
        config.check()
        if not hasattr(self, "mask_bits"):
            self.register_buffer("mask_bits", self._bits(options.get("target_name"), config.masks), persistent=False)
            self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        super().update_layer(adapter_name, r, lora_alpha, config, **options)

    def resolve_lora_variant(self, **options: Any) -> LoraVariant | None:
        return None if self.mask_bits is None else _MaskVariant()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        mixed = kwargs.get("adapter_names") is not None
        if self.mask_bits is None or not names or mixed or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        return _Effective(self, names).forward(x)

    def _bits(self, path: str, masks: Masks | None) -> Tensor | None:
        name, weight = f"{path}.weight", self.get_base_layer().weight.detach()
        if masks is None:
            raise ValueError("this MaskLoraConfig has no masks: make it with MaskLoraConfig.of(model, ...).")
        if name not in masks:
            if longer := next((known for known in masks if known.endswith(f".{name}")), None):
                raise ValueError(f"the masks name {longer}, here it is {name}: give the whole model to PEFT, not a part of it.")
            return None
        if weight.is_meta:
            raise ValueError(f"{name} is offloaded, and a MaskLoRA needs it at hand: load the model without offloading.")
        bits = torch.from_numpy(masks.packed(name)).to(weight.device)
        same = tuple(weight.shape) == masks.shape(name) and weight.is_floating_point()
        if not same or not torch.equal(zero_pruned_(weight.clone(), bits), weight):
            raise ValueError(
                f"the masks are not those of {name}: its shape, {tuple(weight.shape)}, its dtype or pruned weights that are not "
                "zero say so. Make the config of the very model that is adapted, with MaskLoraConfig.of."
            )
        return bits


def load_masked_adapter(
    model: PreTrainedModel | PeftModel, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """A saved MaskLoRA on the pruned model it was trained on; `folder` may be a name on the Hub. `model` may have others.

    Raises:
        ValueError: not a MaskLoRA, of other masks, or the name is taken.
    """
    config = MaskLoraConfig.from_pretrained(str(folder))
    config.masks = _base_and_masks(model)[1]
    if config.masks_digest != config.masks.digest():
        raise ValueError(f"the adapter in {folder} was trained with other masks than those of this model: load its own model.")
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=is_trainable, config=config)
    if adapter_name in model.peft_config:
        raise ValueError(f"the model has an adapter {adapter_name!r}: choose another adapter_name, or delete_adapter it first.")
    config.inference_mode = not is_trainable
    model.add_adapter(adapter_name, config)
    model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    return model


class _Refusing:
    """See `refuse_densifying_merge`; put before the class of a tuner, so that copies of the model refuse too, pickled ones also."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (type(self).__bases__[1],), self.__dict__

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_dense()
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._refuse_dense()
        return super().merge_and_unload(*args, **kwargs)

    def _refuse_dense(self) -> None:
        if name := _filled(self, self.pruning):
            kind = type(next(iter(self.peft_config.values()))).__name__
            raise ValueError(
                f"merging would fill the pruned weights of {name} with those of its {kind}. Keep it apart, take it off with unload(), or "
                "train what keeps zeros when merged: hf_prune.peft_adapters.MaskLoraConfig, PEFT's HiraConfig or IA3Config, or "
                "ShiraConfig with a mask_fn that chooses among the kept weights."
            )


@functools.cache
def _refusing(kind: type[BaseTuner]) -> type[BaseTuner]:
    return type(f"Refusing{kind.__name__}", (_Refusing, kind), {"__module__": __name__})


def _rebuilt(kind: type[BaseTuner]) -> BaseTuner:
    return _refusing(kind).__new__(_refusing(kind))


_KEEP_ZEROS = ("HiraModel", "IA3Model")


def _filled(tuner: BaseTuner, masks: Masks) -> str | None:
    """The first of the pruned weights that an adapter would fill."""
    if any(kind.__name__ in _KEEP_ZEROS for kind in type(tuner).__mro__):
        return None
    for path, module in tuner.model.named_modules():
        name = f"{path.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MaskLoraLinear) and name in masks:
            chosen = getattr(module, "shira_indices", {}).values()
            if not chosen or not all(masks[name][tuple(at.long().cpu())].all() for at in chosen):
                return name
    return None


def refuse_densifying_merge(peft_model: PeftModel, masks: Masks) -> None:
    """From now on `merge_adapter` and `merge_and_unload` raise ValueError, before any weight changes, while an adapter that fills
    zeros, such as an ordinary LoRA, lies over a weight that `masks` prunes. `unload()` goes on working.

    Raises:
        TypeError: not a PeftModel with adapters that can be merged.
    """
    tuner = peft_model.base_model if isinstance(peft_model, PeftModel) else peft_model
    if not isinstance(tuner, BaseTuner):
        raise TypeError(f"refuse_densifying_merge takes a PeftModel with LoRA or the like, got {type(tuner).__name__}.")
    if not isinstance(tuner, _Refusing):
        tuner.__class__ = _refusing(type(tuner))
    tuner.pruning = masks


def _base_and_masks(model: PreTrainedModel | PeftModel) -> tuple[nn.Module, Masks]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base, state_of(base, "MaskLoRA").masks
