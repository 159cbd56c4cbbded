"""What `advise` tells before anyone prunes: shapes, sizes, speed on this CPU, a recommendation."""

import json
import re
import sys

import pytest
import torch
from conftest import make
from transformers import LlamaConfig, T5Config

import hf_prune
from hf_prune.cli import main
from hf_prune.runtimes import advise as advising


SMALL = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Few rows and one matrix of each shape."""
    monkeypatch.setattr(advising, "ROWS", (1, 2, 3))
    monkeypatch.setattr(advising, "COLD", 1)


def config(**changes):
    return LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128, **changes})


def test_shapes_and_sizes(tmp_path):
    """A 2:4 model's folders, ordinary and compact, have the sizes that were told of them."""
    model = make("llama", hidden_size=256, intermediate_size=512, dtype=torch.bfloat16)
    advice = hf_prune.advise(model.config, dtype=torch.bfloat16)
    assert [(str(shape), shape.count) for shape in advice.shapes] == [
        ("(256, 256)", 4), ("(128, 256)", 4), ("(512, 256)", 4), ("(256, 512)", 2)
    ]  # fmt: skip
    assert advice.shapes[2].names == ["model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"]
    assert advice.parameters == sum(parameter.numel() for parameter in model.parameters())
    model.prune(hf_prune.PruningConfig("magnitude", pattern="2:4"))
    for compact, name in ((False, "2:4, ordinary folder"), (True, "2:4, compact folder")):
        model.save_pretrained(tmp_path, compact=compact)
        there = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
        assert there == pytest.approx(advice.sizes[name][0], rel=0.02)
    assert advice.sizes["dense"][1] == sum(parameter.nbytes for parameter in model.parameters())


def test_impossible_shapes_are_named():
    advice = hf_prune.advise(config(hidden_size=30, num_attention_heads=3, intermediate_size=64), dtype=torch.float16)
    impossible = [str(shape) for shape in advice.shapes if "2:4" in shape.problems]
    assert impossible == ["(30, 30)", "(10, 30)", "(64, 30)"] and advice.recommendation != "2:4"
    assert (
        "in_features 30 is not divisible by 4: model.layers.*.self_attn.q_proj, model.layers.*.self_attn.o_proj (30, 30)"
        in str(advice)
    )
    assert not any(name.startswith("2:4") for name in advice.sizes)
    fits = next(shape for shape in advice.shapes if str(shape) == "(30, 64)")
    assert set(fits.problems) == {"2:4, torch CUTLASS", "2:4, cuSPARSELt"}  # ours pads


def test_what_is_not_here_has_no_number():
    advice = hf_prune.advise(config())
    text = str(advice)
    for name in ("2:4, cuSPARSELt", "2:4, torch CUTLASS", "2:4, our decode kernel", "2:4, TensorRT"):
        assert name in advice.not_measured and name not in advice.speed
        assert re.search(rf"^{re.escape(name)} +not measured here: ", text, re.M), text
    exported = {"dense, ONNX Runtime CPU", "dense, OpenVINO CPU", "2:4, OpenVINO CPU"}
    assert "as fast as dense" in advice.not_measured["2:4, ONNX Runtime CPU"]
    assert set(advice.speed) - exported == {advising.STRUCTURED, "2:4, torch.sparse", "50 %, torch.sparse"}
    assert exported <= {*advice.speed, *advice.not_measured}
    assert json.loads(json.dumps(advice.to_dict()))["shapes"][0]["count"] == 4


def test_a_contender_that_fails_has_the_reason(monkeypatch):
    def refuse(weight):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(advising, "_in_torch_sparse", refuse)
    advice = hf_prune.advise(config(), dtype="bfloat16")
    assert advice.not_measured["2:4, torch.sparse"] == "not implemented for 'BFloat16'"


def test_contenders_compute_the_product():
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    expected = x @ weight.t()
    torch.testing.assert_close(advising._in_torch(weight)(x), expected)
    torch.testing.assert_close(advising._in_torch_sparse(weight)(x).t(), expected)


@pytest.mark.parametrize("library, maker", [("onnxruntime", "_in_onnxruntime"), ("openvino", "_in_openvino")])
def test_runtimes_compute_the_product(library, maker):
    pytest.importorskip(library, reason="pip install 'hf-prune[export]'")
    weight, x = advising._with_zeros(torch.randn(8, 16), "2:4"), torch.randn(3, 16)
    expected = x @ (weight + weight.roll(1, 0) + weight.roll(2, 0)).t()
    torch.testing.assert_close(torch.from_numpy(getattr(advising, maker)(weight, 3)(x)), expected)
    torch.testing.assert_close(torch.from_numpy(getattr(advising, maker)(weight, 1)(x)), x @ weight.t())
    with pytest.raises(ValueError, match="float32 only"):
        getattr(advising, maker)(weight.bfloat16(), 1)


