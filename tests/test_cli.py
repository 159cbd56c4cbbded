"""Words of the command line that are wrong end with a message and the exit code 2, before long work."""

import json
import os

import pytest
import torch
import transformers
from conftest import ids_for, make, same, snapshot

import hf_prune
from hf_prune.cli import main, value_of


STREAMS = [[], pytest.param(["--stream"], marks=pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4"))]


@pytest.mark.parametrize(
    "text,value",
    [("True", True), ("False", False), ("None", None), ("true", True), ("null", None), ("0.5", 0.5), ("paper", "paper"), ("[1, 2]", [1, 2])],
)  # fmt: skip
def test_values_in_json_or_as_python_spells_them(text, value):
    assert value_of(text) == value and type(value_of(text)) is type(value)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--device", "bogus"], "--device 'bogus' is not here (Expected one of"),
        pytest.param(
            ["--device", "cuda"],
            "--device 'cuda' is not here (",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA"),
        ),
        (["--device", "bogus", "--stream"], "--device 'bogus' is not here"),
        (["--dtype", "float64x"], "--dtype must be one of auto, bfloat16, float16, float32, got 'float64x'"),
        (
            ["--method", "sparsegpt", "--option", "damping=abc"],
            "damping of sparsegpt must be a number of at least 0, got 'abc'",
        ),
        (["--method", "ria", "--option", "power=abc"], "power of ria must be a number of at least 0, got 'abc'"),
        (["--method", "taylor", "--option", "compensate=no"], "compensate of taylor must be True or False, got 'no'"),
    ],
)
def test_wrong_words(words, message, tmp_path, capsys):
    make("llama").save_pretrained(tmp_path / "dense")
    assert main(["prune", str(tmp_path / "dense"), str(tmp_path / "out"), "--method", "magnitude", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_device_for_perplexity(tmp_path, capsys):
    assert main(["perplexity", str(tmp_path), "text.txt", "--device", "bogus"]) == 2
    assert "--device 'bogus' is not here" in capsys.readouterr().err


def llava():
    """A random model that sees and has two text blocks."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    eyes = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(vision_config=eyes, text_config=make("llama").config, image_token_index=127)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def with_own_code(folder):
    """Makes `folder` that of a model whose Python code lies in it."""
    make("llama").save_pretrained(folder)
    (folder / "modeling_x.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class XConfig(LlamaConfig):\n    model_type = 'xmodel'\n\n\n"
        "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n"
    )
    auto = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "xmodel", "architectures": ["XForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_classifier(folder):
    transformers.LlamaForSequenceClassification(make("llama").config).save_pretrained(folder)


def save_t5(folder):
    sizes = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(folder)


def save_encoder(folder):
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    transformers.AutoModel.from_config(transformers.ViTConfig(**sizes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    "save, words",
    [
        (save_classifier, "holds a LlamaForSequenceClassification, which is no causal language model: "),
        (save_t5, "holds a T5ForConditionalGeneration, which has an encoder too: "),
        (save_encoder, "holds a model of a ViTConfig, which is no causal language model: "),
    ],
)
def test_no_causal_language_model(save, words, stream, tmp_path, capsys):
    save(tmp_path / "src")
    assert main(["prune", str(tmp_path / "src"), str(tmp_path / "out"), "--method", "magnitude", *stream]) == 2
    told = capsys.readouterr().err
    assert f"src {words}" in told and len(told.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert main(["advise", str(tmp_path / "src")]) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("stream", STREAMS)
def test_a_model_that_sees(stream, tmp_path, capsys, tokenizer):
    model = llava()
    model.save_pretrained(tmp_path / "src")
    tokenizer.save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "text.txt").write_text(" ".join(str(i) for i in ids_for(1, 100)[0].tolist()))
    out = str(tmp_path / "out")
    assert main(["prune", str(tmp_path / "src"), out, "--method", "magnitude", "--pattern", "2:4", *stream]) == 0
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    model.prune(hf_prune.PruningConfig("magnitude", pattern="2:4"))
    again = hf_prune.load(out)
    assert type(again) is type(model) and same(again, snapshot(model)) and len(again.pruning_masks) == 14
    assert main(["inspect", out]) == 0 and "zeros and masks agree" in capsys.readouterr().out
    assert main(["perplexity", out, str(tmp_path / "text.txt"), "--sequence-length", "32"]) == 0


@pytest.mark.parametrize("words", [["--compact"], ["--resume-dir", "journal"], *STREAMS[1:]])
def test_code_that_comes_with_a_model(words, tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained(with_own_code(tmp_path / "src"))
    (tmp_path / "text.txt").write_text(" ".join(str(i) for i in ids_for(1, 400)[0].tolist()))
    data = ["--calibration", "text.txt", "--n-samples", "6", "--sequence-length", "24"]
    command = ["prune", "src", "out", "--pattern", "2:4", *data, *words]
    assert main(command) == 2
    assert "Please pass --trust-remote-code" in capsys.readouterr().err and not os.path.exists("out")
    assert main([*command, "--trust-remote-code"]) == 0
    assert main(["inspect", "out", "--trust-remote-code"]) == 0 and "zeros and masks agree" in capsys.readouterr().out
    assert main(["perplexity", "out", "text.txt", "--sequence-length", "24", "--trust-remote-code"]) == 0
    model = hf_prune.load(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "XForCausalLM" and model.pruning_masks.sparsity() == 0.5
    assert os.path.exists("out/modeling_x.py")


def test_advice_on_code_that_comes_with_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_prune.runtimes.advise._measure", lambda *given: ({}, {}))
    folder = str(with_own_code(tmp_path / "src"))
    assert main(["advise", folder]) == 2 and "Please pass --trust-remote-code" in capsys.readouterr().err
    assert main(["advise", folder, "--trust-remote-code"]) == 0 and "XForCausalLM" in capsys.readouterr().out
