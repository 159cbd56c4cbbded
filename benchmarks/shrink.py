"""Shrinking while training: SmolLM2-135M to a share of its block parameters, in several ways, at equal tokens and final size.

python benchmarks/shrink.py texts.jsonl [--ways efficientllm random one-shot scratch dense] [--seeds 0 1 2] [--steps 120] [--out results]

`texts.jsonl` has some hundred documents; every tenth is held out. "random": the same schedule and kinds, groups by chance.
"one-shot": Taylor saliency takes all groups out at once, then the same number of steps trains what is left. "scratch": the
final shape of "efficientllm", from random weights. A demonstration on 10^5 tokens; the paper has 10^10. Two threads, bfloat16
autocast. With --out, tables and figures (PNG) of parameters, kinds and saliency over the steps are written there.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from recover import load, packed
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import hf_prune
from hf_prune.structural import groups_of
from hf_prune.structural.efficientllm import block_parameters


class Random(hf_prune.EfficientLLMCallback):
    """Groups by chance."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        generator = torch.Generator().manual_seed(args.seed * 1000 + state.global_step)
        saliency = self._saliency
        for axis, values in saliency.values.items():  # the kinds in the same order as before, on average
            saliency.values[axis] = values.mean() * (0.5 + torch.rand(len(values), generator=generator))


def run(way: str, seed: int, args: argparse.Namespace, train, held, fresh, counts: dict | None) -> dict:
    model, callbacks = fresh(), []
    what = {"order": args.order, "compensate": args.compensate}
    options = {"warm_up": args.warm_up, "recovery": args.recovery, **what}
    kinds = tuple(args.kinds) if args.kinds else None
    if way == "efficientllm":
        callbacks = [hf_prune.EfficientLLMCallback(args.share, kinds=kinds, **options)]
    elif way == "random":
        callbacks = [Random(counts=counts, **options)]
    elif way == "one-shot":
        config = hf_prune.PruningConfig(
            "taylor",
            parameters=args.share,
            n_samples=32,
            sequence_length=512,
            seed=seed,
            method_options={**what, "kinds": kinds},
        )
        model.prune(config, train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:32]])
    elif way == "scratch":
        config = model.config
        config.num_key_value_heads, config.intermediate_size, config.hidden_size = (
            counts[k] for k in ("heads", "ffn", "hidden")
        )
        config.num_attention_heads = 3 * counts["heads"]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in train]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=2, learning_rate=args.rate * (10 if way == "scratch" else 1),
            warmup_steps=args.steps // 10, weight_decay=0.0, bf16=True, save_strategy="no", report_to=[], logging_steps=1,
            use_cpu=True, seed=seed,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    groups = groups_of(model)
    return {
        "way": way, "seed": seed, "perplexity": hf_prune.perplexity(model, None, held).perplexity,
        "block_parameters": block_parameters(groups), "counts": {kind: axes[0].count for kind, axes in groups.axes.items()},
        "seconds": time.perf_counter() - begun, "log": [e for e in trainer.state.log_history if "loss" in e],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--ways", nargs="*", default=["efficientllm", "random", "one-shot", "scratch", "dense"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--warm-up", type=float, default=0.05)
    parser.add_argument("--recovery", type=float, default=0.5)
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--compensate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--kinds", nargs="*", default=["ffn"], help="that may go; none are all")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    fresh, tokenizer = load()
    texts = [json.loads(line)["text"] for line in open(args.texts, encoding="utf-8")]
    train = packed([t for i, t in enumerate(texts) if i % 10 != 9], tokenizer, 512)
    held = packed(texts[9::10], tokenizer, 512)
    results = []
    print(f"{'way':<14}{'seed':>5}{'held out':>10}{'blocks, M':>11}{'heads':>7}{'ffn':>6}{'hidden':>8}{'seconds':>9}")
    for seed in args.seeds:
        counts = None
        for way in args.ways:
            r = run(way, seed, args, train, held, fresh, counts)
            counts = r["counts"] if way == "efficientllm" else counts
            results.append(r)
            c = r["counts"]
            print(
                f"{way:<14}{seed:>5}{r['perplexity']:>10.2f}{r['block_parameters'] / 1e6:>11.2f}{c['heads']:>7}{c['ffn']:>6}"
                f"{c['hidden']:>8}{r['seconds']:>9.0f}", flush=True,
            )  # fmt: skip
    for way in args.ways:
        found = [r["perplexity"] for r in results if r["way"] == way]
        print(f"{way:<14} mean {statistics.mean(found):.2f} from {min(found):.2f} to {max(found):.2f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "shrink.json").write_text(json.dumps(results, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib"):
            from hf_prune.pretraining import plot

            log = next(r["log"] for r in results if r["way"] == "efficientllm")
            plot(log, args.out / "shrink.png")


if __name__ == "__main__":
    main()
