"""Predicted time and peak memory of pruning models that do not fit here, from rates that were measured, and how it is checked.

    python benchmarks/scale.py                      # the table, for rates that are given (--flops, --disk, ... are of one GPU)
    python benchmarks/scale.py --disk inf           # the same without reading and writing, as of a model in memory (benchmarks/gpu.py)
    python benchmarks/scale.py --check              # measures rates on this machine, predicts small models, prunes them, compares

Of a block: P weights in its linears, of which A are read for a token (of a mixture only its k experts), attention of width a; of a
linear: out x in. T calibration tokens in sequences of L, hidden states of d channels, G processes with one device each. Bytes of a
weight: b (bf16: 2). Rates of one device: F FLOP/s of forward passes in the model's dtype, F32 of products in fp32, Fs of the products of
statistics (on a GPU F, tensor cores multiply them; on a CPU F32), D bytes/s of the disk of a node, N bytes/s between processes, S weights/s
of scores, selection and packing.

    forward of a block    f = 2 A T + 4 T L a                          FLOP, T / G of it on each device
    Wanda                 2 f / F + P / S                              a dense pass for statistics, a pruned one
    SparseGPT             f / F + (sum over inputs of T in^2 / Fs)     one pass, upper triangles of Gram matrices
                          + (sum over inputs in^3 / 3 + sum over linears 2 out in^2) / F32     factor, solve
    GBLM                  Wanda + 4 f / F + 2 P' T / Fs                forward, backward by recomputing (2 f and f); squares of tokens
                          P' is P of a dense model; experts are taken by samples, which the backward pass has already
    reads                 b P / D: a trace, and the walk; GBLM two more (forward, backward); of a node once, by the page cache
    writes                b P / D, and 4 P / D more twice for GBLM's gradients; hidden states 2 b T d / D for the journal
    all-reduce            2 (G - 1) / G x bytes of statistics / N      Gram matrices 4 in^2, norms 4 in, gradients 4 P
    broadcast             (b + 1) P / N                                weights and masks

A step's time is the larger of computing and reading, since the next block is read meanwhile, plus the rest. Solving is shared: the
linears of one input at a time, so at most as many processes as there are linears on one input (3), or with propagate="block" all.

    memory                2 b P + 8 max(out in) + b T d / G x 2 + statistics (Gram: 2 x 4 max in^2, GBLM: 4 P) + outside
                          two blocks, one linear in fp32 and its mask, hidden states before and after, embeddings while they are read,
                          and 0.3 GB of libraries and what the allocator keeps

Leaves out: launch and Python time, load imbalance of experts, and that small products are slower than large ones.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass


os.environ.setdefault("TQDM_DISABLE", "1")


@dataclass(frozen=True)
class Shape:
    """Of a model: `experts` is 0 of a dense one, `active` how many of them a token goes to, besides `shared` ones."""

    name: str
    blocks: int
    hidden: int
    kv: int
    ffn: int
    vocabulary: int
    experts: int = 0
    active: int = 0
    shared: int = 0

    def linears(self, reached: bool = False) -> list[tuple[int, int, float]]:
        """(out, in, how many) in a block, or how many of them one token reaches."""
        d, f = self.hidden, self.ffn
        copies = 1 if not self.experts else self.shared + (self.active if reached else self.experts)
        return [(d, d, 2), (self.kv, d, 2), (f, d, 2 * copies), (d, f, copies)]

    def inputs(self) -> list[tuple[int, float, float]]:
        """(in, how many inputs of that width, share of the tokens that reaches each)."""
        d, f = self.hidden, self.ffn
        n, share = (
            (self.shared + self.experts, (self.shared + self.active) / (self.shared + self.experts)) if self.experts else (1, 1)
        )
        return [(d, 2, 1), (d, n, share), (f, n, share)]

    @property
    def weights(self) -> float:
        return sum(out * into * n for out, into, n in self.linears())

    @property
    def total(self) -> float:
        return self.weights * self.blocks + 2 * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Rates:
    """Of one device, FLOP/s and bytes/s."""

    flops: float
    flops32: float
    statistics: float
    disk: float
    network: float
    select: float
    node: int = 8  # devices that share a disk


def predicted(
    s: Shape, r: Rates, method: str, tokens: int, length: int, devices: int, bytes_each: int = 2
) -> tuple[float, float]:
    """Seconds, and bytes at the peak of one device."""
    b, p, d = bytes_each, s.weights, s.hidden
    active = sum(out * into * n for out, into, n in s.linears(reached=True))
    forward = (2 * active * tokens + 4 * tokens * length * d) / devices / r.flops
    read = b * p / r.disk  # once a node: its other processes find the block in the page cache
    hidden = b * tokens * d
    gram = sum(4 * into**2 * n for into, n, _ in s.inputs())
    reduced = {"wanda": sum(4 * into * n for into, n, _ in s.inputs()), "sparsegpt": gram, "gblm": 4 * p}[method]
    network = (2 * (devices - 1) / devices * reduced + (b + 1) * p * (devices > 1)) / r.network
    written = (b * p + hidden / max(devices / r.node, 1)) / r.disk
    trace = read
    if method == "sparsegpt":
        products = sum(tokens * share * into**2 * n for into, n, share in s.inputs()) / devices
        solved = sum(into**3 / 3 * n for into, n, _ in s.inputs()) + sum(2 * out * into**2 * n for out, into, n in s.linears())
        at_once = min(devices, s.experts or 2)
        walk = max(forward + products / r.statistics + solved / at_once / r.flops32, read)
    else:
        walk = max(2 * forward + p / r.select / min(devices, s.experts or 3), read)
    seconds = trace + walk + network + written
    if method == "gblm":
        squares = 0 if s.experts else 2 * p * tokens / devices / r.statistics
        seconds += max(forward, read) + max(3 * forward + squares, read) + 3 * 4 * p / r.disk + 2 * hidden / r.disk
    largest = max(out * into for out, into, _ in s.linears())
    statistics = {"wanda": 0, "sparsegpt": 16 * max(into for into, *_ in s.inputs()) ** 2, "gblm": 4 * p}[method]
    return seconds * s.blocks, 2 * b * p + 12 * largest + 2 * hidden / devices + statistics + 3e8


MODELS = [
    Shape("Llama-2-7B", 32, 4096, 4096, 11008, 32000),
    Shape("Llama-3-70B", 80, 8192, 1024, 28672, 128256),
    Shape("Llama-3.1-405B", 126, 16384, 1024, 53248, 128256),
    Shape("1T mixture (384 experts, 8 active)", 61, 7168, 1024, 2048, 163840, experts=384, active=8, shared=1),
]


def measured(threads: int) -> Rates:
    """Of this machine's CPU and disk."""
    import torch

    from hf_prune.masks import pack
    from hf_prune.patterns import lowest

    torch.set_num_threads(threads)

    def selection() -> float:
        weight, best = torch.randn(2048, 2048, dtype=torch.bfloat16), float("inf")
        for _ in range(4):
            started = time.perf_counter()
            weight.mul_(mask := ~lowest(weight.float().abs(), 1024))
            pack(mask.numpy())
            best = min(best, time.perf_counter() - started)
        return weight.numel() / best

    def rate(dtype: torch.dtype) -> float:
        a, b = torch.randn(512, 2048, dtype=torch.float32).to(dtype), torch.randn(2048, 2048).to(dtype)
        best = 0.0
        for _ in range(8):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * 512 * 2048**2 / (time.perf_counter() - started))
        return best

    with tempfile.NamedTemporaryFile() as file:
        started = time.perf_counter()
        file.write(bytes(1 << 28))
        file.flush()
        os.fsync(file.fileno())
        disk = (1 << 28) / (time.perf_counter() - started)
    fp32 = rate(torch.float32)
    return Rates(rate(torch.bfloat16), fp32, fp32, disk, 1e10, selection())


