"""The walk over the blocks: statistics are collected, linears pruned, and the next block sees pruned outputs.

Two ways. "block": the dense block is run for its statistics, pruned, and run again (all papers). "linear": all batches run in
lockstep and pause at each linear; it is pruned the moment its input has arrived, so one pass does both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .blocks import Block, Call, Decoder, Linear, Store, eager_experts, handed_on, run_lockstep, watch
from .gradients import block_gradients
from .journal import Journal
from .masks import Masks
from .methods import Magnitude, Method
from .methods.base import Job, Pruned, forget
from .patterns import NM, Pattern, lowest_of_all
from .ranks import ALONE, Ranks
from .reconstruction import Reconstruction, outputs_of, parts_of, reconstruct_block
from .report import BlockReport, LinearReport
from .statistics import GradientNorm


logger = logging.get_logger(__name__)

_SAMPLE = 32  # tokens on which the error of a linear is measured


@dataclass
class Plan:
    """What is to be done: which linears get which pattern, by which method."""

    decoder: Decoder
    patterns: dict[str, Pattern]
    method: Method
    group: str
    propagate: str
    kept: Masks = field(default_factory=Masks)  # of an earlier pruning: its zeros stay
    fixed: Masks = field(default_factory=Masks)  # to be used as they are
    masks: Masks = field(default_factory=Masks)  # all that there are in the end, filled in on the way
    gradients_of: Callable[[Block], dict[str, GradientNorm]] = lambda block: {}  # of the whole model's loss, by parameter
    ranks: Ranks = ALONE
    reconstruction: Reconstruction | None = None
    before_change: Callable[[torch.nn.Parameter], None] = lambda parameter: None
    bf16: bool = False  # forward passes run under autocast; statistics and solvers never do

    def linears(self, block: Block) -> list[Linear]:
        return [linear for linear in block.linears if linear.name in self.patterns]


class _Input:
    """The statistics of one input, shared by the linears that read it, and a few of its rows."""

    def __init__(self, kinds: list[type], linear: Linear, n_batches: int):
        self.linear = linear
        self.statistics = {kind: kind(linear.in_features, linear.parameter.device) for kind in kinds}
        self._per_batch = -(-_SAMPLE // max(n_batches, 1))
        self._rows: list[Tensor] = []
        self._sampled = 0

    def update(self, x: Tensor) -> None:
        for statistic in self.statistics.values():
            statistic.update(x)
        if len(x) and self._sampled < _SAMPLE:
            every = -(-len(x) // self._per_batch)
            rows = x[every // 2 :: every | 1]  # not every time the first token of a sequence, which is unlike the others
            self._sampled += len(rows)
            self._rows.append(rows.clone())

    def add_up(self, ranks: Ranks) -> None:
        """Over all processes; a statistic's tensors are sums."""
        if ranks.count > 1:
            for statistic in self.statistics.values():
                ranks.add_up(*(value for value in vars(statistic).values() if isinstance(value, Tensor)))
            everywhere = [row for rows in ranks.gathered([rows.cpu() for rows in self._rows]) for row in rows]
            self._rows = [rows.to(self.linear.parameter.device) for rows in everywhere]

    def check(self) -> None:
        if not all(s.is_finite() for s in self.statistics.values()):
            raise ValueError(f"the activations that reach {self.linear.name} are not finite: load it in bfloat16 or float32.")

    @property
    def sample(self) -> Tensor | None:
        return torch.cat(self._rows).float() if self._rows else None


