"""A random Llama-2-7B-shaped model in bf16, pruned on a GPU: seconds, memory, and share of what products reach on that GPU.

    python benchmarks/gpu.py                                   # 128 x 2048 tokens, Wanda, SparseGPT and GBLM, at 50 % and 2:4
    python benchmarks/gpu.py --device cpu --hidden 256 --blocks 2 --samples 4 --length 128    # that it runs, without a GPU

Random weights take the time of real ones; perplexity means nothing here. FLOP are those that the methods need (benchmarks/scale.py has the
formulas), so attention masks, statistics and the choice of weights count as lost time. The rate of products is measured first, in bf16 on
matrices of the model's own shapes.
"""

import argparse
import copy
import os
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from scale import Shape
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_prune


transformers.logging.set_verbosity_error()


def flop(shape: Shape, method: str, tokens: int, length: int, gradient_tokens: int) -> float | None:
    """Of one pruning: forward passes, Gram matrices and solves, or the forward and backward passes of gradients; None if the
    method's arithmetic is not known here."""
    forward = 2 * shape.weights * tokens + 4 * tokens * length * shape.hidden / 2  # causal
    if method == "wanda":
        return 2 * forward * shape.blocks
    if method == "sparsegpt":
        gram = sum(tokens * into**2 * n for into, n, _ in shape.inputs())
        solve = sum(into**3 / 3 * n for into, n, _ in shape.inputs()) + sum(
            2 * out * into**2 * n for out, into, n in shape.linears()
        )
        return (forward + gram + solve) * shape.blocks
    if method == "gblm":  # recomputed once: 2 f of backward, 2 f of forward
        return (2 * forward + 4 * forward * gradient_tokens / tokens) * shape.blocks
    return None


def ceiling(shape: Shape, tokens: int, device: torch.device) -> float:
    """FLOP/s of the widest product of a block, the best of ten."""
    a = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    b = torch.randn(shape.hidden, shape.ffn, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(10):
        started = now(device)
        a @ b
        best = min(best, now(device) - started)
    return 2 * tokens * shape.hidden * shape.ffn / best


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt", "gblm"])
    parser.add_argument("--patterns", nargs="*", default=["50%", "2:4"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=32)
    args = parser.parse_args()
    device, ffn = torch.device(args.device), args.hidden * 43 // 16
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: this needs a GPU, or --device cpu with a small --hidden.")
    shape = Shape("Llama-2-7B", args.blocks, args.hidden, args.hidden, ffn, 32000)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=ffn, num_hidden_layers=args.blocks, vocab_size=32000,
        num_attention_heads=max(args.hidden // 128, 1), max_position_embeddings=4096,
    )  # fmt: skip
    ids = torch.randint(0, 32000, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    rate = ceiling(shape, 16384 if device.type == "cuda" else 512, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}: products reach {rate / 1e12:.3g} TFLOP/s in bf16; {shape.total / 1e9:.2f}B weights, {ids.numel()} tokens")
    print(f"{'method':<12}{'pattern':<9}{'seconds':>9}{'of the rate':>13}{'peak GiB':>10}{'model GiB':>11}", flush=True)

    def model_of(blocks: int) -> torch.nn.Module:
        torch.manual_seed(0)
        config.num_hidden_layers = blocks
        with device:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)

    for method in args.methods:
        for pattern in args.patterns:
            small = hf_prune.PruningConfig(method, pattern=pattern, n_samples=2, sequence_length=args.length)
            model_of(1).prune(small, ids[:2])  # the first of a process compiles and loads kernels
            model = model_of(args.blocks)
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            settings = hf_prune.PruningConfig(method, pattern=pattern, n_samples=args.samples, sequence_length=args.length)
            gradients = (getattr(settings.method, "gradient_samples", None) or args.samples) * args.length
            started = now(device)
            report = model.prune(settings, ids)
            seconds = now(device) - started
            work = flop(shape, method, ids.numel(), args.length, min(gradients, ids.numel()))
            share = "-" if work is None else f"{work / seconds / rate:.0%}"
            peak = (report.peak_memory or 0) / 2**30
            print(f"{method:<12}{pattern:<9}{seconds:>9.1f}{share:>13}{peak:>10.1f}{size / 2**30:>11.1f}", flush=True)
            assert not model.pruning_masks.violations(model)
            del model


if __name__ == "__main__":
    main()
