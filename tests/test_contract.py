"""One contract for every family and every method."""

import contextlib
import copy
import dataclasses
import pickle
import re

import pytest
import torch
from conftest import FAMILIES, MASKING, ids_for, make, same, snapshot
from transformers import AutoModelForCausalLM

import hf_prune
from hf_prune import Decoder, PruningConfig
from hf_prune.blocks import run_lockstep
from hf_prune.patterns import NM


def config_for(method, pattern, **changes):
    return PruningConfig(method=method, pattern=pattern, **{"n_samples": 6, "sequence_length": 24, **changes})


def check_masks(model, report, config):
    """Exact counts, legal patterns, masks that agree with zeros, no -0.0."""
    masks = model.pruning_masks
    assert not masks.violations(model)
    for block in Decoder(model).blocks:
        for linear in block.linears:
            mask, weight = linear.matrix(masks[linear.parameter_name]), linear.weight
            if isinstance(config.pattern, NM):
                assert (mask.reshape(-1, config.pattern.m).sum(1) == config.pattern.n).all(), linear.name
            elif config.comparison_group == "row":
                assert ((~mask).sum(1) == config.pattern.count(mask.shape[1])).all(), linear.name
            else:
                assert (~mask).sum() == config.pattern.count(mask.numel()), linear.name
            assert (weight[~mask] == 0).all()
            assert not torch.signbit(weight[~mask]).any()
            assert weight.isfinite().all()
    assert all(linear.pattern_holds for linear in report.linears)
    assert abs(report.sparsity - config.pattern.sparsity) < 0.02


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_replay_is_bit_equal(family):
    model = make(family)
    batches = list(ids_for(5, 40).split(2))
    decoder = Decoder(model)
    with torch.no_grad():
        hidden, calls = decoder.capture(batches)
        for block, arguments in zip(decoder.blocks, calls):
            hidden = [call.run(block, state) for call, state in zip(arguments, hidden)]
        states = iter(hidden)

        def last_block_says(module, args, output):
            state = next(states)
            return state if isinstance(output, torch.Tensor) else (state, *output[1:])

        expected = [model(input_ids=ids, use_cache=False).logits for ids in batches]
        with_replay = decoder.blocks[-1].module.register_forward_hook(last_block_says)
        try:
            replayed = [model(input_ids=ids, use_cache=False).logits for ids in batches]
        finally:
            with_replay.remove()
    for ours, theirs in zip(replayed, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method,pattern", [("wanda", "2:4"), ("sparsegpt", 0.5), ("magnitude", "2:4"), ("gblm", 0.6)])
def test_every_family(family, method, pattern, tmp_path):
    model = make(family)
    model.config.use_cache = True
    outside = {name: p for name, p in snapshot(model).items() if "embed" in name or "norm" in name or "lm_head" in name}
    config = config_for(method, pattern)
    report = model.prune(config, ids_for())
    check_masks(model, report, config)
    assert len(report.linears) == len(Decoder(model).linears)
    for name, value in outside.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
    assert model.config.use_cache is True and not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    ids = ids_for(2, 20, seed=1)
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(reloaded(input_ids=ids).logits, logits)
    assert reloaded.pruning_masks is not None
    for name, mask in model.pruning_masks.items():
        assert torch.equal(reloaded.pruning_masks[name], mask)
    assert reloaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 23)


