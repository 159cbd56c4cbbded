"""The divergence from a dense model's predictions, as a part of the training loss (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Distillation:
    """Loss = (1 - weight) * own loss + weight * T^2 * KL(teacher || student), both at temperature T.

    A forward hook of the student: whatever computes the loss from `labels` gets this one instead.

    Args:
        teacher: the dense model, with the student's vocabulary; it may live on another device or be offloaded by accelerate.
        weight: in (0, 1].
        temperature: T > 0.
    """

    def __init__(self, teacher: nn.Module, weight: float = 0.5, temperature: float = 1.0):
        if not 0 < weight <= 1 or not temperature > 0:
            raise ValueError(f"weight must be in (0, 1] and temperature above 0, got {weight} and {temperature}.")
        self.teacher, self.weight, self.temperature = teacher.eval(), weight, temperature

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None or not model.training:
            return output
        if args:
            raise ValueError("distillation needs the inputs of the model by name.")
        device = next(self.teacher.parameters()).device
        inputs = {k: kwargs[k].to(device) for k in ("input_ids", "attention_mask", "position_ids") if kwargs.get(k) is not None}
        with torch.no_grad():
            teacher = self.teacher(**inputs, use_cache=False).logits
        student = output.get("logits")
        if student is None:
            raise ValueError(
                "distillation needs logits, and the model gave none: TRL's SFTTrainer fuses the head into its loss. Use Trainer."
            )
        if teacher.shape != student.shape:
            raise ValueError(f"the teacher's logits {tuple(teacher.shape)} do not match the student's {tuple(student.shape)}.")
        wanted = (labels[:, 1:] != -100).reshape(-1).nonzero().squeeze(1).to(student.device)
        count = kwargs.get("num_items_in_batch")
        count = max(len(wanted), 1) if count is None else count
        rows = (logits[:, :-1].flatten(0, 1) for logits in (student, teacher.to(student.device)))
        divergence = _Divergence.apply(*rows, wanted, self.temperature) / count
        output["loss"] = (1 - self.weight) * output["loss"] + self.weight * self.temperature**2 * divergence
        return output


class _Divergence(torch.autograd.Function):
    """Sum over the rows in `wanted` of KL(teacher || student); its gradient is made at once, piece by piece."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        gradient = torch.zeros_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for piece in wanted.split(256):
            own = (student[piece].float() / temperature).log_softmax(-1)
            other = (teacher[piece].float() / temperature).log_softmax(-1)
            target = other.exp()
            total += (target * (other - own)).sum()
            gradient[piece] = ((own.exp() - target) / temperature).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None
