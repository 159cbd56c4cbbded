"""Wanda and SparseGPT against llm-compressor: the same model, ids and machine, one run, each library in a process of its own.

    python3.11 -m venv .venv-versus
    .venv-versus/bin/pip install torch==2.13.0
    .venv-versus/bin/pip install llmcompressor==0.14.0.1
    python benchmarks/versus.py --other .venv-versus/bin/python --ids FILE

The two want different versions of Transformers, so llm-compressor has an environment of its own (`--other`), and both load the same
folder, SmolLM2-135M in fp32. Seconds are of the pruning call alone, the model in memory before. Memory is the highest resident set during that
call over the resident set before it. Perplexity of both is measured here, by one function. `--rounds` alternates the two.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time


os.environ.setdefault("TQDM_DISABLE", "1")
SPARSITY = {"50%": ("0:0", 0.5), "2:4": ("2:4", 0.5)}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(args) -> None:
    """One pruning by one library."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    who, method, pattern, folder, out = args.child
    ids = load_file(args.ids)["calibration"].long()[: args.samples]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # from_pretrained maps the file: it would count once it is read
    prune = ours if who == "hf_prune" else theirs
    call = prune(model, method, pattern, ids, folder, args.bf16, args.batch)
    peak, before, done = [resident()], resident(), threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    done.set()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name}
    zeros = sum(int((p == 0).sum()) for p in weights.values()) / sum(p.numel() for p in weights.values())
    torch.save({name: p.detach() for name, p in weights.items()}, out)
    names = {"hf_prune": "hf-prune", "llm-compressor": "llmcompressor"}
    versions = {name: importlib.metadata.version(name) for name in (names[who], "torch", "transformers")}
    print(json.dumps({"seconds": seconds, "memory": peak[0] - before, "sparsity": zeros, "versions": versions}))


def ours(model, method: str, pattern: str, ids, folder: str, bf16: bool, batch: int):
    import hf_prune

    words = {"pattern": pattern} if ":" in pattern else {"sparsity": 0.5}
    config = hf_prune.PruningConfig(method, **words, n_samples=len(ids), sequence_length=ids.shape[1])
    return lambda: model.prune(config, ids, bf16=bf16)


def theirs(model, method: str, pattern: str, ids, folder: str, bf16: bool, batch: int):
    from datasets import Dataset
    from llmcompressor import oneshot

    try:
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    except ImportError:
        from llmcompressor.modifiers.obcq import SparseGPTModifier
        from llmcompressor.modifiers.pruning import WandaPruningModifier
    structure, sparsity = SPARSITY[pattern]
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    recipe = modifier(sparsity=sparsity, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}
    words = {"num_calibration_samples": len(ids), "max_seq_length": ids.shape[1], "shuffle_calibration_samples": False}
    words["batch_size"] = batch
    return lambda: oneshot(model=model, tokenizer=folder, dataset=Dataset.from_dict(rows), recipe=recipe, **words)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", help="python of the environment with llm-compressor")
    parser.add_argument("--ids", required=True, help="safetensors file with `calibration` and `evaluation` (sequences, length)")
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--patterns", nargs="*", default=["50%", "2:4"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=12, help="of text that is evaluated")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--bf16", action="store_true", help="hf_prune's forward passes under autocast; llm-compressor has no such option"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="sequences a batch of llm-compressor, as is its default; ours has 4"
    )
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.ids = os.path.abspath(args.ids)
    if args.child:
        child(args)
        return
    import smollm2
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import hf_prune

    evaluation = load_file(args.ids)["evaluation"].long()[: args.windows]
    with tempfile.TemporaryDirectory() as place:
        folder, out = pathlib.Path(place, "model"), pathlib.Path(place, "weights.pt")
        smollm2.save(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        print(
            f"SmolLM2-135M, fp32, {args.threads} threads; dense {hf_prune.perplexity(model, None, evaluation).perplexity:.2f}"
        )
        print(
            f"{'':<12}{'':<6}{'':<16}{'seconds':>9}{'memory GiB':>12}{'sparsity':>10}{'perplexity':>12}{'ratio':>7}", flush=True
        )
        for method in args.methods:
            for pattern in args.patterns:
                best: dict[str, float] = {}
                for _ in range(args.rounds):
                    for who, python in (("hf_prune", sys.executable), ("llm-compressor", args.other or sys.executable)):
                        words = [
                            "--ids",
                            args.ids,
                            "--threads",
                            args.threads,
                            "--samples",
                            args.samples,
                            "--batch",
                            args.batch,
                            *["--bf16"] * args.bf16,
                        ]
                        words += ["--child", who, method, pattern, folder, out]
                        command = [python, os.path.abspath(__file__), *map(str, words)]
                        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=place, check=True)
                        found = json.loads(done.stdout.splitlines()[-1])
                        model.load_state_dict(torch.load(out), strict=False)
                        ppl = hf_prune.perplexity(model, None, evaluation).perplexity
                        best[who] = min(found["seconds"], best.get(who, 1e9))
                        print(
                            f"{method:<12}{pattern:<6}{who:<16}{found['seconds']:>9.1f}{found['memory'] / 2**30:>12.2f}"
                            f"{found['sparsity']:>10.4f}{ppl:>12.2f}"
                            + (f"{best['hf_prune'] / best[who]:>7.2f}" if who != "hf_prune" else ""),
                            flush=True,
                        )
        print(found["versions"])


if __name__ == "__main__":
    main()
