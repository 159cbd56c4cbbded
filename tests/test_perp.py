"""Retraining: every kind of trainable keeps the masks through training, saving, resuming, best-model reload and merge."""

import copy
import gc
import runpy
import sys
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, ids_for, in_two_processes, make, same, snapshot
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_prune
from hf_prune import Distillation, EfficientLLMCallback, KeepMasksCallback, Masks, PERPCallback, PruningConfig, Reconstruction
from hf_prune.blocks import Decoder, eager_experts, halves_of
from hf_prune.perp import KINDS, AdaptedLinear, attach, release
from hf_prune.reconstruction import outputs_of


DATA = [{"input_ids": ids, "labels": ids} for ids in ids_for(24, 16)]
MERGED = [kind for kind in KINDS if kind != "lora"]


def pruned(family="llama", pattern="2:4", dtype=torch.float32, **changes):
    model = make(family, dtype=dtype, **changes)
    model.prune(PruningConfig(pattern=pattern, n_samples=6, sequence_length=24), ids_for())
    return model


def arguments(folder, **changes):
    values = dict(
        max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        logging_strategy="no", seed=1, disable_tqdm=True,
    )  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**values, **changes})


def train(model, folder, callback, resume=None, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model, arguments(folder, **changes), train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def loss(model):
    ids = torch.stack([row["input_ids"] for row in DATA])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


def holds(model, masks):
    return not masks.violations(model) and not any(hasattr(m, "perp_A") for m in model.modules())


FAMILY = {"bias": "qwen2"}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("kind", MERGED)
def test_every_kind(kind, tmp_path):
    model = pruned(FAMILY.get(kind, "llama"))
    masks, before, start = model.pruning_masks, snapshot(model), loss(model)
    train(model, tmp_path / "run", PERPCallback(train=kind))
    assert loss(model) < start
    assert any(name not in before or not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert holds(model, masks)
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loss(again) == loss(model) and again.pruning_masks.digest() == masks.digest()


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora", "spp_lora", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_is_what_was_trained(family, kind, monkeypatch):
    """Also if the merge is interrupted right after a weight was written, and called again."""
    model = pruned(family)
    attached = attach(model, model.pruning_masks, (kind,))
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        before = model(input_ids=ids_for()).logits
        shown = {name: value.clone() for name, value in model.state_dict().items() if "perp" not in name}
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("hf_prune.perp._swap", interrupted)
            attached.merge()
        attached.merge()
        assert torch.allclose(model(input_ids=ids_for()).logits, before, atol=1e-5)
    assert all(torch.equal(value, shown[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora", "spp_lora"])
def test_gradients_are_those_of_autograd(family, kind):
    model = pruned(family).double()
    attached = attach(model, model.pruning_masks, (kind,), rank=3)
    name, module = next((n, m) for n, m in attached.adapted.items())
    module.perp_A.data, module.perp_B.data = torch.randn_like(module.perp_A), torch.randn_like(module.perp_B)
    mask = model.pruning_masks[f"{name}.weight"]
    x = torch.randn(2, 5, module.perp_A.shape[1], dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, 5, module.perp_B.shape[0], dtype=torch.float64)
    a, b = (p.detach().double().requires_grad_() for p in (module.perp_A, module.perp_B))
    product = (b @ a).t() if module.perp.transposed else b @ a
    own, s = module.weight.detach(), module.perp.scale
    weight = {"mask_lora": own + s * product * mask, "scale_lora": own * product, "spp_lora": own + s * own * product}[kind]
    y = x @ weight if module.perp.transposed else x @ weight.t()
    bias = module.bias if module.bias is not None else 0
    wanted = torch.autograd.grad(((y + bias) * out).sum(), (x, a, b))
    got = torch.autograd.grad((module(x) * out).sum(), (x, module.perp_A, module.perp_B))
    for ours, theirs in zip(got, wanted):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_lora_ends_as_an_adapter_of_peft(tmp_path):
    pytest.importorskip("peft")
    model = pruned()
    masks = model.pruning_masks
    start = loss(model)
    try:
        train(model, tmp_path, PERPCallback(train="lora"))
    except ValueError as error:
        if "PEFT" in str(error) and "version" in str(error):
            pytest.skip(str(error))
        raise
    assert loss(model) < start
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_config.json").exists()
    model.disable_adapters()
    assert abs(loss(model) - start) < 1e-6
    base = {n.replace("base_layer.", ""): p for n, p in model.named_parameters()}
    assert all(not base[name][~masks[name]].any() for name in masks)


@pytest.mark.parametrize("kind, family", [
    *((kind, "llama") for kind in ("mask_lora", "norm", "full", "head", "added_bias")), ("full", "mixtral"),
])  # fmt: skip
def test_resume_is_exact(kind, family, tmp_path):
    start = pruned(family, tie_word_embeddings=kind == "head")
    whole, half, resumed = (copy.deepcopy(start) for _ in range(3))
    save = dict(save_strategy="steps", save_steps=3)
    train(whole, tmp_path / "whole", PERPCallback(train=kind), **save)
    train(half, tmp_path / "half", PERPCallback(train=kind), **save)
    checkpoint = tmp_path / "half/checkpoint-3"
    train(resumed, tmp_path / "half", PERPCallback(train=kind), resume=str(checkpoint), **save)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)  # an ordinary model, half trained
    assert not plain.pruning_masks.violations(plain) and loss(plain) < loss(start)


def test_best_model_is_reloaded_and_merged(tmp_path):
    model = pruned()
    masks = model.pruning_masks
    changes = dict(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", max_steps=8, learning_rate=0.1,
    )  # fmt: skip
    trainer = train(model, tmp_path, PERPCallback(), **changes)
    assert holds(model, masks)
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert abs(loss(best) - loss(model)) < 1e-6


@pytest.mark.parametrize("changes", [
    dict(gradient_accumulation_steps=3), dict(gradient_checkpointing=True), dict(bf16=True), dict(optim="sgd", optim_args="momentum=0.9"),
    dict(optim="adafactor"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["mask_lora", "full"])
def test_ways_to_train(kind, changes, tmp_path):
    model = pruned()
    masks, start = model.pruning_masks, loss(model)
    rate = 1.0 if "optim" in changes and changes["optim"] == "sgd" else 1e-2
    train(model, tmp_path, PERPCallback(train=kind), **{"learning_rate": rate, "weight_decay": 0.1, **changes})
    assert holds(model, masks) and loss(model) < start and model.dtype == torch.float32


def test_what_is_frozen_at_first_keeps_its_zeros(tmp_path):
    """A callback after ours sets it free; the optimizers of one layer step within the backward pass."""
    model = pruned()
    late, steps = model.model.layers[1].requires_grad_(False), model.model.layers[0]
    before = snapshot(model)

    class Thaw(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            late.requires_grad_(state.global_step > 0)

    def step(parameter):
        parameter.data.sub_(torch.ones_like(parameter))
        parameter.grad = None

    for parameter in steps.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Trainer(
        model, arguments(tmp_path, max_steps=3), train_dataset=DATA, callbacks=[KeepMasksCallback(), Thaw()],
        optimizers=(optimizer, None),
    ).train()  # fmt: skip
    assert not model.pruning_masks.violations(model) and not torch.equal(late.mlp.up_proj.weight, before[UP])
    assert not any(p._post_accumulate_grad_hooks for p in late.parameters())


def test_a_schedule_free_optimizer_is_merged_as_it_is_evaluated():
    model, callback = pruned(), PERPCallback("norm")
    callback.on_init_end(arguments("unused"), transformers.TrainerState(), None, model=model)
    optimizer = types.SimpleNamespace(eval=lambda: model.model.norm.weight.data.fill_(3.0))
    callback.on_train_end(None, None, None, optimizer=optimizer)
    assert (model.model.norm.weight == 3).all()


def test_half_precision_model(tmp_path):
    model = pruned(dtype=torch.bfloat16)
    masks, start = model.pruning_masks, loss(model)
    train(model, tmp_path, PERPCallback(train=("mask_lora", "norm")), bf16=True)
    assert holds(model, masks) and loss(model) < start and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_fused_experts_are_named_and_left(tmp_path, caplog):
    model = pruned("mixtral")
    masks = model.pruning_masks
    callback = PERPCallback()
    train(model, tmp_path, callback)
    assert holds(model, masks)


def test_distillation(tmp_path):
    dense, model = make("llama"), pruned()
    plain = copy.deepcopy(model)

    def divergence(student):
        with torch.no_grad():
            own, other = (m.eval()(input_ids=ids_for()).logits.log_softmax(-1) for m in (student, dense))
        return float((other.exp() * (other - own)).sum(-1).mean())

    start = divergence(model)
    train(model, tmp_path, PERPCallback(train="full", distillation=Distillation(dense, weight=1.0)), learning_rate=1e-3)
    train(plain, tmp_path, PERPCallback(train="full"), learning_rate=1e-3)
    assert divergence(model) < start and divergence(model) < divergence(plain)
    assert not model._forward_hooks


def test_distillation_is_the_divergence():
    dense, model = make("llama"), pruned()
    hook = Distillation(dense, weight=0.25, temperature=2.0)
    ids = ids_for()
    labels = ids.clone()
    labels[:, :5] = -100
    model.train()
    plain = model(input_ids=ids, labels=labels)
    handle = model.register_forward_hook(hook, with_kwargs=True)
    output = model(input_ids=ids, labels=labels)
    handle.remove()
    own, other = (x.detach()[:, 4:-1] / 2 for x in (plain.logits, dense(input_ids=ids).logits))
    divergence = nn.functional.kl_div(own.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="sum")
    assert torch.allclose(output.loss, 0.75 * plain.loss + 0.25 * 4 * divergence / own.shape[:2].numel(), atol=1e-5)
    weight = model.lm_head.weight
    (gradient,) = torch.autograd.grad(output.loss, weight)
    kl = nn.functional.kl_div(
        (plain.logits[:, 4:-1] / 2).log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="sum"
    )
    (wanted,) = torch.autograd.grad(0.75 * plain.loss + kl / own.shape[:2].numel(), weight)
    assert torch.allclose(gradient, wanted, atol=1e-5)


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    model = pruned()

    class Spoil(KeepMasksCallback):
        def on_substep_end(self, *args, **kwargs): ...

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                self.hook = model.lm_head.register_full_backward_hook(lambda m, i, o: (i[0] * float("nan"),))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[PERPCallback(), Spoil()])
        trainer.train()
    assert trainer.state.global_step == 4
    assert all(torch.isfinite(p).all() for p in model.parameters()) and holds(model, model.pruning_masks)


def test_errors(tmp_path):
    model = pruned()
    before = snapshot(model)

    def refused(match, model, callback, **changes):
        with pytest.raises(ValueError, match=match):
            train(model, tmp_path, callback, **changes)

    refused("no masks", make("llama"), PERPCallback())
    refused("must name some of", model, PERPCallback(train="mask-lora"))
    refused("got nothing", model, PERPCallback(train=()))
    refused("one adapter at a time", model, PERPCallback(train=("lora", "mask_lora")))
    refused("only alone", model, PERPCallback(train=("full", "norm")))
    refused("finds nothing to train.*added_bias", model, PERPCallback(train="bias"))
    refused("rank must be", model, PERPCallback(rank=0))
    refused("finds nothing to train.*no flag", pruned("gpt2"), PERPCallback(train="added_bias"))
    assert same(model, before) and all(p.requires_grad for p in model.parameters())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA)
    trainer.add_callback(PERPCallback())
    with pytest.raises(ValueError, match="came too late"):
        trainer.train()
    trainer = Trainer(model_init=lambda: pruned(), args=arguments(tmp_path), train_dataset=DATA, callbacks=[PERPCallback()])
    with pytest.raises(ValueError, match="came too late"):
        trainer.train()
    model = pruned()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[PERPCallback()], optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="optimizer does not know"):
        trainer.train()
    callback = PERPCallback()
    Trainer(model := pruned(), arguments(tmp_path), train_dataset=DATA, callbacks=[callback])
    with pytest.raises(ValueError, match="an adapter of PERPCallback"):
        Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[PERPCallback()])
    callback.detach()
    assert same(model, before) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="has ended.*a new one"):
        callback.on_train_begin(None, None, None, model=model)
    masks = Masks({**model.pruning_masks, "lm_head.weight": torch.ones(128, 32) > 0})
    for kinds in (("norm", "head"), ("mask_lora", "head")):
        with pytest.raises(ValueError, match="the head is pruned"):
            attach(model, masks, kinds)
    masks = Masks({"model.embed_tokens.weight": torch.ones(128, 32) > 0, **model.pruning_masks})
    attached = attach(model, masks, "mask_lora")
    assert attached.left_out == ["model.embed_tokens.weight"]
    attached.detach()


@pytest.mark.parametrize("launched", [False, True])
def test_sharded_parameters_are_refused(launched, monkeypatch):
    """Whether `TrainingArguments` say that they are sharded, or `accelerate launch` does, in the environment."""

    def refused(match, callback, version=2, emptied=False, dtype=torch.float32):
        config = {"version": version, "cpu_ram_efficient_loading": str(emptied).lower()}
        args = types.SimpleNamespace(fsdp=not launched, fsdp_config=config, deepspeed=None, bf16=False, fp16=False)
        if launched:
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            for name, value in config.items():
                monkeypatch.setenv(f"FSDP_{name.upper()}", str(value))
        before = snapshot(model := pruned(dtype=dtype))
        with pytest.raises(ValueError, match=match):
            callback.on_init_end(args, None, None, model=model)
        assert same(model, before) and all(p.requires_grad and p.dtype == dtype for p in model.parameters())

    refused("not FSDP1", PERPCallback(), version=1)
    refused("emptied and loaded again", PERPCallback(), emptied=True)
    refused("train PEFT's own LoRA", PERPCallback("lora"))
    refused("gives bfloat16 and float32: set bf16=True", PERPCallback(), dtype=torch.bfloat16)
    refused("use DDP, not FSDP", EfficientLLMCallback(0.7))
    model = pruned()
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks its parameters
    with pytest.raises(ValueError, match="not under FSDP1 or ZeRO-3"):
        KeepMasksCallback().on_train_begin(None, None, None, model=model)


def test_two_processes(tmp_path):
    code = """
import test_perp
for kind in ("mask_lora", "full"):
    model = test_perp.pruned()
    masks = model.pruning_masks
    test_perp.train(model, kind, test_perp.PERPCallback(train=kind), save_strategy="steps", save_steps=3)
    assert test_perp.holds(model, masks)
import pytest
for callback in (test_perp.PERPCallback(), test_perp.KeepMasksCallback()):
    other = test_perp.pruned()
    if torch.distributed.get_rank():  # keeps more
        other.pruning_masks.packed("model.layers.1.mlp.up_proj.weight")[:] = 255
    with pytest.raises(ValueError, match="given different masks"):
        test_perp.train(other, "other", callback)
"""
    in_two_processes(tmp_path, code)
    for kind in ("mask_lora", "full"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / kind / "checkpoint-3")
        assert not plain.pruning_masks.violations(plain)


# accelerate shards on accelerators only; all that it does then runs on CPUs too.
ON_CPUS = """
import accelerate.state as states, torch
from accelerate.utils import DistributedType
begin = states.AcceleratorState.__init__
def init(self, *args, fsdp_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        states.PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
states.AcceleratorState.__init__ = init
"""


@pytest.mark.skipif(transformers.__version__ < "5", reason="Trainer of 4.57 takes FSDP2 from accelerate's launcher alone")
def test_masks_hold_under_fsdp2(tmp_path):
    """Each process masks the rows that it holds; checkpoints carry masks, and training goes on from one."""
    code = f"""{ON_CPUS}
import hf_prune, test_perp
config = {{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}}
how = dict(fsdp=True, fsdp_config=config, weight_decay=0.1, save_strategy="steps", save_steps=3)
for resume in (None, "run/checkpoint-3"):
    model = test_perp.pruned()
    masks, before = model.pruning_masks, test_perp.snapshot(model)
    trainer = test_perp.train(model, "run", hf_prune.KeepMasksCallback(), resume=resume, **how)
    sharded = dict(trainer.model.named_parameters())
    assert all(type(p).__name__ == "DTensor" and len(p.to_local()) < len(p) for p in sharded.values())
    for name, bits in masks.items():
        pruned = ~bits
        for tensor in (sharded[name], *[t for t in trainer.optimizer.state[sharded[name]].values() if t.dim()]):
            assert not tensor.full_tensor()[pruned].any() and tensor.full_tensor()[bits].any()
        assert not torch.equal(sharded[name].full_tensor(), before[name])
    mine = next(p for name, p in sharded.items() if name in masks).to_local()
    kept = mine.detach().clone()
    mine.data.fill_(1.0)
    assert sum(masks.violations(trainer.model).values()) == mine.numel() // 2
    mine.data.copy_(kept)
    trainer.save_model("final")
    found = {{name: p.full_tensor() for name, p in sharded.items()}}
    if resume:
        assert all(torch.allclose(p, found[name], atol=1e-6) for name, p in first.items())
    first = found
model = hf_prune.load("final")
assert not masks.violations(model) and model.pruning_masks.digest() == masks.digest()
assert all(torch.equal(p, found[name]) for name, p in model.named_parameters())
"""
    in_two_processes(tmp_path, code)


FSDP2 = {
    "mask_lora": ("llama", "LlamaDecoderLayer", ("mask_lora", "norm")),
    "spp_lora": ("gpt2", "GPT2Block", ("spp_lora", "head")),
    "full": ("llama", "LlamaDecoderLayer", ("full",)),
}


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    """A folder with what two processes trained under FSDP2, each kind in one of its own."""
    code = f"""{ON_CPUS}
import os
import hf_prune, test_perp
for folder, (family, layer, kinds) in test_perp.FSDP2.items():
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    config = {{"version": 2, "transformer_layer_cls_to_wrap": [layer]}}
    how = dict(fsdp=True, fsdp_config=config, save_strategy="steps", save_steps=3)
    for resume in (None, "run/checkpoint-3"):
        model = test_perp.pruned(family)
        masks, before = model.pruning_masks, test_perp.snapshot(model)
        names = set(before)
        trainer = test_perp.train(model, "run", test_perp.PERPCallback(kinds), resume=resume, **how)
        sharded = dict(trainer.model.named_parameters())
        assert all(type(p).__name__ == "DTensor" for p in sharded.values())
        assert not masks.violations(trainer.model)
        trainer.evaluate(test_perp.DATA)
        assert set(dict(trainer.model.named_parameters())) == set(sharded) and not any("perp" in name for name in trainer.model.state_dict())
        found = {{name: p.full_tensor() for name, p in sharded.items()}}
        for name in masks:
            assert not found[name][~masks[name]].any() and not torch.equal(found[name], before[name])
        if resume:
            assert all(torch.allclose(p, found[name], atol=1e-6) for name, p in first.items())
        first = found
    trainer.save_model("final")
    torch.save(found, f"found-{{torch.distributed.get_rank()}}.pt")
    torch.distributed.barrier()
    model = hf_prune.load("final")
    os.chdir("..")
"""
    folder = tmp_path_factory.mktemp("fsdp2")
    in_two_processes(folder, code)
    return folder


@pytest.mark.skipif(transformers.__version__ < "5", reason="Trainer of 4.57 takes FSDP2 from accelerate's launcher alone")
@pytest.mark.parametrize("kind", FSDP2)
def test_perp_under_fsdp2(kind, fsdp2, tmp_path):
    """The same as in one process, merged rows by rows; training goes on from a checkpoint, and the model runs afterwards."""
    (family, _, kinds), folder = FSDP2[kind], fsdp2 / kind
    found = torch.load(folder / "found-0.pt")
    for place in ("run/checkpoint-6", "final"):  # before it was merged, and after
        plain = AutoModelForCausalLM.from_pretrained(folder / place)
        assert not plain.pruning_masks.violations(plain)
        assert all(torch.allclose(p, found[name], atol=1e-7) for name, p in plain.named_parameters())
    if family == "llama":  # the other one has dropout
        alone = pruned(family)
        train(alone, tmp_path / "alone", PERPCallback(kinds), per_device_train_batch_size=4)
        assert all(torch.allclose(p, found[name], atol=1e-5) for name, p in alone.named_parameters())


def test_tensor_parallelism_is_refused(tmp_path):
    code = """
import pytest, test_perp, torch
from torch.distributed.tensor import Shard, distribute_tensor
from hf_prune.perp import masked_gradients
torch.distributed.init_process_group("gloo")
model = test_perp.pruned()
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
up = model.model.layers[0].mlp.up_proj
whole, up.weight = up.weight, torch.nn.Parameter(distribute_tensor(up.weight.detach(), mesh, [Shard(1)]))
for use in (model.pruning_masks.violations, lambda model: masked_gradients(model, model.pruning_masks)):
    with pytest.raises(ValueError, match="not under tensor parallelism"):
        use(model)
up.weight = whole
"""
    in_two_processes(tmp_path, code)


def test_example(tokenizer, tmp_path, monkeypatch):
    make("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text(" ".join(map(str, ids_for(120).flatten().tolist())))
    paths = [str(tmp_path / name) for name in ("dense", "texts.txt", "out")]
    short = ["--samples", "100", "--length", "24", "--steps", "4"]
    monkeypatch.setattr(sys, "argv", ["retrain.py", *paths, *short])
    runpy.run_path(str(Path(__file__).parent.parent / "examples/retrain.py"))
    model = hf_prune.load(tmp_path / "out")
    assert model.pruning_report.evaluations and model.pruning_masks.patterns["model.layers.0.mlp.up_proj.weight"] == "2:4"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(pruned(), tmp_path, PERPCallback(), save_strategy="steps", save_steps=3)
    other = make("llama", seed=5)
    other.prune(PruningConfig(pattern="2:4", n_samples=6, sequence_length=24), ids_for())
    with pytest.raises(ValueError, match="begin with the pruned model"):
        train(other, tmp_path, PERPCallback(), resume=str(tmp_path / "checkpoint-3"))


def test_nothing_is_held_twice():
    model = pruned(hidden_size=128, intermediate_size=512)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    attached = attach(model, model.pruning_masks, ("mask_lora",), rank=1)
    module = next(m for m in model.modules() if isinstance(m, AdaptedLinear))
    assert sum(b.numel() * b.element_size() for b in model.buffers() if b.dtype == torch.uint8) <= before / 31
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(torch.randn(2, 3, 128))
    assert sum(t.numel() for t in saved) < module.weight.numel() / 4
    attached.detach()


def reconstructed(**options):
    how = Reconstruction(batch_tokens=48, epochs=8, **options)
    model = make("llama")
    config = PruningConfig(pattern="2:4", n_samples=12, sequence_length=24)
    report = model.prune(config, ids_for(12), reconstruct=how)
    return model, report


@pytest.mark.parametrize("unit", ["half", "block"])
@pytest.mark.parametrize("targets", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["full", "mask_lora"])
def test_reconstruction(kind, targets, unit):
    model, report = reconstructed(train=kind, targets=targets, unit=unit, learning_rate=3e-3)
    assert not model.pruning_masks.violations(model) and "reconstruction: error" in str(report)
    assert all(after <= before for before, after in (block.reconstruction for block in report.blocks))
    assert any(after < 0.9 * before for before, after in (block.reconstruction for block in report.blocks))
    assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


WHOLE = {"gpt_neox", "opt", "bloom", "falcon"}  # parallel branches, or a branch that adds the residual itself


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_one_after_the_other_are_the_block(family):
    model = make(family)
    decoder = Decoder(model)
    with eager_experts(model), torch.no_grad():
        (state,), calls = decoder.capture([ids_for(4, 20)])
        for block, (call,) in zip(decoder.blocks, calls):
            parts = halves_of(block, call, state)
            assert len(parts) == (1 if family in WHOLE else 2)
            names = [name for part in parts for name, _ in part.module.named_parameters()]
            assert sorted(names) == sorted(name for name, _ in block.module.named_parameters())
            (*_, outputs) = outputs_of(parts, [call], [state])
            state = call.run(block, state)
            assert torch.equal(outputs[0], state)
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


def test_a_half_without_anything_to_train_leaves_the_block_whole():
    model, dense = pruned("qwen2"), make("qwen2")
    how = Reconstruction(train="bias", batch_tokens=48, learning_rate=3e-2)
    before = snapshot(model)
    errors = hf_prune.reconstruct(model, dense, ids_for(12), n_samples=12, sequence_length=24, how=how)
    changed = {name.split(".")[-1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"bias"} and any(after < start for start, after in errors.values())


def test_reconstruction_in_half_precision_learns():
    model, dense = pruned(dtype=torch.bfloat16), make("llama", dtype=torch.bfloat16)
    how = Reconstruction(batch_tokens=48, epochs=8, learning_rate=3e-3)
    errors = hf_prune.reconstruct(model, dense, ids_for(12), n_samples=12, sequence_length=24, how=how)
    assert all(after < 0.9 * before for before, after in errors.values())
    assert not model.pruning_masks.violations(model) and model.dtype == torch.bfloat16


def test_added_biases_come_off_again():
    model = pruned()
    before = snapshot(model)
    attach(model, model.pruning_masks, "added_bias").detach()
    assert same(model, before) and not model.config.attention_bias and "bias" not in " ".join(model.state_dict())


def test_reconstruction_is_never_worse():
    model, report = reconstructed(learning_rate=1e3)
    plain = make("llama")
    plain.prune(PruningConfig(pattern="2:4", n_samples=12, sequence_length=24), ids_for(12), tokens_per_batch=48)
    assert same(model, snapshot(plain)) and "left alone" in str(report)


def test_reconstruction_resumes(tmp_path):
    import hf_prune.sequential as sequential

    model, _ = reconstructed()
    config = PruningConfig(pattern="2:4", n_samples=12, sequence_length=24)
    how = Reconstruction(batch_tokens=48, epochs=8)
    again = make("llama")
    original, calls = sequential.reconstruct_block, []

    def second_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    before = snapshot(again)
    sequential.reconstruct_block = second_fails
    try:
        with pytest.raises(KeyboardInterrupt):
            again.prune(config, ids_for(12), resume_dir=tmp_path, reconstruct=how)
    finally:
        sequential.reconstruct_block = original
    assert same(again, before)
    again.prune(config, ids_for(12), resume_dir=tmp_path, reconstruct=how)
    assert same(again, snapshot(model))
    with pytest.raises(ValueError, match="reconstruct"):
        make("llama").prune(config, ids_for(12), resume_dir=tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_reconstruct_what_is_pruned(family):
    dense, model = make(family), make(family)
    model.prune(PruningConfig(method="magnitude", pattern="2:4"))
    how = Reconstruction(batch_tokens=48, epochs=4, learning_rate=3e-3)
    errors = hf_prune.reconstruct(model, dense, ids_for(12), n_samples=12, sequence_length=24, how=how)
    assert len(errors) == 2 and any(after < before for before, after in errors.values())
    assert not model.pruning_masks.violations(model) and same(dense, snapshot(make(family)))
    with pytest.raises(ValueError, match="no masks"):
        hf_prune.reconstruct(dense, model, ids_for(12))
    with pytest.raises(ValueError, match="another instance"):
        hf_prune.reconstruct(model, model, ids_for(12), n_samples=12, sequence_length=24)
    with pytest.raises(ValueError, match="at least two batches"):
        hf_prune.reconstruct(model, dense, ids_for(2), n_samples=2, sequence_length=24)
    before, weight = snapshot(model), next(iter(dense.parameters()))
    for value, match in ((1e38, "output of .* is not finite"), (float("nan"), "of the dense model are not finite")):
        weight.data.fill_(value)
        with pytest.raises(ValueError, match=match):
            hf_prune.reconstruct(model, dense, ids_for(12), n_samples=12, sequence_length=24, how=how)
    assert same(model, before)


def test_an_interrupted_training_leaves_no_hooks(tmp_path):
    model = pruned()
    callback = PERPCallback(distillation=Distillation(make("llama", seed=1)))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[callback])

    callback.on_step_end = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    callback.merge()
    assert not model._forward_hooks and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert holds(model, model.pruning_masks)


@pytest.mark.parametrize("callback", [KeepMasksCallback, lambda: PERPCallback(distillation=Distillation(make("llama")))])
def test_training_again_after_an_interruption(callback, tmp_path):
    model, callback, calls = pruned(), callback(), []

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append(sum(len(m._forward_hooks) for m in model.modules()))
            if len(calls) == 1:
                raise KeyboardInterrupt

    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=DATA, callbacks=[callback, Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert len(set(calls)) == 1 and not model._forward_hooks
    model.requires_grad_(True)
    ids = ids_for()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gone = ~model.pruning_masks["model.layers.0.mlp.up_proj.weight"]
    assert model.model.layers[0].mlp.up_proj.weight.grad[gone].any(), "nothing holds the gradients any more"


@pytest.mark.parametrize("callback", [KeepMasksCallback, lambda: PERPCallback(distillation=Distillation(make("llama")))])
def test_what_an_interrupted_training_left_comes_off(callback, tmp_path):
    model, callback = pruned(), callback()
    trainer = Trainer(model, arguments(tmp_path, gradient_checkpointing=True), train_dataset=DATA, callbacks=[callback])
    callback.on_step_begin = interrupted

    def hooks():
        return len(model._forward_hooks), *(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())

    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert max(hooks()) == 1
    if type(callback) is KeepMasksCallback:
        KeepMasksCallback().on_train_begin(None, None, None, model=model)
        assert max(hooks()) == 1
        callback.release()
    else:
        before = model.eval()(input_ids=ids_for()).logits
        copied = copy.deepcopy(model)
        for each in (copied, model):
            release(each, merge=each is model)
            assert holds(each, each.pruning_masks) and torch.equal(each(input_ids=ids_for()).logits, before)
    assert max(hooks()) == 0
    attach(model, model.pruning_masks).detach()


@pytest.mark.parametrize("kind", [KeepMasksCallback, PERPCallback])
def test_a_finished_callback_lets_go(kind, tmp_path):
    """Of its model; a new Trainer may have it again, but not the same one."""
    model, callback = pruned(), kind()
    trainer = train(model, tmp_path, callback, max_steps=1)
    if kind is PERPCallback:
        with pytest.raises(ValueError, match="has ended"):
            trainer.train()
    KeepMasksCallback().on_train_begin(None, None, None, model=model)
    callback.release()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.pruning_masks.parameters_of(model).values())
    release(model)
    train(model, tmp_path, callback, max_steps=1)
    assert holds(model, model.pruning_masks)
    gone = [weakref.ref(model), weakref.ref(model.pruning_report)]
    del model, trainer
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_what_it_opened_is_closed(tmp_path):
    model = pruned()
    train(model, tmp_path, PERPCallback(), gradient_checkpointing=True)
    hooks = model.get_input_embeddings()._forward_hooks.values()
    assert not [hook for hook in hooks if "hf_prune" in hook.__module__], "what is left is Transformers' own"


def test_adapters_are_not_pruned_under():
    model = pruned()
    attached = attach(model, model.pruning_masks)
    with pytest.raises(ValueError, match="merge.. or detach"):
        model.prune(PruningConfig("magnitude", sparsity=0.7))
    attached.merge()
    model.prune(PruningConfig("magnitude", sparsity=0.7))


def test_lora_is_not_lost_when_peft_fails(tmp_path, monkeypatch):
    model, callback = pruned(), PERPCallback("lora")
    monkeypatch.setattr(model, "add_adapter", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, tmp_path, callback)
    monkeypatch.undo()
    callback.merge()
    assert any(module.lora_B["default"].weight.any() for module in model.modules() if hasattr(module, "lora_B"))


def test_linears_of_a_derived_class(tmp_path):
    """All of Falcon's are; others do not multiply by their weight, and take no adapter."""
    model = pruned("falcon", bias=True)  # which it adds to in place
    name, linear = next(
        (n, m) for n, m in model.named_modules() if type(m).__name__ == "FalconLinear" and f"{n}.weight" in model.pruning_masks
    )
    before = linear.weight.clone()
    train(model, tmp_path, PERPCallback())
    assert holds(model, model.pruning_masks) and type(model.get_submodule(name)) is type(linear)
    assert not torch.equal(linear.weight, before)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Grouped(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(2, -1, self.in_features))

    other = pruned()
    other.model.layers[0].mlp.up_proj.__class__, other.model.layers[1].mlp.up_proj.__class__ = Doubled, Grouped
    attached = attach(other, other.pruning_masks)
    assert attached.left_out == ["model.layers.0.mlp.up_proj.weight", UP]
    attached.detach()


def test_distillation_that_is_not_heard(tmp_path):
    callback = PERPCallback(distillation=Distillation(make("llama", seed=1)))
    with pytest.raises(ValueError, match="label_smoothing"):
        train(pruned(), tmp_path, callback, label_smoothing_factor=0.1)


@pytest.mark.parametrize("kind", ["lora", "head", "mask-lora"])
def test_reconstruction_takes_what_a_block_has(kind):
    with pytest.raises(ValueError, match=kind):
        Reconstruction(train=kind)


@pytest.mark.parametrize("values, message", [
    (dict(learning_rate=0.0), "learning_rate must be above 0"),
    (dict(train="added_bias"), "is of a whole model"),
])  # fmt: skip
def test_reconstruction_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Reconstruction(**values)


def test_a_batch_is_left_to_train_on():
    assert Reconstruction(held_out=0.9).split(3) == ([0], [1, 2])


def test_reconstruction_rates():
    assert [Reconstruction(train=how).rate(576) for how in ("full", ("full",))] == [pytest.approx(4e-3, rel=0.01)] * 2
    assert Reconstruction().rate(64) == 4e-3 and Reconstruction(train="mask_lora").rate(64) == 2e-3
    assert Reconstruction().rate(4096) == pytest.approx(2.3 / 4096) and Reconstruction(learning_rate=1e-5).rate(64) == 1e-5


def test_card_says_how_it_was_reconstructed(tmp_path):
    model = make("llama")
    model.prune(
        PruningConfig(pattern="2:4", n_samples=6, sequence_length=24),
        ids_for(),
        reconstruct=Reconstruction(epochs=1, batch_tokens=48),
    )
    model.save_pretrained(tmp_path)
    code = (tmp_path / "README.md").read_text().split("Make it again")[1]
    assert "reconstruct=hf_prune.Reconstruction(train='full'" in code and "reconstruct={" not in code


def test_card_says_how_it_was_trained(tmp_path):
    model = pruned()
    model.pruning_report.add_timing("decode", 1.0, 0.5, "here")
    callback = PERPCallback(("mask_lora", "norm"), rank=4, distillation=Distillation(make("llama")))
    train(model, tmp_path / "run", callback, save_strategy="steps", save_steps=3)
    train(model, tmp_path / "run", KeepMasksCallback(), max_steps=2)
    model.save_pretrained(tmp_path / "out")
    report = hf_prune.load(tmp_path / "out").pruning_report
    assert not report.timings and [how["steps"] for how in report.trained] == [6, 2]
    assert [how["steps"] for how in hf_prune.load(tmp_path / "run/checkpoint-3").pruning_report.trained] == [3]
    card = (tmp_path / "out/README.md").read_text()
    for section in (card, card.split("Make it again")[1]):
        assert "hf_prune.PERPCallback(train=('mask_lora', 'norm'), rank=4" in section and "'weight': 0.5" in section
        assert "hf_prune.KeepMasksCallback(), 2 steps" in section


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora", "full"])
def test_another_default_dtype_changes_nothing(kind, default_dtype, tmp_path):
    found = []
    for dtype in torch.float32, torch.bfloat16:
        default_dtype(torch.float32)
        model, dense = pruned(), make("llama")
        default_dtype(dtype)
        train(model, tmp_path / str(dtype), PERPCallback(kind, distillation=Distillation(dense, cache=tmp_path / "cache")))
        hf_prune.reconstruct(model, dense, ids_for(), how=Reconstruction(train=kind, batch_tokens=48, epochs=1), n_samples=6)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        found.append(model)
    assert same(found[1], snapshot(found[0]))


def test_a_classifier_keeps_its_masks_without_perp(tmp_path):
    pruned().save_pretrained(tmp_path / "pruned")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned", num_labels=2)
    masks, before = model.pruning_masks, snapshot(model)
    rows = [{"input_ids": row["input_ids"], "labels": 1} for row in DATA]
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is none: KeepMasksCallback"):
        Trainer(model, arguments(tmp_path / "run"), train_dataset=rows, callbacks=[PERPCallback()])
    assert same(model, before)
    Trainer(model, arguments(tmp_path / "run"), train_dataset=rows, callbacks=[KeepMasksCallback()]).train()
    assert holds(model, masks) and not same(model, before)
