"""2:4 and unstructured 50 % on a GPU: each form of a linear by shape and number of rows, then decoding and prefill of a whole 7B-shaped model.

Milliseconds are those of one product among many in a replayed CUDA graph that reads a GiB of weights, as in decoding, where every weight is
read once a token; the bandwidth of our kernels is that of all bytes they must move, against a copy of 1 GiB on the same device. Weights are
random, bfloat16, 2:4, and unstructured 50 % for the bitmask.

python benchmarks/sparse24.py [--models SmolLM2-135M Llama-3-8B Llama-3-70B] [--layers 32] [--skip-model]
"""

import argparse
import os
import statistics
import sys
from functools import partial


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_prune


SHAPES = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "Llama-3-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "Llama-3-70B": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
}
FORMS = ("dense", "cusparselt", "cutlass", "decode", "bitmask")


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) with the two largest of each four along `in`."""
    quads = weight.unflatten(1, (-1, 4))
    least = quads.abs().argsort(-1)[..., :2]
    return quads.scatter(-1, least, 0.0).flatten(1)


def half(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) with the larger half of each row."""
    least = weight.abs().float().topk(weight.shape[1] // 2, largest=False).indices
    return weight.scatter(1, least, 0.0)


PATTERNS = {"2:4": two_of_four, "unstructured 50 %": half}


def bandwidth() -> float:
    """Bytes a second of a copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / milliseconds_of(lambda: target.copy_(source)) * 1e3


def linears(models: list[str]) -> None:
    from hf_prune.runtimes import bitmask_kernel, decode_kernel
    from hf_prune.runtimes.semi_structured import measured_plan

    peak = bandwidth()
    print(
        f"copy: {peak / 1e9:.0f} GB/s; milliseconds and speed-up over dense; of our kernels the share of the copy's bandwidth"
    )
    for model in models:
        for out_features, in_features in SHAPES[model]:
            weight = torch.randn(out_features, in_features, dtype=torch.bfloat16, device="cuda")
            weights = {"decode": two_of_four(weight), "bitmask": half(weight)}
            plan, unstructured = measured_plan(weights["decode"], None), measured_plan(weights["bitmask"], None, "decode")
            packed = decode_kernel.pack(weights["decode"]), bitmask_kernel.pack(weights["bitmask"])
            held = {form: sum(tensor.nbytes for tensor in tensors) for form, tensors in zip(weights, packed)}
            missing = plan.missing | unstructured.missing
            print(
                f"\n{model} ({out_features}, {in_features}): {plan}",
                *(f"no {form}: {why}" for form, why in missing.items()),
                sep="\n",
            )
            print(f"{'rows':>6}" + "".join(f"{form:>20}" for form in FORMS))
            for rows, spent in plan.milliseconds.items():
                spent |= {form: took for form, took in unstructured.milliseconds[rows].items() if form == "bitmask"}
                cells = [f"{spent[form]:9.4f} {spent['dense'] / spent[form]:5.2f}x" if form in spent else "-" for form in FORMS]
                for form in {*held} & {*spent}:
                    moved = held[form] + 2 * rows * (in_features + out_features)
                    cells[FORMS.index(form)] += f" {moved / spent[form] * 1e3 / peak:4.0%}"
                print(f"{rows:>6}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


@torch.no_grad()
def whole_model(layers: int, pattern: str) -> None:
    """One token and a prompt of 2048 through a model of Llama-2-7B's shape, dense and packed, and `generate`."""
    from hf_prune.runtimes.semi_structured import replayed

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32000, dtype="bfloat16"
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(PATTERNS[pattern](module.weight))
    prompt = torch.randint(0, 32000, (1, 2048), device="cuda")

    def measured() -> list[float]:
        times = [milliseconds_of(replayed(partial(model, prompt[:, :rows], use_cache=False))) for rows in (1, 16, 2048)]
        words = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
        model.generate(prompt[:, :16], **words)
        return [*times, milliseconds_of(lambda: model.generate(prompt[:, :16], **words), 3) / 64]

    dense = measured()
    print(f"\n7B-shaped, {layers} blocks, {pattern}\n{hf_prune.to_semi_structured(model)}")
    packed = measured()
    names = (
        "decode, 1 token (CUDA graph)",
        "16 tokens (CUDA graph)",
        "prefill, 2048 tokens (CUDA graph)",
        "generate, a token (eager)",
    )
    for name, before, after in zip(names, dense, packed):
        print(f"{name:<36}{before:9.3f} ms dense {after:9.3f} ms packed {before / after:6.2f}x")


def milliseconds_of(run, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--skip-model", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: no CUDA device. On a machine with one: pip install '.[sparse]' && python benchmarks/sparse24.py")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    linears(args.models)
    if not args.skip_model:
        for pattern in PATTERNS:
            whole_model(args.layers, pattern)
    return 0


if __name__ == "__main__":
    sys.exit(main())
