"""What retraining gives back: SmolLM2-135M pruned, then trained in several ways on a few texts, perplexity on other ones.

python benchmarks/recover.py texts.jsonl --ids ids.safetensors [--rows sparsegpt,2:4,reconstruction+mask_lora ...]

`texts.jsonl` has 300 documents or so; every tenth is held out. `ids.safetensors` has `calibration` and `evaluation` ids
(sequences, length): pruning calibrates with the first, the perplexity is of the second. Each way is a process of its own; peak
memory is that of the whole process from the pruned model on, without the evaluation. Two threads, bfloat16 autocast.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from safetensors.torch import load_file
from smollm2 import load
from transformers import Trainer, TrainingArguments

import hf_prune
from hf_prune.pruning import count_peak


PRUNED = ("magnitude,50%", "wanda,2:4", "sparsegpt,2:4")
WAYS = {
    "before": {},
    "norm": {"train": ("norm",), "rate": 3e-3},
    "mask_lora": {"train": ("mask_lora", "norm"), "rate": 2e-3},
    "full": {"train": ("full",), "rate": 3e-4},
    "reconstruction+mask_lora": {"reconstruct": True, "train": ("mask_lora", "norm"), "rate": 2e-3, "distil": True},
}


def packed(texts: list[str], tokenizer, length: int) -> torch.Tensor:
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def rows_of(args: argparse.Namespace, pruned: str, way: str) -> list[dict]:
    """Of one process: the way, and before it the reconstruction that it begins with."""
    fresh, tokenizer = load()
    texts = [json.loads(line)["text"] for line in open(args.texts, encoding="utf-8")]
    train, held = packed([t for i, t in enumerate(texts) if i % 10 != 9], tokenizer, 512), packed(texts[9::10], tokenizer, 512)
    ids = {name: value.long() for name, value in load_file(args.ids).items()}
    how, folder = WAYS[way], pathlib.Path(args.place, pruned.replace("%", ""))
    if not folder.exists():
        method, pattern = pruned.split(",")
        config = hf_prune.PruningConfig(method=method, pattern=pattern, n_samples=len(ids["calibration"]), sequence_length=512)
        model = fresh()
        model.prune(config, ids["calibration"])
        model.save_pretrained(folder)
        del model
    model, seconds, rows = hf_prune.load(folder, dtype=torch.float32), 0.0, []

    def measure(way: str, share: float, **more) -> None:
        assert not model.pruning_masks.violations(model)
        highest = peak() / 2**30
        found = {
            name: hf_prune.perplexity(model, None, x).perplexity for name, x in (("held", held), ("ppl", ids["evaluation"]))
        }
        rows.append({"way": way, "seconds": seconds, "peak": highest, "share": share, **found, **more})
        count_peak(model.device)

    peak = count_peak(model.device)
    if how.get("reconstruct"):
        started = time.perf_counter()
        options = {name: value for name, value in vars(args).items() if name in ("epochs", "batch_tokens") and value}
        reconstruction = hf_prune.Reconstruction(bf16=True, learning_rate=args.block_rate, **options)
        errors = hf_prune.reconstruct(model, fresh(), train[: args.sequences], how=reconstruction)
        seconds += time.perf_counter() - started
        share = model.pruning_masks.numel() / sum(p.numel() for p in model.parameters())
        measure("reconstruction", share, error=[sum(error[i] for error in errors.values()) / len(errors) for i in (0, 1)])
    share = 0.0
    if how.get("distil") and args.written:
        started = time.perf_counter()
        own = hf_prune.self_calibration_sequences(fresh(), train, n_samples=args.written, sequence_length=512)
        train = torch.cat([train, torch.stack(own)])
        seconds += time.perf_counter() - started
    if how.get("train"):
        distillation = hf_prune.Distillation(fresh().to(torch.bfloat16), weight=args.weight) if how.get("distil") else None
        callback = hf_prune.PERPCallback(how["train"], distillation=distillation)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=args.rate or how["rate"],
                warmup_steps=args.steps // 10, weight_decay=0.0, bf16=True, max_grad_norm=1.0, save_strategy="no", report_to=[],
                logging_steps=20, use_cpu=True, seed=args.seed,
            )  # fmt: skip
            data = [{"input_ids": row, "labels": row} for row in train]
            trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
            share, started = callback._attached.share, time.perf_counter()
            trainer.train()
            seconds += time.perf_counter() - started
    measure(way, share)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--ids", required=True)
    parser.add_argument("--rows", nargs="*", default=[f"{pruned},{way}" for pruned in PRUNED for way in WAYS])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2, help="sequences of 512 tokens a step of the retraining")
    parser.add_argument("--rate", type=float, help="of the retraining; default by what is trained")
    parser.add_argument("--block-rate", type=float, help="of the reconstruction")
    parser.add_argument("--sequences", type=int, default=128, help="that the reconstruction uses")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--weight", type=float, default=0.5, help="of the distillation")
    parser.add_argument("--written", type=int, default=0, help="sequences that the dense model writes, to distil with as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        torch.set_num_threads(2)
        transformers.logging.set_verbosity_error()
        *pruned, way = args.alone.split(",")
        print("\n" + json.dumps(rows_of(args, ",".join(pruned), way)))
        return
    print(f"{'pruned, trained':<40}{'perplexity':>11}{'held out':>10}{'seconds':>9}{'peak GiB':>10}{'trained':>10}")
    with tempfile.TemporaryDirectory() as place:
        for row in args.rows:
            command = [sys.executable, __file__, *sys.argv[1:], "--alone", row, "--place", place]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                raise SystemExit(f"{row} failed, see above.")
            for r in json.loads(run.stdout.splitlines()[-1]):
                name = f"{row.rpartition(',')[0]},{r['way']}"
                print(
                    f"{name:<40}{r['ppl']:>11.2f}{r['held']:>10.2f}{r['seconds']:>9.0f}{r['peak']:>10.2f}{r['share']:>10.3%}",
                    {"error": r["error"]} if "error" in r else "", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
