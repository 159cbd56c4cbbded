"""The decoder blocks of a model, the linears in them and how they are called: the only file that knows Transformers' modules.

Nothing is looked up by architecture. Blocks are the `ModuleList` of gradient-checkpointing layers, or the outermost one;
what a block calls, in which order and on which shared inputs, is seen by running eight tokens through it once. A mixture's fused
3-D expert parameter is found the same way: by the matrix products that read it. Leaves out everything that changes a weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn
from torch.nn.utils.prune import is_pruned
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


Store = Callable[[Tensor], Tensor]  # moves hidden states to where they wait between blocks


@dataclass(eq=False)
class Linear:
    """One prunable weight, always seen as (out, in)."""

    name: str  # "model.layers.0.mlp.up_proj"; of an expert "model.layers.0.mlp.experts.gate_up_proj.3"
    parameter_name: str
    module: nn.Module
    attribute: str  # of `module`, holds the parameter
    transposed: bool = False  # stored (in, out): Conv1D, some fused experts
    expert: int | None = None  # slice of a fused (experts, ., .) parameter
    called: bool = False  # by the eight tokens
    rank: tuple = (math.inf,)  # order of calls within the block
    group: Any = None  # linears of one block with equal `group` read one input

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def weight(self) -> Tensor:
        """The weight as an (out, in) view."""
        return self.matrix(self.parameter.detach())

    def matrix(self, tensor: Tensor) -> Tensor:
        """The (out, in) view of this linear in any `tensor` of its parameter's shape: weight, mask or gradient."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor.t() if self.transposed else tensor

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


