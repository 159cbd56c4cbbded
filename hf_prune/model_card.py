"""Model cards: what was pruned, how, and what was measured, as a section of README.md between two markers.

Everything in the section comes from the report; what was not measured is said to be so. Outside of the markers a card belongs
to its owner: saving again replaces the section and our keys of the metadata, and leaves the rest as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers.models.auto import modeling_auto
from transformers.utils import logging
from yaml import YAMLError

from .masks import MASK_FILE
from .methods.base import REGISTRY
from .report import PruningReport
from .serialization import FOLDER, file_of, is_weight_file


logger = logging.get_logger(__name__)

CARD = "README.md"
BEGIN = "<!-- hf_prune:begin, replaced when the model is saved; write above or below -->"
END = "<!-- hf_prune:end -->"

_SECTION = re.compile(r"<!-- hf_prune:begin(?:(?!hf_prune:begin).)*?hf_prune:end -->", re.S)
_METADATA = re.compile(r"\A\s*---\r?\n.*?\n---\r?\n", re.S)
_TITLES = {"alps": "ALPS", "sparsegpt": "SparseGPT", "gblm": "GBLM", "ria": "RIA", "wanda": "Wanda"}


def write_card(folder: Path, report: PruningReport, *, old: str | None, base: str | None, tags: Sequence[str] = ()) -> None:
    """Writes README.md for the weights that are in `folder` by now; see `render`.

    A card whose metadata nobody can read is left as it is, with a warning: it is no reason not to save a model.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    try:
        text = render(report, sizes, old, base, tags, _architecture(folder))
    except (ValueError, TypeError, YAMLError) as error:
        logger.warning(f"{CARD} is left as it was, its metadata cannot be read: {error}")
        return
    write_text(folder, text)


def write_text(folder: Path, text: str) -> None:
    """README.md, with the bytes that `card_of` found."""
    (folder / CARD).write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def render(
    report: PruningReport,
    sizes: dict[str, int],
    old: str | None = None,
    base: str | None = None,
    tags: Sequence[str] = (),
    architecture: str | None = None,
) -> str:
    """The text of a README.md.

    Args:
        sizes: bytes of the safetensors files, by their names relative to the model folder.
        old: the card that is there already; what its owner wrote stays.
        base: the card of the dense model, whose license is carried over.
        tags: more tags.
        architecture: name of the class that is saved; None is that which was pruned.

    Raises:
        ValueError: the metadata of `old` is no YAML.
    """
    architecture = architecture or report.model
    section = f"{BEGIN}\n\n# {_title(report, architecture)}\n\n{_section(report, sizes, architecture)}\n\n{END}"
    known = (old or "").lstrip().startswith("---")
    card = ModelCard(old if known else f"---\nlibrary_name: transformers\n---\n{old or ''}")
    if _SECTION.search(card.text):
        card.text = _SECTION.sub(lambda match: section, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n" if card.text.strip() else f"\n{section}\n"
    _describe(card.data, report, tags, architecture)
    _carry_over(card.data, base)
    return str(card)


def without_section(text: str) -> str:
    """The text of a card that its owner wrote, without metadata."""
    return _SECTION.sub("", _METADATA.sub("", text)).strip()


def of_others(text: str, tags: Sequence[str] = ()) -> str:
    """A card for weights that have masks no longer: without our section, tags and results, and with `tags`."""
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, YAMLError):
        return _SECTION.sub("", text)
    if not _SECTION.search(text):
        return text
    card.text = _SECTION.sub("", card.text)
    kept = [tag for tag in card.data.tags or [] if tag not in REGISTRY and not _OURS.fullmatch(tag)]
    card.data.tags = list(dict.fromkeys([*kept, *tags])) or None
    card.data.eval_results = [known for known in card.data.eval_results or [] if known.metric_name != _METRIC] or None
    return str(card)


_METRIC = "perplexity, measured by hf_prune"
_OURS = re.compile(r"pruned|sparse|hf_prune|\d+:\d+")


_TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-text-to-text": "AutoModelForImageTextToText",
}  # pipeline tag -> the class that loads it


