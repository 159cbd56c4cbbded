"""A pruned model on disk: an ordinary model folder with zeros, and beside it `pruning/` with masks, config and report.

The `pruning/` folder is one level deep, so that `push_to_hub` takes it along and no other loader reads its safetensors as weights.
config.json gets a short `pruning_config`, never a `quantization_config`. Masks are found again when they are first asked for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import cached_file, logging

from .config import CONFIG_FILE
from .masks import FORMAT_VERSION, MASK_FILE, Masks
from .report import PruningReport


logger = logging.get_logger(__name__)

FOLDER = "pruning"


class PruningState:
    """What a pruned model carries on its instance: masks, the config as a dict, and the report, if it was made here."""

    def __init__(self, masks: Masks, config: dict[str, Any], report: PruningReport | None = None):
        self.masks, self.config, self.report = masks, config, report

    def summary(self) -> dict[str, Any]:
        """The short entry in config.json."""
        keys = ("method", "pattern", "sparsity", "overrides")
        return {**{key: self.config[key] for key in keys}, "format_version": FORMAT_VERSION}

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/pruning, whole or not at all."""
        target, fresh = Path(folder) / FOLDER, Path(folder) / f".{FOLDER}.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            self.masks.save(fresh)
            content = {
                "format_version": FORMAT_VERSION,
                "config": self.config,
                "report": self.report.to_dict() if self.report else None,
            }
            (fresh / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> PruningState:
        """Reads `folder`/pruning.

        Raises:
            ValueError: it is not there or cannot be read.
        """
        path = Path(folder) / FOLDER
        if not (path / MASK_FILE).is_file() or not (path / CONFIG_FILE).is_file():
            raise ValueError(f"{folder} holds no masks: {path / MASK_FILE} and {CONFIG_FILE} are needed.")
        content = json.loads((path / CONFIG_FILE).read_text())
        report = content.get("report")
        return cls(Masks.load(path), content["config"], PruningReport.from_dict(report) if report else None)


def find_state(model: nn.Module) -> PruningState | None:
    """The state that belongs to the place a model was loaded from, checked against its weights; None if it was not pruned.

    Raises:
        ValueError: the masks there do not belong to this model, or its pruned weights are not zero.
    """
    config = getattr(model, "config", None)
    if getattr(config, "pruning_config", None) is None:
        return None
    source = config._name_or_path
    revision = getattr(config, "_commit_hash", None)
    found = [
        cached_file(
            source, name, subfolder=FOLDER, revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )
        if source
        else None
        for name in (MASK_FILE, CONFIG_FILE)
    ]  # fmt: skip
    if None in found:
        raise ValueError(
            f"this model was pruned, but its masks ({FOLDER}/{MASK_FILE}) are not found in {source!r}. Copy the folder "
            f"'{FOLDER}' next to its config.json, or load it from where it was saved."
        )
    state = PruningState.load(Path(found[0]).parent.parent)
    if violations := state.masks.violations(model):
        name, count = next(iter(violations.items()))
        raise ValueError(
            f"the masks in {source!r} do not agree with the weights: {count} pruned weights of {name} are not zero"
            + (f", and {len(violations) - 1} more parameters" if len(violations) > 1 else "")
            + ". The weights were changed after pruning."
        )
    return state