@torch.no_grad()
def prune_without_data(plan: Plan, journal: Journal | None = None) -> list[BlockReport]:
    """Prunes in place by weights alone."""
    reports: list[BlockReport] = []
    done = journal.finished if journal else 0
    if plan.group == "model":
        everything = [linear for block in plan.decoder.blocks for linear in plan.linears(block)]
        jointly = _joint_masks(plan, everything, {})
    for index, block in enumerate(tqdm(plan.decoder.blocks, desc=plan.method.name, unit="block")):
        started = time.perf_counter()
        if index < done:
            reports.append(_taken(plan, block, index, journal))
            continue
        with block.present():
            work = _BlockWork(plan, block)
            if plan.group == "model":
                work.fixed = {linear.name: jointly.pop(linear.name) for linear in work.linears}
            work.prune_all()
            plan.masks.update(work.masks)
            reports.append(BlockReport(block.name, time.perf_counter() - started, None, work.reports()))
            if journal:
                journal.save_block(index, work.parameters, work.masks, reports[-1], [])
    return reports


@torch.no_grad()
def prune_blocks(
    plan: Plan,
    batches: list[Tensor],
    probe: Tensor,
    store: Store = lambda x: x,
    gradient_samples: int | None = None,
    journal: Journal | None = None,
) -> list[BlockReport]:
    """Prunes in place, block after block, on the calibration `batches`.

    Args:
        batches: ids (sequences, length) each, without padding; one sequence each where `gradient_samples` is given. Of several
            processes each has batches of its own.
        probe: ids (1, length); the error of a block is measured on them.
        store: moves hidden states to where they wait.
        gradient_samples: how many batches have a block-wise backward pass, for methods of scope "block".
        journal: where finished blocks are kept, and taken from.

    Raises:
        ValueError: activations that are not finite.
    """
    reports: list[BlockReport] = []
    done = journal.finished if journal else 0
    how = plan.reconstruction
    with eager_experts(plan.decoder.model):
        hidden, calls = plan.decoder.capture([*batches, probe], store)
        dense = hidden[:-1] if how and how.targets == "dense" else []  # what reaches a block of the dense model
        shared = handed_on(calls[-1])
        if done:
            logger.info(f"{done} of {len(plan.decoder.blocks)} blocks are taken from {journal.folder}.")
            hidden = journal.hidden(done, [*hidden, *dense], shared)
            hidden, dense = hidden[: len(batches) + 1], hidden[len(batches) + 1 :]
        for index, block in enumerate(tqdm(plan.decoder.blocks, desc=plan.method.name, unit="block")):
            started = time.perf_counter()
            if index < done:
                reports.append(_taken(plan, block, index, journal))
                continue
            with block.present(), _autocast(block, plan.bf16):
                work = _BlockWork(plan, block)
                for mapping in shared if index == done else ():
                    mapping.update({key: tuple(x.to(block.device) for x in kept) for key, kept in mapping.items()})
                with _autocast(block, False):
                    work.gradients = plan.gradients_of(block)
                    if gradient_samples is not None:
                        some, norm = slice(min(gradient_samples, len(batches))), (plan.method.order, plan.method.by_token)
                        work.gradients = block_gradients(
                            block, calls[index][some], hidden[some], work.linears, *norm, plan.ranks
                        )
                before = calls[index][-1].run(block, hidden[-1])
                arguments, states = calls[index][: len(batches)], hidden[: len(batches)]
                inputs = list(states) if how else []
                parts = parts_of(block, arguments[0], inputs[0], how) if how else []
                targets = outputs_of(parts, arguments, dense or inputs, store)
                if plan.propagate == "linear":
                    work.in_one_pass(arguments, states, store)
                else:
                    work.in_two_passes(arguments, states, store, again=not how and index + 1 < len(calls))
                plan.masks.update(work.masks)
                reconstruction = None
                if how:
                    for parameter in work.parameters.values():
                        plan.before_change(parameter)
                    reconstruction = reconstruct_block(parts, plan.masks, arguments, inputs, targets, how)
                    states = [store(call.run(block, x)) for call, x in zip(arguments, inputs)]
                    dense = targets[-1] if dense else []
                after = calls[index][-1].run(block, hidden[-1])
                hidden = [*states, store(after)]
                calls[index].clear()
                error = _relative(after - before, before)
                reports.append(BlockReport(block.name, time.perf_counter() - started, error, work.reports(), reconstruction))
                if journal:
                    journal.save_block(index, work.parameters, work.masks, reports[-1], [*hidden, *dense], shared)
    return reports


