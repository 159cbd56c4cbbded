"""Exports: every mask is found again in the graph, outputs and generation are torch's, quantisation keeps zeros, and what is refused.

Runs with Transformers' own exporters where it has them, else with Optimum's.
"""

import importlib.metadata
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ids_for, make, same, snapshot
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import hf_prune
from hf_prune.cli import main
from hf_prune.masks import Masks
from hf_prune.runtimes import exporting, graph, quantised
from hf_prune.runtimes.exported import REPORT
from hf_prune.runtimes.quantised import as_read


onnx = pytest.importorskip("onnx")
NATIVE = exporting._is_native()
HERE = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
FORMATS = [
    pytest.param(format, marks=pytest.mark.skipif(not NATIVE and name not in HERE, reason="no exporter for it here"))
    for format, (name, _) in exporting.LEGACY.items()
]


def pruned(family: str = "llama", pattern: str = "2:4", **changes):
    model = make(family, **changes)
    model.prune(hf_prune.PruningConfig("magnitude", pattern=pattern))
    return model


@pytest.fixture(scope="session")
def exports(tmp_path_factory, tokenizer):
    """Format -> the pruned model, its export and the report, made when first asked for."""
    made = {}

    def export(format: str):
        if format not in made:
            model, folder = pruned(), tmp_path_factory.mktemp("export") / format
            made[format] = model, folder, hf_prune.export(model, folder, format=format, tokenizer=tokenizer, pattern="2:4")
        return made[format]

    return export


