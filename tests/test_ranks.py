"""Two processes prune one model together: both have the result, it is that of one process, and both end when one cannot go on."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ids_for, make

from hf_prune import GBLM, PruningConfig
from hf_prune.ranks import Ranks


SMALL = dict(n_samples=6, sequence_length=24)
CASES = {
    "wanda": ("llama", PruningConfig("wanda", **SMALL)),
    "wanda linear": ("llama", PruningConfig("wanda", "2:4", propagate="linear", **SMALL)),
    "wanda by block": ("llama", PruningConfig("wanda", comparison_group="block", **SMALL)),
    "sparsegpt": ("llama", PruningConfig("sparsegpt", **SMALL)),
    "sparsegpt block": ("mixtral", PruningConfig("sparsegpt", propagate="block", **SMALL)),
    "sparsegpt experts": ("mixtral", PruningConfig("sparsegpt", "2:4", **SMALL)),
    "gblm": ("llama", PruningConfig(GBLM(), **SMALL)),
    "gblm by block": ("llama", PruningConfig(GBLM(scope="block", gradient_samples=3), **SMALL)),
    "magnitude": ("llama", PruningConfig("magnitude")),
}

_SCRIPT = """
import os, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import torch
torch.set_num_threads(1)
from conftest import HUB, ids_for, make, same, snapshot
import hf_prune
from hf_prune import PruningConfig
from hf_prune.journal import fingerprint
from hf_prune.ranks import Ranks
from test_ranks import CASES, SMALL

ranks = Ranks.launched()
assert ranks.count == 2
found = {}

for name, (family, config) in CASES.items():
    model = make(family)
    report = model.prune(config, ids_for())
    found[name] = (snapshot(model), {x: model.pruning_masks[x] for x in model.pruning_masks}, [x.error for x in report.linears])

src, dst = sys.argv[2] + "/src", sys.argv[2] + "/dst"
if not ranks.index:
    make("llama").save_pretrained(src)
ranks.wait()
report = hf_prune.prune_checkpoint(src, dst, PruningConfig("sparsegpt", **SMALL), ids_for())
found["from disk to disk"] = (snapshot(hf_prune.load(dst)), dict(hf_prune.load(dst).pruning_masks), [x.error for x in report.linears])

def told(word, act, *args, **options):
    try:
        act(*args, **options)
    except ValueError as error:
        assert word in str(error) and "rank 0" in str(error), error
    else:
        raise AssertionError("not refused")

def refused(word, config, ids, **changes):
    model = make("llama", **changes)
    before = snapshot(model)
    told(word, model.prune, config, ids)
    assert same(model, before)

for method, patterns in ("wanda", ["2:4", "4:8"]), ("taylor", ["ffn:0.5", "ffn:0.25"]):
    refused("calibration", PruningConfig(method, patterns[0], **SMALL), ids_for(seed=ranks.index))
    refused("pattern", PruningConfig(method, patterns[ranks.index], **SMALL), ids_for())
    refused("weights", PruningConfig(method, patterns[0], **SMALL), ids_for(), seed=ranks.index)
real, torch.__version__ = torch.__version__, f"2.{ranks.index}"
refused("versions", PruningConfig("wanda", **SMALL), ids_for())
torch.__version__ = real
told("dst", hf_prune.prune_checkpoint, src, f"{dst}-{ranks.index}", PruningConfig("wanda", **SMALL), ids_for())

def agreed(model):
    ranks.check_same({"weights": fingerprint(model.parameters())})

model = make("llama")
model.prune(PruningConfig("taylor", "ffn:0.5", **SMALL), ids_for())
agreed(model)
model = make("llama")
model.prune(PruningConfig("wanda", **SMALL), ids_for())
before, how = snapshot(model), [hf_prune.Reconstruction(epochs=1, batch_tokens=n) for n in (48, 72)]
for word, dense, seed, settings in ("calibration", 0, ranks.index, how[0]), ("dense", ranks.index, 0, how[0]), ("how", 0, 0, how[ranks.index]):
    given = dict(how=settings, n_samples=6, sequence_length=24)
    told(word, hf_prune.reconstruct, model, make("llama", seed=dense), ids_for(seed=seed), **given)
assert same(model, before)
hf_prune.reconstruct(model, make("llama"), ids_for(), how=how[0], n_samples=6, sequence_length=24)
agreed(model)

# All of them save, the second when the first has ended.
for compact in (False, True):
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    time.sleep(0.3 * ranks.index)
    model.save_pretrained(sys.argv[2] + "/saved", compact=compact)
    model.push_to_hub("saved", compact=compact)
    ranks.wait()
    assert same(hf_prune.load(sys.argv[2] + "/saved"), snapshot(model))
    assert ranks.index or same(hf_prune.load("tester/saved"), snapshot(model))
assert len(HUB.repos) == 1 - ranks.index  # each has a Hub

# The first saves alone, which changes its config.
model = make("llama")
model.prune(PruningConfig("wanda", sparsity=0.3, **SMALL), ids_for())
if not ranks.index:
    model.save_pretrained(sys.argv[2] + "/mid")
model.prune(PruningConfig("wanda", **SMALL), ids_for())
torch.save(found, f"{sys.argv[2]}/{ranks.index}.pt")

# And then one of them dies, in the second block.
from hf_prune import sequential
model, blocks = make("llama"), []
before, prune = snapshot(model), sequential._BlockWork.in_one_pass
def in_one_pass(work, *args):
    blocks.append(work)
    if ranks.index and len(blocks) == 2:
        os._exit(7)
    return prune(work, *args)
sequential._BlockWork.in_one_pass = in_one_pass
try:
    model.prune(PruningConfig("sparsegpt", **SMALL), ids_for(), resume_dir=sys.argv[2] + "/journal")
except RuntimeError as error:
    assert "another process ended" in str(error), error
    assert same(model, before)
    os._exit(5)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs the script in two gloo processes; folder, exit codes, and what each found."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(_SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py", str(Path(__file__).parent), str(folder)], cwd=folder, text=True, stderr=subprocess.PIPE,
            env={**common, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=170)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [5, 7], errors[0][-2000:] + errors[1][-2000:]
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_both_have_the_same(two):
    _, (first, second) = two
    assert len(first) == 10
    for name, (weights, masks, errors) in first.items():
        other = second[name]
        assert all(torch.equal(weights[key], other[0][key]) for key in weights), name
        assert all(torch.equal(masks[key], other[1][key]) for key in masks) and errors == other[2], name


def test_it_is_that_of_one_process(two):
    disk = {"from disk to disk": ("llama", PruningConfig("sparsegpt", **SMALL))}
    for name, (family, config) in (CASES | disk).items():
        model = make(family)
        model.prune(config, ids_for())
        weights, masks, _ = two[1][0][name]
        for key in masks:  # up to the order of summation
            assert (masks[key] == model.pruning_masks[key]).float().mean() > 0.99, (name, key)
        for key, parameter in model.named_parameters():
            assert (parameter - weights[key]).norm() <= 0.05 * parameter.norm(), (name, key)


def test_a_process_alone_needs_no_other():
    alone, x = Ranks(), torch.ones(2)
    alone.add_up(x)
    assert alone.share([1, 2, 3]) == [1, 2, 3] and torch.equal(x, torch.ones(2)) and alone.lowest(4) == 4
    assert Ranks(1, 2).share([1, 2, 3]) == [2] and Ranks(0, 2).owners([3, 1, 2]) == [0, 1, 1]
