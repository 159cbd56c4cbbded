"""The divergence from a dense model's predictions, as a part of the training loss (Hinton et al., arXiv 1503.02531).

With a cache the dense model runs once a sequence: its most likely tokens are kept on disk, a safetensors file a sequence.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import readable, write_whole
from .masks import input_device
from .patterns import check_count


_LEAST = -1e4  # of a log-probability: 0 in effect, but finite, also in float16
_PARTS = ("logits", "indices", "rest")  # of a cached sequence


class Distillation:
    """Loss = (1 - weight) * own loss + weight * T^2 * KL(teacher || student), both at temperature T.

    A forward hook of the student: whatever computes the loss from `labels` gets this one instead.

    Args:
        teacher: the dense model, with the student's vocabulary; it may live on another device or be offloaded by accelerate.
            It is put into evaluation mode.
            None: everything comes from the cache.
        weight: in (0, 1].
        temperature: T > 0.
        top_k: the divergence is over the teacher's `top_k` likeliest tokens and all others as one; default all, 64 with a cache.
        cache: a folder where the teacher's predictions are kept, so that it runs once a sequence; about 6 * top_k bytes a token.
    """

    def __init__(
        self, teacher: nn.Module | None, weight: float = 0.5, temperature: float = 1.0, *,
        top_k: int | None = None, cache: str | os.PathLike | None = None,
    ):  # fmt: skip
        if not 0 < weight <= 1 or not temperature > 0:
            raise ValueError(f"weight must be in (0, 1] and temperature above 0, got {weight} and {temperature}.")
        if top_k is not None:
            check_count("top_k", top_k)
        if teacher is None and cache is None:
            raise ValueError("distillation without a teacher needs the cache that an earlier one filled: give cache='folder'.")
        self.teacher, self.weight, self.temperature = None if teacher is None else teacher.eval(), weight, temperature
        self.top_k = 64 if top_k is None and cache is not None else top_k
        self.cache = None if cache is None else Path(cache)
        self._folder: Path | None = None
        self.used = False  # in a loss

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None or not model.training:
            return output
        if args:
            raise ValueError("distillation needs the inputs of the model by name.")
        inputs = {k: kwargs[k] for k in ("input_ids", "attention_mask", "position_ids") if kwargs.get(k) is not None}
        student = output.get("logits")
        if student is None:
            raise ValueError("distillation needs logits, and SFTTrainer of TRL fuses them into its loss: use Trainer.")
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        wanted = (following != -100).reshape(-1).nonzero().squeeze(1).to(student.device)
        count = kwargs.get("num_items_in_batch")
        count = max(len(wanted), 1) if count is None else count
        if self.top_k is None:
            known, function = [self._logits(inputs, student.shape)], _Divergence
        else:
            with torch.no_grad():
                known, function = self._top(inputs, labels, student.shape), _TopDivergence
        rows = (values.flatten(0, 1) for values in (student, *(values.to(student.device) for values in known)))
        divergence = function.apply(*rows, wanted, self.temperature) / count
        self.used = True
        output["loss"] = (1 - self.weight) * output["loss"] + self.weight * self.temperature**2 * divergence
        return output

    @torch.no_grad()
    def _logits(self, inputs: dict[str, Tensor], shape: torch.Size) -> Tensor:
        if (rows := self.teacher.get_input_embeddings().weight.shape[0]) < shape[-1]:
            raise ValueError(f"the teacher knows {rows} tokens and the student {shape[-1]}: they must have one vocabulary.")
        device = input_device(self.teacher)
        teacher = self.teacher(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
        if teacher.shape != shape:
            raise ValueError(f"the teacher's logits {tuple(teacher.shape)} do not match the student's {tuple(shape)}.")
        return teacher

    def _top(self, inputs: dict[str, Tensor], labels: Tensor, shape: torch.Size) -> list[Tensor]:
        """Of every token the teacher's likeliest: log-probabilities (n, length, k), indices, and that of all others (n, length)."""
        k = min(self.top_k, shape[-1] - 1)
        if self.cache is None:
            return [part.unflatten(0, shape[:2]) for part in _top_of(self._logits(inputs, shape), k, self.temperature)]
        if "input_ids" not in inputs or any(x.dim() != 2 for x in inputs.values()) or labels.shape != shape[:2]:
            shapes = {name: tuple(x.shape) for name, x in inputs.items()}
            raise ValueError(f"a cache needs input_ids, and all inputs (sequences, length) as the logits; got {shapes}.")
        inputs = {name: x.expand(shape[:2]) for name, x in inputs.items()}
        ids = inputs["input_ids"].cpu().long()
        mask, positions = (
            inputs.get(name, torch.full_like(ids, none)).cpu() for name, none in (("attention_mask", 1), ("position_ids", -1))
        )
        rows, used = torch.stack([ids, mask.long(), positions.long()], 1), mask.bool().clone()
        used[:, :-1] |= labels[:, 1:].cpu() != -100
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in used]  # padding behind is not the sequence's
        folder, paths = self._place(shape[-1]), []
        for row, length in zip(rows, lengths):
            key = hashlib.sha256(folder.name.encode() + row[:, :length].contiguous().numpy().tobytes())
            paths.append(folder / f"{key.hexdigest()}.safetensors")
        if missing := [i for i, path in enumerate(paths) if not path.exists()]:
            if self.teacher is None:
                raise ValueError(
                    f"{len(missing)} of {len(paths)} sequences of this batch are not in the cache {folder}, the first one being "
                    f"{ids[missing[0], :8].tolist()}...: give the teacher, or the data that the cache was filled with."
                )
            logits = self._logits({n: x[missing] for n, x in inputs.items()}, torch.Size([len(missing), *shape[1:]]))
            for i, row in zip(missing, logits):
                _save(paths[i], _top_of(row[: lengths[i]], k, self.temperature))
        sizes = ((*shape[:2], k), torch.float32), ((*shape[:2], k), torch.int32), (shape[:2], torch.float32)
        parts = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
        for i, path in enumerate(paths):
            with (
                readable(path, "a teacher's predictions", " Delete it; the teacher makes it anew."),
                safe_open(path, "pt") as file,
            ):
                for part, name in zip(parts, _PARTS):
                    part[i, : lengths[i]] = file.get_tensor(name)
        return parts

    def _place(self, vocabulary: int) -> Path:
        """The cache's folder of this teacher."""
        ending = f"-vocabulary{vocabulary}-top{self.top_k}-temperature{self.temperature:g}"
        if self._folder is None and self.teacher is None:
            found = [path.name for path in sorted(self.cache.glob("*-vocabulary*"))]
            fitting = [name for name in found if name.endswith(ending)]
            if len(fitting) != 1:
                raise ValueError(
                    f"without a teacher {self.cache} must hold one teacher's predictions, a folder that ends in {ending!r}; it has "
                    f"{', '.join(found) or 'none'}. Give the teacher, or the top_k and temperature they were made with."
                )
            self._folder = self.cache / fitting[0]
        elif self._folder is None:
            self._folder = self.cache / (_identity(self.teacher) + ending)
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


