"""A pruning that was killed goes on from its journal, and ends bit-equal to one that was not."""

import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ids_for, make, same, snapshot
from test_cli import with_own_code

import hf_prune
from hf_prune import GBLM, PruningConfig, pruning


CONFIG = dict(method="sparsegpt", n_samples=6, sequence_length=24)
STOPS = 5  # blocks of the model


def model():
    return make("llama", num_hidden_layers=STOPS)


def whole(**changes):
    done = model()
    report = done.prune(PruningConfig(**{**CONFIG, **changes}), ids_for())
    return done, report


class Stopped(Exception):
    pass


def stop_after(monkeypatch, blocks):
    from hf_prune.journal import Journal

    original = Journal.save_block

    def save_block(self, index, *args):
        if index == blocks:
            raise Stopped
        original(self, index, *args)

    monkeypatch.setattr(Journal, "save_block", save_block)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", GBLM(), GBLM(scope="block")], ids=str)
@pytest.mark.parametrize("blocks", range(STOPS))
def test_resumed_is_bit_equal(tmp_path, monkeypatch, method, blocks):
    expected, report = whole(method=method)
    again = model()
    before = snapshot(again)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, blocks)
        again.prune(PruningConfig(**{**CONFIG, "method": method}), ids_for(), resume_dir=tmp_path)
    assert same(again, before)
    for _ in range(2):  # the second finds everything done
        again = model()
        resumed = again.prune(PruningConfig(**{**CONFIG, "method": method}), ids_for(), resume_dir=tmp_path)
        assert same(again, snapshot(expected))
        assert again.pruning_masks.digest() == expected.pruning_masks.digest()
        assert [x.error for x in resumed.blocks] == [x.error for x in report.blocks]
        assert [x for b in resumed.blocks for x in b.linears] == [x for b in report.blocks for x in b.linears]
    assert len(list(tmp_path.glob("hidden-*"))) == 1


def test_other_inputs_are_refused(tmp_path):
    config = PruningConfig(**CONFIG)
    model().prune(config, ids_for(), resume_dir=tmp_path)
    changed = model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    other_epsilon = make("llama", num_hidden_layers=STOPS, rms_norm_eps=0.01)
    for other, ids, settings, word in [
        (other_epsilon, ids_for(), config, "model's rms_norm_eps .then 1e-06, now 0.01"),
        (model(), ids_for(seed=1), config, "calibration"),
        (changed, ids_for(), config, "weights"),
        (model(), ids_for(), PruningConfig(**CONFIG, pattern="2:4"), 'pattern.*"2:4"'),
    ]:
        before = snapshot(other)
        with pytest.raises(ValueError, match=f"another pruning. What differs: .*{word}"):
            other.prune(settings, ids, resume_dir=tmp_path)
        assert same(other, before) and other.pruning_masks is None


@pytest.mark.parametrize("name", ["journal.json", "block-00001.safetensors", "hidden-00005.safetensors"])
def test_a_damaged_journal_is_an_error(tmp_path, name):
    model().prune(PruningConfig(**CONFIG), ids_for(), resume_dir=tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    again = model()
    before = snapshot(again)
    with pytest.raises(ValueError, match=name):
        again.prune(PruningConfig(**CONFIG), ids_for(), resume_dir=tmp_path)
    assert same(again, before)


_KILLER = """
import os, shutil, signal, sys, threading, time
sys.path.insert(0, "tests")
import torch, tqdm
torch.set_num_threads(1)  # a fork has no other threads
from test_resume import *
import hf_prune
tqdm.tqdm.set_lock(threading.RLock())  # its own lies in shared memory: a fork that is killed within it would hold it for ever

journal, folder = sys.argv[1:]

def work(compact=False):
    torch.set_num_threads(1)
    m = make("llama", num_hidden_layers=4, hidden_size=128, intermediate_size=256)
    m.prune(PruningConfig(**CONFIG), ids_for(), resume_dir=journal)
    m.save_pretrained(folder, compact=compact)
    return m

def forked(compact=False):
    pid = os.fork()
    if not pid:
        work(compact)
        os._exit(0)
    return pid

expected = work()
shutil.rmtree(folder)
shutil.rmtree(journal)
started = time.perf_counter()
os.waitpid(forked(), 0)
duration = time.perf_counter() - started
assert same(hf_prune.load(folder), snapshot(expected))
found = set()
for i in range(20):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(journal, ignore_errors=True)
    pid = forked(compact=bool(i % 2))
    time.sleep(duration * (i + 1) / 20)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found.add((len(list(os.scandir(journal))) if os.path.exists(journal) else 0, os.path.exists(folder)))
    if os.path.exists(folder):  # then it is whole
        assert same(hf_prune.load(folder), snapshot(expected))
    work(compact=bool(i % 2))
    assert same(hf_prune.load(folder), snapshot(expected))
    assert not [entry for entry in os.listdir(os.path.dirname(folder)) if entry.startswith(".")]
print(len(found))
"""


def test_killed_at_20_moments(tmp_path):
    """SIGKILL at 20 moments of pruning and saving: the resumed result is bit-equal, and no folder is ever half-written."""
    command = [sys.executable, "-c", _KILLER, str(tmp_path / "journal"), str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 3  # the moments were different ones


def test_the_size_of_a_batch_that_did_not_fit_is_forgotten(tmp_path, monkeypatch):
    original, sizes = pruning.prune_blocks, []

    def out_of_memory(plan, batches, **kwargs):
        sizes.append(max(batch.numel() for batch in batches))
        if sizes[-1] > 48:
            raise torch.OutOfMemoryError
        return original(plan, batches, **kwargs)

    monkeypatch.setattr(pruning, "prune_blocks", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model().prune(PruningConfig(**CONFIG), ids_for(), resume_dir=tmp_path)
    monkeypatch.setattr(pruning, "_batch_tokens", lambda *args: 48)
    model().prune(PruningConfig(**CONFIG), ids_for(), resume_dir=tmp_path)
    assert sizes == [144, 48]


@pytest.mark.skipif(transformers.__version__ < "5", reason="from disk to disk needs transformers 5")
def test_a_model_with_its_own_code(tmp_path, monkeypatch):
    src, config = with_own_code(tmp_path / "src"), PruningConfig(**CONFIG)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        hf_prune.prune_checkpoint(src, tmp_path / "out", config, ids_for())
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 1)
        hf_prune.prune_checkpoint(src, tmp_path / "out", config, ids_for(), trust_remote_code=True)
    hf_prune.prune_checkpoint(src, tmp_path / "out", config, ids_for(), trust_remote_code=True)
    expected = make("llama")
    expected.prune(config, ids_for())
    again = hf_prune.load(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "XForCausalLM" and same(again, snapshot(expected))
