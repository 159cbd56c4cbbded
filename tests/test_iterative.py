"""Pruning in rounds: the sparsities of a schedule, N:M in steps, training between, and going on after an interruption."""

import pytest
import torch
from conftest import ids_for, make, same, snapshot
from transformers import Trainer, TrainingArguments

import hf_prune
from hf_prune import NM, PERPCallback, PruningConfig, Unstructured


MAGNITUDE = PruningConfig(method="magnitude", pattern="unstructured", sparsity=0.75)


@pytest.mark.parametrize(
    "config,schedule,patterns",
    [
        (MAGNITUDE, "linear", [0.1875, 0.375, 0.5625, 0.75]),
        (MAGNITUDE, "cubic", [0.75 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)]),
        (PruningConfig(method="magnitude", pattern="2:4"), "linear", [NM(3, 4), NM(2, 4)]),
        (PruningConfig(method="magnitude", pattern="4:8"), "linear", [NM(7, 8), NM(6, 8), NM(5, 8), NM(4, 8)]),
    ],
)
def test_rounds(config, schedule, patterns):
    seen, masks = [], []

    def train(model, report):
        seen.append(report.config["pattern"])
        masks.append({name: model.pruning_masks[name] for name in model.pruning_masks})

    model = make("llama")
    reports = hf_prune.prune_iteratively(model, config, train, rounds=4, schedule=schedule)
    patterns = [Unstructured(p) if isinstance(p, float) else p for p in patterns]
    assert len(reports) == len(patterns)
    for report, pattern in zip(reports, patterns):
        assert report.sparsity == pytest.approx(pattern.sparsity, abs=2e-3)
        assert all(linear.pattern_holds for linear in report.linears)
    for before, after in zip(masks, masks[1:]):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    assert not model.pruning_masks.violations(model)


def test_with_a_trainer_and_after_an_interruption(tmp_path):
    model, calls = make("llama"), []
    config = PruningConfig(pattern="2:4", overrides={"*.mlp.*": "4:8"}, n_samples=6, sequence_length=24)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def train(model, report):
        calls.append(report.config["overrides"])
        callback = PERPCallback("mask_lora")
        if len(calls) == 2:
            callback.on_step_end = interrupted
        args = TrainingArguments(tmp_path, max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no")
        data = [{"input_ids": ids, "labels": ids} for ids in ids_for(8)]
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

    with pytest.raises(KeyboardInterrupt):
        hf_prune.prune_iteratively(model, config, train, rounds=4, schedule="linear", calibration=ids_for())
    reports = hf_prune.prune_iteratively(model, config, train, rounds=4, schedule="linear", calibration=ids_for())
    assert calls == [{"*.mlp.*": p} for p in ("7:8", "6:8", "6:8", "5:8", "4:8")]
    assert len(reports) == 3 and all(linear.pattern_holds for linear in reports[-1].linears)
    assert reports[-1].trained[0]["steps"] == 2 and not any("Adapted" in type(module).__name__ for module in model.modules())
    assert hf_prune.prune_iteratively(model, config, train, calibration=ids_for()) == [] and len(calls) == 5


def test_the_last_training_is_made_again_if_it_did_not_end(tmp_path):
    model, calls = make("llama"), []

    def train(model, report):
        calls.append(report.sparsity)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_prune.prune_iteratively(model, MAGNITUDE, train, rounds=2)
    model.save_pretrained(tmp_path)
    again = hf_prune.load(tmp_path)
    assert len(hf_prune.prune_iteratively(again, MAGNITUDE, train, rounds=2)) == 1 and calls[2] == calls[1]
    again.save_pretrained(tmp_path)
    assert hf_prune.prune_iteratively(hf_prune.load(tmp_path), MAGNITUDE, train, rounds=2) == []


@pytest.mark.parametrize("before", [dict(sparsity=0.5), dict(pattern="4:8")])
def test_as_sparse_in_another_pattern_is_not_reached(before):
    model = make("llama")
    model.prune(PruningConfig("magnitude", **before))
    assert hf_prune.prune_iteratively(model, PruningConfig("magnitude", pattern="2:4"), lambda *_: None)
    assert {str(p) for p in model.pruning_masks.patterns.values()} == {"2:4"}
    assert all(not NM(2, 4).violations(mask) for mask in model.pruning_masks.values())


@pytest.mark.parametrize("group", ["model", "block", "matrix"])
def test_what_competes_is_reached_together(group):
    config = PruningConfig("magnitude", sparsity=0.75, comparison_group=group)
    model = make("llama")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(3.0)  # keeps more than its share
    assert len(hf_prune.prune_iteratively(model, config, lambda *_: None, rounds=2)) == 2
    assert hf_prune.prune_iteratively(model, config, lambda *_: None, rounds=2) == []


def test_a_mixture_is_looked_at_once(monkeypatch):
    config, unpacked, unpack = PruningConfig("magnitude", pattern="2:4"), [], hf_prune.masks.unpack

    def counted(packed, width):
        unpacked.append(8 * packed.size)
        return unpack(packed, width)

    model = make("qwen3_moe", num_experts=16)
    hf_prune.prune_iteratively(model, config, lambda *_: None)
    monkeypatch.setattr(hf_prune.masks, "unpack", counted)
    assert hf_prune.prune_iteratively(model, config, lambda *_: None) == []
    assert sum(unpacked) == model.pruning_masks.numel()


def test_refuses():
    model = make("llama")
    before = snapshot(model)
    for options, message in (
        ({"schedule": "square"}, "linear, cubic"),
        ({"rounds": 0}, "at least 1"),
        ({"rounds": 2.5}, "whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_prune.prune_iteratively(model, MAGNITUDE, lambda *args: None, **options)
    with pytest.raises(TypeError, match="train must be a function"):
        hf_prune.prune_iteratively(model, MAGNITUDE, None)
    assert same(model, before)

    def spoil(model, report):
        torch.nn.init.ones_(model.model.layers[0].mlp.up_proj.weight)

    with pytest.raises(ValueError, match="up_proj.weight.*not zero.*KeepMasksCallback"):
        hf_prune.prune_iteratively(model, MAGNITUDE, spoil)
