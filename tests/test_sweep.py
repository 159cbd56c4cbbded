"""The sweep over learning rates: what it measures, and that it leaves no trace."""

import copy
import math

import pytest
import torch
from conftest import ids_for, make
from test_perp import FAMILY, pruned

from hf_prune import Distillation
from hf_prune.perp import KINDS, attach
from hf_prune.sweep import LearningRateSweep, sweep_learning_rate


TRAIN, HELD = list(ids_for(8, 16)), [row.tolist() for row in ids_for(3, 16, seed=5)]
FEW = dict(steps=3, rates=[1e-3, 1e-2])


def state(model):
    """All that a sweep must leave as it was."""
    return (
        {
            name: (p.detach().clone(), p.requires_grad, p.dtype, id(p))
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        [(name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        model.config.to_dict(),
        torch.get_rng_state(),
    )


def unchanged(model, before):
    (parameters, buffers, modules, config, random), now = before, state(model)
    assert parameters.keys() == now[0].keys() and buffers.keys() == now[1].keys()
    for name, (value, *rest) in parameters.items():
        other, *others = now[0][name]
        size = torch.int32 if value.dtype == torch.float32 else torch.int16
        assert torch.equal(value.view(size), other.view(size)) and rest == others, name
    assert all(torch.equal(value, now[1][name]) for name, value in buffers.items())
    assert modules == now[2] and config == now[3] and torch.equal(random, now[4])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    model = pruned(FAMILY.get(kind, "llama"))
    model.model.layers[0].train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state(model)
    result = sweep_learning_rate(model, TRAIN, HELD, train=kind, **FEW)
    assert unchanged(model, before) and all(p.grad is None for p in model.parameters())
    assert list(result.losses) == [1e-3, 1e-2] and result.best == min(result.losses, key=result.losses.get)
    assert all(math.isfinite(loss) and loss != result.start for loss in result.losses.values())


@pytest.mark.parametrize("changes", [dict(dtype=torch.bfloat16), dict(tie_word_embeddings=True), dict(attention_dropout=0.5)])
@pytest.mark.parametrize("kind", ["full", "mask_lora", "head"])
def test_kinds_of_models(kind, changes):
    model = pruned(**changes)
    before = state(model)
    results = [sweep_learning_rate(model, TRAIN, HELD, train=(kind,), **FEW) for _ in range(2)]
    assert unchanged(model, before) and results[0] == results[1]


@pytest.mark.parametrize("kind", ["full", "mask_lora"])
def test_half_precision_trains_as_well(kind):
    results = [
        sweep_learning_rate(pruned(dtype=dtype), TRAIN, TRAIN, train=kind, rates=[3e-3], steps=20)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    whole, half = (result.start - result.losses[3e-3] for result in results)
    assert 0.8 < half / whole < 1.25


def test_it_is_the_training_it_stands_for():
    model = pruned()
    trained, rate = copy.deepcopy(model), 3e-3
    result = sweep_learning_rate(model, TRAIN[:2], HELD, train="norm", rates=[rate], steps=2)
    attached = attach(trained, trained.pruning_masks, "norm")
    optimizer = torch.optim.AdamW(attached.trainable.values(), lr=rate, weight_decay=0.0)
    ids = torch.stack(TRAIN[:2])
    for share in (1.0, 1.0):  # one step of warm-up, then down from the top
        optimizer.param_groups[0]["lr"] = share * rate
        trained.train()(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(attached.trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.tensor(HELD)
    with torch.no_grad():
        assert abs(result.losses[rate] - float(trained.eval()(input_ids=ids, labels=ids).loss)) < 1e-5
        assert abs(result.start - float(model(input_ids=ids, labels=ids).loss)) < 1e-5


def test_masks_hold_meanwhile():
    model = pruned()
    masks, seen = model.pruning_masks, []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(bool(masks.violations(model))))
    sweep_learning_rate(model, TRAIN, HELD, train="full", **FEW)
    handle.remove()
    assert len(seen) > 6 and not any(seen)


def test_default_rates_by_kind():
    model = pruned()
    for train, centre in (("norm", 2e-3), (("mask_lora", "norm"), 2e-3), ("head", 2e-3), ("full", 3e-4)):
        result = sweep_learning_rate(model, TRAIN, HELD, train=train, steps=1)
        rates = list(result.losses)
        assert len(rates) == 5 and rates[2] == centre
        assert all(abs(b / a - math.sqrt(10)) < 0.1 for a, b in zip(rates, rates[1:]))


def test_rows_of_any_length_with_labels():
    model = pruned()
    ragged = [
        {"input_ids": row[:n], "labels": row[:n].masked_fill(torch.arange(n) < 3, -100)} for n, row in zip((16, 9, 12), TRAIN)
    ]
    result = sweep_learning_rate(model, ragged, ragged, train="norm", **FEW)
    total = count = 0
    for row in ragged:
        with torch.no_grad():
            n = len(row["input_ids"]) - 3
            total += n * float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss)
            count += n
    assert abs(result.start - total / count) < 1e-5


def test_distillation(tmp_path):
    model = pruned()
    before = state(model)
    with_teacher = sweep_learning_rate(model, TRAIN, HELD, distillation=Distillation(make("llama"), 1.0, cache=tmp_path), **FEW)
    assert unchanged(model, before)
    without = sweep_learning_rate(model, TRAIN, HELD, **FEW)
    assert with_teacher.start == without.start and with_teacher.losses != without.losses
    assert sweep_learning_rate(model, TRAIN, HELD, distillation=Distillation(None, 1.0, cache=tmp_path), **FEW) == with_teacher


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["full", "mask_lora", "added_bias", "head"])
def test_put_back_after_an_error(kind, error, monkeypatch):
    model = pruned()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, step, count = state(model), torch.optim.AdamW.step, []

    def interrupted(self, *args, **kwargs):
        step(self, *args, **kwargs)
        count.append(None)
        if len(count) == 5:
            raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(error):
        sweep_learning_rate(model, TRAIN, HELD, train=kind, **FEW)
    assert len(count) == 5 and unchanged(model, before) and bool((model.lm_head.weight.grad == 1).all())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = pruned()
    plain = sweep_learning_rate(model, TRAIN, HELD, **FEW)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = state(model)
    result = sweep_learning_rate(model, TRAIN, HELD, **FEW)
    assert unchanged(model, before) and all(abs(result.losses[rate] - plain.losses[rate]) < 1e-5 for rate in plain.losses)


def test_what_is_not_finite_is_infinite(caplog, monkeypatch):
    monkeypatch.setattr("hf_prune.sweep.logger.warning", lambda text: caplog.records.append(text))
    model = pruned()
    before = state(model)
    result = sweep_learning_rate(model, TRAIN, HELD, train="full", steps=4, rates=[1e30, 1e-4, 1e-3, 1e35])
    assert result.losses[1e35] == math.inf and math.isfinite(result.losses[1e-3]) and "inf" in str(result)
    with pytest.raises(ValueError, match="no rate of 1e.35 gave a finite loss .before training: .*give lower rates"):
        sweep_learning_rate(model, TRAIN, HELD, train="full", steps=4, rates=[1e35])
    assert unchanged(model, before)


def test_warnings(monkeypatch):
    said = []
    monkeypatch.setattr("hf_prune.sweep.logger.warning", said.append)
    model = pruned()
    sweep_learning_rate(model, TRAIN, TRAIN, train="full", rates=[1e-8, 1e-7, 1e-3], steps=4)
    assert len(said) == 1 and "0.001 is the highest" in said[0]
    said.clear()
    sweep_learning_rate(model, TRAIN, TRAIN, train="full", rates=[1e-7, 1e-3, 1.0], steps=4)
    assert not said
    sweep_learning_rate(model, TRAIN, TRAIN, train="full", rates=[1.0, 10.0], steps=4)
    assert len(said) == 2 and "1 is the lowest" in said[0] and "no learning rate brought" in said[1]


def test_table():
    text = str(LearningRateSweep({1e-3: 2.0, 1e-2: 1.5, 1e-1: math.inf}, 1e-2, 2.5))
    assert [line.split() for line in text.splitlines()[1:]] == [["none", "2.5000"], ["0.001", "2.0000"], ["0.01", "1.5000", "best"], ["0.1", "inf"]]  # fmt: skip


@pytest.mark.parametrize("match, changes", [
    ("train_dataset has 0 sequences", dict(train_dataset=[])), ("held_out has 0 sequences", dict(held_out=[])),
    ("held_out has 1 sequences and no token", dict(held_out=[{"input_ids": [3, 4], "labels": [-100, -100]}])),
    (r"train_dataset\[1\] must be one sequence", dict(train_dataset=[[3, 4], [5]])), (r"train_dataset\[0\] has ids", dict(train_dataset=[[3, 400]])),
    (r"held_out\[0\] must be token ids or a dict", dict(held_out=[{"text": "a"}])), ("rates must be", dict(rates=[])),
    ("rates must be", dict(rates=[0.0])), ("rates must be", dict(rates=[math.nan])), ("steps must be a whole number", dict(steps=0)),
    ("must name some of", dict(train="mask-lora")), ("finds nothing to train", dict(train="bias")),
])  # fmt: skip
def test_errors(match, changes):
    model = pruned()
    before = state(model)
    with pytest.raises(ValueError, match=match):
        sweep_learning_rate(model, **{"train_dataset": TRAIN, "held_out": HELD, **changes})
    assert unchanged(model, before)


def test_no_masks():
    with pytest.raises(ValueError, match="sweep_learning_rate needs a pruned model"):
        sweep_learning_rate(make("llama"), TRAIN, HELD)
