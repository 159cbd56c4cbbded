"""A MaskLoRA training step against one of PEFT's LoRA on the same linears: their steps alternate in one process, and each one's
peak memory is that of a process of its own.

python benchmarks/adapters.py [--steps 9] [--batch 2] [--length 512] [--dtypes bfloat16,float32]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from smollm2 import load

import hf_prune
from hf_prune.perp import attach, masked_gradients


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trainer_of(kind: str, half: bool):
    """A function that takes one step on a batch of ids, with a SmolLM2-135M of its own."""
    fresh, _ = load()
    model = fresh()
    model.prune(hf_prune.PruningConfig(method="magnitude", pattern="2:4"))
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        masks = model.pruning_masks
        parameters = list(attach(model, masks, kind, rank=16, alpha=32, upcast=half).trainable.values())
        masked_gradients(model, masks)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    model.train()

    def step(ids: torch.Tensor) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="bfloat16 is autocast")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    batches = torch.randint(0, 49152, (args.steps + 1, args.batch, args.length), generator=torch.Generator().manual_seed(0))
    if args.alone:
        step = trainer_of(args.alone, args.dtypes == "bfloat16")
        for ids in batches[:3]:
            step(ids)
        with open("/proc/self/status") as file:  # ru_maxrss would count what the parent had
            print(next(line.split()[1] for line in file if line.startswith("VmHWM")))
        return
    print(f"SmolLM2-135M, 2:4, {args.batch} x {args.length} tokens a step, rank 16, 2 threads")
    for dtype in args.dtypes.split(","):
        one, other = (trainer_of(kind, dtype == "bfloat16") for kind in ("mask_lora", "lora"))
        seconds = [(one(ids), other(ids)) for ids in batches][1:]
        memory = []
        for kind in ("mask_lora", "lora"):
            command = [sys.executable, __file__, "--alone", kind, "--dtypes", dtype]
            command += ["--batch", str(args.batch), "--length", str(args.length)]
            memory.append(int(subprocess.run(command, capture_output=True, check=True).stdout) / 2**20)
        (a, b), ratios = (statistics.median(kind) for kind in zip(*seconds)), sorted(x / y for x, y in seconds)
        print(
            f"{dtype}: a step {a:.2f} s against {b:.2f} s of PEFT's LoRA, ratio {statistics.median(ratios):.3f} (of single steps "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}); peak {memory[0]:.2f} against {memory[1]:.2f} GiB, {memory[0] / memory[1]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
