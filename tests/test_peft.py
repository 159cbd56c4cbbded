"""MaskLoRA in PEFT: trained, merged, unmerged, saved and loaded with the masks; merges that would fill them are refused."""

import copy
import functools
import pickle

import accelerate
import pytest
import torch
from conftest import ids_for, make, same, snapshot
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_prune import KeepMasksCallback, PERPCallback, PruningConfig


peft = pytest.importorskip("peft", minversion="0.21")

from hf_prune.peft_adapters import MaskLoraConfig, load_masked_adapter, refuse_densifying_merge  # noqa: E402


def pruned(family="llama", dtype=torch.float32, pattern="2:4"):
    return copy.deepcopy(_pruned(family, dtype, pattern))


@functools.cache
def _pruned(family, dtype, pattern):
    model = make(family, dtype=dtype)
    model.prune(PruningConfig(pattern=pattern, n_samples=6, sequence_length=24), ids_for())
    return model


def shake(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def logits(model, **more):
    with torch.no_grad():
        return model.eval()(input_ids=ids_for(), **more).logits


def masked(model, **options):
    result = peft.get_peft_model(model, MaskLoraConfig.of(model, **{"r": 4, "lora_alpha": 8, **options}))
    shake(result)
    return result


def close(one, other, tolerance=1e-5):
    return torch.allclose(one, other, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_merging_keeps_zeros(family, tmp_path):
    model = pruned(family)
    masks, start = model.pruning_masks, logits(model)
    adapted = masked(model, use_rslora=True)
    with_adapter = logits(adapted)
    assert not close(with_adapter, start, 1e-2)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), start)
    adapted.merge_adapter(safe_merge=True)
    assert close(logits(adapted), with_adapter)
    adapted.unmerge_adapter()
    assert close(logits(adapted), with_adapter)
    merged = adapted.merge_and_unload()
    assert close(logits(merged), with_adapter) and not masks.violations(merged)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged)) and again.pruning_masks.digest() == masks.digest()


def test_a_kept_weight_of_zero_is_trained():
    model = pruned()
    name = next(iter(model.pruning_masks))
    with torch.no_grad():
        model.get_parameter(name)[model.pruning_masks[name]] = 0.0
    merged = masked(model).merge_and_unload()
    assert torch.equal(merged.get_parameter(name) != 0, model.pruning_masks[name])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"r": 3, "use_rslora": True}])
def test_gradients_are_those_of_autograd(family, changes):
    model = pruned(family)
    adapted = masked(model, **changes)
    path, layer = next((n, m) for n, m in model.named_modules() if type(m).__name__ == "MaskLoraLinear")
    a, b, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    x = torch.randn(2, 5, a.shape[1], requires_grad=True)
    product = (b @ a).t() if family == "gpt2" else b @ a
    weight = base.weight + layer.scaling["default"] * product * model.pruning_masks[f"{path}.weight"]
    wanted = x @ (weight if family == "gpt2" else weight.t()) + (0 if base.bias is None else base.bias)
    out = torch.randn_like(wanted)
    assert close(layer(x), wanted)
    for ours, theirs in zip(*(torch.autograd.grad((y * out).sum(), (x, a, b)) for y in (layer(x), wanted))):
        assert close(ours, theirs, 1e-4)
    assert adapted.peft_config["default"].use_rslora == changes.get("use_rslora", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_training(dtype, autocast):
    model = pruned(dtype=dtype)
    masks, before = model.pruning_masks, snapshot(model)
    adapted = masked(model)
    adapted.train()
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = adapted(input_ids=ids_for(), labels=ids_for()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with_adapter = logits(adapted)
    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged), with_adapter) and not masks.violations(merged)
    assert not same(merged, before) and {p.dtype for p in merged.parameters()} == {dtype}