@pytest.mark.parametrize("method", MASKING)
@pytest.mark.parametrize("pattern", ["unstructured:0.3", "2:4"])
@pytest.mark.parametrize("propagate", ["linear", "block"])
def test_every_method(method, pattern, propagate):
    config = config_for(method, pattern, propagate=propagate)
    first, second = make("llama"), make("llama")
    report = first.prune(config, ids_for())
    check_masks(first, report, config)
    second.prune(config, ids_for())
    assert same(second, snapshot(first))  # same input, same result
    if config.needs_calibration:
        assert all(linear.error is not None and 0 < linear.error < 1.5 for linear in report.linears)
        assert all(block.error is not None for block in report.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", MASKING)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_half_precision(dtype, method, family):
    model = make(family, dtype=dtype).train()
    config = config_for(method, "2:4")
    report = model.prune(config, ids_for())
    assert model.training and all(p.dtype == dtype for p in model.parameters())
    check_masks(model, report, config)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_batches_do_not_matter(family, method):
    """One batch, many in lockstep, or two passes of a single linear's inputs: the same statistics."""
    results = []
    for tokens in (24, 10_000):
        model = make(family)
        model.prune(config_for(method, "2:4", propagate="linear"), ids_for(), tokens_per_batch=tokens)
        results.append(model.pruning_masks)
    for name in results[0]:
        assert (results[0][name] != results[1][name]).float().mean() < 0.01


def test_lockstep_pauses_every_batch_at_every_input(llama):
    decoder = Decoder(llama)
    batches = list(ids_for(4, 16).split(1))
    with torch.no_grad():
        hidden, calls = decoder.capture(batches)
        expected = [call.run(decoder.blocks[0], state) for call, state in zip(calls[0], hidden)]
        log = []
        run_lockstep(
            decoder.blocks[0], calls[0], hidden, decoder.blocks[0].linears,
            lambda linear, x: log.append((linear.name.split(".")[-1], len(x))), lambda linear: log.append("done"),
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(hidden, expected))
    one = lambda name: [(name, 16)] * 4 + ["done"]  # noqa: E731
    assert log == one("q_proj") + one("o_proj") + one("gate_proj") + one("down_proj")


def test_conv1d_is_a_linear_transposed():
    """GPT-2's weights are stored (in, out); along `in` is along the first dimension."""
    model = make("gpt2")
    model.prune(config_for("wanda", "2:4"), ids_for())
    mask = model.pruning_masks["transformer.h.0.mlp.c_fc.weight"]
    assert mask.shape == (32, 128)
    assert (mask.t().reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gblm"])
@pytest.mark.parametrize("propagate", ["linear", "block"])
def test_unreached_experts_are_pruned_by_magnitude_and_named(family, method, propagate):
    model = make(family)
    dense = snapshot(model)
    report = model.prune(config_for(method, "2:4", n_samples=1, propagate=propagate), ids_for(1, 1).repeat(1, 2))
    assert report.notes and all("not reached" in note for note in report.notes.values())
    linears = {linear.name: linear for linear in Decoder(model).linears}
    for name in report.notes:
        linear = linears[name]
        weight = linear.matrix(dense[linear.parameter_name])
        assert torch.equal(linear.matrix(model.pruning_masks[linear.parameter_name]), NM(2, 4).mask(weight.abs()))
    assert "not reached" in str(report)


def test_routers_stay_dense():
    for family in ("mixtral", "qwen3_moe", "gpt_oss"):
        model = make(family)
        report = model.prune(config_for("wanda", "2:4"), ids_for())
        assert "router" in report.skipped.values()
        assert not any(name.endswith(("gate.weight", "router.weight")) for name in model.pruning_masks)


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gblm_scopes_leave_gradients_alone(scope, checkpointing):
    model = make("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    options = {"scope": scope, "gradient_checkpointing": checkpointing, "norm": "l1"}
    model.prune(config_for("gblm", "2:4", method_options=options), ids_for())
    assert not model.get_input_embeddings().weight.requires_grad
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert "forward" not in model.model.layers[0].__dict__


def test_gblm_gradients_are_those_of_the_loss(llama):
    from hf_prune.gradients import model_gradients

    decoder = Decoder(llama)
    samples = list(ids_for(3, 20))
    plain = model_gradients(llama, decoder.blocks, decoder.linears, samples, 2)
    saving = model_gradients(llama, decoder.blocks, decoder.linears, samples, 2, checkpointing=True)
    name = "model.layers.0.mlp.up_proj.weight"
    squares = 0
    for ids in samples:
        llama.zero_grad()
        llama(input_ids=ids[None], labels=ids[None]).loss.backward()
        squares = squares + dict(llama.named_parameters())[name].grad ** 2
    assert torch.allclose(plain[name].value, (squares / 3).sqrt(), rtol=1e-3, atol=1e-7)
    assert torch.allclose(plain[name].value, saving[name].value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("family, name", [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")])
def test_gblm_gradients_of_tokens(family, name, order):
    """Against one outer product at a time; Conv1D stores (in, out). A checkpoint recomputes the inputs."""
    from hf_prune.gradients import model_gradients

    model = make(family)
    decoder = Decoder(model)
    samples = list(ids_for(3, 20))
    plain = model_gradients(model, decoder.blocks, decoder.linears, samples, order, by_token=True)
    saving = model_gradients(model, decoder.blocks, decoder.linears, samples, order, checkpointing=True, by_token=True)
    module, total = model.get_submodule(name), 0
    for ids in samples:
        seen = {}
        hook = module.register_forward_hook(lambda m, args, y, seen=seen: (y.retain_grad(), seen.update(x=args[0], y=y))[0])
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        hook.remove()
        for gradient, x in zip(seen["y"].grad[0], seen["x"][0]):
            one = torch.outer(x, gradient) if family == "gpt2" else torch.outer(gradient, x)
            total = total + one.detach().abs() ** order
    assert torch.allclose(plain[f"{name}.weight"].sum, total, rtol=1e-3, atol=1e-10)
    for key, norm in plain.items():
        assert norm.sum.max() > 0 and torch.allclose(norm.sum, saving[key].sum, rtol=1e-3, atol=1e-12), key
    assert all(p.requires_grad and not p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gblm_hears_every_weight(family):
    from hf_prune.gradients import model_gradients

    model = make(family)
    decoder = Decoder(model)
    norms = model_gradients(model, decoder.blocks, decoder.linears, list(ids_for(3)), 2, by_token=True)
    assert all(norm.sum.any() for norm in norms.values())


def test_groups_overrides_and_globs(llama):
    config = config_for("wanda", "2:4", exclude=["*.q_proj"], overrides={"*.mlp.*": "4:8", "*.down_proj": 0.75})
    report = llama.prune(config, ids_for())
    patterns = {linear.name: linear.pattern for linear in report.linears}
    assert patterns["model.layers.0.self_attn.v_proj"] == "2:4"
    assert patterns["model.layers.1.mlp.up_proj"] == "4:8"
    assert patterns["model.layers.1.mlp.down_proj"] == "unstructured:0.75"
    assert "model.layers.0.self_attn.q_proj" not in patterns
    assert report.skipped["model.layers.0.self_attn.q_proj"] == "excluded by the config"
    experts = make("qwen3_moe")  # "experts.down_proj.3" since transformers 5, "experts.3.down_proj" before
    report = experts.prune(config_for("wanda", "2:4", include=["*.down_proj"]), ids_for())
    assert len(report.linears) == 16 and all(".down_proj" in linear.name for linear in report.linears)


@pytest.mark.parametrize("group", ["block", "model"])
def test_wide_comparison_groups(group, llama):
    report = llama.prune(config_for("magnitude", 0.5, comparison_group=group))
    sparsities = {round(linear.sparsity, 3) for linear in report.linears}
    assert len(sparsities) > 2 and abs(report.sparsity - 0.5) < 1e-3
    if group == "block":
        other = make("llama")
        report = other.prune(config_for("wanda", 0.5, comparison_group="block", propagate="block"), ids_for())
        assert abs(report.sparsity - 0.5) < 1e-3


def test_pruning_on_keeps_old_zeros(llama):
    llama.prune(config_for("magnitude", 0.3), None)
    first = {name: mask for name, mask in llama.pruning_masks.items()}
    llama.prune(config_for("sparsegpt", 0.6), ids_for())
    assert not llama.pruning_masks.violations(llama)
    for name, mask in llama.pruning_masks.items():
        assert not (mask & ~first[name]).any()
    assert abs(llama.pruning_masks.sparsity() - 0.6) < 1e-3


def test_pruning_on_is_exact_or_says_so():
    model = make("llama")
    model.prune(config_for("wanda", 0.5), ids_for())
    report = model.prune(config_for("sparsegpt", 0.5, method_options={"block_size": 8}), ids_for())
    assert report.sparsity == 0.5 and all(linear.pattern_holds for linear in report.linears)
    model = make("llama")
    model.prune(config_for("magnitude", 0.5))  # within a matrix: some rows have lost more than half
    report = model.prune(config_for("magnitude", 0.5, comparison_group="row"))
    assert report.sparsity > 0.5 and not any(linear.pattern_holds for linear in report.linears)
    assert all("more was pruned before" in note for note in report.notes.values()) and report.notes


@pytest.mark.parametrize("method", MASKING)
def test_given_masks_of_a_model_with_zeros(method):
    donor, model = make("llama"), make("llama")
    donor.prune(config_for("magnitude", "2:4"))
    model.prune(config_for("magnitude", 0.5))
    both = {name: mask & donor.pruning_masks[name] for name, mask in model.pruning_masks.items()}
    report = model.prune(config_for(method, "2:4"), ids_for(), masks=donor.pruning_masks)
    for name, mask in both.items():
        assert torch.equal(model.pruning_masks[name], mask) and not model.get_parameter(name)[~mask].any()
    assert report.sparsity == model.pruning_masks.sparsity() > 0.55


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_given_masks_that_break_the_pattern(family):
    donor, model = make(family), make(family)
    donor.prune(config_for("magnitude", 0.7))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="the given mask of .* is not '2:4': .* groups keep more than 2.*pattern='unstructured'"
    ):
        model.prune(config_for("magnitude", "2:4"), masks=donor.pruning_masks)
    assert same(model, before)
    model.prune(config_for("magnitude", 0.7), masks=donor.pruning_masks)
    assert model.pruning_masks.sparsity() == pytest.approx(0.7, abs=1e-3)


def test_experts_are_left_out_by_a_name_that_fits():
    model = make("mixtral", intermediate_size=36)
    with pytest.raises(ValueError, match="divisible by 8") as refused:
        model.prune(config_for("magnitude", "4:8"))
    glob = re.search(r"exclude=\['(.*)'\]", str(refused.value))[1]
    assert glob.endswith((".down_proj", ".w2"))
    model.prune(config_for("magnitude", "4:8", exclude=[glob]))


def test_sequences_are_no_longer_than_the_model(tokenizer):
    model = make("mpt")  # max_seq_len
    report = model.prune(PruningConfig("wanda", n_samples=2), [" ".join(["5"] * 200)] * 50, tokenizer)
    assert report.tokens == 2 * 64


def test_a_config_is_replaced():
    config = config_for("sparsegpt", "2:4", method_options={"damping": 0.05})
    other = dataclasses.replace(config, n_samples=3)
    assert other.n_samples == 3 and other.method == config.method
    with pytest.raises(ValueError, match="method_options go with a method's name"):
        dataclasses.replace(config, method=hf_prune.Wanda())


def test_fixed_masks_are_only_refitted():
    donor, model = make("llama"), make("llama")
    donor.prune(config_for("wanda", "2:4"), ids_for())
    model.prune(config_for("sparsegpt", "2:4"), ids_for(), masks=donor.pruning_masks)
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.pruning_masks[weight], donor.pruning_masks[weight])
    assert not torch.equal(model.get_parameter(weight), donor.get_parameter(weight))


def test_state_is_carried(llama):
    llama.prune(config_for("magnitude", 0.5))
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert other.pruning_masks.sparsity() == pytest.approx(0.5)
    assert type(llama).__name__ == "LlamaForCausalLM"


def test_tied_embeddings_and_device_map(tmp_path):
    make("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32)
    report = model.prune(config_for("sparsegpt", "2:4"), ids_for(), store="cpu")
    check_masks(model, report, config_for("sparsegpt", "2:4"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("propagate", ["linear", "block"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gblm"])
def test_bf16_is_of_forward_passes_alone(method, propagate, family, monkeypatch):
    kind = hf_prune.PruningConfig(method).method.__class__
    solve, seen = kind.prune, []

    def spy(self, jobs, group):
        seen.append(torch.is_autocast_enabled("cpu"))
        return solve(self, jobs, group)

    monkeypatch.setattr(kind, "prune", spy)
    inputs = []
    for need in {hf_prune.statistics.ActivationNorm, hf_prune.statistics.Hessian}:
        update = need.update
        monkeypatch.setattr(need, "update", lambda self, x, update=update: (inputs.append((x.dtype, torch.is_autocast_enabled("cpu"))), update(self, x)) and None)  # fmt: skip
    config = PruningConfig(method, pattern="2:4", propagate=propagate, n_samples=8, sequence_length=32)
    exact, model = make(family), make(family)
    exact.prune(config, ids_for())
    assert torch.bfloat16 not in {dtype for dtype, _ in inputs}
    inputs.clear()
    report = model.prune(config, ids_for(), bf16=True)
    assert torch.bfloat16 in {dtype for dtype, _ in inputs} and not any(on for _, on in inputs) and not any(seen)
    assert not torch.is_autocast_enabled("cpu") and model.dtype == torch.float32 and report.config["bf16"] is True
    agree = [float((mask == exact.pruning_masks[name]).float().mean()) for name, mask in model.pruning_masks.items()]
    assert 0.9 < sum(agree) / len(agree) < 1.0

    def fail(self, jobs, group):
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "prune", fail)
    with pytest.raises(KeyboardInterrupt):
        make(family).prune(config, ids_for(), bf16=True)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_that_are_cast_once_are_never_stale(family, monkeypatch):
    models = make(family), make(family)
    for model in models:
        model.prune(config_for("wanda", "2:4", propagate="block"), ids_for(), bf16=True)
        monkeypatch.setattr(hf_prune.sequential, "_weights_stay", contextlib.nullcontext)
    assert same(models[0], snapshot(models[1]))


def test_bf16_leaves_half_precision_as_it_is():
    models = make("llama", dtype=torch.bfloat16), make("llama", dtype=torch.bfloat16)
    for model, bf16 in zip(models, (False, True)):
        model.prune(config_for("sparsegpt", "2:4"), ids_for(), bf16=bf16)
    assert same(models[0], snapshot(models[1]))


def test_a_new_method_is_one_class(llama):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Ones(hf_prune.Method):
        name = "ones"
        paper = "none"

        def score(self, weight):
            return torch.ones_like(weight)

    report = llama.prune(PruningConfig(method=Ones(), pattern="2:4"))
    assert report.config["method"] == "ones"
    mask = llama.pruning_masks["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(mask, torch.tensor([False, False, True, True]).repeat(64, 8))  # ties go in index order


def test_install_is_idempotent():
    from transformers import PreTrainedModel

    before = PreTrainedModel.save_pretrained
    hf_prune.install()
    assert PreTrainedModel.save_pretrained is before


@pytest.mark.parametrize("group", ["block", "model"])
def test_wide_groups_go_on_and_leave_out(group, llama):
    config = PruningConfig("magnitude", comparison_group=group, exclude=["*.layers.0.*"])
    llama.prune(config)
    before = llama.pruning_masks.digest()
    llama.prune(config)
    assert llama.pruning_masks.digest() == before and not any(".layers.0." in name for name in llama.pruning_masks)
    with pytest.raises(ValueError, match="asks for less"):
        llama.prune(PruningConfig("magnitude", sparsity=0.3, comparison_group=group, exclude=["*.layers.0.*"]))
    with pytest.raises(ValueError, match="comparison_group='row'"):
        llama.prune(config, masks=llama.pruning_masks)