def _autocast(block: Block, enabled: bool) -> AbstractContextManager:
    """Linears of float32 in bfloat16, or not; without a cache, which would go on serving weights as they were before they changed."""
    return torch.autocast(block.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def _weights_stay() -> Iterator[None]:
    """Autocast, if it is on, casts each weight once within."""
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()


def _taken(plan: Plan, block: Block, index: int, journal: Journal) -> BlockReport:
    """The report of a block that the journal has; its weights and masks are what they were."""
    work = _BlockWork(plan, block)
    for parameter in work.parameters.values():
        plan.before_change(parameter)
    masks, report = journal.load_block(index, work.parameters)
    plan.masks.update(masks)
    return report


class _BlockWork:
    """One block while it is being pruned."""

    def __init__(self, plan: Plan, block: Block):
        self.plan, self.block = plan, block
        self.linears = plan.linears(block)
        self.parameters = {linear.parameter_name: linear.parameter for linear in self.linears}
        if plan.reconstruction:  # all of them may change
            self.parameters = {f"{block.name}.{name}": p for name, p in block.module.named_parameters()}
        self.gradients: dict[str, GradientNorm] = {}
        self.groups: dict = {}
        for linear in self.linears:
            self.groups.setdefault(linear.group, []).append(linear)
        self.masks: dict[str, Tensor] = {}  # parameter -> mask of its shape
        self.fixed: dict[str, Tensor] = {}  # linear -> mask (out, in)
        self._reports: dict[str, LinearReport] = {}
        self._inputs: dict = {}

    def in_one_pass(self, calls: list[Call], states: list[Tensor], store: Store) -> None:
        """propagate="linear"; `states` become the block's outputs, in place."""
        self._n_batches = len(calls)
        run_lockstep(
            self.block, calls, states, self.linears, self._hear, lambda linear: self._prune_groups([linear.group]), store,
            self.plan.ranks.lowest,
        )  # fmt: skip
        self._prune_unreached()

    def in_two_passes(self, calls: list[Call], states: list[Tensor], store: Store, again: bool = True) -> None:
        """propagate="block"; `states` become the block's outputs, in place, unless it need not run `again`."""
        first = {group[0] for group in self.groups.values()}
        self._n_batches = len(calls)
        last = max((linear for linear in self.linears if linear.called), key=lambda linear: linear.rank, default=None)
        # An expert may be called or not, so only a plain linear tells that all others have been heard.
        stop_at = last if last is not None and last.rank[1:] == (0, 0) and last is self.block.linears[-1] else None

        def listener(linear: Linear, x: Tensor) -> None:
            if linear in first:
                self._hear(linear, x)
            if linear is stop_at:
                raise _Heard

        with _weights_stay():
            for call, state in zip(calls, states):
                with watch(self.block, listener, self.linears), contextlib.suppress(_Heard):
                    call.run(self.block, state)
        self.prune_all()
        with _weights_stay():
            for i, (call, state) in enumerate(zip(calls, states) if again else ()):
                states[i] = store(call.run(self.block, state))

    def prune_all(self) -> None:
        """Prunes every linear of the block, those without an input by magnitude."""
        if not self.plan.method.needs:
            if self.plan.group == "block":
                self.fixed = _joint_masks(self.plan, self.linears, {})
            self._prune([_Task(linears, self.plan.method) for linears in self.groups.values()])
            return
        everywhere = self.plan.ranks.gathered([group in self._inputs for group in self.groups])
        reached = [group for group, heard in zip(self.groups, zip(*everywhere)) if any(heard)]
        self._prune_groups(reached)
        self._prune_unreached()

    def reports(self) -> list[LinearReport]:
        return [self._reports[linear.name] for linear in self.linears]

    def _hear(self, linear: Linear, x: Tensor) -> None:
        with _autocast(self.block, False):
            self._input(linear).update(x)

    def _input(self, linear: Linear) -> _Input:
        """That of `linear`, empty if it has not been heard."""
        if linear.group not in self._inputs:
            kinds = [kind for kind in self.plan.method.needs if kind is not GradientNorm]
            self._inputs[linear.group] = _Input(kinds, linear, self._n_batches)
        return self._inputs[linear.group]

    def _prune_groups(self, groups: list) -> None:
        """Linears whose inputs have arrived in one process or another."""
        for group in groups:
            source = self._input(self.groups[group][0])
            source.add_up(self.plan.ranks)
            source.check()
        if self.plan.group == "block":
            self.fixed = _joint_masks(self.plan, self.linears, self._inputs, self.gradients)
        self._prune([_Task(self.groups[group], self.plan.method, group) for group in groups])

    def _prune_unreached(self) -> None:
        """Experts that no token was sent to: by magnitude, within the same groups, and the report says so."""
        note = "not reached by the calibration data, pruned by magnitude"
        self._prune([_Task([x], Magnitude(), note=note) for x in self.linears if x.name not in self._reports])

    def _prune(self, tasks: list[_Task]) -> None:
        """Each process does its share, and all of them have the result."""
        ranks = self.plan.ranks
        if 1 < ranks.count > len(tasks):
            tasks = [dataclasses.replace(task, linears=[linear]) for task in tasks for linear in task.linears]
        owners = ranks.owners([task.cost for task in tasks])
        last = {task.group: i for i, task in enumerate(tasks)}
        for i, (task, owner) in enumerate(zip(tasks, owners)):
            if owner == ranks.index:
                with _autocast(self.block, False):
                    self._solve(task)
            if last[task.group] == i:
                self._inputs.pop(task.group, None)
        if ranks.count > 1:
            for task, owner in zip(tasks, owners):
                self._exchange(task, owner)
            order = [name for name in self.parameters if name in self.masks]  # the same in all processes
            self.masks = {name: self.masks[name] for name in order}

    def _solve(self, task: _Task) -> None:
        plan, source = self.plan, self._inputs.get(task.group)
        jobs = []
        for linear in task.linears:
            known = _statistics(task.method, linear, source, self.gradients)
            kept, fixed = _mask_of(plan.kept, linear), self.fixed.get(linear.name)
            fixed = _mask_of(plan.fixed, linear) if fixed is None else fixed
            if fixed is not None and kept is not None:
                fixed = fixed & kept
            jobs.append(Job(linear.weight.float(), known, plan.patterns[linear.name], kept, fixed))
        results = task.method.prune(jobs, plan.group if plan.group == "row" else "matrix")
        sample = source.sample if source else None
        for linear, job, result in zip(task.linears, jobs, results):
            error = None
            if sample is not None:
                before = sample @ job.weight.t()
                error = _relative(before - sample @ result.weight.t(), before)
            plan.before_change(linear.parameter)
            linear.weight.copy_(result.weight)
            self._remember(linear, result.mask)
            self._reports[linear.name] = self._linear_report(linear, job, result, error, task.note)

    def _exchange(self, task: _Task, owner: int) -> None:
        """Takes over what process `owner` made of the linears of `task`."""
        ranks, mine = self.plan.ranks, owner == self.plan.ranks.index
        reports = ranks.gathered([self._reports.get(linear.name) for linear in task.linears])[owner]
        for linear, report in zip(task.linears, reports):
            if not mine:
                self.plan.before_change(linear.parameter)
                self._remember(linear, torch.empty(linear.weight.shape, dtype=torch.bool))
                self._reports[linear.name] = report
            linear.weight.copy_(ranks.sent(linear.weight, owner))
            mask = linear.matrix(self.masks[linear.parameter_name])
            mask.copy_(ranks.sent(mask.to(linear.parameter.device), owner))

    def _remember(self, linear: Linear, mask: Tensor) -> None:
        name = linear.parameter_name
        if name not in self.masks:  # of fused experts one after the other
            known = self.plan.kept.get(name, torch.ones((), dtype=torch.bool).expand(linear.parameter.shape))
            self.masks[name] = torch.empty(known.shape, dtype=torch.bool, device=mask.device).copy_(known)
        linear.matrix(self.masks[name]).copy_(mask)

    def _linear_report(self, linear: Linear, job: Job, result: Pruned, error: float | None, note: str) -> LinearReport:
        pattern = job.pattern
        if result.damping is not None and result.damping > self.plan.method.damping:
            note = f"damping raised to {result.damping:g}, its Gram matrix had no Cholesky factor"
        pruned = result.mask.numel() - int(result.mask.count_nonzero())
        if isinstance(pattern, NM):
            holds = pattern.violations(result.mask) == 0
        elif job.fixed is not None:  # its count is not that of one linear
            holds = True
        else:
            groups = result.mask if self.plan.group == "row" else result.mask.reshape(1, -1)
            over = groups.shape[1] - groups.count_nonzero(1) - pattern.count(groups.shape[1])
            holds = not bool(over.any())
            if job.kept is not None and bool((over > 0).any()):
                note = note or "more was pruned before, in some rows or all of it, than the pattern asks for"
        return LinearReport(linear.name, str(pattern), pruned / result.mask.numel(), holds, error, result.damping, note)


@dataclass(frozen=True)
class _Task:
    """Linears that are pruned in one go, because they read one input: `group`, or none that is known."""

    linears: list[Linear]
    method: Method
    group: Any = None
    note: str = ""

    @property
    def cost(self) -> float:
        return float(sum(linear.out_features * linear.in_features**2 for linear in self.linears))


class _Heard(Exception):
    """The rest of the dense pass has nothing to tell."""


def _statistics(method: Method, linear: Linear, source: _Input | None, gradients: dict[str, GradientNorm]) -> tuple:
    known = dict(source.statistics) if source else {}
    if norm := gradients.get(linear.parameter_name):  # seen as (out, in)
        known[GradientNorm] = GradientNorm.of(linear.matrix(norm.sum), norm.order, norm.samples)
    return tuple(known[kind] for kind in method.needs)


def mask_of(masks: Masks, linear: Linear) -> Tensor | None:
    """That of `linear` (out, in) on the CPU, if there is one."""
    if linear.parameter_name not in masks:
        return None
    mask = masks.of(linear.parameter_name, linear.expert)
    return mask.t() if linear.transposed else mask


def _mask_of(masks: Masks, linear: Linear) -> Tensor | None:
    mask = mask_of(masks, linear)
    return None if mask is None else mask.to(linear.parameter.device)


def _joint_masks(plan: Plan, linears: list[Linear], inputs: dict, gradients=None) -> dict[str, Tensor]:
    """Masks of linears whose scores compete with one another, for the comparison groups "block" and "model"."""
    scores, known = [], {}
    for linear in linears:
        source = inputs.get(linear.group)
        if source or not plan.method.needs:  # an unreached expert competes for itself
            kept = known[linear.name] = _mask_of(plan.kept, linear)
            values = plan.method.score(linear.weight.float(), *_statistics(plan.method, linear, source, gradients or {}))
            scores.append(forget(values, kept))
    pattern = plan.patterns[linears[0].name] if linears else None  # one for all
    if isinstance(pattern, NM):
        masks = [pattern.mask(values) for values in scores]
    else:
        masks = [~gone for gone in lowest_of_all(scores, pattern.count(sum(s.numel() for s in scores)))] if scores else []
    return {name: mask if kept is None else mask & kept for (name, kept), mask in zip(known.items(), masks)}


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.float().norm() / reference.float().norm().clamp_min(1e-30))