def test_several_adapters(tmp_path):
    model = pruned()
    masks = model.pruning_masks
    model.save_pretrained(tmp_path / "base")
    adapted = masked(model)
    first = logits(adapted)
    adapted.add_adapter("second", MaskLoraConfig.of(adapted, r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"]))
    adapted.set_adapter("second")
    shake(adapted, 1)
    second = logits(adapted)
    mixed = logits(adapted, adapter_names=["default"] * 3 + ["second"] * 3)
    assert close(mixed[:3], first[:3]) and close(mixed[3:], second[3:])
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    adapted.save_pretrained(tmp_path)
    again = load_masked_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path)
    assert torch.equal(logits(again), first)
    assert load_masked_adapter(again, tmp_path / "second", "second", is_trainable=True) is again
    again.set_adapter("second")
    assert torch.equal(logits(again), second) and any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match="has an adapter 'second'"):
        load_masked_adapter(again, tmp_path / "second", "second")
    adapted.add_weighted_adapter(["default", "default"], [0.75, 0.25], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    assert close(logits(adapted), first, 1e-4)
    merged = adapted.merge_and_unload(adapter_names=["default", "second"])
    assert close(logits(merged), both) and not masks.violations(merged)
    merged = copy.deepcopy(again).merge_and_unload()
    assert close(logits(merged), second) and not masks.violations(merged)


def test_loading_as_an_ordinary_lora_warns(tmp_path):
    adapted = masked(pruned())
    adapted.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="mask_lora"):
        plain = peft.PeftModel.from_pretrained(pruned(), tmp_path)
    assert not close(logits(plain), logits(adapted), 1e-3)
    with pytest.raises(ValueError, match="load_masked_adapter"), pytest.warns(UserWarning, match="mask_lora"):
        adapted.load_adapter(tmp_path, "again")
    with pytest.raises(ValueError, match="mask_lora"):
        plain.add_adapter("masked", MaskLoraConfig.of(pruned(), r=2))
    with pytest.raises(ValueError, match="other masks"):
        load_masked_adapter(pruned(pattern="1:4"), tmp_path)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="trained without masks"):
        load_masked_adapter(pruned(), tmp_path / "plain")


