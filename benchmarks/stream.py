"""From disk to disk: a Llama-shaped bf16 checkpoint, made block by block, is pruned in a process that may not hold LIMIT of memory.

    python benchmarks/stream.py                        # 36 blocks, 8.6 GB, three methods, at most 3 GB each, bit-equal to in memory?
    python benchmarks/stream.py --depths 4 8 16        # peak memory over depth, small blocks unless --hidden says otherwise
    python benchmarks/stream.py --overhead             # time from folder to folder against in memory, SmolLM2-135M
    python benchmarks/stream.py --kill 3               # SIGKILL three times on the way: does it end bit-equal?

The limit is on the resident set: a thread reads /proc/self/statm a hundred times a second and kills the process when it is
passed. (A limit of address space, RLIMIT_AS, would count what torch maps but never touches: its libraries alone are gigabytes.)
Resident pages of mapped files count too. `--compare` prunes the same folder in memory afterwards, in another process without a limit,
which needs the whole model's size and more, and compares weight by weight. Everything is deleted at the end.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time


os.environ.setdefault("TQDM_DISABLE", "1")

import smollm2
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_prune


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
GB = 1e9


def resident() -> int:
    """Bytes, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(limit: float, peak: list[int]) -> None:
    while True:
        peak[0] = max(peak[0], resident())
        if peak[0] > limit:
            print(f"KILLED at {peak[0] / GB:.2f} GB", flush=True)
            os._exit(9)
        time.sleep(0.01)


def config_of(args, depth: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3, num_hidden_layers=depth, vocab_size=32000,
        num_attention_heads=args.hidden // 128, num_key_value_heads=args.hidden // 128, max_position_embeddings=2048,
        torch_dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip


def make(folder: pathlib.Path, config: LlamaConfig) -> int:
    """Writes a random checkpoint, a shard a block; its bytes."""
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    d, f = config.hidden_size, config.intermediate_size
    attention = {f"self_attn.{x}_proj": (d, d) for x in "qkvo"}
    mlp = {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    norms = dict.fromkeys(["input_layernorm", "post_attention_layernorm"], (d,))
    parts = [
        {f"model.layers.{i}.{n}.weight": shape for n, shape in {**attention, **mlp, **norms}.items()}
        for i in range(config.num_hidden_layers)
    ]
    parts += [
        {
            "model.embed_tokens.weight": (config.vocab_size, d),
            "model.norm.weight": (d,),
            "lm_head.weight": (config.vocab_size, d),
        }
    ]
    weights, total, generator = {}, 0, torch.Generator().manual_seed(0)
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)
            for key, shape in part.items()
        }  # fmt: skip
        save_file(tensors, folder / name, {"format": "pt"})
        weights.update(dict.fromkeys(part, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}))
    return total


def calibration_of(args) -> torch.Tensor:
    return torch.randint(0, 32000, (args.samples, args.length), generator=torch.Generator().manual_seed(1))


def pruning_config(args, method: str) -> hf_prune.PruningConfig:
    return hf_prune.PruningConfig(method, n_samples=args.samples, sequence_length=args.length)


def child(args) -> None:
    """One pruning, in a process of its own."""
    peak = [0]
    threading.Thread(target=watch, args=(args.limit * GB, peak), daemon=True).start()
    before, started = resident(), time.perf_counter()
    src, dst, method, way = args.child
    if way == "stream":
        report = hf_prune.prune_checkpoint(src, dst, pruning_config(args, method), calibration_of(args))
    else:
        model = AutoModelForCausalLM.from_pretrained(src)
        report = model.prune(pruning_config(args, method), calibration_of(args))
        model.save_pretrained(dst)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak[0], "before": before, "sparsity": report.sparsity}), flush=True)


def command(args, src, dst, method: str, way: str, limit: float) -> list[str]:
    options = ["--samples", args.samples, "--length", args.length, "--limit", limit, "--child", src, dst, method, way]
    return [sys.executable, __file__, *map(str, options)]


def run(*words) -> dict | None:
    method, way = words[3:5]
    done = subprocess.run(command(*words), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{method} {way}: ended with {done.returncode}: {done.stdout.strip()}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def killed(args, words: tuple, seconds: float) -> list[int]:
    """Starts it, and kills it by SIGKILL, `--kill` times; how many files were written each time."""
    moments, there = random.Random(0), []
    for _ in range(args.kill):
        process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.05, 0.25) * seconds + 8)  # to import takes a while
            break  # it was done
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        there.append(len(list(words[2].with_name("dst.unfinished").glob("model/*.safetensors"))))
    return there