@pytest.mark.parametrize("format", FORMATS)
def test_every_mask_is_in_the_graph(exports, format):
    model, folder, report = exports(format)
    masks = model.pruning_masks
    assert {f"{one.linear}.weight" for one in report.linears} == set(masks) and not report.problems
    assert sum(one.pruned for one in report.linears) == sum(masks[name].numel() - masks.kept(name) for name in masks)
    assert {(one.violations, one.off_pattern, one.pattern) for one in report.linears} == {(0, 0, "2:4")}
    assert report.max_difference < 1e-5 and report.same_choice == 1 and report.size > 0
    assert json.loads((folder / REPORT).read_text())["linears"][0]["linear"] == report.linears[0].linear
    assert hf_prune.check_zeros(folder, model) == sum(one.pruned for one in report.linears)
    assert (folder / "tokenizer.json").is_file() and not list(folder.parent.glob(".*.tmp"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_lost_zero_is_told(exports, format):
    model, folder, _ = exports(format)
    masks = Masks({name: mask.clone() for name, mask in model.pruning_masks.items()})
    masks.patterns = {**model.pruning_masks.patterns, "model.layers.0.mlp.up_proj.weight": "1:4"}
    name = "model.layers.1.mlp.down_proj.weight"
    row = masks[name]
    row[3, row[3].nonzero()[0]] = False  # a weight that is not zero in the graph
    masks[name] = row
    found, missing = graph.zeros_in_graphs(folder, format, model, masks)
    assert [one.linear for one in found if one.violations == 1] == ["model.layers.1.mlp.down_proj"] and not missing
    assert [one.linear for one in found if one.off_pattern] == ["model.layers.0.mlp.up_proj"]
    _, missing = graph.zeros_in_graphs(folder, format, pruned(seed=1), model.pruning_masks)  # another model's graph
    assert len(missing) == len(masks)
    with pytest.raises(ValueError, match="not found.*symmetrically"):
        hf_prune.check_zeros(folder, pruned(seed=1))


@pytest.mark.parametrize("format", FORMATS)
def test_generation_is_torchs(exports, format):
    model, folder, _ = exports(format)
    exported, ids = hf_prune.load_exported(folder), ids_for(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # a shorter prompt in the batch
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(exported.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_export_is_an_error(exports, format, tmp_path):
    shutil.copytree(exports(format)[1], tmp_path / "model")
    for path in [path for path in (tmp_path / "model").iterdir() if path.suffix in (".onnx", ".data", ".xml", ".bin")]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="model cannot be loaded"):
            hf_prune.load_exported(tmp_path / "model")
        path.write_bytes(whole)
    if NATIVE:
        (tmp_path / "model" / "export.json").unlink()
        with pytest.raises(ValueError, match="has no export.json"):
            hf_prune.load_exported(tmp_path / "model")


def test_nothing_is_written_where_it_cannot_be(tmp_path, monkeypatch):
    model = pruned(pattern="unstructured")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        hf_prune.export(model, tmp_path / "there")
    with pytest.raises(ValueError, match="format must be one of"):
        hf_prune.export(model, tmp_path / "new", format="tflite")
    with pytest.raises(ValueError, match="pattern='2:4' was asked for.*unstructured:0.5"):
        hf_prune.export(model, tmp_path / "new", pattern="2:4")
    with pytest.raises(ValueError, match="not written by hf_prune.export"):
        hf_prune.load_exported(tmp_path / "there")
    part = make("llama")
    part.prune(hf_prune.PruningConfig("magnitude", pattern="2:4", include=["*.q_proj"]))
    with pytest.raises(ValueError, match="pattern='2:4' was asked for throughout, but 12 linears have no mask.*k_proj"):
        hf_prune.export(part, tmp_path / "new", pattern="2:4")
    with pytest.raises(ValueError, match=r"bfloat16 on a CPU: export model.float\(\)"):
        hf_prune.export(make("llama", dtype=torch.bfloat16), tmp_path / "new")

    def fails(model, folder):
        (folder / "model.onnx").write_bytes(b"half")
        try:
            raise KeyError("no translation of aten.odd")
        except KeyError as error:
            raise RuntimeError("outer") from error

    monkeypatch.setattr(exporting, "_exporter", lambda *_: ("exporter 1.0", fails))
    with pytest.raises(ValueError, match="exporter 1.0 cannot export this LlamaForCausalLM.*aten.odd"):
        hf_prune.export(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_graph_that_does_not_run_leaves_nothing(tmp_path, monkeypatch):
    class OddError(Exception):
        pass

    def fails(*_):
        raise OddError("no kernel for Mul")

    def writes(model, folder):
        (folder / "model.onnx").write_bytes(b"whole")

    monkeypatch.setattr(exporting, "_exporter", lambda *_: ("exporter 1.0", writes))
    monkeypatch.setattr(exporting, "zeros_in_graphs", lambda *_: ([], []))
    monkeypatch.setattr(exporting, "in_runtime", fails)
    with pytest.raises(ValueError, match="the exported LlamaForCausalLM in float32 does not run: no kernel for Mul"):
        hf_prune.export(pruned(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not NATIVE, reason="transformers without exporters")
def test_a_folder_in_bfloat16_is_exported_in_float32(tmp_path):
    model = pruned(dtype=torch.bfloat16, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--pattern", "2:4"]) == 0
    report, exported = json.loads((tmp_path / "out" / REPORT).read_text()), hf_prune.load_exported(tmp_path / "out")
    assert {one["stored"] for one in report["linears"]} == {"float"} and not report["problems"]
    ids = ids_for(1, 5)
    words = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(exported.generate(ids, **words), model.float().generate(ids, **words))


def test_missing_exporters_name_the_extra(monkeypatch, tmp_path, llama):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    monkeypatch.setattr(exporting, "_is_native", lambda: True)
    with pytest.raises(ImportError, match=r"needs openvino: .*hf-prune\[export\]"):
        hf_prune.export(llama, tmp_path / "new", format="openvino")
    with pytest.raises(ImportError, match=r"hf-prune\[quantise\]"):
        hf_prune.export(llama, tmp_path / "new", weights="int8")
    monkeypatch.setattr(exporting, "_is_native", lambda: False)
    monkeypatch.setattr(exporting, "LEGACY", {"onnx": ("optimum-none", "onnx-legacy")})
    with pytest.raises(ImportError, match=r"optimum-none, pip install 'hf-prune\[onnx-legacy\]'; here is transformers"):
        hf_prune.export(llama, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not NATIVE, reason="transformers without exporters")
def test_caches_that_are_none_are_refused(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(type(llama), "forward", lambda self, *args, **kwargs: type("Output", (), {"past_key_values": None}))
    with pytest.raises(ValueError, match="keys and values of every block"):
        hf_prune.export(llama, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def onnx_graph(path: Path, nodes: list, constants: dict[str, numpy.ndarray]) -> None:
    helper = onnx.helper
    values = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", None])
    y = helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], values)), path)


def test_experts_of_one_parameter_may_have_several_patterns():
    filled = numpy.ones((2, 8), bool)
    assert graph._counts(filled, ~filled, "2:4, 4:8") == (16, 16, None)


@pytest.mark.parametrize("how", ["merged", "gemm", "half", "folded", "int8", "integer", "bits"])
def test_whatever_the_graph_made_of_a_linear(tmp_path, how):
    model = pruned()
    attention, node = model.model.layers[0].self_attn, onnx.helper.make_node
    weights = [linear.weight.detach().numpy() for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    merged = numpy.concatenate(weights)
    scale = numpy.abs(merged).max(1, keepdims=True) / 127
    q = numpy.round(merged / scale).astype(numpy.int8)
    four = numpy.clip(numpy.round(merged / (scale * 18)) + 8, 0, 15).astype(numpy.uint8)
    nodes, constants = {
        "merged": ([node("MatMul", ["x", "w"], ["y"])], {"w": merged.T.copy()}),
        "gemm": ([node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": merged}),
        "half": ([node("Cast", ["w"], ["c"], to=1), node("MatMul", ["x", "c"], ["y"])], {"w": merged.T.astype(numpy.float16)}),
        "folded": ([node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])], {"w": merged}),
        "int8": (
            [node("DequantizeLinear", ["w", "s"], ["d"], axis=1), node("MatMul", ["x", "d"], ["y"])],
            {"w": q.T.copy(), "s": scale[:, 0]},
        ),
        "integer": ([node("MatMulInteger", ["x", "w", "", "z"], ["y"])], {"w": (q.T + 0.0 + 9).astype(numpy.uint8), "z": numpy.uint8(9)}),
        "bits": (
            [node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=32, N=64, bits=4, block_size=32)],
            {"w": (four[:, ::2] | four[:, 1::2] << 4)[:, None, :], "s": scale[:, 0] * 18},
        ),
    }[how]  # fmt: skip
    if how == "integer":  # unsigned with a zero point: negative numbers need a larger one
        constants = {"w": (q.T.astype(numpy.int16) + 128).astype(numpy.uint8), "z": numpy.array(128, numpy.uint8)}
    onnx_graph(tmp_path / "model.onnx", nodes, constants)
    names = [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]
    masks = model.pruning_masks.renamed({name: name for name in names})
    found, missing = graph.zeros_in_graphs(tmp_path, "onnx", model, masks)
    assert [(one.rows, one.at, one.violations, one.off_pattern) for one in found] == [
        ((0, 32), 0, 0, 0), ((0, 16), 32, 0, 0), ((0, 16), 48, 0, 0),
    ]  # fmt: skip
    assert not missing and {one.constant for one in found} == {"w"}


class TestQuantised:
    def test_torchao_keeps_zeros_or_is_refused(self):
        torchao = pytest.importorskip("torchao.quantization")
        model = pruned()
        pruned_weights = round(model.pruning_masks.sparsity() * model.pruning_masks.numel())
        assert hf_prune.quantise(model, torchao.Int8WeightOnlyConfig()) == pruned_weights
        assert hf_prune.check_zeros(model, pruned()) == pruned_weights
        for config in ("int8", None):
            with pytest.raises(TypeError, match="config must be one of torchao's"):
                hf_prune.quantise(pruned(), config)
        four = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
        assert hf_prune.quantise(pruned("qwen2"), four) > 0

    def test_torchao_at_loading(self, tmp_path):
        torchao = pytest.importorskip("torchao.quantization")
        config, model = torchao.Int8WeightOnlyConfig(), pruned().bfloat16()
        count = round(model.pruning_masks.sparsity() * model.pruning_masks.numel())
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config))
        assert loaded.pruning_masks.digest() == model.pruning_masks.digest() and hf_prune.check_zeros(loaded) == count
        if NATIVE:  # 4.57 writes no safetensors of it
            loaded.save_pretrained(tmp_path / "again")
            assert hf_prune.check_zeros(hf_prune.load(tmp_path / "again")) == count
        hf_prune.quantise(model, config)
        for one in (loaded, model):
            for refused in (
                partial(one.prune, hf_prune.PruningConfig("magnitude")), partial(hf_prune.quantise, one, config),
                partial(hf_prune.export, one, tmp_path / "out", format="openvino"), partial(one.pruning_masks.apply, one),
                partial(one.save_pretrained, tmp_path / "out", compact=True),
            ):  # fmt: skip
                with pytest.raises(ValueError, match="quanti[sz]e"):
                    refused()

    def test_torchao_leaves_what_is_no_linear(self, monkeypatch):
        torchao = pytest.importorskip("torchao.quantization")
        told = []
        monkeypatch.setattr(quantised.logger, "warning", told.append)
        model = pruned("gpt2")  # of Conv1D
        before = snapshot(model)
        with pytest.raises(ValueError, match="quantises no pruned weight of this GPT2LMHeadModel.*Conv1D.*hf_prune.export"):
            hf_prune.quantise(model, torchao.Int8WeightOnlyConfig())
        assert same(model, before) and not told
        model = pruned("mixtral")
        masks = model.pruning_masks
        linears = [name for name in masks if ".self_attn." in name]
        count = hf_prune.quantise(model, torchao.Int8WeightOnlyConfig())
        if len(masks[next(name for name in masks if "experts" in name)].shape) == 3:
            assert count == sum(masks[name].numel() - masks.kept(name) for name in linears)
            assert "Int8WeightOnlyConfig left 4 pruned weights as they were: model.layers.0.mlp.experts" in told[0]

    @pytest.mark.parametrize(
        "scheme", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}]
    )
    def test_bitsandbytes_keeps_zeros(self, scheme, tmp_path):
        pytest.importorskip("bitsandbytes")
        model = pruned("llama", hidden_size=64, intermediate_size=128)  # its blocks are of 64
        model.save_pretrained(tmp_path)
        config = BitsAndBytesConfig(**scheme, bnb_4bit_compute_dtype=torch.float32)
        quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        linear = quantised.model.layers[0].mlp.up_proj
        assert type(linear).__module__.startswith("bitsandbytes") and not linear.weight.is_floating_point()
        pruned_weights = round(model.pruning_masks.sparsity() * model.pruning_masks.numel())
        assert hf_prune.check_zeros(quantised) == hf_prune.check_zeros(quantised, model) == pruned_weights
        read = as_read(linear, "weight")
        torch.testing.assert_close(read.float(), model.model.layers[0].mlp.up_proj.weight, atol=0.05, rtol=0.2)
        quantised.save_pretrained(tmp_path / "again")
        again = hf_prune.load(tmp_path / "again", device_map="cpu")
        assert hf_prune.check_zeros(again) == pruned_weights and again.pruning_masks.digest() == model.pruning_masks.digest()
        with pytest.raises(ValueError, match="quantised"):
            quantised.pruning_masks.apply(quantised)
        with pytest.raises(ValueError, match="quantized"):
            quantised.prune(hf_prune.PruningConfig("magnitude", sparsity=0.5))

    def test_a_scheme_without_a_zero_is_refused_before_anything_changes(self, monkeypatch):
        torchao = pytest.importorskip("torchao.quantization")

        def odd(module, config, filter_fn=None):  # numbers at odd multiples of a step: none is zero
            for linear in module.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight.data = (torch.floor(linear.weight.data / 0.01) + 0.5) * 0.01

        monkeypatch.setattr(torchao, "quantize_", odd)
        model = pruned()
        before = snapshot(model)
        with pytest.raises(ValueError, match="Int8WeightOnlyConfig does not keep pruned weights at zero.*0.005 for 0"):
            hf_prune.quantise(model, torchao.Int8WeightOnlyConfig())
        assert same(model, before)
        odd(model, None)
        with pytest.raises(ValueError, match="LlamaForCausalLM does not keep.*and 12 more linears"):
            hf_prune.check_zeros(model)

    @pytest.mark.parametrize(("kind", "keeps"), [("Q8_0", True), ("Q4_0", True), ("Q4_1", False)])
    def test_gguf(self, kind, keeps):
        gguf = pytest.importorskip("gguf")
        model, kind = pruned(), gguf.GGMLQuantizationType[kind]
        for name in model.pruning_masks:
            weight = model.get_parameter(name).data
            stored = gguf.quants.quantize(weight.numpy(), kind)
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind).copy()))
        if keeps:
            assert hf_prune.check_zeros(model, pruned()) == 9216
        else:  # a minimum and a scale: zero falls between two numbers
            with pytest.raises(ValueError, match="does not keep pruned weights at zero.*more linears"):
                hf_prune.check_zeros(model, pruned().pruning_masks)

    def test_of_an_export_by_its_own_tools(self, exports, tmp_path):
        quantization = pytest.importorskip("onnxruntime.quantization")
        if not NATIVE:
            pytest.skip("one export is enough")
        model, folder, report = exports("onnx")
        (tmp_path / "pruning").mkdir()
        (tmp_path / REPORT).write_text((folder / REPORT).read_text())
        graph_file = onnx.load(folder / "model.onnx")
        del graph_file.graph.value_info[:]  # ONNX Runtime's quantizer stumbles over shapes of what it transposes
        quantization.quantize_dynamic(
            graph_file,
            tmp_path / "model.onnx",
            weight_type=quantization.QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        )
        assert hf_prune.check_zeros(tmp_path, model) == sum(one.pruned for one in report.linears)
        found, _ = graph.zeros_in_graphs(tmp_path, "onnx", model, model.pruning_masks)
        assert {one.stored for one in found} == {"int8"}

    @pytest.mark.skipif(not NATIVE, reason="one way to quantise is enough")
    def test_an_export_in_four_bits_of_a_smaller_model(self, tmp_path):
        pytest.importorskip("nncf")
        model = make("gpt2")
        model.prune(hf_prune.PruningConfig("taylor", pattern="ffn:0.5"), list(ids_for()))
        model.prune(hf_prune.PruningConfig("magnitude", pattern="2:4"))
        report = hf_prune.export(model, tmp_path / "out", format="openvino", weights="int4")
        assert {one.stored for one in report.linears} == {"i4"} and not sum(one.violations for one in report.linears)
        assert report.max_difference > 0 and hf_prune.load_exported(tmp_path / "out").config.n_inner == 64


class TestOptimumCli:
    def run(self, monkeypatch, *words):
        monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
        main = pytest.importorskip("optimum.commands.optimum_cli").main
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    def test_prune(self, monkeypatch, tmp_path, llama, tokenizer):
        llama.save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        words = (tmp_path / "dense", tmp_path / "out", "--method", "magnitude", "--pattern", "4:8")
        assert self.run(monkeypatch, "prune", *words) == 0
        assert set(hf_prune.load(tmp_path / "out").pruning_masks.patterns.values()) == {"4:8"}

    def test_compact_is_for_zeros(self, monkeypatch, tmp_path, capsys):
        words = ("nowhere", tmp_path / "out", "--method", "taylor", "--pattern", "ffn:0.25", "--calibration", "x", "--compact")
        assert self.run(monkeypatch, "prune", *words) == 2
        assert "the model is smaller as it is" in capsys.readouterr().err

    def test_export_of_what_is_not_2_4(self, monkeypatch, tmp_path, llama, capsys):
        llama.save_pretrained(tmp_path / "dense")
        assert self.run(monkeypatch, "export", "sparse24", tmp_path / "dense", tmp_path / "out", "--format", "openvino") == 2
        assert "pattern='2:4' was asked for, but the masks of this model are: none" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