def test_errors():
    model = pruned()
    before = snapshot(model)
    for match, options in [
        ("lora_dropout=0.1", {"lora_dropout": 0.1}), ("use_dora=True", {"use_dora": True}), ("lora_bias", {"lora_bias": True}),
        ("'gaussian'", {"init_lora_weights": "pissa"}), ("modules_to_save", {"modules_to_save": ["up_proj"]}),
        ("target_parameters", {"target_parameters": ["mlp.experts"]}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            MaskLoraConfig.of(model, **options)
    with pytest.raises(ValueError, match="has no masks"):
        MaskLoraConfig.of(make("llama"))
    with pytest.raises(ValueError, match="has no masks"):
        peft.get_peft_model(model, MaskLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="whole model"):
        peft.get_peft_model(model.model, MaskLoraConfig.of(model, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="not those of"):
        peft.get_peft_model(make("llama"), MaskLoraConfig.of(model))
    with pytest.raises(ValueError, match="is offloaded"):
        peft.get_peft_model(accelerate.cpu_offload(pruned()), MaskLoraConfig.of(model))
    assert same(model, before)


def test_adapter_of_transformers_itself(tmp_path):
    model = pruned()
    model.add_adapter(MaskLoraConfig.of(model, r=4, lora_alpha=8))
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_masked_adapter(pruned(), tmp_path)), logits(model))


def test_merges_that_would_fill_masks_are_refused():
    model = pruned()
    masks, before = model.pruning_masks, snapshot(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    shake(adapted)
    refuse_densifying_merge(adapted, masks)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload, copy.deepcopy(adapted).merge_and_unload):
        with pytest.raises(ValueError, match="MaskLoraConfig"):
            merge()
    assert same(adapted.unload(), before)
    for config in (
        peft.LoHaConfig(r=2),
        peft.VeraConfig(r=2),
        peft.OFTConfig(r=0, oft_block_size=4),
        peft.AdaLoraConfig(total_step=9),
        peft.LoKrConfig(r=2),
        peft.ShiraConfig(r=2),  # of weights chosen at random
    ):
        config.target_modules = {"q_proj"}
        other = peft.get_peft_model(pruned(), config)
        KeepMasksCallback().on_train_begin(None, None, None, model=other)
        again = pickle.loads(pickle.dumps(other))
        assert type(again.base_model) is type(copy.deepcopy(other).base_model) is type(other.base_model)
        for merge in (other.merge_adapter, other.merge_and_unload, again.merge_and_unload):
            with pytest.raises(ValueError, match=f"q_proj.weight with those of its {type(config).__name__}.*MaskLoraConfig"):
                merge()
        assert same(other.unload(), before)
    head = peft.get_peft_model(pruned(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    shake(head)
    norms = peft.get_peft_model(pruned(), peft.LNTuningConfig(target_modules=["input_layernorm"]))
    for harmless in (head, masked(pruned()), norms):
        refuse_densifying_merge(harmless, masks)
        assert not masks.violations(harmless.merge_and_unload())
    with pytest.raises(TypeError, match="PeftModel with LoRA"):
        refuse_densifying_merge(model, masks)


def test_keep_masks_over_adapters(tmp_path):
    """What PEFT trains beside its LoRA keeps its zeros, and the LoRA is not merged into pruned weights."""
    model = pruned()
    masks = model.pruning_masks
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"]))
    name = "layers.1.mlp.down_proj"
    copied = dict(adapted.named_modules())[f"base_model.model.model.{name}"].modules_to_save["default"]
    before = copied.weight.detach().clone()
    args = TrainingArguments(tmp_path, max_steps=3, learning_rate=1e-2, weight_decay=0.1, report_to=[], use_cpu=True)
    data = [{"input_ids": ids, "labels": ids} for ids in ids_for(8)]
    Trainer(adapted, args, train_dataset=data, callbacks=[KeepMasksCallback()]).train()
    assert not torch.equal(copied.weight, before) and not copied.weight[~masks[f"model.{name}.weight"]].any()
    with pytest.raises(ValueError, match="MaskLoraConfig"):
        adapted.merge_and_unload()
    assert not masks.violations(adapted.unload())


@pytest.mark.parametrize("kind", ["hira", "ia3", "shira"])
def test_other_adapters_that_keep_zeros(kind):
    model = pruned()
    masks = model.pruning_masks
    kept = {module: masks[f"{n}.weight"] for n, module in model.named_modules() if f"{n}.weight" in masks}

    def among_kept(layer, r, **options):
        chosen = kept[layer].flatten().nonzero()[: r * sum(layer.weight.shape)]
        return torch.zeros(layer.weight.numel()).index_fill(0, chosen[:, 0], 1.0).view(layer.weight.shape)

    targets = ["q_proj", "down_proj"]
    if kind == "hira":
        config = peft.HiraConfig(r=2, target_modules=targets)
    elif kind == "ia3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    else:
        config = peft.ShiraConfig(r=2, target_modules=targets, mask_type="among_kept")
        config.mask_fn = among_kept
    adapted = peft.get_peft_model(model, config)
    start = logits(adapted)
    shake(adapted)
    with_adapter = logits(adapted)
    assert not close(with_adapter, start, 1e-3)
    refuse_densifying_merge(adapted, masks)
    merged = adapted.merge_and_unload()
    assert close(logits(merged), with_adapter) and not masks.violations(merged)


def test_saving_while_peft_wraps_forgets_no_masks(tmp_path, caplog):
    for model in (pruned(), wrapped_when_loaded(tmp_path / "base")):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"]))
        model.save_pretrained(tmp_path / "wrapped")
        assert "q_proj is wrapped by PEFT. The model keeps its masks" in caplog.text and "unload()" in caplog.text
        with pytest.raises(ValueError, match="compact.*wrapped by PEFT"):
            model.save_pretrained(tmp_path / "compact", compact=True)
        caplog.clear()
        assert adapted.unload() is model and not model.pruning_masks.violations(model)
        model.save_pretrained(tmp_path / "out")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").pruning_masks


def wrapped_when_loaded(folder):
    pruned().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_masks_are_forgotten_where_weights_are_not_zero(tmp_path):
    model = pruned()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    shake(adapted)
    adapted.merge_and_unload()
    model.save_pretrained(tmp_path)
    assert model.pruning_masks is None


def test_layers_that_transformers_leaves_wrapped(tmp_path):
    """The way out that the messages name."""
    model, how = pruned(), peft.LoraConfig(r=2, target_modules=["q_proj"])
    before = snapshot(model)
    model.add_adapter(how)
    way = r"delete_adapter\(name\): then peft.get_peft_model\(model, config\).unload\(\)"
    with pytest.raises(ValueError, match=way):
        model.prune(PruningConfig("magnitude", pattern="1:4"))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=way):
        model.save_pretrained(tmp_path, compact=True)
    model.save_pretrained(tmp_path / "wrapped")
    assert peft.get_peft_model(model, how).unload() is model and same(model, before)
    model.save_pretrained(tmp_path, compact=True)
    assert model.prune(PruningConfig("magnitude", pattern="1:4")).sparsity == 0.75


def test_perp_makes_its_own_adapters(tmp_path):
    how = peft.LoraConfig(r=2, target_modules=["q_proj"])
    args = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    data = [{"input_ids": ids, "labels": ids} for ids in ids_for(8)]
    with pytest.raises(ValueError, match="peft_config=.*KeepMasksCallback"):
        Trainer(peft.get_peft_model(pruned(), how), args, train_dataset=data, callbacks=[PERPCallback()])
    model = pruned()
    before = snapshot(model)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[perp := PERPCallback()])
    adapted = peft.get_peft_model(model, how)
    with pytest.raises(ValueError, match="PEFT has wrapped layers"):
        trainer.train()
    perp.detach()
    assert same(adapted.unload(), before)
