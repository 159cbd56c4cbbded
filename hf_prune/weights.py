"""Where the weights of a model are while it is pruned: in its modules, or kept by accelerate on the CPU until they run
(`device_map`), or sharded by FSDP2; for those on disk see `checkpoint`.

What is elsewhere is put in place part by part, whole, with the hooks that would otherwise do so for a forward pass laid aside;
what was changed goes back to where it stays.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .blocks import blocks_of
from .journal import fingerprint
from .masks import Masks, offloading_hook, rows_here, where_kept


class Weights:
    """The weights of `model`, all of which are in its modules.

    Attributes:
        stored: parameter -> the tensor that keeps its values; those that check their values themselves are left out.
        device: where the model computes.
        masks: of the pruned weights, none yet.
        together: whether all are in place at once.
    """

    together = True

    def __init__(self, model: nn.Module):
        self._model, self.masks = model, Masks()
        self.stored: dict[str, Tensor] = dict(model.named_parameters())
        self.device = model.get_input_embeddings().weight.device

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Of a model in memory, wherever they are."""
        away = any(parameter.is_meta or hasattr(parameter, "placements") for parameter in model.parameters())
        return Elsewhere(model) if away or any(map(_is_sharded, model.modules())) else Weights(model)  # whole for now, perhaps

    @property
    def identity(self) -> str:
        """A short text that differs where their values do."""
        return fingerprint(self._model.parameters())

    @property
    def numel(self) -> int:
        """Of all parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def in_charge(self) -> contextlib.AbstractContextManager[None]:
        """Within, nothing else moves them."""
        return contextlib.nullcontext()

    def present(self, part: int | None) -> contextlib.AbstractContextManager[None]:
        """Within, the weights of block `part`, or with None of all that is outside of blocks, are in place."""
        return contextlib.nullcontext()

    def kept_of(self, parameter: nn.Parameter) -> Tensor | None:
        """Where the values of a `parameter` that is present stay, before it is changed; None if they are not overwritten."""
        return parameter


class Elsewhere(Weights):
    """Those of a model some of which are not in its modules; of a sharded one `stored` has the rows of this process.

    Raises:
        ValueError: some are on disk, or sharded other than by FSDP2 in rows; says what to do.
    """

    together = False

    def __init__(self, model: nn.Module):
        self._model, self.masks = model, Masks()
        self._sharded = [module for module in model.modules() if _is_sharded(module)]
        for module in self._sharded:
            module.reshard()
        self._hooks = {module: hook for module in model.modules() if (hook := offloading_hook(module))}
        self.stored = {name: self._stored(name, p) for name, p in model.named_parameters()}
        self.device = next((hook.execution_device for hook in self._hooks.values()), next(model.parameters()).device)
        self.device = torch.device(self.device)
        self._present: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}  # in place -> as it was, and where its values stay
        self._changed: set[nn.Parameter] = set()
        prefixes = [f"{block.name}." for block in blocks_of(model)]
        self._modules: dict[int | None, list[tuple[str, nn.Module]]] = {}
        for name, module in model.named_modules():
            part = next((i for i, prefix in enumerate(prefixes) if f"{name}.".startswith(prefix)), None)
            self._modules.setdefault(part, []).append((name, module))

    @property
    def identity(self) -> str:  # of the values of another process no text can be had here
        return ""

    @property
    def numel(self) -> int:
        """Of all parameters; accelerate makes two of those that are tied."""
        sizes = {self.stored[name].data_ptr() or name: p.numel() for name, p in self._model.named_parameters()}
        return sum(sizes.values())

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        forwards = {module: vars(module).get("forward") for module in self._hooks}
        hooks = [(h, dict(h)) for module in self._sharded for h in (module._forward_pre_hooks, module._forward_hooks)]
        try:
            for module, hook in self._hooks.items():
                module.forward = partial(_run, hook, module._old_forward)
            for registered, all_hooks in hooks:
                for key, hook in all_hooks.items():
                    bound = inspect.unwrap(hook, stop=lambda f: hasattr(f, "__self__"))
                    if type(getattr(bound, "__self__", None)).__module__.startswith("torch.distributed"):
                        del registered[key]
            yield
        finally:
            for module, forward in forwards.items():
                module.forward = forward
            for registered, all_hooks in hooks:
                registered.clear()
                registered.update(all_hooks)

    @contextlib.contextmanager
    def present(self, part: int | None) -> Iterator[None]:
        here: dict[int, nn.Parameter] = {}
        replaced: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        try:
            for path, module in self._modules[part]:
                device = torch.device(self._hooks[module].execution_device) if module in self._hooks else self.device
                for name, parameter in module._parameters.items():
                    if parameter is None or not (parameter.is_meta or hasattr(parameter, "placements")):
                        continue
                    if id(parameter) not in here:
                        stored = self.stored[f"{path}.{name}"]
                        whole = stored.to(device, copy=True) if parameter.is_meta else parameter.detach().full_tensor()
                        here[id(parameter)] = nn.Parameter(whole, requires_grad=False)
                        self._present[here[id(parameter)]] = parameter, stored
                    replaced.append((module._parameters, name, parameter))
                    module._parameters[name] = here[id(parameter)]
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_meta:
                        replaced.append((module._buffers, name, buffer))
                        module._buffers[name] = self._hooks[module].weights_map[name].to(device)
            yield
            for whole in self._changed & {*here.values()}:
                parameter, stored = self._present[whole]
                stored.copy_(whole.detach() if parameter.is_meta else rows_here(whole.detach(), parameter))
        finally:
            for registry, name, before in replaced:
                registry[name] = before
            for whole in here.values():
                self._present.pop(whole, None)
                self._changed.discard(whole)

    def kept_of(self, parameter: nn.Parameter) -> Tensor | None:
        """It will be written back."""
        if parameter not in self._present:
            return parameter
        self._changed.add(parameter)
        return self._present[parameter][1]

    def _stored(self, name: str, parameter: nn.Parameter) -> Tensor:
        if not hasattr(parameter, "placements"):
            return where_kept(self._model, name, parameter, to_change=True).detach()
        in_rows = all(type(p).__name__ in ("Shard", "Replicate") and getattr(p, "dim", 0) == 0 for p in parameter.placements)
        if not self._sharded or not in_rows:
            raise ValueError(
                f"{name} is sharded over processes as {parameter.placements}: load the model whole, shard it by FSDP2, in rows, or "
                "call hf_prune.prune_checkpoint."
            )
        rows = parameter.detach().to_local()
        if rows.device.type != parameter.device_mesh.device_type:
            raise ValueError(
                f"{name} is on {rows.device.type}, by CPUOffloadPolicy: leave that out, or call hf_prune.prune_checkpoint."
            )
        return rows


def _is_sharded(module: nn.Module) -> bool:
    """By FSDP2, whose module is loaded if anything is."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _run(hook: AlignDevicesHook, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What is left of the `hook` of accelerate: inputs come to where the module computes."""
    device = hook.execution_device
    return forward(*send_to_device(args, device), **send_to_device(kwargs, device, skip_keys=hook.skip_keys))