def _architecture(folder: Path) -> str | None:
    """Name of the class that is saved in `folder`, if its config tells."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _task(architecture: str) -> str | None:
    """Its pipeline tag, if it is one of `_TASKS`; remote code, which Transformers has not, is taken for a causal language model."""
    if architecture in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return "image-text-to-text"
    if architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "text-generation"
    found = next((task for task, auto in _TASKS.items() if architecture.endswith(auto.removeprefix("AutoModel"))), None)
    return found or (None if hasattr(transformers, architecture) else "text-generation")


def _loader(architecture: str) -> str:
    """Name of the class of Transformers that loads it."""
    return _TASKS.get(_task(architecture), architecture)


def _describe(data: ModelCardData, report: PruningReport, more: Sequence[str], architecture: str) -> None:
    """Our keys of the metadata; names, tags and results that the owner put there stay."""
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or _task(architecture)
    pattern, method = report.config["pattern"], report.config["method"]
    tags = ["pruned", "sparse", "hf_prune", method, *([pattern] if ":" in pattern else []), *more]
    others = [tag for tag in data.tags or [] if tag not in REGISTRY and not _OURS.fullmatch(tag)]
    data.tags = [*others, *(tag for tag in dict.fromkeys(tags) if tag not in others)]
    if report.base_model and "/" in report.base_model and not Path(report.base_model).is_absolute():
        data.base_model = data.base_model or report.base_model
        data.base_model_relation = getattr(data, "base_model_relation", None) or "finetune"
    results = [_result(evaluation) for evaluation in report.evaluations]
    kept = [known for known in data.eval_results or [] if known.metric_name != _METRIC]
    data.model_name = data.model_name if kept else (_title(report, architecture) if results else None)
    data.eval_results = [*kept, *results] or None


def _carry_over(data: ModelCardData, base: str | None) -> None:
    """License and language of the dense model, where its card can be read and this one says nothing."""
    if base is None or not base.lstrip().startswith("---"):
        return
    try:
        source = ModelCard(base, ignore_metadata_errors=True).data
    except (ValueError, TypeError, YAMLError) as error:
        logger.info(f"the card of the base model cannot be read: {error}")
        return
    for key in ("license", "license_name", "license_link", "language"):
        if getattr(data, key, None) is None and getattr(source, key, None) is not None:
            setattr(data, key, getattr(source, key))


def _result(evaluation: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^a-z0-9]+", "_", evaluation["dataset"].lower()).strip("_"),
        dataset_name=evaluation["dataset"],
        dataset_args={key: evaluation[key] for key in ("sequence_length", "stride", "windows", "tokens")},
        metric_type="perplexity",
        metric_name=_METRIC,
        metric_value=evaluation["perplexity"],
    )


def _pattern(report: PruningReport) -> str:
    pattern = report.config["pattern"]
    return pattern if ":" in pattern else f"{report.sparsity:.0%}"


def _title(report: PruningReport, architecture: str) -> str:
    method = report.config["method"]
    name = Path(report.base_model).name if report.base_model else architecture
    return f"{name}, pruned to {_pattern(report)} with {_TITLES.get(method, method)}"


def _section(report: PruningReport, sizes: dict[str, int], architecture: str) -> str:
    parts = {
        "How it was pruned": _how(report),
        "Quality": _quality(report),
        "Size": _size(sizes),
        "Speed": _speed(report),
        "Block by block": _picture(report),
        "Limits": _limits(report),
        "Load it": _LOAD if _is_compact(sizes) else f"{_LOAD}\n\n{_PLAIN.format(_loader(architecture))}",
        "Make it again": _again(report),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _how(report: PruningReport) -> str:
    config, data, later = report.config, "no data", dict(report.reconstructed)
    later = [*later.pop("how", {}).items(), *later.items()]
    if report.tokens:
        data = f"{report.calibration}, " if report.calibration else ""
        data += f"{report.sequences} sequences, {report.tokens} tokens, sampling {config['sampling']}, seed {config['seed']}"
    method = REGISTRY.get(config["method"])
    paper = f" ({method.paper})" if method and method.paper else ""
    options = ", ".join(f"{key}={value!r}" for key, value in config.get("method_options", {}).items())
    rows = [
        ("base model", report.base_model or report.model),
        ("method", _TITLES.get(config["method"], config["method"]) + paper),
        ("masks", f"given, of {config['masks']} parameters" if "masks" in config else ""),
        ("options", options),
        ("pattern", _pattern(report) + (f", {config['overrides']}" if config.get("overrides") else "")),
        ("compared within", config.get("comparison_group") or ""),
        ("propagate", config.get("propagate") or "" if report.tokens else ""),
        ("left dense", ", ".join(config.get("exclude", []))),
        ("sparsity of the pruned linears", f"{report.sparsity:.4f}"),
        ("sparsity of all parameters", f"{report.model_sparsity:.4f}"),
        ("calibration", data),
        ("pruned before", "; ".join(report.earlier)),
        ("reconstructed afterwards", ", ".join(f"{key}={value!r}" for key, value in later)),
        ("trained afterwards", "; ".join(_training(how) for how in report.trained)),
        ("peak memory", f"{report.peak_memory / 2**30:.2f} GiB" if report.peak_memory else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    notes = Counter([*report.skipped.values(), *report.notes.values()])
    rows += [(f"{count} linear{'s' if count > 1 else ''}", why) for why, count in notes.items()]
    return _table(("", ""), [row for row in rows if row[1]])


def _quality(report: PruningReport) -> str:
    if not report.evaluations:
        return "Not measured."
    rows = [
        (e["dataset"], "-" if e["dense"] is None else f"{e['dense']:.2f}", f"{e['perplexity']:.2f}", str(e["tokens"]),
         f"{e['windows']} of {e['sequence_length']}, stride {e['stride']}{', BOS each' if e['bos'] else ''}")
        for e in report.evaluations
    ]  # fmt: skip
    table = _table(("perplexity on", "dense", "pruned", "tokens predicted", "windows"), rows)
    return f"{table}\n\nPerplexities compare only with others of the same text and windows. Nothing else was measured."


def _size(sizes: dict[str, int]) -> str:
    def megabytes(names: list[str]) -> str:
        return f"{sum(sizes[name] for name in names) / 1e6:.1f} MB"

    masks = [f"{FOLDER}/{MASK_FILE}"]
    weights = [name for name in sizes if is_weight_file(name)]
    if _is_compact(sizes):
        return f"Compact: weights {megabytes(weights)}, masks {megabytes(masks)}. `hf-prune expand` writes the ordinary form."
    return (
        f"Weights {megabytes(weights)}, as many as of the dense model: zeros are stored like other numbers. "
        f"Masks {megabytes(masks)}. `save_pretrained(folder, compact=True)` leaves the zeros out."
    )


def _is_compact(sizes: dict[str, int]) -> bool:
    return any(name.startswith(f"{FOLDER}/") and is_weight_file(name) for name in sizes)


def _speed(report: PruningReport) -> str:
    if not report.timings:
        return "Not measured. Zeros alone make nothing faster in PyTorch; see the limits."
    rows = [(t["what"], f"{t['dense'] * 1e3:.2f} ms", f"{t['pruned'] * 1e3:.2f} ms", t["machine"]) for t in report.timings]
    return _table(("", "dense", "pruned", "machine"), rows)


def _picture(report: PruningReport) -> str:
    """Bars: sparsity from 0 to 1, and the error of the block's output from 0 to the largest."""
    errors = [block.error for block in report.blocks if block.error is not None and math.isfinite(block.error)]
    largest = max(errors, default=0.0)
    lines = [f"{'block':<6} {'sparsity':<23} {'change of the output' if errors else ''}".rstrip()]
    for i, block in enumerate(report.blocks):
        line = f"{i:<6} "
        line += f"{_bar(block.sparsity, 1.0):<16} {block.sparsity:.3f}  " if block.sparsity is not None else f"{'-':<24}"
        if block.error is not None:
            line += f"{_bar(block.error, largest):<16} {block.error:.3f}"
        lines.append(line.rstrip())
    note = (
        "The change is ||pruned - dense|| / ||dense|| of a block's output, on one calibration sequence that reached the block "
        "through the pruned blocks before it."
    )
    return "```\n" + "\n".join(lines) + "\n```" + (f"\n\n{note}" if errors else "")