@torch.no_grad()
def _identity(model: nn.Module) -> str:
    """SHA-256 of the config's name, and of names, shapes and a few values of the parameters, its first 16 digits."""
    total = hashlib.sha256(str(getattr(getattr(model, "config", None), "_name_or_path", "")).encode())
    for path, module in model.named_modules():
        with align_module_device(module):  # what accelerate offloads is at hand within
            for name, values in module.named_parameters(recurse=False):
                total.update(f"{path}.{name}{values.dtype}{tuple(values.shape)}".encode())
                total.update(values.flatten()[:: max(1, values.numel() // 16)].float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _save(path: Path, parts: list[Tensor]) -> None:
    tensors = {name: part.cpu().contiguous() for name, part in zip(_PARTS, parts)}
    write_whole(path, lambda temporary: save_file(tensors, temporary), shared=True)


def _top_of(logits: Tensor, k: int, temperature: float) -> list[Tensor]:
    """Of every row the k greatest logits less the log-sum-exp of all, at the temperature; their indices; and that of the rest."""
    parts = []
    for piece in logits.reshape(-1, logits.shape[-1]).split(256):
        piece = piece.float() / temperature
        values, indices = piece.topk(k)
        total = piece.logsumexp(-1, keepdim=True)
        rest = (piece.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True) - total).squeeze(-1)
        parts.append(((values - total).clamp(min=_LEAST).half(), indices.int(), rest.clamp(min=_LEAST)))
    return [torch.cat(part) for part in zip(*parts)]


class _Divergence(torch.autograd.Function):
    """Sum over the rows in `wanted` of KL(teacher || student); its gradient is made at once, piece by piece.

    What the teacher never says counts for nothing, though both logits be -inf: a model may mask a part of its vocabulary.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        ctx.gradient = torch.zeros_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for piece in wanted.split(_ROWS):
            own, other = (_log_softmax(logits[piece], temperature) for logits in (student, teacher))
            target = other.exp()
            total += torch.dot(target.flatten(), other.sub_(own).masked_fill_(target == 0, 0).flatten())
            ctx.gradient[piece] = own.exp_().sub_(target).div_(temperature).to(student.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient.mul_(outer.to(ctx.gradient.dtype))
        del ctx.gradient
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


class _TopDivergence(_Divergence):
    """As `_Divergence`, over the teacher's likeliest tokens and one event for all others."""

    @staticmethod
    def forward(ctx, student: Tensor, top: Tensor, indices: Tensor, rest: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        ctx.gradient = torch.zeros_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for piece in wanted.split(_ROWS):
            where = indices[piece].long()
            other = torch.cat([top[piece].float(), rest[piece, None].float()], -1).log_softmax(-1)
            target = other.exp()
            own = _log_softmax(student[piece], temperature)
            known = own.gather(-1, where)
            wished = own.scatter(-1, where, -torch.inf)
            beyond = wished.logsumexp(-1, keepdim=True)
            total += (target * (other - torch.cat([known, beyond], -1)).masked_fill_(target == 0, 0)).sum()
            wished.sub_(beyond.clamp_min(torch.finfo(beyond.dtype).min)).exp_().mul_(target[:, -1:]).scatter_(
                -1, where, target[:, :-1]
            )
            ctx.gradient[piece] = own.exp_().sub_(wished).div_(temperature).to(student.dtype)
        return total


_ROWS = 64  # logits at a time, whose buffers an allocator keeps for the next ones


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)
