"""Norms of gradients of single samples or single tokens, streamed: each is added to its weight's sum as soon as it exists.

A token's gradient is the outer product of two vectors, so all of them are added in one matrix product of their squares, in the
place of the one that makes a sample's gradient. Owns the backward passes over the dense model (GBLM, arXiv 2311.04902) and over
one block (Wanda++, arXiv 2503.04992). What the sums are used for is the method's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from .blocks import Block, Call, Decoder, Linear, as_it_was, replaced
from .calibration import batches_of
from .journal import Journal
from .ranks import ALONE, Ranks
from .statistics import GradientNorm


_BATCH_TOKENS = 512  # of samples whose gradients need not be told apart; more is faster, and the logits take the memory


def model_gradients(
    model: nn.Module,
    blocks: list[Block],
    linears: list[Linear],
    samples: list[Tensor],
    order: int,
    checkpointing: bool = False,
    by_token: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, GradientNorm]:
    """For each parameter of `linears`, the norm over `samples` (each ids (length,)) of the language-model loss's gradient; with
    `by_token` over all tokens of all samples, but for fused experts. Of several `ranks` each goes through a share of them.

    Raises:
        ValueError: a gradient is not finite, or a sample has no next token to predict.
    """
    batches = _batches(samples, linears, by_token, ranks)
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, samples)) - 1  # the loss is a mean, but its gradient is made larger, lest it underflows in fp16
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        norms = stack.enter_context(_streamed(model, linears, order, 1 / longest, by_token, checkpointing))
        if by_token:  # no parameter may need a gradient, yet what follows the embedding does
            hook = model.get_input_embeddings().register_forward_hook(lambda m, args, x: x.detach().requires_grad_().clone())
            stack.callback(hook.remove)
        if checkpointing:
            for block in blocks:
                forward = partial(checkpoint, block.module.forward, use_reentrant=False)
                stack.enter_context(replaced(block.module, "forward", forward))
        for ids in tqdm(batches, desc="gradients", unit="batch"):
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            logits.backward(_loss_gradient(logits, ids, longest / (ids.shape[1] - 1)))
            del logits
    return _finished(norms, len(samples), ranks)


def block_gradients(
    block: Block,
    calls: list[Call],
    hidden: list[Tensor],
    linears: list[Linear],
    order: int,
    by_token: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, GradientNorm]:
    """The same of ||block(x)||_2 for each sequence of `hidden` (sequences, length, d), parameters of one block only."""
    with torch.enable_grad(), _streamed(block.module, linears, order, 1.0, by_token) as norms:
        for call, x in zip(calls, hidden):
            output = call.run(block, x.detach().requires_grad_(by_token).clone())
            output.backward(output.detach() / output.detach().float().norm().clamp_min(1e-30).to(output.dtype))
    return _finished(norms, sum(ranks.gathered(len(hidden))), ranks)


def gradients_by_block(
    decoder: Decoder, linears: list[Linear], samples: list[Tensor], method: Any, journal: Journal, ranks: Ranks
) -> Callable[[Block], dict[str, GradientNorm]]:
    """What `model_gradients` gives, equal bit for bit, for a model whose blocks are there one at a time; block -> its norms.

    A forward pass keeps what reaches each block in `journal`; then each block, from the last to the first, is run again and turns
    the gradient of what it gave into that of what it got.
    """
    by_token, longest, blocks = method.by_token, max(map(len, samples)) - 1, decoder.blocks
    chosen, index_of = set(linears), {block: i for i, block in enumerate(blocks)}
    batches = _batches(samples, linears, by_token, ranks)
    states, calls = decoder.capture(batches)

    def forward(index: int) -> dict[str, Tensor]:
        with torch.no_grad(), blocks[index].present():
            return _named(call.run(blocks[index], x) for call, x in zip(calls[index], states))

    def loss() -> dict[str, Tensor]:
        found = []
        with torch.enable_grad(), decoder.outside_present():
            device = decoder.model.get_input_embeddings().weight.device
            for ids, x in zip(batches, states):
                x = x.to(device).detach().requires_grad_()
                logits = decoder.logits(ids, x.clone())
                logits.backward(_loss_gradient(logits, ids, longest / (ids.shape[1] - 1)))
                found.append(x.grad)
        return _named(found)

    def backward(index: int) -> dict[str, Tensor]:
        block, found = blocks[index], []
        mine = [linear for linear in block.linears if linear in chosen]
        with torch.enable_grad(), block.present():
            with _streamed(block.module, mine, method.order, 1 / longest, by_token) as norms:
                for call, x, gradient in zip(calls[index], states, gradients):
                    x = x.to(block.device).detach().requires_grad_(index > 0 or by_token)
                    call.run(block, x.clone()).backward(gradient.to(block.device))
                    found.append(x.grad)
        norms = _finished(norms, len(samples), ranks)
        return {name: norm.sum for name, norm in norms.items()} | (_named(found) if index else {})

    done = [(journal.folder / f"gradients-{i:05d}.safetensors").exists() for i in range(len(blocks))]
    start = -ranks.lowest(-(done.index(True) if any(done) else len(blocks)))  # blocks whose gradients are still to be found
    first = states
    for i in tqdm(range(start), desc="forward", unit="block"):
        states = _states(journal.tensors(f"states-{i + 1:05d}", partial(forward, i)))
    gradients = _states(journal.tensors(f"gradients-{start:05d}", loss)) if start else []
    for i in tqdm(reversed(range(start)), desc="gradients", unit="block", total=start):
        states = _states(journal.tensors(f"states-{i:05d}", lambda: {})) if i else first
        gradients = _states(journal.tensors(f"gradients-{i:05d}", partial(backward, i)))
        journal.forget(f"states-{i + 1:05d}")

    def norms_of(block: Block) -> dict[str, GradientNorm]:
        sums = journal.tensors(f"gradients-{index_of[block]:05d}", lambda: {})
        names = {linear.parameter_name for linear in block.linears if linear in chosen}
        return {name: GradientNorm.of(sums[name].to(block.device), method.order, len(samples)) for name in names}

    return norms_of


def _named(states: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{_STATE}{i:06d}": state for i, state in enumerate(states)}


def _states(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors) if name.startswith(_STATE)]


_STATE = "state:"


def _batches(samples: list[Tensor], linears: list[Linear], by_token: bool, ranks: Ranks) -> list[Tensor]:
    """Of the share that this process has of `samples`."""
    if min(map(len, samples)) < 2:
        raise ValueError("gradients of the language-model loss need calibration sequences of at least 2 tokens.")
    together = by_token and all(linear.expert is None for linear in linears)
    return batches_of(ranks.share(samples), _BATCH_TOKENS) if together else [ids[None] for ids in ranks.share(samples)]


@contextlib.contextmanager
def _streamed(
    owner: nn.Module, linears: list[Linear], order: int, scale: float, by_token: bool, checkpointed: bool = False
) -> Iterator[dict[str, GradientNorm]]:
    """Only parameters of `linears` get gradients, and those go into what it gives, the norms, at once; all flags and gradients are
    as before afterwards.

    With `by_token` linears that are modules of their own get none: their inputs and their outputs' gradients are enough.
    """
    parameters = {linear.parameter_name: linear.parameter for linear in linears}
    norms = {name: GradientNorm(p.shape, order, p.device) for name, p in parameters.items()}

    def take(norm: GradientNorm, parameter: nn.Parameter) -> None:
        norm.update(parameter.grad, scale)
        parameter.grad = None

    with contextlib.ExitStack() as stack:
        stack.enter_context(as_it_was(owner))
        owner.requires_grad_(False)
        alone = {linear.parameter_name: linear for linear in linears if by_token and linear.expert is None}
        for name, linear in alone.items():
            norm = GradientNorm.of(linear.matrix(norms[name].sum), norms[name].order, 0)
            take_tokens = partial(_listen, partial(norm.update_tokens, scale=scale), checkpointed)
            stack.callback(linear.module.register_forward_hook(take_tokens, with_kwargs=True).remove)
        for name, parameter in parameters.items():
            if name not in alone:
                parameter.requires_grad_(True)
                hook = parameter.register_post_accumulate_grad_hook(partial(take, norms[name]))
                stack.callback(hook.remove)
        yield norms


def _listen(
    take: Callable[[Tensor, Tensor], None], checkpointed: bool, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
) -> Tensor:
    x = (args[0] if args else next(iter(kwargs.values()))).detach()
    if not output.requires_grad:  # what the model computes without gradients, such as the indexer of a sparse attention
        return output
    if checkpointed:
        return _TokenGradients.apply(output, x, take)
    output.register_hook(lambda gradient: take(gradient, x))  # holds what autograd would
    return output


class _TokenGradients(torch.autograd.Function):
    """Hands a linear's input and its output's gradient to `take`; a checkpoint recomputes the input, instead of holding it."""

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return output.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.take(gradient, x)
        return gradient, None, None


def _loss_gradient(logits: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Gradient of `scale` times the summed next-token cross-entropy of `ids` (samples, length), with respect to `logits` (samples,
    length, vocabulary).

    softmax - one-hot, written over the logits themselves where the backward pass does not need them: autograd would keep
    three more buffers of that size, and with a large vocabulary they are the peak.
    """
    own = type(logits.grad_fn).__name__ in _KEEP_NO_OUTPUT  # were it wrong, autograd would refuse, not err
    gradient = logits.detach() if own else logits.detach().clone()
    count = ids.shape[1] - 1
    for rows, targets in zip(gradient, ids[:, 1:].to(logits.device)):
        for piece in rows.split(128):
            torch.softmax(piece, dim=-1, out=piece)
        rows[torch.arange(count, device=logits.device), targets] -= 1.0
        rows[count:] = 0
    return gradient if scale == 1.0 else gradient.mul_(scale)


_KEEP_NO_OUTPUT = {"UnsafeViewBackward0", "MmBackward0"}


def _finished(norms: dict[str, GradientNorm], samples: int, ranks: Ranks = ALONE) -> dict[str, GradientNorm]:
    for name, norm in norms.items():
        ranks.add_up(norm.sum)
        norm.samples = samples  # an expert that a sample did not reach had a gradient of zero there
        if not norm.is_finite():
            raise ValueError(f"the gradient of {name} is not finite. Load the model in bfloat16 or float32.")
    return norms