def _bar(value: float, largest: float, width: int = 16) -> str:
    if not largest or not math.isfinite(value):
        return ""
    eighths = round(8 * width * value / largest)
    return "\u2588" * (eighths // 8) + ("", *"\u258f\u258e\u258d\u258c\u258b\u258a\u2589")[eighths % 8]


def _limits(report: PruningReport) -> str:
    lines = [
        "Pruning loses knowledge, and rare knowledge first: try the model on your own task before relying on it.",
        "What the dense model gets wrong, this one does as well; its license and its limits apply.",
    ]
    if report.config["pattern"] == "2:4":
        lines.append("2:4 zeros can use NVIDIA's sparse tensor cores, which pays for prompts and large batches.")
    else:
        lines.append("No common runtime is faster with these zeros; they make files smaller, if stored compact.")
    if report.tokens:
        lines.append("One calibration set and one seed: other text gives other masks.")
    return "\n".join(f"- {line}" for line in lines)


_LOAD = """```python
import hf_prune

model = hf_prune.load("THIS_REPOSITORY")  # checks weights and masks
```"""
_PLAIN = "`{}.from_pretrained` loads it as well, also without hf_prune."


def _again(report: PruningReport) -> str:
    config = dict(report.config)
    how, bf16, given = config.pop("reconstruct", None), config.pop("bf16", False), config.pop("masks", 0)
    shown = {
        key: value
        for key, value in config.items()
        if value not in (None, [], {}, ["*"]) and (key != "sparsity" or report.config["pattern"] == "unstructured")
    }
    arguments = "\n".join(f"    {key}={value!r}," for key, value in shown.items())
    source = repr(report.calibration) if report.calibration else "texts"
    data = f"calibration={source}, tokenizer=tokenizer" if report.tokens else ""
    data = ", ".join(filter(None, [data, "masks=masks" if given else "", "bf16=True" if bf16 else ""]))
    data += f", reconstruct={_reconstruction(how)}" if how else ""
    name, after, loader = report.base_model or "the dense model", "", _loader(report.model)
    if later := dict(report.reconstructed):
        how = _reconstruction(later.pop("how"))
        later = "".join(f", {key}={value!r}" for key, value in later.items())
        after = f"\ndense = {loader}.from_pretrained({name!r})"
        after += f"\nhf_prune.reconstruct(model, dense, calibration=texts, tokenizer=tokenizer, how={how}{later})"
    before = "".join(f"# before it: {words}\n" for words in report.earlier)
    after += "".join(f"\n# then a Trainer with data of its own: {_training(how)}" for how in report.trained)
    return f"""```python
import hf_prune
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})
config = hf_prune.PruningConfig(
{arguments}
)
{before}model.prune(config{", " + data if data else ""}){after}
```"""


def _training(how: dict[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in how.items() if key not in ("callback", "steps"))
    return f"hf_prune.{how['callback']}({given}), {how['steps']} steps"


def _reconstruction(how: dict[str, Any]) -> str:
    return "hf_prune.Reconstruction(" + ", ".join(f"{key}={value!r}" for key, value in how.items()) + ")"


def card_of(name: str | None, **hub: Any) -> str | None:
    """README.md of a model folder or of a repository; None where there is none.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError: the Hub does not say whether there is one.
    """
    path = file_of(name, CARD, **hub) if name else None
    if path is None:
        return None
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read()


def base_card(name: str | None, token: Any, local_files_only: bool) -> str | None:
    """README.md of the dense model, or None if nobody can be asked: a card is complete without its license."""
    try:
        return card_of(name, token=token, local_files_only=local_files_only)
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.info(f"no card of {name}: {error}")
        return None
