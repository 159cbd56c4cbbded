"""Prune, quantise, both: bytes and perplexity of SmolLM2-135M, and whether the zeros were kept.

`python benchmarks/quantise.py IDS` with a safetensors file of `calibration` and `evaluation` ids, as for benchmarks/export.py, whose
pruned model it takes or makes. torchao and bitsandbytes quantise the linears of the blocks, nncf those, the embedding and the head.
"Packed" is what `to_semi_structured(dtype=...)` multiplies on a GPU, computed here in float32 with the same numbers: weights of 8 bits for
a few rows; for many the activations too, token by token.
"""

import argparse
import pathlib
import tempfile

import smollm2
import torch
from export import perplexity, pruned
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_prune
from hf_prune.runtimes.eight_bits import dequantised, quantised


SCHEMES = {
    "none": None,
    "torchao int8": Int8WeightOnlyConfig(),
    "torchao int4, groups of 64": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "packed int8, a few rows": torch.int8,
    "packed int8, many rows": torch.int8,
    "packed fp8, a few rows": torch.float8_e4m3fn,
    "packed fp8, many rows": torch.float8_e4m3fn,
    "nncf int8 (OpenVINO)": "int8",
    "nncf int4, groups of 64": "int4",
}


def stored_bytes(model: torch.nn.Module) -> int:
    """Of all parameters, those of a quantised tensor being the tensors that it holds."""
    total, seen = 0, set()
    for parameter in model.parameters():
        tensors = [parameter]
        while tensors:
            tensor = tensors.pop()
            if hasattr(tensor, "__tensor_flatten__"):
                tensors += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            elif tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel() * tensor.element_size()
    return total


def pack(model: torch.nn.Module, dtype: torch.dtype, many: bool) -> int:
    """Quantises the pruned linears as they are packed, and their inputs if there are `many`; returns the bytes saved by packing."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return dequantised(*quantised(x.flatten(0, -2), dtype), x.dtype).view(x.shape)

    saved = 0
    for name in model.pruning_masks:
        linear = model.get_submodule(name.removesuffix(".weight"))
        linear.weight.data = rounded(linear.weight.data)
        saved += linear.weight.numel() * linear.weight.element_size() - linear.weight.numel() * 5 // 8 - len(linear.weight) * 4
        if many:
            linear.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
    return saved


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", help="safetensors file with `calibration` and `evaluation` (sequences, length)")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/export"))
    parser.add_argument("--models", nargs="+", default=["dense", "2:4"], choices=("dense", "2:4"))
    parser.add_argument("--schemes", nargs="+", default=[*SCHEMES], choices=SCHEMES)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    ids = {name: value.long() for name, value in load_file(args.ids).items()}
    windows = ids["evaluation"][: args.windows]
    print(f"{'quantised':<28}{'model':<8}{'pruned weights, all zero':>25}{'MiB':>8}{'perplexity':>12}", flush=True)
    for name in args.models:
        for scheme in args.schemes:
            model = smollm2.load()[0]() if name == "dense" else pruned(args.work, ids["calibration"])
            config, checked = SCHEMES[scheme], 0
            if scheme.startswith("nncf"):
                folder = args.work / f"{name.replace(':', '-')}-openvino-{config}"
                if not folder.exists():
                    hf_prune.export(model, folder, format="openvino", weights=config)
                checked = hf_prune.check_zeros(folder, model) if name == "2:4" else 0
                size = sum(path.stat().st_size for path in folder.glob("*.bin"))
                tell(scheme, name, checked, size, perplexity(hf_prune.load_exported(folder), windows))
                continue
            if scheme.startswith("bitsandbytes"):  # it quantises while a model is loaded
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder)
                    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
                    checked = hf_prune.check_zeros(model) if name == "2:4" else 0
            elif scheme.startswith("packed"):
                if name == "2:4":
                    size = stored_bytes(model) - pack(model, config, scheme.endswith("many rows"))
                    tell(scheme, name, hf_prune.check_zeros(model), size, perplexity(model, windows))
                continue
            elif config is not None and name == "dense":
                quantize_(
                    model, config, filter_fn=lambda module, path: isinstance(module, torch.nn.Linear) and "layers" in path
                )
            elif config is not None:
                checked = hf_prune.quantise(model, config)
            elif name == "2:4":
                checked = hf_prune.check_zeros(model)
            tell(scheme, name, checked, stored_bytes(model), perplexity(model, windows))


def tell(scheme: str, name: str, checked: int, size: int, value: float) -> None:
    """One line of the table."""
    print(f"{scheme:<28}{name:<8}{checked or '-':>25}{size / 2**20:>8.0f}{value:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
