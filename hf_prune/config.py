"""`PruningConfig`: the only place where the user's words become objects. Every wrong word fails here."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .methods import Method, make
from .methods.base import REGISTRY
from .patterns import COMPARISON_GROUPS, Pattern, Structured, Unstructured, check_count, one_of, parse


logger = logging.get_logger(__name__)

CONFIG_FILE = "pruning_config.json"
# Fields of which one is made of others.
_DEPENDENT = ("method", "method_options", "pattern", "sparsity", "parameters", "comparison_group", "propagate")


@dataclass
class PruningConfig:
    """What to prune, how, and from how much text; to set a field checks all anew, as `dataclasses.replace` does.

    Attributes:
        method: "magnitude", "wanda", "sparsegpt", "alps", "gblm", "ria", "taylor", or an instance of a `Method`.
        pattern: "unstructured" (with `sparsity`), "unstructured:0.6", or "N:M" that keeps N of every M weights along `in`.
        sparsity: fraction of weights to prune, in [0, 1); for the pattern "unstructured".
        method_options: fields of the method, such as `{"damping": 0.05}`; only if `method` is a name.
        comparison_group: within which set scores compete: "row", "matrix", "block" or "model"; None is the method's own.
        propagate: "linear" prunes each linear the moment its calibration input arrives, in one pass; "block" runs each block
            dense, prunes it, and runs it again (the papers' way); None is what measured better for the method.
        include, exclude: globs on names of linears ("*.mlp.*"); a glob that matches nothing is an error.
        overrides: glob -> pattern for some linears, such as `{"*.mlp.*": "4:8"}`; the last that matches counts.
        n_samples: number of calibration sequences.
        sequence_length: tokens of each; None is the model's number of positions, but at most 2048.
        sampling: "packed" joins documents; "paper" takes a random window of one document that is long enough.
        seed: of everything that is random.
        parameters: with method "taylor", instead of a pattern: those of the blocks that are left, a share or a number.

    Raises:
        ValueError, TypeError: a value that is not allowed; a config that exists stays as it was.
    """

    method: str | Method = "wanda"
    pattern: str | float | Pattern = "unstructured"
    sparsity: float = 0.5
    method_options: dict[str, Any] = field(default_factory=dict)
    comparison_group: str | None = None
    propagate: str | None = None
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    overrides: dict[str, str | float] = field(default_factory=dict)
    n_samples: int = 128
    sequence_length: int | None = None
    sampling: str = "packed"
    seed: int = 0
    parameters: float | int | None = None

    # Name -> (what was made, what was given). It is a field, so that `dataclasses.replace`, which gives what was made, gives it too.
    _known: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def __setattr__(self, name: str, value: Any) -> None:
        before, is_field = dict(self.__dict__), any(f.name == name for f in dataclasses.fields(PruningConfig))
        if "_ready" in before and type(self) is PruningConfig and not is_field:
            raise TypeError(f"a PruningConfig has no field {name!r}.")
        super().__setattr__(name, value)
        if "_ready" in before and is_field:
            try:
                PruningConfig.__post_init__(self)  # not a subclass's, which may set fields itself
            except BaseException:
                self.__dict__.clear()
                self.__dict__.update(before)
                raise

    def _changed(self) -> set[str]:
        """The fields that hold something else than was made for them; the others hold again what was given."""
        changed = set()
        for name, (made, given) in self._known.items():
            value = getattr(self, name)
            if value is made or (isinstance(value, (int, float)) and value == made):  # of a pickled number there are two
                setattr(self, name, given)
            else:
                changed.add(name)
        if "pattern" in changed and "parameters" not in changed:
            self.parameters = None
        elif changed & {"parameters", "sparsity"} and "pattern" not in changed:
            if "parameters" in changed or isinstance(self._known["pattern"][0], Unstructured):
                self.pattern = "unstructured"
        return changed

    def __post_init__(self):
        self.__dict__.pop("_ready", None)
        new = self._changed() if self._known else {"sparsity"}
        given = {name: getattr(self, name) for name in _DEPENDENT}
        if isinstance(self.method, Method):
            if self.method_options not in ({}, dataclasses.asdict(self.method)):
                raise ValueError("method_options go with a method's name; set the fields of the instance instead.")
        elif isinstance(self.method, str):
            self.method = make(self.method, self.method_options)
        else:
            raise TypeError(f"method must be a name ({', '.join(sorted(REGISTRY))}) or a Method, got {self.method!r}.")
        self.method_options = dataclasses.asdict(self.method)
        if self.parameters is not None:
            same = Structured(parameters=self.parameters)
            if self.pattern not in ("unstructured", same):
                raise ValueError(f"give either parameters={self.parameters} or pattern={self.pattern!r}.")
            self.pattern = same
        self.pattern = parse(self.pattern, self.sparsity)
        if isinstance(self.pattern, Structured) != self.method.structural:
            raise ValueError(
                f"method '{self.method.name}' cannot give pattern '{self.pattern}': whole groups ('heads:0.25,ffn:0.25' or "
                "parameters=0.8) go with method='taylor', and it with them."
            )
        if "sparsity" in new and self.sparsity not in (0.5, self.pattern.sparsity):
            logger.warning(f"sparsity={self.sparsity} is not used: pattern '{self.pattern}' means {self.pattern.sparsity:g}.")
        self.sparsity = self.pattern.sparsity
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            setattr(self, name, [globs] if isinstance(globs, str) else list(globs))
        self.overrides = {glob: parse(pattern, self.sparsity) for glob, pattern in self.overrides.items()}
        one_of("comparison_group", self.comparison_group, (None, *COMPARISON_GROUPS))
        one_of("propagate", self.propagate, (None, "linear", "block"))
        one_of("sampling", self.sampling, ("packed", "paper"))
        for name in ("n_samples", "sequence_length"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.method.structural and (self.include != ["*"] or self.exclude or self.overrides):
            raise ValueError(
                f"pattern '{self.pattern}' is the same for every block: include, exclude and overrides are for weights."
            )
        if any(isinstance(pattern, Structured) for pattern in self.overrides.values()):
            raise ValueError("overrides are patterns of weights; whole groups go from every block alike.")
        for name in ("comparison_group", "propagate"):
            if getattr(self, name) is None:
                setattr(self, name, "".join(getattr(self.method, name)))  # an object that is no literal's
        if self.comparison_group == "block" and self.propagate == "linear":
            raise ValueError("comparison_group='block' compares a block's linears before one is pruned: use propagate='block'.")
        if self.comparison_group == "model" and self.method.needs:
            raise ValueError(
                f"comparison_group='model' needs all scores before any weight is pruned, but {self.method.name} scores a "
                "block on the outputs of pruned blocks. Use method='magnitude', or the group 'row', 'matrix' or 'block'."
            )
        if self.comparison_group in ("block", "model"):
            if type(self.method).prune is not Method.prune:
                raise ValueError(f"{self.method.name} solves one matrix at a time: comparison_group must be 'row' or 'matrix'.")
            if self.overrides:
                raise ValueError(f"overrides need comparison_group='row' or 'matrix', not {self.comparison_group!r}.")
        self._known = {name: (getattr(self, name), value) for name, value in given.items()}
        self._ready = True

    @property
    def needs_calibration(self) -> bool:
        return bool(self.method.needs)

    def patterns_for(self, names: list[str]) -> dict[str, Pattern]:
        """The pattern of every linear in `names` that is to be pruned.

        Raises:
            ValueError: a glob matches none of the names, or nothing is left.
        """
        for glob in (*self.include, *self.exclude, *self.overrides):
            if not any(_matches(name, glob) for name in names):
                some = ", ".join(names[:: max(1, len(names) // 4)][:4])
                raise ValueError(f"the glob {glob!r} matches no linear of this model. Its linears are named like {some}.")
        chosen = {}
        for name in names:
            if any(_matches(name, g) for g in self.include) and not any(_matches(name, g) for g in self.exclude):
                chosen[name] = self.pattern
                for glob, pattern in self.overrides.items():
                    if _matches(name, glob):
                        chosen[name] = pattern
        if not chosen:
            raise ValueError(f"include={self.include} and exclude={self.exclude} leave no linear to prune.")
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "_known"}
        values["method"] = self.method.name
        values["pattern"] = "unstructured" if isinstance(self.pattern, Unstructured) else str(self.pattern)
        values["method_options"] = dict(self.method_options)
        del values["parameters"]  # the pattern says it
        values["overrides"] = {glob: str(pattern) for glob, pattern in self.overrides.items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningConfig:
        """The config of those values.

        Raises:
            ValueError: a key that no field has.
        """
        allowed = [f.name for f in dataclasses.fields(cls) if f.name != "_known"]
        if unknown := sorted(set(values) - set(allowed)):
            raise ValueError(f"unknown key {', '.join(unknown)} in a pruning config. Allowed: {', '.join(allowed)}.")
        return cls(**values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `pruning_config.json` into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PruningConfig:
        """Reads `pruning_config.json` in `folder` or in its `pruning/`."""
        path = Path(folder) / CONFIG_FILE
        path = path if path.exists() else Path(folder) / "pruning" / CONFIG_FILE
        values = json.loads(path.read_text())
        return cls.from_dict(values.get("config", values))


def _matches(name: str, glob: str) -> bool:
    return (
        fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition(".")[0], glob) and name.split(".")[-1].isdigit()
    )
