"""Norms of per-sample gradients, streamed: each weight's gradient is added to its sum as soon as it exists, then freed.

Owns the backward passes over the dense model (GBLM, arXiv 2311.04902) and over one block (Wanda++, arXiv 2503.04992). What the
sums are used for is the method's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from .blocks import Block, Call, Linear, _replaced
from .statistics import GradientNorm


_FP16_SCALE = 2.0**10  # gradients of a mean loss over thousands of tokens underflow in fp16


def model_gradients(
    model: nn.Module,
    blocks: list[Block],
    linears: list[Linear],
    samples: list[Tensor],
    order: int,
    checkpointing: bool = False,
) -> dict[str, GradientNorm]:
    """For each parameter of `linears`, the norm over `samples` (each ids (length,)) of the language-model loss's gradient.

    Raises:
        ValueError: a gradient is not finite, or a sample has no next token to predict.
    """
    if min(map(len, samples)) < 2:
        raise ValueError("gradients of the language-model loss need calibration sequences of at least 2 tokens.")
    parameters = {linear.parameter_name: linear.parameter for linear in linears}
    norms = {name: GradientNorm(p.shape, order, p.device) for name, p in parameters.items()}
    device = model.get_input_embeddings().weight.device
    half = next(iter(parameters.values())).dtype == torch.float16
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_streamed(model, parameters, norms, 1 / _FP16_SCALE if half else 1.0))
        if checkpointing:
            for block in blocks:
                forward = partial(checkpoint, block.module.forward, use_reentrant=False)
                stack.enter_context(_replaced(block.module, "forward", forward))
        for ids in tqdm(samples, desc="gradients", unit="sample"):
            logits = model(input_ids=ids[None].to(device), use_cache=False).logits
            logits.backward(_loss_gradient(logits, ids, _FP16_SCALE if half else 1.0))
            del logits
    return _finished(norms, len(samples))


def block_gradients(
    block: Block, calls: list[Call], hidden: list[Tensor], linears: list[Linear], order: int
) -> dict[str, GradientNorm]:
    """The same of ||block(x)||_2 for each sequence of `hidden` (sequences, length, d), parameters of one block only."""
    parameters = {linear.parameter_name: linear.parameter for linear in linears}
    norms = {name: GradientNorm(p.shape, order, p.device) for name, p in parameters.items()}
    with torch.enable_grad(), _streamed(block.module, parameters, norms, 1.0):
        for call, x in zip(calls, hidden):
            output = call.run(block, x.detach())
            output.backward(output.detach() / output.detach().float().norm().clamp_min(1e-30).to(output.dtype))
    return _finished(norms, len(hidden))


@contextlib.contextmanager
def _streamed(
    owner: nn.Module, parameters: dict[str, nn.Parameter], norms: dict[str, GradientNorm], scale: float
) -> Iterator[None]:
    """Only `parameters` get gradients, and those go into `norms` at once; all flags and gradients are as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in owner.parameters()]

    def take(norm: GradientNorm, parameter: nn.Parameter) -> None:
        norm.update(parameter.grad, scale)
        parameter.grad = None

    with contextlib.ExitStack() as stack:
        try:
            for parameter in owner.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
            for name, parameter in parameters.items():
                parameter.requires_grad_(True)
                hook = parameter.register_post_accumulate_grad_hook(partial(take, norms[name]))
                stack.callback(hook.remove)
            yield
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient


def _loss_gradient(logits: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Gradient of the mean next-token cross-entropy of `ids` (length,) with respect to `logits` (1, length, vocabulary).

    softmax - one-hot, written over the logits themselves where the backward pass does not need them: autograd would keep
    three more buffers of that size, and with a large vocabulary they are the peak.
    """
    own = type(logits.grad_fn).__name__ in _KEEP_NO_OUTPUT  # were it wrong, autograd would refuse, not err
    gradient = logits.detach() if own else logits.detach().clone()
    targets = ids[1:].to(logits.device)
    count = len(targets)
    for piece in gradient[0].split(128):
        piece.copy_(piece.float().softmax(dim=-1).mul_(scale / count))
    gradient[0, torch.arange(count, device=logits.device), targets] -= scale / count
    gradient[0, count:] = 0
    return gradient


_KEEP_NO_OUTPUT = {"UnsafeViewBackward0", "MmBackward0"}


def _finished(norms: dict[str, GradientNorm], samples: int) -> dict[str, GradientNorm]:
    for name, norm in norms.items():
        norm.samples = samples  # an expert that a sample did not reach had a gradient of zero there
        if not norm.is_finite():
            raise ValueError(f"the gradient of {name} is not finite. Load the model in bfloat16 or float32.")
    return norms
