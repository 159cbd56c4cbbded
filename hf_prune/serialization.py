"""A pruned model on disk: an ordinary model folder with zeros, and beside it `pruning/` with masks, config and report.

The `pruning/` folder is one level deep, so that `push_to_hub` takes it along and no other loader reads its safetensors as weights.
config.json gets a short `pruning_config`, never a `quantization_config`. Masks are found again when they are first asked for,
or by `load`, which also checks the weight files against the digests that were saved with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .atomic import readable
from .compact import SIGN, as_ordinary
from .config import CONFIG_FILE
from .masks import FORMAT_VERSION, MASK_FILE, Masks, check_version
from .patterns import first_line, one_of
from .report import PruningReport


logger = logging.get_logger(__name__)

FOLDER = "pruning"
ADAPTER = "adapter_config.json"  # of PEFT
ON_MISMATCH = ("error", "reapply", "drop")

_THREADS = min(8, os.cpu_count() or 1)  # that compute digests

_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    rf"(pytorch_)?model(?P<of_file>\.[\w.-]+?)?({_SHARD})?\.(safetensors|bin)|"
    rf"(pytorch_)?model\.(safetensors|bin)\.index(?P<of_index>\.[\w.-]+)?\.json|{FOLDER}/values{_SHARD}\.safetensors"
)


def is_weight_file(name: str) -> bool:
    """Whether a file of that name, relative to a model folder, may hold weights."""
    return _WEIGHTS.fullmatch(name) is not None


def variant_of(name: str) -> str | None:
    """The variant that a weight file of that name belongs to."""
    found = _WEIGHTS.fullmatch(name)
    return (found["of_file"] or found["of_index"] or "").removeprefix(".") or None


def is_replaced(name: str, variants: Collection[str | None] = (None,)) -> bool:
    """Whether new `variants` take the place of that entry: weights in other formats or variants stay."""
    if not is_weight_file(name) or name.startswith("pytorch_") or ".safetensors" not in name:
        return name == FOLDER
    return variant_of(name) in variants


def written_in(name: str | Path, **hub: Any) -> dict[str, Any] | None:
    """What `PruningState.save` wrote into a folder or a repository: None if nothing, empty if nobody can read it.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError: the Hub does not say whether there is something.
    """
    if (path := file_of(name, f"{FOLDER}/{CONFIG_FILE}", **hub)) is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            "masks": content["masks"],
            "files": {file: digest for file, digest in content["files"].items() if is_weight_file(file)},
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def replaced_variants(variant: str | None, before: dict[str, Any] | None) -> set[str | None]:
    """Those that a new save, as `variant`, takes the place of, where `before` was written: a compact one goes with its masks."""
    compact = any(name.startswith(f"{FOLDER}/") for name in (before or {}).get("files", ()))
    return {variant, None} if compact else {variant}


def file_of(name: str | Path, file: str, **hub: Any) -> Path | None:
    """The path of a file in a model folder or in a repository; None where there is none.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError: the Hub does not say whether there is one.
    """
    path = Path(name) / file
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(str(name), file, **hub))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
    return path if path.is_file() else None


@dataclass(eq=False)
class PruningState:
    """What a pruned model carries on its instance."""

    masks: Masks
    config: dict[str, Any]
    report: PruningReport | None = None  # if it was made here
    files: dict[str, str] = field(default_factory=dict)  # name of a weight file that it was saved with -> SHA-256
    folder: Path | None = None  # where it was read

    def summary(self) -> dict[str, Any]:
        """The short entry in config.json."""
        keys = ("method", "pattern", "sparsity", "overrides")
        return {**{key: self.config[key] for key in keys}, "format_version": FORMAT_VERSION}

    def save(self, folder: str | Path, variant: str | None = None, before: Iterable[dict[str, Any] | None] = ()) -> None:
        """Writes `folder`/pruning, for the weight files that are in `folder` by now.

        Where these masks were written `before`, the weight files of variants other than this `variant` go with them still.
        """
        target = Path(folder) / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        weights = [path for path in Path(folder).iterdir() if path.is_file() and is_weight_file(path.name)]
        weights = sorted([*weights, *target.glob("values-*.safetensors")])
        with _digests(weights) as digests:  # while the masks are written
            digest = self.masks.save(target)
            found = dict(zip([path.relative_to(folder).as_posix() for path in weights], digests))
        files: dict[str, str] = {}
        for known in before:
            if known and known["masks"] == digest:
                gone = replaced_variants(variant, known)
                files.update({name: old for name, old in known["files"].items() if variant_of(name) not in gone})
        files.update(found)
        content = {
            "format_version": FORMAT_VERSION,
            "config": self.config,
            "report": self.report.to_dict() if self.report else None,
            "masks": digest,
            "files": files,
        }
        (target / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n")

    @property
    def compact(self) -> list[str]:
        """The weight files of a compact folder, relative to it; none of an ordinary one."""
        return [name for name in self.files if name.startswith(f"{FOLDER}/")]

    @classmethod
    def load(cls, folder: str | Path) -> PruningState:
        """Reads `folder`/pruning.

        Raises:
            ValueError: it is not there, of a newer version, damaged, or a link to elsewhere.
        """
        path = Path(folder) / FOLDER
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}.")
        for name in (MASK_FILE, CONFIG_FILE):
            if not (path / name).is_file():
                raise ValueError(f"{folder} holds no masks: {path / MASK_FILE} and {CONFIG_FILE} are needed.")
            check_inside(path / name, Path(folder))
        with readable(path / CONFIG_FILE, "the config of a pruned model"):
            content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
            check_version(path / CONFIG_FILE, content["format_version"])
            config, report, files = dict(content["config"]), content.get("report"), dict(content.get("files", {}))
            report, digest = PruningReport.from_dict(report) if report else None, content["masks"]
            config["method"], config["pattern"]  # noqa: B018 - without them it is no config of ours
        return cls(Masks.load(path, digest), config, report, files, Path(folder))

    def check_files(self, folder: Path, variant: str | None = None) -> None:
        """Compares the weight files of `variant` in `folder` with those that the masks were saved with.

        Raises:
            ValueError: one is missing, was changed, or lies elsewhere; or there is one more that would be read instead.
        """
        if wrong := [name for name in self.files if not is_weight_file(name)]:
            raise ValueError(f"{folder / FOLDER / CONFIG_FILE} names {wrong[0]!r} as a weight file, which it cannot be.")
        paths = {name: folder / name for name in self.files if variant_of(name) == variant}
        for path in paths.values():
            if not path.is_file():
                raise ValueError(f"{path} is missing: this model was saved with {len(self.files)} weight files.")
            check_inside(path, folder)
        with _digests(list(paths.values())) as digests:
            for (name, path), digest in zip(paths.items(), digests):
                if digest != self.files[name]:
                    raise ValueError(f"{path} is damaged or was changed: it is not the file that was saved with the masks.")
        for name, path in paths.items():
            if name.endswith(".json"):
                named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
                if wrong := sorted(named - {*self.files, SIGN}):
                    raise ValueError(f"{path} names {wrong[0]!r}, which is not among the files that were saved with the masks.")
        for path in folder.iterdir():
            if is_replaced(path.name, {variant}) and path.name not in {*self.files, FOLDER}:
                raise ValueError(f"{path} is not among the weight files that were saved with the masks: remove it.")
        if self.files and variant not in (there := set(map(variant_of, self.files))):
            raise ValueError(
                f"{folder} has masks for the weights of variant {', '.join(map(repr, there))}, not of {variant!r}."
            )


def load(name_or_path: str | Path, *, on_mismatch: str = "error", **kwargs: Any) -> PreTrainedModel:
    """Loads a pruned model and checks it at once: weight files by their digests, masks by theirs, weights against masks.

    A compact folder is expanded while it is read, one tensor at a time; nothing is written. A model that was never pruned is
    loaded too, and has no `pruning_masks`.

    Args:
        name_or_path: folder or Hub name.
        on_mismatch: if anything is wrong with the masks: "error"; "reapply" sets pruned weights to zero again; "drop" gives
            the model as it is, without masks. Compact weights cannot be read without their masks.
        **kwargs: as for `from_pretrained` of the class that the config names, see `class_of`: `revision`, `dtype`, ...

    Raises:
        ValueError: damaged or foreign masks or weights; says which.
    """
    one_of("on_mismatch", on_mismatch, ON_MISMATCH)
    hub, folder = hub_arguments(kwargs), Path(name_or_path)
    if hub.pop("subfolder", ""):
        raise ValueError("hf_prune.load takes the folder of the model itself: leave out subfolder.")
    if kwargs.get("gguf_file"):  # has neither a config.json nor masks
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    trust = {key: kwargs[key] for key in ("trust_remote_code",) if key in kwargs}
    config = config_of(name_or_path, **hub, **trust)
    state = None
    if getattr(config, "pruning_config", None) is not None:
        try:
            state = _read(config, **hub)  # before the weights: it is quicker
        except ValueError:
            if on_mismatch != "drop":
                raise
    named = getattr(config, "transformers_weights", None)
    if state and named not in (None, *state.files):
        raise ValueError(f"config.json takes its weights from {named!r}, which the masks were not saved with.")
    checked = state is not None and on_mismatch == "error"
    if state and state.compact and not kwargs.get("variant"):
        loaded = _load_compact(name_or_path, class_of(config), state, hub, kwargs)
    else:
        if checked and folder.is_dir():
            state.check_files(folder, kwargs.get("variant"))
        loaded = class_of(config).from_pretrained(name_or_path, **kwargs)
        if checked and not folder.is_dir():
            state.check_files(state.folder, kwargs.get("variant"))
    settle(loaded[0] if isinstance(loaded, tuple) else loaded, on_mismatch, state, **hub)
    return loaded


def config_of(name_or_path: str | Path, **kwargs: Any) -> PretrainedConfig:
    """The config of a model folder or a repository; `kwargs` as for `AutoConfig.from_pretrained`.

    Raises:
        ValueError: an adapter is there, and no model.
    """
    folder = Path(name_or_path)
    if (folder / ADAPTER).exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{name_or_path} holds an adapter and no model: model = hf_prune.load(the pruned model's folder), then "
            f"model.load_adapter({str(name_or_path)!r}); for a MaskLoRA hf_prune.peft_adapters.load_masked_adapter."
        )
    return AutoConfig.from_pretrained(name_or_path, **kwargs)


def class_of(config: PretrainedConfig) -> type:
    """The class whose `from_pretrained` reads a folder of that `config`.

    It is that which `architectures` names, such as a classifier or a model that sees; AutoModelForCausalLM where that makes the
    same, or all that the folder lacks is a head tied to the embedding, or Transformers has no such class, as of remote code.
    """
    architecture = (config.architectures or [""])[0]
    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    named = getattr(transformers, architecture, None)
    if isinstance(remote, str) and remote.rpartition(".")[2] == architecture:
        return AutoModelForCausalLM
    if not (isinstance(named, type) and issubclass(named, PreTrainedModel) and isinstance(config, named.config_class or ())):
        return AutoModelForCausalLM
    causal, body = (mapping.get(type(config), None) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING))
    complete = causal and named is body and getattr(config, "tie_word_embeddings", False)
    registered = isinstance(causal, type) and issubclass(causal, named)  # in its place, or the same
    return AutoModelForCausalLM if registered or complete else named


def skeleton_of(config: PretrainedConfig, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A model of that `config`, its weights not read; `kwargs` as for `AutoModelForCausalLM.from_config`."""
    if (kind := class_of(config)) is AutoModelForCausalLM:
        return kind.from_config(config, trust_remote_code=trust_remote_code, **kwargs)
    return kind._from_config(config, **kwargs)


