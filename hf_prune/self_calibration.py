"""Self-calibration (Williams et al., arXiv 2410.17170v2): calibration text that the model writes itself.

Sampled at one temperature from the first token on, and begun with a few tokens of somebody's text where there is some; the
paper begins with the BOS token alone and lets the temperature fall.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from .blocks import as_it_was, replaced
from .calibration import batches_of, calibration_sequences, positions_of, tokenizer_of
from .checkpoint import check_finite
from .masks import input_device
from .patterns import check_count


@torch.no_grad()
def self_calibration_sequences(
    model: PreTrainedModel,
    prompts: Any = None,
    tokenizer: Any = None,
    *,
    n_samples: int = 128,
    sequence_length: int = 512,
    prompt_length: int = 4,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Tensor]:
    """`n_samples` sequences that `model` continues, each int64 (sequence_length,), on the CPU: calibration for `prune` and
    `reconstruct`, and text to retrain on with `Distillation`. Let the dense model write them, before it is pruned.

    Sampled from the whole distribution: the model's own generation config (top-k, penalties, what ends a text) plays no part.

    Args:
        prompts: text or ids, as for `calibration_sequences`, of which windows of `prompt_length` tokens at random places are
            continued, in turns if they are fewer than `n_samples`; None begins with the model's BOS token.
        batch_size: sequences written together.

    Raises:
        ValueError: a model that cannot generate, weights that are not finite, nothing to begin with, prompts that leave nothing to
            write, a sequence longer than the model allows.
        TypeError: prompts that are neither text nor ids, or no tokenizer.
    """
    for name, value in {"n_samples": n_samples, "prompt_length": prompt_length, "batch_size": batch_size}.items():
        check_count(name, value)
    positions = positions_of(model.config)
    if not 2 <= sequence_length <= (positions or sequence_length):
        raise ValueError(f"sequence_length must be from 2 to the model's {positions} positions, got {sequence_length}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if not getattr(model, "can_generate", bool)():
        raise ValueError(
            f"{type(model).__name__} cannot generate text: give calibration text, or AutoModelForCausalLM's model."
        )
    check_finite((name, p) for name, p in model.named_parameters() if not p.is_meta)
    starts = _starts(model, prompts, tokenizer_of(tokenizer), n_samples, sequence_length, prompt_length, seed)
    device = input_device(model)
    written: list[Tensor] = []
    bar = tqdm(total=len(starts), desc="self-calibration", unit="sequence")
    gpus = [device] if device.type == "cuda" else []
    with as_it_was(model), replaced(model, "generation_config", GenerationConfig()), torch.random.fork_rng(gpus), bar:
        torch.manual_seed(seed)
        for equal in batches_of(starts, len(starts) * sequence_length):
            for batch in equal.to(device).split(batch_size):
                new = sequence_length - batch.shape[1]
                how = GenerationConfig(do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0, max_new_tokens=new)
                rows = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=how)
                written += rows.cpu().unbind()
                bar.update(len(rows))
    return written


def _starts(model, prompts, tokenizer, n_samples: int, length: int, prompt_length: int, seed: int) -> list[Tensor]:
    if prompts is None:
        configs = (model.generation_config, model.config.get_text_config(), tokenizer)
        bos = next((token for c in configs if isinstance(token := getattr(c, "bos_token_id", None), int)), None)
        if bos is None:
            raise ValueError("the model has no BOS token to begin a text with: give prompts, texts or token ids.")
        return [torch.tensor([bos])] * n_samples
    if prompt_length >= length:
        raise ValueError(f"prompts of prompt_length={prompt_length} tokens leave nothing to write of sequence_length={length}.")
    options = {"n_samples": n_samples, "sequence_length": prompt_length, "seed": seed, "sampling": "paper"}
    starts = calibration_sequences(prompts, tokenizer, **options, vocab_size=model.get_input_embeddings().weight.shape[0])
    return [starts[i % len(starts)] for i in range(n_samples)]
