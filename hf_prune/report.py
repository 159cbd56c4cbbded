"""What a pruning did, linear by linear, as a value: printed as a table, or turned into a dict or Markdown."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .evaluation import Perplexity


@dataclass
class LinearReport:
    """One linear. `error` is ||(W - W') X|| / ||W X|| over a sample of the calibration tokens, None if there was no data."""

    name: str
    pattern: str
    sparsity: float
    pattern_holds: bool
    error: float | None = None
    damping: float | None = None
    note: str = ""


@dataclass
class BlockReport:
    """One block. `error` is the relative change of the block's output on one short sequence that reaches it pruned.

    `reconstruction` is the relative squared error on held-out calibration text before and after; equal if that did not fall, and the
    block was left as it was pruned.
    """

    name: str
    seconds: float
    error: float | None
    linears: list[LinearReport]
    reconstruction: tuple[float, float] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlockReport:
        """What `dataclasses.asdict` gave."""
        return cls(**{**values, "linears": [LinearReport(**linear) for linear in values["linears"]]})

    @property
    def sparsity(self) -> float | None:
        """Mean over the block's linears."""
        return sum(linear.sparsity for linear in self.linears) / len(self.linears) if self.linears else None


@dataclass
class PruningReport:
    """What `prune` did.

    Attributes:
        sparsity: fraction of zeros over the pruned linears (by their masks).
        model_sparsity: the same zeros over all parameters of the model.
        tokens: calibration tokens used.
        skipped: name -> why it was left dense.
        peak_memory: bytes, highest resident set of the process meanwhile (or of the GPU's allocator); None if unknown.
        base_model: Hub name (or folder name) of the dense model; set it where hf_prune cannot know.
        calibration: what the calibration data was, in words; empty for ids and texts that came without a name.
        versions: library -> version.
        evaluations: what `add_perplexity` was told.
        timings: what `add_timing` was told.
        reconstructed: what a later `reconstruct` was told, which drops evaluations and timings of before.
        earlier: the prunings before this one, a line each.
        trained: what a callback did in a `Trainer` afterwards, which drops them too: a dict each training, with its steps.
        structure: where whole groups went: what -> [before, after].
        retrained: whether the training that `prune_iteratively` called after this pruning has ended.
    """

    config: dict[str, Any]
    model: str
    blocks: list[BlockReport] = field(default_factory=list)
    sparsity: float = 0.0
    model_sparsity: float = 0.0
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gradient_seconds: float = 0.0
    peak_memory: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    calibration: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    reconstructed: dict[str, Any] = field(default_factory=dict)
    earlier: list[str] = field(default_factory=list)
    trained: list[dict[str, Any]] = field(default_factory=list)
    structure: dict[str, list[float]] = field(default_factory=dict)
    retrained: bool = False

    def in_words(self) -> str:
        """This pruning in one line: method, pattern, data, and the training that followed."""
        config = self.config
        words = [
            config["method"],
            f"{config['pattern']} {config['sparsity']:g}" if config["pattern"] == "unstructured" else config["pattern"],
        ]
        words += [f"{self.sequences} sequences" if self.tokens else "no data"]
        words += ["reconstructed"] if self.reconstructed or config.get("reconstruct") else []
        return ", ".join([*words, *(f"{how['callback']} for {how['steps']} steps" for how in self.trained)])

    def follow(self, earlier: PruningReport | None) -> None:
        """Takes over what the model was from the report of an `earlier` pruning, and names that pruning."""
        if earlier:
            self.base_model, self.earlier = earlier.base_model, [*earlier.earlier, earlier.in_words()]

    def add_perplexity(self, dataset: str, pruned: Perplexity, dense: Perplexity | None = None) -> None:
        """Remembers a perplexity that was measured, for the model card; replaces an earlier one on the same `dataset`.

        Raises:
            ValueError: dense and pruned were measured on different windows.
        """
        if dense and dataclasses.replace(dense, perplexity=0.0) != dataclasses.replace(pruned, perplexity=0.0):
            raise ValueError(f"dense and pruned perplexity do not compare: {dense} against {pruned}.")
        self.evaluations = [known for known in self.evaluations if known["dataset"] != dataset]
        entry = {"dataset": dataset, **dataclasses.asdict(pruned)}
        self.evaluations.append({**entry, "dense": None if dense is None else dense.perplexity})

    def add_timing(self, what: str, dense_seconds: float, pruned_seconds: float, machine: str) -> None:
        """Remembers a latency that was measured, for the model card, such as "decode, batch 1" on "H200, torch 2.13"."""
        self.timings.append({"what": what, "dense": dense_seconds, "pruned": pruned_seconds, "machine": machine})

    @property
    def linears(self) -> list[LinearReport]:
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def notes(self) -> dict[str, str]:
        """Linears of which there is something to say: unreached experts, raised damping."""
        return {linear.name: linear.note for linear in self.linears if linear.note}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningReport:
        """What `to_dict` gave."""
        return cls(**{**values, "blocks": [BlockReport.from_dict(block) for block in values["blocks"]]})

    def _summary(self) -> list[str]:
        if self.structure:
            what = ", ".join(f"{name} {a:,.6g} -> {b:,.6g}" for name, (a, b) in self.structure.items())
            lines = [f"{self.model}: {self.config['method']}, {self.config['pattern']}", what]
            lines += [f"calibration {self.sequences} sequences, {self.tokens} tokens", f"{self.seconds:.1f} s"]
            return lines + [f"{kind} stay: {why}" for kind, why in self.skipped.items()]
        lines = [
            f"{self.model}: {self.config['method']}, {self.config['pattern']}, "
            f"{len(self.linears)} linears in {len(self.blocks)} blocks",
            f"sparsity {self.sparsity:.4f} of the pruned linears, {self.model_sparsity:.4f} of all parameters",
            f"calibration {self.sequences} sequences, {self.tokens} tokens" if self.tokens else "no calibration data used",
            f"{self.seconds:.1f} s"
            + (f", {self.gradient_seconds:.1f} s of it for gradients" if self.gradient_seconds else "")
            + (f"; peak memory {self.peak_memory / 2**30:.2f} GiB" if self.peak_memory else ""),
        ]
        if pairs := [block.reconstruction for block in self.blocks if block.reconstruction]:
            kept = [b.name for b in self.blocks if b.reconstruction and b.reconstruction[0] == b.reconstruction[1]]
            lines.append(
                f"reconstruction: error on held-out calibration text {_mean([a for a, _ in pairs]):.4f} before, "
                f"{_mean([b for _, b in pairs]):.4f} after" + (f"; no better, so left alone: {', '.join(kept)}" if kept else "")
            )
        lines += by_reason({**self.skipped, **self.notes})
        return lines

    def _rows(self) -> list[tuple[str, ...]]:
        def number(value, digits):
            return "-" if value is None else f"{value:.{digits}f}"

        return [
            (b.name, number(b.sparsity, 4), "yes" if all(x.pattern_holds for x in b.linears) else "NO",
             number(_mean([x.error for x in b.linears]), 3), number(b.error, 3), f"{b.seconds:.2f}")
            for b in self.blocks
        ]  # fmt: skip

    def to_markdown(self) -> str:
        """Summary and a table of the blocks."""
        rows = [] if self.structure else [_COLUMNS, ("---",) * len(_COLUMNS), *self._rows()]
        return "\n".join([*(f"- {line}" for line in self._summary()), "", *(f"| {' | '.join(row)} |" for row in rows)])

    def __str__(self) -> str:
        if self.structure:
            return "\n".join(self._summary())
        return "\n".join([table([_COLUMNS, *self._rows()]), *self._summary()])


_COLUMNS = ("block", "sparsity", "pattern holds", "mean linear error", "block error", "seconds")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(rows: list[tuple[str, ...]]) -> str:
    """`rows`, the first of which is the head, in columns; the last cell of a shorter row may run over the rest."""
    columns = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == columns) for i in range(columns)]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def by_reason(reasons: dict[str, str]) -> list[str]:
    """A line for each reason in `reasons`, name -> why, with the first three names."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [f"{why}: {', '.join(n[:3])}{f' and {len(n) - 3} more' if len(n) > 3 else ''}" for why, n in names.items()]
