"""SmolLM2-135M dense and pruned 2:4 in torch, ONNX Runtime and OpenVINO: zeros in the graph, logits, perplexity, size, tokens a second.

`python benchmarks/export.py IDS` with a safetensors file of `calibration` and `evaluation` ids (sequences, length). The pruned model and
the exports stay in `--work`; what is there already is not made again. Speeds of one row compare with those of the row's runtime only.
"""

import argparse
import os
import pathlib
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import smollm2
import torch
import transformers
from safetensors.torch import load_file

import hf_prune
from hf_prune.runtimes.exported import report_of


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


TORCH = {}  # model -> its logits on 256 tokens of the evaluation text


def pruned(work: pathlib.Path, calibration: torch.Tensor) -> transformers.PreTrainedModel:
    """SmolLM2 pruned 2:4 by SparseGPT; made once."""
    if not (work / "2-4").exists():
        model = smollm2.load()[0]()
        config = hf_prune.PruningConfig(
            "sparsegpt", pattern="2:4", n_samples=len(calibration), sequence_length=calibration.shape[1]
        )
        model.prune(config, list(calibration))
        model.save_pretrained(work / "2-4")
    return hf_prune.load(work / "2-4")


@torch.no_grad()
def perplexity(model, windows: torch.Tensor) -> float:
    """Of any model that gives logits, over `windows` (windows, length); every window on its own."""
    losses = [
        torch.nn.functional.cross_entropy(
            model(input_ids=window[None], attention_mask=torch.ones_like(window[None])).logits[0, :-1].float(), window[1:]
        )
        for window in windows
    ]
    return float(torch.stack(losses).mean().exp())


def speed(model, prompt: torch.Tensor, new: int = 32) -> tuple[float, float]:
    """Tokens a second of a prompt (1, length), and of `new` tokens after it; the better of three."""
    best = [float("inf"), float("inf")]
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad():
            model(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        between = time.perf_counter()
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        best = [min(best[0], between - started), min(best[1], time.perf_counter() - between - (between - started))]
    return prompt.shape[1] / best[0], new / max(best[1], 1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", help="safetensors file with `calibration` and `evaluation` (sequences, length)")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/export"))
    parser.add_argument("--models", nargs="+", default=["2:4", "dense"], choices=("dense", "2:4"))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--no-speed", action="store_true", help="when the machine is not quiet")
    args = parser.parse_args()
    ids = {name: value.long() for name, value in load_file(args.ids).items()}
    windows = ids["evaluation"][: args.windows]
    print(f"{'runtime':<10}{'model':<8}{'zeros lost':>11}{'off 2:4':>9}{'difference':>12}{'perplexity':>12}{'MiB':>8}", end="")
    print("" if args.no_speed else f"{'prompt tokens/s':>17}{'new tokens/s':>14}", flush=True)
    for name in args.models:
        model = smollm2.load()[0]() if name == "dense" else pruned(args.work, ids["calibration"])
        row("torch", name, model, None, windows, args)
        for format in ("onnx", "openvino"):
            folder = args.work / f"{name.replace(':', '-')}-{format}"
            if not folder.exists():
                hf_prune.export(model, folder, format=format)
            row(format, name, hf_prune.load_exported(folder), report_of(folder), windows, args)
            if (format, name) == ("openvino", "2:4"):
                off = hf_prune.load_exported(folder, options={"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 1.0})
                row("same, off", name, off, report_of(folder), windows, args)


def row(runtime, name, model, report, windows, args) -> None:
    """One line of the table."""
    text, cells = windows[:1, :256], f"{'':>11}{'':>9}{'':>12}"
    with torch.no_grad():
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
    if report is None:
        TORCH[name] = logits
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    else:
        size, difference = report["size"], float((logits - TORCH[name]).abs().max())
        off = sum(one["off_pattern"] or 0 for one in report["linears"])
        cells = f"{sum(one['violations'] for one in report['linears']):>11}{off:>9}{difference:>12.1e}"
    line = f"{runtime:<10}{name:<8}{cells}{perplexity(model, windows):>12.3f}{size / 2**20:>8.0f}"
    if not args.no_speed:
        line += "{:>17.0f}{:>14.1f}".format(*speed(model, text))
    print(line, flush=True)


if __name__ == "__main__":
    main()
