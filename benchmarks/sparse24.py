"""2:4 and unstructured 50 % on a GPU: each form of a linear by shape and number of rows, then decoding and prefill of a whole 7B-shaped model.

Milliseconds are those of one product among many in a replayed CUDA graph that reads a GiB of weights, as in decoding, where every weight is
read once a token; the bandwidth of our kernels is that of all bytes they must move, against a copy of 1 GiB on the same device. Weights are
random, bfloat16, 2:4, and unstructured 50 % for the bitmask; with 8 bits the time to quantise the activations is part of the product, also
of the dense one (torch._scaled_mm).

python benchmarks/sparse24.py [--models SmolLM2-135M Llama-3-8B Llama-3-70B] [--layers 32] [--forms 2:4 int8 ...] [--static]
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
DTYPES = {"": None, "int8 ": torch.int8, "fp8 ": torch.float8_e4m3fn}
FORMS = [f"{word}{form}" for word in DTYPES for form in ("dense", "cusparselt", "cutlass", "decode", "bitmask")]


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) with the two largest of each four along `in`."""
    quads = weight.unflatten(1, (-1, 4))
    least = quads.abs().argsort(-1)[..., :2]
    return quads.scatter(-1, least, 0.0).flatten(1)


def half(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) with the larger half of each row."""
    least = weight.abs().float().topk(weight.shape[1] // 2, largest=False).indices
    return weight.scatter(1, least, 0.0)


MODELS = {
    "2:4": (two_of_four, None),
    "int8": (two_of_four, torch.int8),
    "fp8": (two_of_four, torch.float8_e4m3fn),
    "50 %": (half, None),
}


def bandwidth() -> float:
    """Bytes a second of a copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / milliseconds_of(lambda: target.copy_(source)) * 1e3


def dense_fp8(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What 2:4 in 8 bits competes with."""
    from hf_prune.runtimes.eight_bits import quantised

    q, of_rows = quantised(x, weight.dtype)
    return torch._scaled_mm(q, weight.t(), scale_a=of_rows[:, None], scale_b=scales[None], out_dtype=x.dtype)


def linears(models: list[str]) -> None:
    from hf_prune.runtimes.eight_bits import quantised
    from hf_prune.runtimes.plans import measured_plan, milliseconds, sample

    peak = bandwidth()
    print(f"copy: {peak / 1e9:.0f} GB/s; milliseconds and speed-up over dense")
    for model in models:
        for out_features, in_features in SHAPES[model]:
            weight = torch.randn(out_features, in_features, dtype=torch.bfloat16, device="cuda")
            plans = {word: measured_plan(two_of_four(weight), None, dtype=dtype) for word, dtype in DTYPES.items()}
            unstructured = measured_plan(half(weight), None, "decode")
            packed, fp8 = weight.numel(), quantised(weight, torch.float8_e4m3fn)
            # Bytes of a weight's values and codes.
            held = {
                "decode": packed * 1.125,
                "bitmask": packed * 1.25,
                "int8 decode": packed * 0.625,
                "fp8 decode": packed * 0.625,
            }
            print(f"\n{model} ({out_features}, {in_features})")
            for word, plan in plans.items():
                print(f"{word}2:4: {plan}", *(f"no {word}{form}: {why}" for form, why in plan.missing.items()), sep="\n")
            spent: dict[int, dict[str, float]] = {}
            for rows, by_form in plans[""].milliseconds.items():
                spent[rows] = dict(by_form)
                for word, plan in plans.items():
                    spent[rows] |= {f"{word}{form}": took for form, took in plan.milliseconds[rows].items() if form != "dense"}
                if "bitmask" in unstructured.milliseconds[rows]:
                    spent[rows]["bitmask"] = unstructured.milliseconds[rows]["bitmask"]
                spent[rows]["fp8 dense"] = milliseconds(dense_fp8, sample(rows, weight), *fp8)
            forms = [form for form in FORMS if form in spent[1] or form in spent[4096]]
            print(f"{'rows':>6}" + "".join(f"{form:>17}" for form in forms))
            for rows, took in spent.items():
                cells = [f"{took[form]:9.4f} {took['dense'] / took[form]:5.2f}x" if form in took else "-" for form in forms]
                print(f"{rows:>6}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
            shares = [f"{form} {held[form] / spent[1][form] * 1e3 / peak:.0%}" for form in held if form in spent[1]]
            print(f"of the copy's bandwidth at one row: {', '.join(shares)}", flush=True)


@torch.no_grad()
def whole_model(layers: int, forms: list[str], static: bool) -> None:
    """One token and a prompt of 2048 through a model of Llama-2-7B's shape, dense and packed, and `generate`."""
    from hf_prune.runtimes.plans import replayed

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32000, dtype="bfloat16"
    )  # fmt: skip
    prompt = torch.randint(0, 32000, (1, 2048), device="cuda")
    words = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
    ways = {"generate, a token (eager)": words}
    if static:
        ways["generate, a token (static cache)"] = words | {"cache_implementation": "static"}

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def measured(model: torch.nn.Module) -> dict[str, float]:
        times = {}
        for name, rows in (("decode, 1 token", 1), ("4 tokens", 4), ("16 tokens", 16), ("prefill, 2048 tokens", 2048)):
            times[f"{name} (CUDA graph)"] = milliseconds_of(replayed(partial(model, prompt[:, :rows], use_cache=False)))
        for name, how in ways.items():
            torch._dynamo.reset()
            for _ in range(2):  # the second records what the first compiled
                model.generate(prompt[:, :16], **how)
            times[name] = milliseconds_of(partial(model.generate, prompt[:, :16], **how), 3) / 64
        return times

    dense = measured(fresh())
    for form in forms:
        pattern, dtype = MODELS[form]
        model = fresh()
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(pattern(module.weight))
        print(f"\n7B-shaped, {layers} blocks, {form}\n{hf_prune.to_semi_structured(model, dtype=dtype)}")
        for name, took in measured(model).items():
            print(f"{name:<36}{dense[name]:9.3f} ms dense {took:9.3f} ms packed {dense[name] / took:6.2f}x", flush=True)
        del model


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
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="whose linears; none: no table")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--forms", nargs="*", default=list(MODELS), choices=list(MODELS), help="of the whole model; none: no model"
    )
    parser.add_argument("--static", action="store_true", help="also generate with a static cache, which compiles the model")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: no CUDA device. On a machine with one: pip install '.[sparse]' && python benchmarks/sparse24.py")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if args.forms:
        whole_model(args.layers, args.forms, args.static)
    if args.models:
        linears(args.models)
    return 0


if __name__ == "__main__":
    sys.exit(main())