def test_a_runtime_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    advice = hf_prune.advise(config())
    for name in ("dense, ONNX Runtime CPU", "2:4, OpenVINO CPU"):
        assert "not installed: pip install 'hf-prune[export]'" in advice.not_measured[name]
    assert not any("Runtime" in name or "OpenVINO" in name for name in advice.speed)


def test_recommendation():
    def speed(**ratios):
        return {name: dict(zip(advising.ROWS, of)) for name, of in ratios.items()}

    structured = {advising.STRUCTURED: (1.4, 1.3, 1.4)}
    slow = {"2:4, torch.sparse": (0.02, 0.9, 0.6), "50 %, torch.sparse": (0.02, 1.2, 0.6)}
    kind, why = advising._recommendation(speed(**structured, **slow))
    assert kind == "structured" and "2:4, torch.sparse (0.02x at 1, 0.90x at 2, 0.60x at 3)" in why
    assert advising._recommendation(speed(**slow))[0] == "nothing"
    gpu = {"2:4, our decode kernel": (1.7, 1.5, 1.0), "2:4, cuSPARSELt": (0.1, 0.2, 1.6)}
    assert advising._recommendation(speed(**structured, **gpu))[0] == "2:4"
    kind, why = advising._recommendation(speed(**structured, **dict.fromkeys(advising.EIGHT_BITS, (2.5, 2.0, 2.0))))
    assert kind == "structured" and "quantised too: 2:4 int8, packed (2.50x at 1, 2.00x at 2, 2.00x at 3)" in why
    assert advising._recommendation(speed(**{"50 %, x": (1.5, 1.5, 1.5)}))[0] == "unstructured"
    runtime = {"dense, OpenVINO CPU": (2.0, 1.5, 1.0), "2:4, OpenVINO CPU": (2.02, 1.5, 1.0)}
    kind, why = advising._recommendation(speed(**runtime))  # it is the runtime that gains, not its zeros
    assert kind == "nothing" and "2:4, OpenVINO CPU (1.01x at 1, 1.00x at 2, 1.00x at 3)" in why
    assert "Faster without any pruning, exported: OpenVINO CPU (2.00x at 1, 1.50x at 2, 1.00x at 3)" in why
    runtime = {"dense, OpenVINO CPU": (0.05, 0.09, 0.12), "2:4, OpenVINO CPU": (0.08, 0.09, 0.13)}
    assert advising._recommendation(speed(**runtime))[0] == "nothing"  # slower than torch, whatever its zeros gain
    runtime = {"dense, OpenVINO CPU": (0.5, 1.5, 1.0), "2:4, OpenVINO CPU": (1.2, 1.8, 1.2)}
    kind, why = advising._recommendation(speed(**runtime))
    assert kind == "2:4" and "1.20x at 2, 1.20x at 3 rows, over dense in torch and in OpenVINO CPU, whichever is faster" in why


def test_command_line(tmp_path, capsys):
    config(dtype="bfloat16").save_pretrained(tmp_path)
    assert main(["advise", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "LlamaForCausalLM" and told["dtype"] == "bfloat16" and told["device"].startswith("CPU")
    assert main(["advise", str(tmp_path), "--dtype", "float32"]) == 0
    assert "recommendation: " in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["advise", str(tmp_path / "empty")]) == 2 and "no folder or Hub name of a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (([1, 2],), TypeError, "a folder or Hub name, got a list"),
        ((torch.nn.Linear(2, 2),), TypeError, "got a Linear"),
        ((T5Config(),), ValueError, "the config holds a model of a T5Config, which has an encoder too"),
        ((config(), "tpu"), ValueError, "got device 'tpu'"),
        ((config(), "cuda"), ValueError, "got device 'cuda'"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        hf_prune.advise(*arguments)
    with pytest.raises(ValueError, match="'int8'"):
        hf_prune.advise(config(), dtype="int8")


def test_packing_is_refused_on_a_cpu():
    pytest.importorskip("triton")
    model = make("llama", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs CUDA and the model is on cpu.*no CUDA device.*taylor.*advise"):
        hf_prune.to_semi_structured(model)
