"""Models whose weights are not in their modules: offloaded by accelerate, or sharded by FSDP2 over two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import ids_for, make, same, snapshot

import hf_prune
from hf_prune import GBLM, Masks, PruningConfig, Reconstruction
from hf_prune.undo import Undo


SMALL = dict(n_samples=6, sequence_length=24)
CONFIGS = {
    "wanda": PruningConfig("wanda", **SMALL),
    "sparsegpt": PruningConfig("sparsegpt", "2:4", **SMALL),
    "gblm": PruningConfig(GBLM(), **SMALL),
    "gblm by block": PruningConfig(GBLM(scope="block", gradient_samples=3), **SMALL),
    "magnitude": PruningConfig("magnitude"),
}


SHARDED = [("llama", name) for name in CONFIGS] + [("mixtral", "sparsegpt"), ("mixtral", "gblm by block"), ("gpt2", "wanda")]


def offloaded_values(model, name):
    path, _, last = name.rpartition(".")
    return model.get_submodule(path)._hf_hook.weights_map[last]


def offloaded(family: str, **changes):
    model = make(family, **changes)
    cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def kept(model) -> dict[str, torch.Tensor]:
    """The values that accelerate has."""
    return {name: offloaded_values(model, name).clone() for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_offloaded_is_pruned_as_in_memory(family, name):
    whole, model, ids = make(family), offloaded(family), ids_for()
    forwards = [module.forward for module in model.modules() if hasattr(module, "_hf_hook")]
    report = whole.prune(CONFIGS[name], ids)
    assert [x.error for x in model.prune(CONFIGS[name], ids).linears] == [x.error for x in report.linears]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert forwards == [module.forward for module in model.modules() if hasattr(module, "_hf_hook")]
    assert all(torch.equal(kept(model)[name], value) for name, value in whole.named_parameters())
    assert model.pruning_masks.digest() == whole.pruning_masks.digest() and not model.pruning_masks.violations(model)
    assert model.pruning_report.model_sparsity == report.model_sparsity
    with torch.no_grad():
        assert torch.equal(model(ids[0][None]).logits, whole(ids[0][None]).logits)


def test_offloaded_is_rebuilt_pruned_further_and_saved(tmp_path):
    whole, model, ids = make("llama"), offloaded("llama"), ids_for()
    for pruned in (whole, model):
        pruned.prune(PruningConfig("wanda", sparsity=0.3, **SMALL), ids, reconstruct=Reconstruction(epochs=1, batch_tokens=48))
        pruned.prune(PruningConfig("sparsegpt", sparsity=0.6, **SMALL), ids)
    assert all(torch.equal(kept(model)[name], value) for name, value in whole.named_parameters())
    model.hf_device_map = {"model": "cpu", "lm_head": 0}  # as from_pretrained notes it
    model.save_pretrained(tmp_path)
    assert same(hf_prune.load(tmp_path), snapshot(whole))
    name = "model.layers.0.mlp.up_proj.weight"
    offloaded_values(model, name).fill_(1.0)
    assert list(model.pruning_masks.violations(model)) == [name]
    model.pruning_masks.apply(model)
    assert not model.pruning_masks.violations(model) and offloaded_values(model, name).max() == 1.0


def test_a_failure_leaves_offloaded_weights(monkeypatch):
    model, calls, save = offloaded("llama"), [], Undo.save
    before, forwards = kept(model), [module.forward for module in model.modules()]

    def fail(self, parameter):
        calls.append(save(self, parameter))
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(Undo, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        model.prune(CONFIGS["wanda"], ids_for())
    assert all(torch.equal(value, before[name]) for name, value in kept(model).items())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert forwards == [module.forward for module in model.modules()] and model.pruning_masks is None


def test_undo_of_no_rows():
    empty, weight = torch.empty(0, 4), torch.ones(2, 4)
    with pytest.raises(KeyboardInterrupt), Undo([empty, weight]) as undo:
        undo.save(empty)
        undo.save(weight)
        weight.zero_()
        raise KeyboardInterrupt
    assert weight.all()


def test_what_needs_weights_in_place(tmp_path):
    model = offloaded("llama")
    with pytest.raises(ValueError, match="resume_dir needs all weights in place"):
        model.prune(CONFIGS["wanda"], ids_for(), resume_dir=tmp_path)
    with pytest.raises(ValueError, match="comparison_group='model' needs all weights in place"):
        model.prune(PruningConfig("magnitude", comparison_group="model"))
    with pytest.raises(ValueError, match="offloaded"):
        model.prune(PruningConfig("taylor", parameters=0.7), ids_for())
    model = make("llama")
    disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(ValueError, match="is on disk.*max_memory=, or call hf_prune.prune_checkpoint"):
        model.prune(CONFIGS["wanda"], ids_for())
    masks = Masks({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32, dtype=torch.bool)})
    assert not masks.violations(model)
    with pytest.raises(ValueError, match="is on disk, where it is not changed"):
        masks.apply(model)
    empty = make("llama").to("meta")
    for refused in (
        lambda: empty.prune(CONFIGS["wanda"], ids_for()),
        lambda: masks.apply(empty),
        lambda: masks.violations(empty),
    ):
        with pytest.raises(ValueError, match="on the device 'meta' and has no values"):
            refused()
    bad = make("llama")
    bad.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    cpu_offload(bad, execution_device="cpu")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight are not finite"):
        bad.prune(CONFIGS["wanda"], ids_for())


_SCRIPT = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from conftest import ids_for, make
from test_elsewhere import CONFIGS, SHARDED
from hf_prune import sequential

dist.init_process_group("gloo")
mesh, ids = init_device_mesh("cpu", (2,)), ids_for()

def sharded(family):
    model = make(family)
    for block in getattr(model, model.base_model_prefix).layers if hasattr(model.base_model, "layers") else model.base_model.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def whole(model):
    for module in model.modules():
        getattr(module, "reshard", int)()  # a forward pass leaves what is outside of blocks whole
    return {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}

found = {}
for family, name in SHARDED:
    config = CONFIGS[name]
    model = sharded(family)
    if name == "wanda":
        with torch.no_grad():
            model(ids[0][None])  # leaves what is outside of blocks unsharded
    before = whole(model) if name == "sparsegpt" else None
    if before:  # a failure when the second block is done, in both processes
        real, calls = sequential.BlockReport, []
        def fail(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*args)
        sequential.BlockReport = fail
        try:
            model.prune(config, ids)
            raise AssertionError("it did not stop")
        except KeyboardInterrupt:
            sequential.BlockReport = real
        assert all(torch.equal(value, before[key]) for key, value in whole(model).items())
    model.prune(config, ids)
    assert all(hasattr(parameter, "placements") for parameter in model.parameters())
    assert not model.pruning_masks.violations(model)
    with torch.no_grad():
        logits = model(ids[0][None]).logits
    found[family, name] = whole(model), model.pruning_masks.digest(), logits
# Whole for now: one group that stays so after a forward pass; and a group of several modules.
for how in ("root", "together"):
    model = make("llama")
    if how == "together":
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if how == "root":
        with torch.no_grad():
            model(ids[0][None])
        assert not any(hasattr(parameter, "placements") for parameter in model.parameters())
    model.prune(CONFIGS["wanda"], ids)
    with torch.no_grad():
        logits = model(ids[0][None]).logits
    found["llama", how] = whole(model), model.pruning_masks.digest(), logits

bad = sharded("llama")
if dist.get_rank() == 1:
    bad.model.layers[1].mlp.up_proj.weight.detach().to_local().fill_(torch.nan)
try:
    bad.prune(CONFIGS["wanda"], ids)
    raise AssertionError("it did not refuse")
except ValueError as error:
    assert "layers.1.mlp.up_proj.weight are not finite" in str(error)
torch.save(found, f"{sys.argv[2]}/{dist.get_rank()}.pt")
dist.barrier()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes has."""
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent), str(folder)]
    place = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(words, env={**place, "RANK": str(i), "LOCAL_RANK": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(error[-3000:] for error in errors)
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(2)]


@pytest.mark.parametrize(("family", "name"), [*SHARDED, ("llama", "root"), ("llama", "together")])
def test_sharded_is_pruned_in_place(family, name, two):
    """The same masks on both processes, those of one process but for ties of rounding, and a model that still runs under FSDP2."""
    (values, digest, logits), (others, other_digest, _) = (found[family, name] for found in two)
    assert digest == other_digest and all(torch.equal(value, others[key]) for key, value in values.items())
    one = make(family)
    one.prune(CONFIGS.get(name, CONFIGS["wanda"]), ids_for())
    for key, value in one.named_parameters():
        agree = ((value != 0) == (values[key] != 0)).float().mean()
        assert agree > 0.99, (key, agree)
        same_places = (value != 0) == (values[key] != 0)
        torch.testing.assert_close(values[key][same_places], value.detach()[same_places], atol=2e-2, rtol=2e-2)
    with torch.no_grad():
        one.load_state_dict(values, strict=False)
        one.tie_weights()
        torch.testing.assert_close(one(ids_for()[0][None]).logits, logits, atol=1e-4, rtol=1e-4)


def test_perplexity_of_an_offloaded_model():
    ids = ids_for(1, 48)[0]
    assert hf_prune.perplexity(offloaded("llama"), None, ids, sequence_length=16) == hf_prune.perplexity(
        make("llama"), None, ids, sequence_length=16
    )
