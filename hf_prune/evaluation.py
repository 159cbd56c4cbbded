"""Perplexity, as the papers measure it and as users need it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .blocks import as_it_was
from .calibration import positions_of, tokenizer_of
from .masks import input_device


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on; compares only with others of the same `sequence_length` and `stride`.

    Attributes:
        perplexity: exp of the mean cross-entropy, in nats, over `tokens` predicted tokens.
        windows: number of windows that the text was cut into.
        bos: whether each window begins with the tokenizer's begin-of-sequence token.
    """

    perplexity: float
    tokens: int
    windows: int
    sequence_length: int
    stride: int
    bos: bool

    def __float__(self) -> float:
        return self.perplexity

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} ({self.tokens} tokens, {self.windows} windows of {self.sequence_length}, "
            f"stride {self.stride}{', with BOS' if self.bos else ''})"
        )


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Sequence[str] | Tensor | Sequence[int],
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    add_bos: bool | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of `text` under a causal language model.

    The text is cut into windows of `sequence_length` tokens. Without `stride` they do not overlap and a last, shorter one
    is dropped: the papers' protocol (methods compared in arXiv 2306.11695). With a smaller `stride` each window predicts only the tokens
    that the one before has not, with the rest as context.

    Args:
        text: a string, several (joined by a blank line), or ids (length,) or (windows, sequence_length), also as a tokenizer gives them.
        tokenizer: may be None for ids; a processor stands for its tokenizer.
        sequence_length: tokens a window, at most the model's positions; default that number, at most 2048, or the width of 2-D ids, but
            for a single row that is longer than the positions.
        add_bos: put the tokenizer's BOS token first in every window; default is what the tokenizer itself does with text.
            The papers' code has it in the first window only; add_bos=False leaves it out everywhere.

    Raises:
        ValueError: text shorter than two tokens or one window, ids outside the vocabulary, a window longer than the model allows.
        TypeError: something that is neither text nor ids, or no tokenizer.
    """
    tokenizer = tokenizer_of(tokenizer)
    positions, text = positions_of(model.config), _text_or_ids(text)
    if sequence_length is None and isinstance(text, Tensor) and text.dim() == 2:
        rows, width = text.shape
        sequence_length = None if rows == 1 and positions and width > positions else width
    length = min(2048, positions or 2048) if sequence_length is None else sequence_length
    if length < 2 or (positions and length > positions):
        raise ValueError(f"sequence_length must be from 2 to the model's {positions} positions, got {length}.")
    stride = length if stride is None else stride
    if not 0 < stride <= length:
        raise ValueError(f"stride must be from 1 to sequence_length={length}, got {stride}.")
    bos = getattr(tokenizer, "bos_token_id", None)
    if add_bos is None:
        add_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    elif add_bos and bos is None:
        raise ValueError("add_bos=True needs a tokenizer that has a BOS token.")
    ids = _ids(tokenizer, text, bos)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise ValueError(f"token ids run from {int(ids.min())} to {int(ids.max())}, the vocabulary to {vocabulary - 1}.")
    body = length - 1 if add_bos else length
    starts = [0] if stride < length and 2 <= len(ids) < body else list(range(0, len(ids) - body + 1, min(stride, body)))
    if not starts:
        raise ValueError(f"the text has {len(ids)} tokens, a window needs {body}. Give more text or a smaller sequence_length.")
    if stride < length and starts[-1] + body < len(ids):
        starts.append(starts[-1] + stride)  # the shorter rest
    total, count, end = 0.0, 0, 0
    with as_it_was(model):
        for start in tqdm(starts, desc="perplexity", unit="window", disable=not progress):
            window = ids[start : start + body]
            fresh = min(start + len(window) - end, len(window) - (0 if add_bos else 1))  # not predicted before
            end = start + len(window)
            if add_bos:
                window = torch.cat([ids.new_tensor([bos]), window])
            window = window.to(input_device(model))
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, window[1:].to(logits.device), reduction="none")
            total += float(loss[len(loss) - fresh :].sum(dtype=torch.float64))
            count += fresh
    value = math.exp(total / count) if total / count < 700 else math.inf
    return Perplexity(value, count, len(starts), length, stride, bool(add_bos))


def _text_or_ids(text: Any) -> str | list[str] | Tensor:
    """Ids as a tensor, whatever they came in, without padding."""
    given, mask = type(text).__name__, None
    if isinstance(text, Mapping):
        text, mask = text.get("input_ids"), text.get("attention_mask")
    if isinstance(text, str):
        return text
    if isinstance(text, Iterable) and not hasattr(text, "__array__"):
        text = list(text)
        if all(isinstance(part, str) for part in text):
            return text
    try:
        ids = torch.as_tensor(text).cpu()
        kept = None if mask is None else torch.as_tensor(mask).cpu().reshape(ids.shape).bool()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"perplexity is of a text, a list of texts, or ids (length,) or (windows, sequence_length), got a {given}: {error}."
        ) from error
    if ids.is_floating_point():
        raise ValueError(f"token ids must be whole numbers, got {ids.dtype}.")
    return (ids if kept is None or kept.all() else ids[kept]).long()


def _ids(tokenizer: Any, text: str | list[str] | Tensor, bos: int | None) -> Tensor:
    if isinstance(text, Tensor):
        return text.reshape(-1)
    if tokenizer is None:
        raise ValueError("perplexity of text needs a tokenizer.")
    text = text if isinstance(text, str) else "\n\n".join(text)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[1:] if ids[:1] == [bos] else ids, dtype=torch.long)
