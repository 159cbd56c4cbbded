"""From disk to disk: the result is that of pruning in memory, bit for bit, or an error, and the source is as it was."""

import json

import pytest
import torch
from conftest import ids_for, make, same, snapshot
from transformers import AutoModelForCausalLM

import hf_prune
from hf_prune import GBLM, PruningConfig, prune_checkpoint


def saved(folder, family="llama", **changes):
    make(family, **changes).save_pretrained(folder, max_shard_size="60KB")
    return folder


def config_for(method="wanda", **changes):
    return PruningConfig(method, **{"n_samples": 6, "sequence_length": 24, **changes})


def in_memory(folder, config, ids=None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    report = model.prune(config, ids_for() if ids is None else ids)
    return model, report


def check_equal(src, dst, config):
    report = prune_checkpoint(src, dst, config, ids_for())
    expected, known = in_memory(src, config)
    loaded = hf_prune.load(dst)
    assert same(loaded, snapshot(expected)) and loaded.pruning_masks.digest() == expected.pruning_masks.digest()
    assert same(AutoModelForCausalLM.from_pretrained(dst), snapshot(expected))
    assert [(b.name, b.error, b.linears) for b in report.blocks] == [(b.name, b.error, b.linears) for b in known.blocks]
    assert not dst.with_name(dst.name + ".unfinished").exists()
    return loaded


METHODS = ["magnitude", "wanda", "sparsegpt", "ria", GBLM(), GBLM(scope="block"), GBLM(alpha="paper")]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_equals_in_memory(tmp_path, family, method):
    check_equal(saved(tmp_path / "src", family, num_hidden_layers=3 if family == "llama" else 2), tmp_path / "dst", config_for(method))
