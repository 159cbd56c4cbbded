"""Words of the command line that are wrong end with a message and the exit code 2, before long work."""

import pytest
import torch
from conftest import make

from hf_prune.cli import main, value_of


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