def check(args) -> None:
    """Predicted and measured, for random models that `benchmarks/stream.py` makes and prunes."""
    rates = measured(args.threads)
    print(
        f"measured: bf16 {rates.flops / 1e9:.0f} GFLOP/s, fp32 {rates.flops32 / 1e9:.0f} GFLOP/s, disk {rates.disk / 1e9:.2f} GB/s, "
        f"selection {rates.select / 1e6:.0f} M weights/s"
    )
    print(f"{'model':<28}{'method':<12}{'predicted s':>12}{'measured s':>12}{'predicted GB':>14}{'measured GB':>13}")
    samples, length = args.tokens // 128, 128
    for hidden, depth in ((1024, 4), (1536, 4), (2048, 3)):
        shape = Shape(f"{depth} blocks of {hidden}", depth, hidden, hidden, hidden * 8 // 3, 32000)
        script = pathlib.Path(__file__).parent / "stream.py"
        words = ["--hidden", hidden, "--depths", depth, "--samples", samples, "--length", length, "--limit", 1000, "--json"]
        done = subprocess.run([sys.executable, script, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                seconds, memory = predicted(shape, rates, found["method"], samples * length, length, 1)
                print(
                    f"{shape.name:<28}{found['method']:<12}{seconds:>12.1f}{found['seconds']:>12.1f}"
                    f"{memory / 1e9:>14.2f}{(found['peak'] - found['before']) / 1e9:>13.2f}",
                    flush=True,
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--flops", type=float, default=450e12, help="of forward passes in bf16; an H100 reached 757e12 in products"
    )
    parser.add_argument("--flops32", type=float, default=40e12, help="fp32")
    parser.add_argument("--disk", type=float, default=3e9, help="of a node")
    parser.add_argument("--network", type=float, default=50e9, help="between devices")
    parser.add_argument("--select", type=float, default=5e9, help="weights/s that are chosen from, of one device")
    parser.add_argument("--tokens", type=int, default=None, help="default 128 x 2048, with --check 512")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    args = parser.parse_args()
    args.tokens = args.tokens or (512 if args.check else 128 * 2048)
    if args.check:
        check(args)
        return
    rates = Rates(args.flops, args.flops32, args.flops, args.disk, args.network, args.select)
    print(f"rates given, not measured: {dataclasses.asdict(rates)}; {args.tokens} tokens in sequences of {args.length}")
    print(f"{'model':<38}{'weights':>9}{'method':>11}" + "".join(f"{f'{n} GPUs: s':>13}{'GB':>7}" for n in args.devices))
    for shape in MODELS:
        for method in ("wanda", "sparsegpt", "gblm"):
            cells = ""
            for n in args.devices:
                seconds, memory = predicted(shape, rates, method, args.tokens, args.length, n)
                cells += f"{seconds:>13.0f}{memory / 1e9:>7.0f}"
            print(f"{shape.name:<38}{shape.total / 1e9:>8.0f}B{method:>11}{cells}")


if __name__ == "__main__":
    main()
