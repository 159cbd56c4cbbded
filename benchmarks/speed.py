"""Time and memory of each method, in units of one plain forward of the same calibration batches through the blocks.

Seconds on a shared machine drift; ratios within one run hold. F is measured before and after each method. Run it with
`make bench`; `--methods wanda,2:4,linear ...` picks rows. Text is Python's own documentation unless `--ids` names a
safetensors file with `calibration` and `evaluation` ids.
"""

import argparse
import os
import pydoc_data.topics
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from safetensors.torch import load_file
from smollm2 import load

import hf_prune
from hf_prune.cli import value_of


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROWS = [
    f"{method},{pattern},{propagate}"
    for method, ways in {
        "magnitude": [""],
        "wanda": ["linear", "block"],
        "sparsegpt": ["linear", "block"],
        "gblm": ["block"],
    }.items()
    for propagate in ways
    for pattern in ("50%", "2:4")
]


def resident() -> float:
    """Resident memory now, GiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 2**20 for line in file if line.startswith("VmRSS"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=ROWS, help="method,pattern,propagate[,option=value...]")
    parser.add_argument("--ids", help="safetensors file with `calibration` and `evaluation` (sequences, length)")
    parser.add_argument(
        "--written", action="store_true", help="calibrate on text that the dense model writes, from its BOS token on"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(2)
    fresh, tokenizer = load()
    model = fresh()
    if args.ids:
        ids = {name: value.long() for name, value in load_file(args.ids).items()}
        calibration, evaluation = ids["calibration"], ids["evaluation"]
    else:
        topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        texts = [text for i, text in enumerate(topics) if i % 5]
        calibration = torch.stack(
            hf_prune.calibration_sequences(texts, tokenizer, n_samples=args.samples, sequence_length=args.length)
        )
        evaluation = "\n\n".join(topics[::5])
        evaluation = tokenizer(evaluation, return_tensors="pt", verbose=False)["input_ids"][0, : 6 * 1024].view(6, 1024)
    if args.written:
        n, length = calibration.shape
        own = hf_prune.self_calibration_sequences(fresh(), None, tokenizer, n_samples=n, sequence_length=length)
        calibration = torch.stack(own)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = hf_prune.Decoder(model)
    batches = list(calibration.split(max(1, 2048 // calibration.shape[1])))

    @torch.no_grad()
    def forward() -> float:
        hidden, calls = decoder.capture(batches)
        started = time.perf_counter()
        for block, arguments in zip(decoder.blocks, calls):
            hidden = [call.run(block, state) for call, state in zip(arguments, hidden)]
        return time.perf_counter() - started

    forward()
    print(f"SmolLM2-135M, calibration {tuple(calibration.shape)}, evaluation {tuple(evaluation.shape)}, fp32, 2 threads")
    print(f"{'method':<34}{'perplexity':>11}{'F (s)':>8}{'pruning / F':>11}{'gradients / F':>15}{'peak over model (GiB)':>23}")
    print(f"{'dense':<34}{hf_prune.perplexity(model, None, evaluation).perplexity:>11.2f}", flush=True)
    for row in args.methods:
        method, pattern, propagate, *options = row.split(",")
        options = {name: value_of(text) for name, text in (option.split("=") for option in options)}
        model.load_state_dict(dense)
        config = hf_prune.PruningConfig(
            method=method, pattern=pattern, propagate=propagate or None, method_options=options,
            n_samples=len(calibration), sequence_length=calibration.shape[1],
        )  # fmt: skip
        before, memory = forward(), resident()
        _, report = hf_prune.prune_model(model, config, calibration)
        one = (before + forward()) / 2
        ppl = hf_prune.perplexity(model, None, evaluation).perplexity
        rest = (report.seconds - report.gradient_seconds) / one
        print(
            f"{row:<34}{ppl:>11.2f}{one:>8.1f}{rest:>11.2f}{report.gradient_seconds / one:>15.2f}"
            f"{report.peak_memory / 2**30 - memory:>23.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