def tensors_of(folder: pathlib.Path):
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt", backend="pread") as file:
            for name in file.keys():
                yield name, file


def equal(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Weight by weight; and the digests of the masks."""
    places = {name: path for path in other.glob("model*.safetensors") for name in safe_open(path, "pt").keys()}
    for name, file in tensors_of(one):
        with safe_open(places.pop(name), "pt", backend="pread") as there:
            if not torch.equal(file.get_tensor(name).view(torch.int16), there.get_tensor(name).view(torch.int16)):
                return False
    digests = [json.loads((folder / "pruning/pruning_config.json").read_text())["masks"] for folder in (one, other)]
    return not places and digests[0] == digests[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--depths", type=int, nargs="*", default=[36])
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt", "gblm"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--limit", type=float, default=3.0, help="GB of resident set")
    parser.add_argument("--compare", action="store_true", help="with pruning in memory, which has no limit")
    parser.add_argument("--overhead", action="store_true", help="on SmolLM2-135M, from folder to folder")
    parser.add_argument("--kill", type=int, default=0, help="how many times")
    parser.add_argument("--folder", default=None, help="where the files go; default is a temporary folder")
    parser.add_argument("--plot", help="PNG of peak memory over depth")
    parser.add_argument("--json", action="store_true", help="print each result as JSON too")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if args.child:
        child(args)
        return
    place = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
    peaks: dict[str, list[float]] = {method: [] for method in args.methods}
    try:
        for depth in [0] if args.overhead else args.depths:
            src = place / f"src-{depth}"
            if args.overhead:
                smollm2.save(src)
                args.limit = 1e3
                size = sum(path.stat().st_size for path in src.glob("*.safetensors"))
            else:
                needed = 2.2 * 2 * depth * 12 * args.hidden**2 * 1.2
                if shutil.disk_usage(place).free < needed + 10 * GB:
                    raise SystemExit(f"{place} has no room for {needed / GB:.0f} GB: give --folder.")
                size = make(src, config_of(args, depth))
            print(f"{depth} blocks, {size / GB:.2f} GB, calibration {args.samples} x {args.length}", flush=True)
            for method in args.methods:
                dst, other = place / "dst", place / "memory"
                found = run(args, src, dst, method, "stream", args.limit)
                if found and args.json:
                    print(json.dumps({"method": method, **found}), flush=True)
                if found:
                    peaks[method].append(found["peak"] / GB)
                    print(
                        f"  {method:<10} disk to disk {found['seconds']:8.1f} s  peak {found['peak'] / GB:.2f} GB "
                        f"({found['before'] / GB:.2f} before it began)  sparsity {found['sparsity']:.4f}",
                        flush=True,
                    )
                if found and args.kill:
                    whole, words = dst.rename(place / "whole"), (args, src, dst, method, "stream", args.limit)
                    there = killed(args, words, found["seconds"])
                    if not dst.exists():
                        run(*words)
                    print(
                        f"  {method:<10} killed with {', '.join(map(str, there))} files written; went on; "
                        f"equal bit for bit: {equal(dst, whole)}",
                        flush=True,
                    )
                    shutil.rmtree(whole)
                if args.compare or args.overhead:
                    known = run(args, src, other, method, "memory", 1e3)
                    print(
                        f"  {method:<10} in memory    {known['seconds']:8.1f} s  peak {known['peak'] / GB:.2f} GB; "
                        f"ratio {found['seconds'] / known['seconds']:.2f}; equal bit for bit: {equal(dst, other)}",
                        flush=True,
                    )
                for folder in (dst, other, place / "dst.unfinished"):
                    shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(src)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if args.plot and all(len(values) == len(args.depths) for values in peaks.values()):
        from matplotlib import pyplot

        for method, values in peaks.items():
            pyplot.plot(args.depths, values, marker="o", label=method)
        pyplot.xlabel("blocks")
        pyplot.ylabel("peak resident set, GB")
        pyplot.ylim(bottom=0)
        pyplot.legend()
        pyplot.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