@dataclass(eq=False)
class Call:
    """The arguments of one call of one block, but for its hidden states."""

    args: tuple
    kwargs: dict[str, Any]

    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """The block's hidden states for `hidden` (batch, length, d), as the model itself would compute them."""
        device = block.device
        hidden = hidden.to(device)
        if "hidden_states" in self.kwargs:
            output = block.module(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            output = block.module(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


def handed_on(calls: list[Call]) -> list[MutableMapping]:
    """What blocks will fill in these calls, which none has run yet, for blocks after them to read."""
    return [v for call in calls for v in call.kwargs.values() if isinstance(v, MutableMapping) and not v]


@dataclass(eq=False)
class Block:
    """One decoder layer."""

    name: str
    module: nn.Module
    linears: list[Linear] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)  # parameter that looks like a linear -> why it is none
    rest_of_output: tuple = ()
    returns_tuple: bool = False
    present: Callable[[], AbstractContextManager] = contextlib.nullcontext  # within, the parameters of `module` are there

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def blocks_of(model: nn.Module) -> list[Block]:
    """The decoder blocks of `model`, their linears not yet known.

    Raises:
        ValueError: no stack of blocks, or one that holds a block twice.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # not the tower that sees or hears
    of_text = set((decoder or model).modules())
    stacks = [found for found in model.named_modules() if isinstance(found[1], nn.ModuleList) and len(found[1])]
    marked = [found for found in stacks if all(isinstance(child, GradientCheckpointingLayer) for child in found[1])]
    for known in marked, list(_unmarked(stacks, model)):
        if known := [found for found in known if found[1] in of_text] or known:
            name, stack = max(known, key=lambda found: _numel(found[1]))
            return _distinct([Block(f"{name}.{i}", module) for i, module in enumerate(stack)])
    raise ValueError(f"{type(model).__name__} has no stack of decoder blocks: give a decoder-only model of Transformers.")


def _distinct(blocks: list[Block]) -> list[Block]:
    first: dict[nn.Module, Block] = {}
    for block in blocks:
        if (known := first.setdefault(block.module, block)) is not block:
            raise ValueError(
                f"{known.name} and {block.name} are the same module, and blocks that are in a model twice are not supported: give "
                "each a module of its own, as by copy.deepcopy."
            )
    return blocks


def _unmarked(stacks: list[tuple[str, nn.ModuleList]], model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Of code outside of Transformers: lists in no other list, of modules with linears, that are most of what is no embedding."""
    outside = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings") if hasattr(model, name)]
    rest = _numel(model) - _numel(nn.ModuleList(filter(None, outside)))
    for name, stack in stacks:
        nested = any(name.startswith(f"{other}.") for other, _ in stacks)
        if not nested and all(_holds_linears(child) for child in stack) and 2 * _numel(stack) > rest:
            yield name, stack


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _holds_linears(module: nn.Module) -> bool:
    return not isinstance(module, (nn.Linear, Conv1D)) and any(isinstance(m, (nn.Linear, Conv1D)) for m in module.modules())


class Decoder:
    """The blocks of a causal language model, found and tried once.

    Args:
        present: for a model whose weights are elsewhere: `present(i)` is a context within which those of block `i` are there,
            `present(None)` one for all that is outside of blocks.

    Attributes:
        shared: whether blocks hand more than hidden states on to others, such as keys and values (Gemma 3n).

    Raises:
        ValueError: no stack of blocks, blocks that do not simply follow one another, or weights that torch.nn.utils.prune makes anew.
    """

    def __init__(self, model: nn.Module, present: Callable[[int | None], AbstractContextManager] | None = None):
        self.model, self.shared = model, False
        self.body = getattr(model, model.base_model_prefix, model)
        self.blocks = blocks_of(model)
        self.outside_present = partial(present, None) if present else contextlib.nullcontext
        for index, block in enumerate(self.blocks):
            block.linears = list(_linears_of(block))
            if present:
                block.present = partial(present, index)
        self._trace()

    @property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all blocks."""
        return [parameter for block in self.blocks for parameter in block.module.parameters()]

    def _trace(self) -> None:
        """Runs eight tokens; notes who is called in which order on which input, and finds the fused experts."""
        calls: list[tuple[Linear, Tensor]] = []
        grouped: set[Linear] = set()
        previous: Tensor | None = None

        def before(module, args, kwargs):
            visit.enter_context(by_module[module].present())
            visit.enter_context(watch(by_module[module], lambda linear, x: calls.append((linear, x)), discover=True))
            for linear in by_module[module].linears:
                visit.callback(linear.module.register_forward_hook(partial(gave, linear)).remove)
            hidden = args[0] if args else kwargs["hidden_states"]
            self.shared |= bool(handed_on([Call((), kwargs)]))
            if previous is not None and not (hidden is previous or torch.equal(hidden.to(previous.device), previous)):
                raise ValueError(
                    f"{type(self.model).__name__} changes the hidden states between its blocks: hf_prune needs blocks that follow one another."
                )

        def gave(linear, module, args, output):
            if args and args[0].numel() // linear.in_features != output.numel() // linear.out_features:
                grouped.add(linear)

        def after(module, args, output):
            nonlocal previous
            block = by_module[module]
            for name in {linear.parameter_name for linear in block.linears}.intersection(block.left_dense):
                del block.left_dense[name]
            for linear in grouped.intersection(block.linears):
                block.linears.remove(linear)
                block.left_dense[linear.name] = "its outputs read different inputs, group by group"
            block.returns_tuple = not isinstance(output, Tensor)
            previous = output[0] if block.returns_tuple else output
            block.rest_of_output = tuple(output[1:]) if block.returns_tuple else ()
            _order(block, [(linear, x) for linear, x in calls if linear not in grouped])
            calls.clear()
            visit.close()

        by_module = {block.module: block for block in self.blocks}
        with contextlib.ExitStack() as stack, torch.no_grad(), eager_experts(self.model), self.outside_present():
            visit = stack.enter_context(contextlib.ExitStack())  # what holds as long as one block runs
            for block in self.blocks:
                stack.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.module.register_forward_hook(after).remove)
            ids = torch.arange(8, device=self.model.get_input_embeddings().weight.device)[None]
            try:
                self.body(input_ids=ids % self.model.get_input_embeddings().weight.shape[0], use_cache=False)
            except (AttributeError, TypeError) as error:
                raise ValueError(f"{type(self.model).__name__} cannot be run block by block: {error}") from error
        if previous is None:
            raise ValueError(f"{type(self.model).__name__} does not run the blocks that it holds.")

    @torch.no_grad()
    def capture(self, batches: list[Tensor], store: Store = lambda x: x) -> tuple[list[Tensor], list[list[Call]]]:
        """What reaches the blocks for each batch of `ids` (sequences, length).

        Returns:
            The hidden states before block 0, a tensor (sequences, length, d) a batch, where `store` moves it;
            and `calls[block][batch]`: every block's own arguments, which differ between sliding-window and full attention.
        """
        states: list[Tensor] = []
        calls: list[list[Call]] = [[] for _ in self.blocks]
        pool: dict = {}

        def heard(index: int, hidden: Tensor, rest: tuple, kwargs: dict[str, Any]) -> Tensor:
            if index == 0:
                states.append(store(hidden))
            kwargs = {k: None if k == "hidden_states" else _interned(v, pool) for k, v in kwargs.items()}
            calls[index].append(Call(tuple(_interned(a, pool) for a in rest), kwargs))
            return hidden

        with self.outside_present(), self._stand_ins(heard):
            device = self.model.get_input_embeddings().weight.device
            for ids in batches:
                self.body(input_ids=ids.to(device), use_cache=False)
        return states, calls

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of the `hidden` states that leave its last block, for `ids` (sequences, length)."""
        last = len(self.blocks) - 1
        with self._stand_ins(lambda index, before, *_: hidden if index == last else before):
            return self.model(input_ids=ids.to(hidden.device), use_cache=False).logits

    @contextlib.contextmanager
    def _stand_ins(self, output_of: Callable[[int, Tensor, tuple, dict[str, Any]], Tensor]) -> Iterator[None]:
        """Within, no block runs: block i gives `output_of(i, hidden, args, kwargs)` of the hidden states and arguments that reach it."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            block, named = self.blocks[index], "hidden_states" in kwargs
            hidden, rest = (kwargs["hidden_states"], args) if named else (args[0], args[1:])
            output = output_of(index, hidden, rest, kwargs)
            return (output, *block.rest_of_output) if block.returns_tuple else output

        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced(block.module, "forward", partial(forward, index)))
            yield


def run_lockstep(
    block: Block,
    calls: list[Call],
    hidden: list[Tensor],
    linears: list[Linear],
    on_input: Callable[[Linear, Tensor], None],
    on_complete: Callable[[Linear], None],
    store: Store = lambda x: x,
    lowest: Callable[[int], int] = int,
) -> None:
    """Runs all batches through `block` together, in place in `hidden`, pausing each at the linears on its way.

    `on_input(linear, x)` is told of every batch's input (tokens, in) at the first linear of a group; when all batches that
    need that group are there, `on_complete(linear)` may change its weights, and only then do they go on. So one pass both
    collects and propagates, in the memory that the batches hold at that one point rather than that of all intermediates.

    `lowest(position)` is asked where to go on, given the next group in line here: other processes run other batches.
    """
    done: set = set()
    main = greenlet.getcurrent()
    line = sorted({linear.group: linear for linear in reversed(linears)}.values(), key=lambda linear: linear.rank)
    position = {linear.group: i for i, linear in enumerate(line)}

    def arrive(linear: Linear, x: Tensor) -> None:
        if linear.group not in done:
            on_input(linear, x)
            main.switch(linear)

    def forward(i: int) -> None:
        hidden[i] = store(calls[i].run(block, hidden[i]))

    with watch(block, arrive, linears) as watching:
        batches = [greenlet(forward) for _ in calls]
        paused: dict[int, Linear] = {}

        def resume(i: int, *args) -> None:
            linear = batches[i].switch(*args)
            if batches[i].dead:
                paused.pop(i, None)
            else:
                paused[i] = linear

        try:
            for i in range(len(batches)):
                resume(i, i)
            while (at := lowest(min((position[x.group] for x in paused.values()), default=len(line)))) < len(line):
                first = line[at]
                watching.paused = True  # products within are not calls of the block
                on_complete(first)
                watching.paused = False
                done.add(first.group)
                for i in [i for i, linear in paused.items() if linear.group == first.group]:
                    resume(i)
        finally:
            for batch in batches:
                if not batch.dead:
                    batch.throw(GreenletExit)


@contextlib.contextmanager
def watch(
    block: Block, on_input: Callable[[Linear, Tensor], None], linears: list[Linear] | None = None, discover: bool = False
) -> Iterator[_Products]:
    """Within, `on_input(linear, x)` hears of every call of `linears` (all of the block by default), before it runs.

    `x` is (tokens, in). Modules are heard by a hook; fused experts by the matrix products that read their parameter, with
    `discover` also those that are not known yet.
    """

    def hear(linear: Linear, x: Tensor) -> None:
        if x.numel():  # an expert may be called with no token
            on_input(linear, x if discover else x.reshape(-1, x.shape[-1]))

    def heard(linear: Linear, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hear(linear, args[0] if args else kwargs["input"])

    linears = block.linears if linears is None else linears
    products = _Products(block, hear, [linear for linear in linears if linear.expert is not None], discover)
    with contextlib.ExitStack() as stack:
        for linear in linears:
            if linear.expert is None:
                stack.callback(linear.module.register_forward_pre_hook(partial(heard, linear), with_kwargs=True).remove)
        if products.fused:
            stack.enter_context(products)
        yield products


class _Products(TorchFunctionMode):
    """Hears of the matrix products that read fused experts, unless it is `paused`."""

    def __init__(self, block: Block, hear: Callable[[Linear, Tensor], None], experts: list[Linear], discover: bool):
        super().__init__()
        self._block, self._hear, self._discover, self.paused = block, hear, discover, False
        self._experts = {(linear.parameter_name, linear.expert): linear for linear in experts}
        self.fused: dict[int, tuple[str, nn.Module, str]] = {}
        for path, module in block.module.named_modules() if discover or experts else ():
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and parameter.shape[0] > 1:
                    name = ".".join(filter(None, (block.name, path, attribute)))
                    self.fused[parameter.untyped_storage().data_ptr()] = name, module, attribute

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not self.paused and getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1:
            weight = args[1]
            if isinstance(weight, Tensor) and (found := self.fused.get(weight.untyped_storage().data_ptr())):
                self._product(found, args[0], weight, is_linear=func.__name__ == "linear")
        return func(*args, **(kwargs or {}))

    def _product(self, found: tuple[str, nn.Module, str], x: Tensor, weight: Tensor, is_linear: bool) -> None:
        name, module, attribute = found
        parameter = getattr(module, attribute)
        stored_as_read = weight.stride()[-2:] == parameter.stride()[-2:]
        if self._discover and (name, 0) not in self._experts:
            for e in range(parameter.shape[0]):
                linear = Linear(f"{name}.{e}", name, module, attribute, stored_as_read != is_linear, expert=e)
                self._experts[name, e] = linear
                self._block.linears.append(linear)
        if weight.dim() == 3:  # a batched product over all experts: x is (experts, tokens, in)
            experts, inputs = range(len(weight)), x
        else:
            experts, inputs = [(weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)], [x]
        for expert, tokens in zip(experts, inputs):
            if linear := self._experts.get((name, expert)):
                with self:  # inside this method the mode is off; the listener may switch to another batch, which needs it
                    self._hear(linear, tokens)


_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm"})


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures compute expert by expert within, so that each expert's own tokens can be seen."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    with contextlib.ExitStack() as stack:
        for config in configs:
            if hasattr(config, "_experts_implementation_internal"):
                stack.enter_context(replaced(config, "_experts_implementation_internal", "eager"))
        yield


@contextlib.contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within; modes, `requires_grad` and gradients of all that is in it are as before afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    before = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    module.eval()
    try:
        for parameter, *_ in before:
            parameter.grad = None
        yield
    finally:
        for m, training in modes:
            m.training = training
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextlib.contextmanager
def replaced(module: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    own = module.__dict__.get(attribute, module)  # no module is an attribute of itself
    setattr(module, attribute, value)
    try:
        yield
    finally:
        delattr(module, attribute) if own is module else setattr(module, attribute, own)


class Part:
    """A block, or one of its two residual branches with the norms that belong to it, run alone.

    Attributes:
        module: what is in it; its parameters have the names that they have in the block.
    """

    def __init__(
        self, block: Block, children: list[str] | None = None, end: nn.Module | None = None, silent: dict | None = None
    ):
        self.block, self._end, self._silent = block, end, silent or {}
        self.module = block.module
        if children is not None:
            self.module = nn.ModuleDict({name: block.module.get_submodule(name) for name in children})

    def run(self, call: Call, hidden: Tensor) -> Tensor:
        """The hidden states after this part for those before it, both (batch, length, d)."""
        with contextlib.ExitStack() as stack:
            for module, rest in self._silent.items():
                stack.enter_context(replaced(module, "forward", partial(_silence, hidden.to(self.block.device), rest)))
            if self._end is not None:
                stack.callback(self._end.register_forward_pre_hook(_stop, with_kwargs=True).remove)
            try:
                return call.run(self.block, hidden)
            except _Reached as reached:
                return reached.args[0]


@torch.no_grad()
def halves_of(block: Block, call: Call, hidden: Tensor) -> list[Part]:
    """Attention and MLP as two parts, one after the other; the whole block where they are not that (parallel branches).

    Found by trying: what reaches one of the modules after the first that holds linears must be all that the rest depends on.
    """
    first = block.linears[0].name.removeprefix(f"{block.name}.").split(".")[0] if block.linears else None
    order: list[str] = []
    entered: list[tuple[str, Tensor]] = []
    structure: list = []
    with contextlib.ExitStack() as stack:
        for name, child in block.module.named_children():

            def entering(module, args, kwargs, name=name):
                order.append(name)
                if structure:
                    entered.append((name, args[0] if args else next(iter(kwargs.values()), None)))

            stack.callback(child.register_forward_pre_hook(entering, with_kwargs=True).remove)
            if name == first:
                stack.callback(child.register_forward_hook(lambda module, args, output: structure.append(output)).remove)
        whole = call.run(block, hidden)
    if len(set(order)) == len(order) and structure:
        output = structure[0]
        rest = None if isinstance(output, Tensor) else tuple(output[1:])
        for name, x in entered:
            if not isinstance(x, Tensor) or x.shape != hidden.shape:
                continue
            cut, child = order.index(name), block.module.get_submodule(name)
            parts = [
                Part(block, order[:cut], end=child),
                Part(block, order[cut:], silent={block.module.get_submodule(first): rest}),
            ]
            if (parts[1].run(call, x) - whole).norm() <= 1e-5 * whole.norm() and any(
                p.dim() > 1 for p in parts[1].module.parameters()
            ):
                return parts
    return [Part(block)]


class _Reached(Exception):
    pass


def _stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else next(iter(kwargs.values())))


def _silence(hidden: Tensor, rest: tuple | None, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(hidden) if rest is None else (torch.zeros_like(hidden), *rest)


def _linears_of(block: Block) -> Iterator[Linear]:
    """The `nn.Linear` and `Conv1D` of a block; routers, tiny ones and other parameters go to `block.left_dense`, and so do those
    whose weight is no parameter, but made of others (weight_norm).

    Raises:
        ValueError: a weight is made by torch.nn.utils.prune.
    """
    for path, module in block.module.named_modules():
        name = ".".join(filter(None, (block.name, path)))
        if isinstance(module, (nn.Linear, Conv1D)):
            made = _made_anew(name, module)
            too_small = "reads or gives fewer than 8 numbers" if min(module.weight.shape) < 8 else None
            if reason := made or _router(block.module, path) or too_small:
                block.left_dense[name] = reason
            else:
                yield Linear(name, f"{name}.weight", module, "weight", transposed=isinstance(module, Conv1D))
        else:
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and min(parameter.shape) > 1 and "bias" not in attribute:  # perhaps fused experts
                    block.left_dense[f"{name}.{attribute}"] = (
                        _router(block.module, f"{path}.{attribute}") or "no linear that hf_prune knows"
                    )


def _made_anew(name: str, module: nn.Module) -> str | None:
    """Why a change of the weight of `module` would not last, or None."""
    if "weight" in module._parameters:
        return None
    if is_pruned(module):
        raise ValueError(
            f"{name} carries a mask of torch.nn.utils.prune, which makes its weight anew in every forward pass: make the mask "
            "permanent first, with torch.nn.utils.prune.remove(module, 'weight')."
        )
    return "its weight is no parameter: it is made anew in every forward pass, or a buffer"


def _router(block: nn.Module, path: str) -> str | None:
    """Why the parameter or module at `path` decides where tokens go, or None."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        owner = type(block.get_submodule(".".join(parts[:end]))).__name__.lower()
        if "router" in owner or "gating" in owner:
            return "router"
    parent = block.get_submodule(".".join(parts[:-1]))
    experts = getattr(parent, "experts", None)
    module = getattr(parent, parts[-1], None)
    if experts is not None and isinstance(module, nn.Linear):
        counts = [p.shape[0] for p in experts.parameters(recurse=False) if p.dim() == 3]
        counts += [len(experts)] if isinstance(experts, nn.ModuleList) else []
        if module.out_features == 1 or module.out_features in counts:
            return "router"
    return None


def _order(block: Block, calls: list[tuple[Linear, Tensor]]) -> None:
    """Fills in `called`, `rank` and `group` from what was heard; experts that were not reached follow their siblings."""
    first_calls: dict[Linear, tuple[int, int]] = {}
    for position, (linear, x) in enumerate(calls):
        first_calls.setdefault(linear, (position, id(x)))
    start: dict[str, int] = {}  # container of experts -> position of its first call
    leaves: dict[tuple[str, str], tuple[int, int]] = {}  # (container, leaf) -> position, first position on its input
    earliest: dict[int, int] = {}
    for linear, (position, source) in first_calls.items():
        earliest.setdefault(source, position)
        if place := _expert_place(block, linear):
            container, _, leaf = place
            start.setdefault(container, position)
            leaves.setdefault((container, leaf), (position, earliest[source]))
    for index, linear in enumerate(block.linears):
        linear.called = linear in first_calls
        place = _expert_place(block, linear)
        if place and (place[0], place[2]) in leaves:
            container, expert, leaf = place
            position, shared = leaves[container, leaf]
            linear.rank, linear.group = (start[container], expert, position), (container, expert, shared)
        elif linear.called:
            position, source = first_calls[linear]
            linear.rank, linear.group = (position, 0, 0), (earliest[source],)
        else:
            linear.rank, linear.group = (math.inf, index, 0), (linear.name,)
    block.linears.sort(key=lambda linear: linear.rank)


def _expert_place(block: Block, linear: Linear) -> tuple[str, int, str] | None:
    """(container, expert, leaf) of an expert's linear, `("mlp.experts", 3, "w1")`; None of any other."""
    path = linear.parameter_name[len(block.name) + 1 :].removesuffix(".weight").split(".")
    if linear.expert is not None:
        return ".".join(path[:-1]), linear.expert, path[-1]
    for i, part in enumerate(path):
        if part.isdigit():
            return ".".join(path[:i]), int(part), ".".join(path[i + 1 :])
    return None


def _interned(value: Any, pool: dict) -> Any:
    """`value` with its tensors replaced by equal ones that are alive already: batches share their attention masks."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_interned(v, pool) for v in value)
    if not isinstance(value, Tensor):
        return value
    known = pool.setdefault((value.shape, value.dtype, value.device), [])
    for tensor in known:
        if tensor is value or torch.equal(tensor, value):
            return tensor
    known.append(value)
    return value
