"""Shrinking while training: SmolLM2-135M to a share of its block parameters, in several ways, at equal tokens and final size.

python benchmarks/shrink.py texts.jsonl --out results [--ways efficientllm random one-shot scratch] [--seeds 0 1 2] [--steps 100]

`texts.jsonl` has some hundred documents; every tenth is held out. "random": the same schedule and kinds, groups by chance.
"one-shot": Taylor saliency takes all groups out at once, and the same number of steps trains what is left. "scratch": the final
shape of "efficientllm", from random weights, at ten times the rate. A demonstration on 10^5 tokens; the paper has 10^10.
bfloat16 autocast. Runs found in results/shrink.json are not run again; the table in results/shrink.md has them all, and
results/shrink.png the first of "efficientllm". With --speed the forward pass of the first result is timed against the source's, and its steps
against those of a model that was never larger.
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
from recover import packed
from smollm2 import load
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

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


class Held(TrainerCallback):
    """The bytes that training holds for the parameters in the end."""

    bytes = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == state.max_steps - 1:
            held = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if torch.is_tensor(t)]
            self.bytes = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def run(way: str, seed: int, args: argparse.Namespace, train, held, fresh, counts: dict | None) -> dict:
    model, callbacks, memory = fresh(), [], Held()
    what = {"order": args.order, "compensate": args.compensate}
    options = {"warm_up": args.warm_up, "recovery": args.recovery, **what}
    kinds = tuple(args.kinds) if args.kinds else None
    if way == "efficientllm":
        callbacks = [hf_prune.EfficientLLMCallback(args.share, kinds=kinds, **options)]
    elif way == "random":
        callbacks = [Random(counts=counts, **options)]
    elif way == "one-shot":
        some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:32]]
        config = hf_prune.PruningConfig(
            "taylor",
            parameters=args.share,
            n_samples=32,
            sequence_length=512,
            seed=seed,
            method_options={**what, "kinds": kinds},
        )
        model.prune(config, some)
    elif way == "scratch":
        config = model.config
        config.num_key_value_heads, config.intermediate_size, config.hidden_size = (
            counts[k] for k in ("heads", "ffn", "hidden")
        )
        config.num_attention_heads = 3 * counts["heads"]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation("eager")  # faster than the fused kernel on a CPU at this length
    rows = [{"input_ids": row, "labels": row} for row in train]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=2, learning_rate=args.rate * (10 if way == "scratch" else 1),
            warmup_steps=args.steps // 10, weight_decay=0.0, bf16=True, save_strategy="no", report_to=[], logging_steps=1,
            use_cpu=True, seed=seed,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks, memory])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    groups = groups_of(model)
    result = {
        "way": way, "seed": seed, "steps": args.steps, "options": {**options, "rate": args.rate, "share": args.share, "kinds": args.kinds},
        "perplexity": hf_prune.perplexity(model, None, held).perplexity, "block_parameters": block_parameters(groups),
        "counts": {kind: axes[0].count for kind, axes in groups.axes.items()}, "seconds": time.perf_counter() - begun,
        "bytes": memory.bytes,
        "log": [e for e in trainer.state.log_history if "loss" in e and way == "efficientllm"],
    }  # fmt: skip
    if args.speed and way == "efficientllm":
        speed(fresh(), trainer, held)
    return result


def in_turn(*works) -> list[float]:
    """The median seconds of each, done ten times one after the other, so that all see the same machine; the first time does not count."""
    seconds = [[] for _ in works]
    for _ in range(11):
        for work, found in zip(works, seconds):
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
    return [statistics.median(found[1:]) for found in seconds]


def speed(source, trainer, held) -> None:
    """Prints how much faster the smaller model's forward pass is than the source's and how many fewer FLOPs it has, and how long
    its training steps take against those of a model that was never larger."""
    smaller = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without Trainer's bfloat16
    ids = held[:2]
    source.eval().set_attn_implementation("eager")  # as the smaller one
    flops = []
    for model in (source, smaller):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
        flops.append(counter.get_total_flops())
    with torch.no_grad():
        slow, fast = in_turn(lambda: source(input_ids=ids), lambda: smaller(input_ids=ids))
    fewer, faster = flops[0] / flops[1], slow / fast
    print(f"forward of {ids.numel()} tokens: {fewer:.2f}x fewer FLOPs, {faster:.2f}x faster ({faster / fewer:.2f} of that)")
    twin = AutoModelForCausalLM.from_config(smaller.config, dtype=torch.float32, attn_implementation="eager")
    options = {name: value for name, value in trainer.optimizer.param_groups[0].items() if name != "params"}
    other = torch.optim.AdamW(
        twin.parameters(), **{name: options[name] for name in ("lr", "betas", "eps", "weight_decay", "fused")}
    )

    def step(model, optimizer) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's wrapper has the schedule, too
    shrunk, never = in_turn(lambda: step(smaller.train(), optimizer), lambda: step(twin.train(), other))
    print(f"a step: {shrunk:.2f} s, of a model that was never larger {never:.2f} s ({shrunk / never:.2f}x)")


def table(results: list[dict]) -> str:
    """Means over the seeds, as markdown."""
    lines = [
        "| way | held-out perplexity, mean (each seed) | blocks, M | GB of parameters, gradients, moments at the end |",
        "|---|---|---|---|",
    ]
    for way in dict.fromkeys(r["way"] for r in results):
        of = sorted((r for r in results if r["way"] == way), key=lambda r: r["seed"])
        each = ", ".join(f"{r['perplexity']:.2f}" for r in of)
        mean, size, held = statistics.mean(r["perplexity"] for r in of), of[0]["block_parameters"] / 1e6, of[0]["bytes"] / 1e9
        lines.append(f"| {way} | **{mean:.2f}** ({each}) | {size:.1f} | {held:.2f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--ways", nargs="*", default=["efficientllm", "random", "one-shot", "scratch"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--warm-up", type=float, default=0.05)
    parser.add_argument("--recovery", type=float, default=0.2)
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--compensate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--kinds", nargs="*", default=["ffn"], help="that may go; none are all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    fresh, tokenizer = load()
    texts = [json.loads(line)["text"] for line in open(args.texts, encoding="utf-8")]
    train = packed([t for i, t in enumerate(texts) if i % 10 != 9], tokenizer, 512)
    held = packed(texts[9::10], tokenizer, 512)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "shrink.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for seed in args.seeds:
        for way in args.ways:
            if any((r["way"], r["seed"]) == (way, seed) for r in results):
                continue
            counts = next((r["counts"] for r in results if r["way"] == "efficientllm"), None)
            r = run(way, seed, args, train, held, fresh, counts)
            shape = ", ".join(f"{count} {kind}" for kind, count in r["counts"].items())
            print(f"{way}, seed {seed}: {r['perplexity']:.2f} with {shape} in {r['seconds']:.0f} s", flush=True)
            results.append(r)
            file.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "shrink.md").write_text(table(results))
    print(table(results))
    if importlib.util.find_spec("matplotlib"):
        from hf_prune.pretraining import plot

        plot(next(r["log"] for r in results if r["way"] == "efficientllm"), args.out / "shrink.png")


if __name__ == "__main__":
    main()