def check_causal(config: PretrainedConfig, name: str | Path) -> None:
    """Refuses the folder or repository `name` if it holds no causal language model.

    Raises:
        ValueError: says what it holds and the way out.
    """
    kind = class_of(config)
    held = kind.__name__ if kind is not AutoModelForCausalLM else f"model of a {type(config).__name__}"
    if config.is_encoder_decoder:
        raise ValueError(f"{name} holds a {held}, which has an encoder too: give a causal language model, with a decoder only.")
    if kind is AutoModelForCausalLM:
        fits = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or kind.__name__ in (getattr(config, "auto_map", None) or {})
    else:
        fits = kind.can_generate()
    if not fits:
        raise ValueError(
            f"{name} holds a {held}, which is no causal language model: give the one that it was made from, and load what "
            f"comes out with its own class, to train it there under the masks."
        )


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that say where a model is, the revision as a plain commit if it is known."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    hub = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
    if "revision" in hub:
        hub["revision"] = getattr(hub["revision"], "resolved", hub["revision"])
    return hub


def remember_source(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Masks are read when they are first asked for: then from the same place. A token stays out of copies and pickles."""
    hub, name = hub_arguments(kwargs), model.config._name_or_path
    if os.path.isdir(name):
        hub["source"] = os.path.abspath(name)
    _TOKENS[model] = hub.pop("token", None)
    model.__dict__[SOURCE] = hub


def _load_compact(
    name_or_path: str | Path, kind: type, state: PruningState, hub: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.py", f"{FOLDER}/*"], **hub))
    state.check_files(folder)
    rest = {key: value for key, value in kwargs.items() if key not in (*hub, "revision", "disable_mmap")}
    with as_ordinary(folder, [folder / name for name in state.compact], state.masks):
        loaded = kind.from_pretrained(folder, **rest)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if "disk" in map(str, (getattr(model, "hf_device_map", None) or {}).values()):
        raise ValueError(f"{name_or_path} is compact and cannot be offloaded to disk. Make it ordinary with hf_prune.expand.")
    model.config._name_or_path = str(name_or_path)
    return loaded


def settle(
    model: PreTrainedModel, on_mismatch: str = "error", state: PruningState | None = None, **hub: Any
) -> PruningState | None:
    """The state that belongs to the place `model` was loaded from, put on the instance; None if it was not pruned.

    `state` is what was read from there already, if it was. What a quantizer has stored in numbers of its own is not compared with the
    masks.

    Raises:
        ValueError: the masks there do not belong to this model, or its pruned weights are not zero.
    """
    if STATE in model.__dict__:
        return model.__dict__[STATE]
    config = getattr(model, "config", None)
    if state is None and getattr(config, "pruning_config", None) is None:
        return None
    if model.base_model is model and model.get_output_embeddings() is None:
        return None  # the body of a pruned model shares its config; the names of the masks are those of the whole
    problem = ""
    try:
        known = {**model.__dict__.get(SOURCE, {}), "token": _TOKENS.get(model)}
        state = state or _read(config, **{**known, **hub})
        if violations := state.masks.violations(model):
            name, count = next(iter(violations.items()))
            problem = (
                f"the masks in {config._name_or_path!r} do not agree with the weights: {count} pruned weights of {name} are "
                "not zero" + (f", and {len(violations) - 1} more parameters" if len(violations) > 1 else "")
            )
    except ValueError as error:
        if on_mismatch != "drop":
            raise ValueError(f"{error}{_never_pruned(model)}") from error
        problem = str(error)
    if problem and on_mismatch == "error":
        raise ValueError(
            f"{problem}. The weights were changed after pruning. hf_prune.load(..., on_mismatch='reapply') sets them to zero "
            f"again; on_mismatch='drop', or `del model.pruning_masks`, goes on without masks.{_never_pruned(model)}"
        )
    if problem and on_mismatch == "drop":
        logger.warning(f"going on without masks: {problem}")
        model.__dict__[STATE] = None  # and not in its config, which may be that of other models too
        return None
    if problem:
        logger.warning(f"pruned weights set to zero again: {problem}")
        state.masks.apply(model)
    model.__dict__[STATE] = state
    return state


def _never_pruned(model: PreTrainedModel) -> str:
    """Why its weights may never have been those of the masks, as a further sentence; empty if they were."""
    if SOURCE not in model.__dict__:
        why = "was not read by from_pretrained. If it was made from a config alone, it never had the pruned weights"
    elif MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), type(model)).base_model_prefix != model.base_model_prefix:
        why = f"names its weights {model.base_model_prefix}.*, so that from_pretrained has read none of the pruned ones"
    else:
        return ""
    return f" This {type(model).__name__} {why}: `del model.pruning_masks`."


def state_of(model: PreTrainedModel, who: str) -> PruningState:
    """As `settle`.

    Raises:
        ValueError: the model was not pruned; says that `who` needs that.
    """
    if (state := settle(model)) is None:
        raise ValueError(f"{who} needs a pruned model, and this one has no masks: call model.prune(...) first.")
    return state


STATE, SOURCE, SHRUNK = "_hf_prune_state", "_hf_prune_source", "_hf_prune_shrunk"  # attributes of an instance
_TOKENS: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()


def _read(config: Any, **hub: Any) -> PruningState:
    """The state that is where a model of that `config` was loaded from.

    Raises:
        ValueError: there is none.
        OSError: the Hub does not say whether there is.
    """
    source = hub.pop("source", config._name_or_path)
    hub = {**hub, "revision": getattr(config, "_commit_hash", None) or hub.get("revision")}
    inside = hub.pop("subfolder", "")
    gone = not source or (os.path.isabs(source) and not os.path.isdir(source))
    try:
        names = [] if gone else [f"{inside}/{FOLDER}/{name}".strip("/") for name in (MASK_FILE, CONFIG_FILE)]
        found = [file_of(source, name, **hub) for name in names]
    except OSError as error:
        raise OSError(
            f"this model was pruned, and {source!r} cannot be asked for its masks: {first_line(error)} Try again when it can, or "
            "`del model.pruning_masks` to go on without them."
        ) from error
    if gone or None in found:
        raise ValueError(
            f"this model was pruned, but its masks ({FOLDER}/{MASK_FILE}) are not found in {source!r}"
            f"{', which is gone' if source and gone else ''}. Copy the folder '{FOLDER}' next to its config.json, or load it from where it was "
            "saved; `del model.pruning_masks` goes on without them."
        )
    return PruningState.load(found[0].parent.parent)


def check_inside(path: Path, folder: Path) -> None:
    """Refuses a link out of `folder`; the Hub's cache links its snapshots to `blobs` beside them."""
    allowed = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        allowed.append(folder.absolute().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root.resolve()) for root in allowed):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside of its folder: hf_prune does not follow it.")


def copy_entry(entry: Path, folder: Path) -> None:
    """Writes a file, or all that are in a folder, into `folder`: their contents, also of links, and not that they are read-only."""
    if entry.is_dir():
        shutil.copytree(entry, folder / entry.name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    else:
        shutil.copyfile(entry, folder / entry.name)


@contextlib.contextmanager
def _digests(paths: list[Path]) -> Iterator[Iterator[str]]:
    """Within, the digests of files, in order, which several threads compute; those that were not begun are left when it ends."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool.map(_digest, paths)
    finally:
        pool.shutdown(cancel_futures=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
