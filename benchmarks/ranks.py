"""One process against two, each with one core and one thread: time, and whether their masks agree.

    python benchmarks/ranks.py --ids FILE        # needs two cores that nobody else uses

SmolLM2-135M in fp32. Each process is pinned to a core of its own; the slower of two counts. `agree` says whether both ended with the
same masks and weights, bit for bit; `as one` is the share of mask bits that are those of one process, up to the order of summation.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time


os.environ.setdefault("TQDM_DISABLE", "1")


def child(args) -> None:
    """One of the processes."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import smollm2
    import torch
    import transformers
    from safetensors.torch import load_file

    import hf_prune
    from hf_prune.ranks import Ranks

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fresh, _ = smollm2.load()
    model = fresh()
    ids = load_file(args.ids)["calibration"].long()[: args.samples]
    method, propagate, out = args.child
    config = hf_prune.PruningConfig(method, propagate=propagate, n_samples=len(ids), sequence_length=ids.shape[1])
    Ranks.launched().wait()
    started = time.perf_counter()
    masks, _ = hf_prune.prune_model(model, config, ids)
    Ranks.launched().wait()
    seconds = time.perf_counter() - started
    torch.save((seconds, masks.digest(), {name: p.detach() for name, p in model.named_parameters()}), f"{out}-{rank}.pt")


def run(args, method: str, propagate: str, out: str, count: int) -> list:
    import torch

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, __file__, "--ids", args.ids, "--samples", str(args.samples), "--child", method, propagate, out]
    environments = [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    processes = [subprocess.Popen(command, env=environment) for environment in environments]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a process failed")
    return [torch.load(f"{out}-{i}.pt") for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", required=True, help="safetensors file with `calibration` (sequences, length)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rows", nargs="*", default=["wanda,block", "sparsegpt,linear", "sparsegpt,block", "gblm,block"])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    print(f"{'method':<20}{'one (s)':>9}{'two (s)':>9}{'ratio':>7}  agree  as one", flush=True)
    for row in args.rows:
        method, propagate = row.split(",")
        with tempfile.TemporaryDirectory() as place:
            (alone,) = run(args, method, propagate, f"{place}/one", 1)
            first, second = run(args, method, propagate, f"{place}/two", 2)
        agree = first[1] == second[1] and all((first[2][name] == p).all() for name, p in second[2].items())
        names = [name for name, p in alone[2].items() if p.dim() == 2 and "layers." in name]
        same = sum(int(((alone[2][n] != 0) == (first[2][n] != 0)).sum()) for n in names) / sum(
            alone[2][n].numel() for n in names
        )
        slower = max(first[0], second[0])
        print(f"{row:<20}{alone[0]:>9.1f}{slower:>9.1f}{slower / alone[0]:>7.2f}  {agree!s:<5}  {same:.5f}", flush=True)


if __name__ == "__main__":
    main()
