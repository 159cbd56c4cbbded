"""The cards in `model_cards/` are what their runs measured: every number in them is in the JSON beside."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_prune import PruningReport
from hf_prune.model_card import render


FOLDER = Path(__file__).parent.parent / "model_cards"
CARDS = sorted(FOLDER.glob("*.md"))


def numbers(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from re.findall(r"\d+(?:\.\d+)*", str(key))
            yield from numbers(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, str):
        yield from re.findall(r"\d+(?:\.\d+)*", value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def test_there_are_cards():
    assert {"smollm2-135m-gblm-2-4.md", "smollm2-135m-sparsegpt-50.md"} <= {path.name for path in CARDS}


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_number_was_measured(path):
    result = json.loads(path.with_suffix(".json").read_text())
    report = result["report"]
    known = list(numbers(result))
    masks = sum(size for name, size in result["sizes"].items() if "masks" in name)
    blocks = [sum(linear["sparsity"] for linear in b["linears"]) / len(b["linears"]) for b in report["blocks"]]
    known += [
        masks / 1e6,
        (sum(result["sizes"].values()) - masks) / 1e6,
        report["peak_memory"] / 2**30,
        *blocks,
        100 * report["sparsity"],
    ]
    known += range(len(report["blocks"]))
    text = ModelCard.load(path).text
    fixed = {"2", "4"} | set(re.findall(r"\d+(?:\.\d+)*", "arXiv 2311.04902 2301.00774 SmolLM2 135M 2:4 0.5"))
    written = re.findall(r"\d+(?:\.\d+)*", text)
    assert len(written) > 60
    for number in written:
        if number in fixed or number in known:
            continue
        digits = len(number.partition(".")[2])
        assert number.count(".") <= 1 and any(
            isinstance(value, (int, float)) and f"{value:.{digits}f}" == number for value in known
        ), f"{number} is in no result"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_are_rendered_by_this_code(path):
    spec = importlib.util.spec_from_file_location("make_cards", FOLDER / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert path.read_text(encoding="utf-8") == make.card(json.loads(path.with_suffix(".json").read_text()))
    data = ModelCard.load(path).data
    assert data.base_model == make.BASE and data.license == "apache-2.0" and data.eval_results


@pytest.mark.parametrize(
    "architecture, task, loader",
    [
        ("LlamaForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("XForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("LlamaForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("Qwen2ForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        ("LlamaForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
        ("LlavaForConditionalGeneration", "image-text-to-text", "AutoModelForImageTextToText"),
        ("Gemma3ForConditionalGeneration", "image-text-to-text", "AutoModelForImageTextToText"),
        ("GPT2DoubleHeadsModel", None, "GPT2DoubleHeadsModel"),
        ("OfRemoteCodeLMHeadModel", "text-generation", "AutoModelForCausalLM"),
    ],
)
def test_a_card_is_of_the_class_that_is_saved(architecture, task, loader):
    config = {"method": "magnitude", "pattern": "2:4", "sparsity": None}
    report, sizes = PruningReport(config, "LlamaForCausalLM"), {"pruning/masks.safetensors": 1}
    card = ModelCard(render(report, sizes, architecture=architecture))
    assert card.data.pipeline_tag == task and f"# {architecture}, pruned to 2:4" in card.text
    assert f"`{loader}.from_pretrained` loads it as well" in card.text
    assert "model = AutoModelForCausalLM.from_pretrained('the dense model')" in card.text  # which was pruned
    assert f"model = {loader}.from_pretrained" in render(PruningReport(config, architecture), sizes)
    kept = render(report, sizes, "---\npipeline_tag: summarization\n---\n", architecture=architecture)
    assert ModelCard(kept).data.pipeline_tag == "summarization"
