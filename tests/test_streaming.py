"""From disk to disk: the result is that of pruning in memory, bit for bit, or an error, and the source is as it was."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ids_for, make, same, snapshot
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import CHAT_TEMPLATE_DIR

import hf_prune
from hf_prune import GBLM, PruningConfig, checkpoint, journal, masks, prune_checkpoint, pruning, streaming
from hf_prune.cli import main
from hf_prune.serialization import PruningState


SMALL = {"n_samples": 6, "sequence_length": 24}
METHODS = ["magnitude", "wanda", "sparsegpt", "alps", "ria", GBLM(), GBLM(scope="block"), GBLM(alpha="paper")]


def saved(folder, family="llama", shards="60KB", **changes):
    make(family, **changes).save_pretrained(folder, max_shard_size=shards)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def check_equal(src, dst, config, **options):
    """Prunes `src` to `dst` and in memory, and compares all there is."""
    before = contents(src)
    report = prune_checkpoint(src, dst, config, ids_for(), **options)
    expected = hf_prune.load(src)
    known = expected.prune(config, ids_for(), bf16=options.get("bf16", False))
    loaded, plain = hf_prune.load(dst), AutoModelForCausalLM.from_pretrained(dst)
    assert same(loaded, snapshot(expected)) and same(plain, snapshot(expected)) and loaded.dtype == expected.dtype
    assert loaded.pruning_masks.digest() == expected.pruning_masks.digest()
    assert [(b.name, b.error, b.linears) for b in report.blocks] == [(b.name, b.error, b.linears) for b in known.blocks]
    assert (report.sparsity, report.model_sparsity, report.skipped) == (known.sparsity, known.model_sparsity, known.skipped)
    assert contents(src) == before and [path.name for path in dst.parent.iterdir() if "." in path.name] == []
    return loaded


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_equals_in_memory(tmp_path, family, method):
    src = saved(tmp_path / "src", family, num_hidden_layers=3 if family == "llama" else 2)
    check_equal(src, tmp_path / "dst", PruningConfig(method, **SMALL))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"dtype": torch.bfloat16, "tie_word_embeddings": True, "shards": "1GB"}),
        ("gemma2", {"dtype": torch.float16}),
        ("gpt2", {}),
        ("qwen3_moe", {"dtype": torch.bfloat16}),
        ("gpt_oss", {}),
        ("opt", {}),
        ("llama", {"num_hidden_layers": 12}),  # block 10 comes after block 1 by name
    ],
)
def test_checkpoints_of_all_kinds(tmp_path, family, changes):
    src = saved(tmp_path / "src", family, **changes)
    names = {key for path in src.glob("*.safetensors") for key in load_file(path)}
    check_equal(src, tmp_path / "dst", PruningConfig("sparsegpt", "2:4", **SMALL), store="disk", bf16=True)
    assert names == {key for path in (tmp_path / "dst").glob("*.safetensors") for key in load_file(path)}


def test_what_is_not_pruned_and_what_was(tmp_path):
    src = saved(tmp_path / "src")
    (src / "tokenizer_config.json").write_text("{}")
    make("llama").generation_config.save_pretrained(src)
    first = PruningConfig("wanda", exclude=["*.layers.0.*"], overrides={"*.down_proj": "4:8"}, **SMALL)
    check_equal(src, tmp_path / "first", first)
    assert {"tokenizer_config.json", "generation_config.json", "README.md", "config.json"} <= set(contents(tmp_path / "first"))
    second = PruningConfig("sparsegpt", sparsity=0.7, include=["*.layers.0.*", "*.layers.1.mlp.*"], **SMALL)
    check_equal(tmp_path / "first", tmp_path / "second", second)  # zeros of before stay, as do masks of others
    assert "model.layers.1.self_attn.q_proj.weight" in hf_prune.load(tmp_path / "second").pruning_masks


def test_the_base_model_and_the_card_of_a_pruned_source(tmp_path):
    model = make("llama")
    model.prune(PruningConfig("magnitude", sparsity=0.3))
    model.pruning_report.base_model = "someone/base"
    model.save_pretrained(tmp_path / "src")
    card = tmp_path / "src" / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    (tmp_path / "src" / CHAT_TEMPLATE_DIR).mkdir()
    (tmp_path / "src" / CHAT_TEMPLATE_DIR / "rag.jinja").write_text("{{ messages }}")
    for path in (tmp_path / "src").rglob("*.j*"):
        path.chmod(0o444)
    (tmp_path / "dst").symlink_to(tmp_path / "far" / "dst")
    (tmp_path / "far" / "dst.unfinished" / "model" / CHAT_TEMPLATE_DIR).mkdir(parents=True)  # as a kill leaves it
    report = prune_checkpoint(tmp_path / "src", tmp_path / "dst", PruningConfig("magnitude", sparsity=0.6))
    text = (tmp_path / "dst" / "README.md").read_text()
    assert (tmp_path / "far" / "dst" / CHAT_TEMPLATE_DIR / "rag.jinja").read_text() == "{{ messages }}"
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "far").rglob("*"))
    assert report.base_model == "someone/base" and "Mine." in text and "pruned to 60%" in text and "pruned to 30%" not in text


def test_a_config_without_dtype(tmp_path):
    src = saved(tmp_path / "src", dtype=torch.bfloat16)
    edit(src / "config.json", dtype=None)
    assert check_equal(src, tmp_path / "dst", PruningConfig(**SMALL)).dtype == torch.bfloat16


def test_a_variant_in_the_source_stays_there(tmp_path):
    src = saved(tmp_path / "src")
    make("llama").save_pretrained(src, variant="fp16", max_shard_size="60KB")
    prune_checkpoint(src, tmp_path / "dst", PruningConfig("magnitude"))
    assert not [name for name in contents(tmp_path / "dst") if "fp16" in name]


def test_other_copies_of_the_weights_are_not_fetched(hub, tmp_path):
    src = saved(tmp_path / "src")
    (src / "original").mkdir()
    for name in ("original/consolidated.00.pth", "original/params.json", "consolidated.safetensors", "pytorch_model.bin"):
        (src / name).write_bytes(b"large")
    repo = HfApi().create_repo("large").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=src)
    prune_checkpoint(repo, tmp_path / "dst", PruningConfig("magnitude"))
    there = [path.name for path in Path(hf_hub_download(repo, "config.json")).parent.rglob("*")]
    assert "config.json" in there and not set(there) & {"original", "consolidated.safetensors", "pytorch_model.bin"}


def test_weights_are_those_that_transformers_reads(tmp_path):
    src = saved(tmp_path / "src", seed=1)
    single = saved(tmp_path / "single", shards="1GB", tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(single)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    check_equal(src, tmp_path / "dst", PruningConfig("magnitude"))
    edit(src / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="other values for lm_head.weight than for model.embed_tokens.weight"):
        prune_checkpoint(src, tmp_path / "tied", PruningConfig(**SMALL), ids_for())


def test_earlier_masks_are_checked(tmp_path):
    src, config = tmp_path / "src", PruningConfig("magnitude", sparsity=0.7, include=["*.layers.0.*"])
    model = make("llama")
    model.prune(PruningConfig("magnitude"))
    model.save_pretrained(src, max_shard_size="60KB")
    edit(src / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match="masks do not belong .* no parameter 'model.layers.1"):
        prune_checkpoint(src, tmp_path / "dst", config)
    edit(src / "config.json", num_hidden_layers=2)
    lose_tensor(src, change=lambda w: w + 1)
    with pytest.raises(ValueError, match="was changed: it is not the file that was saved"):
        prune_checkpoint(src, tmp_path / "dst", config)
    PruningState.load(src).save(src)  # with new digests
    with pytest.raises(ValueError, match="1024 pruned weights of model.layers.1.mlp.up_proj.weight are not zero"):
        prune_checkpoint(src, tmp_path / "dst", config)
    assert not (tmp_path / "dst").exists()


def test_one_block_at_a_time(tmp_path, monkeypatch):
    src, seen = saved(tmp_path / "src", num_hidden_layers=5), []

    class Watched(checkpoint.Checkpoint):
        def __init__(self, model, *args):
            super().__init__(model, *args)
            self.model = model

        def write(self, part):
            there = {name.split(".")[2] for name, p in self.model.named_parameters() if not p.is_meta and "layers" in name}
            seen.append((part, there))
            super().write(part)

    monkeypatch.setattr(streaming, "Checkpoint", Watched)
    prune_checkpoint(src, tmp_path / "dst", PruningConfig(GBLM(), **SMALL), ids_for())
    assert seen == [(i, {str(i)}) for i in range(5)] + [(None, set())]


def test_a_shard_is_made_of_its_own_part(tmp_path, monkeypatch):
    src, inside, states = saved(tmp_path / "src", num_hidden_layers=5), [], []
    write, state_dict = checkpoint.Checkpoint.write, torch.nn.Module.state_dict

    def writing(self, part):
        inside.append(part)
        write(self, part)
        inside.clear()

    def state_of_all(self, *args, **kwargs):
        states.extend(inside)
        return state_dict(self, *args, **kwargs)

    monkeypatch.setattr(checkpoint.Checkpoint, "write", writing)
    monkeypatch.setattr(torch.nn.Module, "state_dict", state_of_all)
    prune_checkpoint(src, tmp_path / "dst", PruningConfig("magnitude"))
    assert not states and not inside


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", GBLM()], ids=str)
def test_goes_on_where_it_stopped(tmp_path, monkeypatch, method):
    src, config = saved(tmp_path / "src", num_hidden_layers=4), PruningConfig(method, **SMALL)
    left, read, write = 0, checkpoint.Checkpoint._read, checkpoint.write_whole

    def at_last(function):
        def called(*args):
            nonlocal left
            left -= 1
            if not left:
                raise Stopped
            return function(*args)

        return called

    monkeypatch.setattr(checkpoint.Checkpoint, "_read", at_last(read))
    monkeypatch.setattr(checkpoint, "write_whole", at_last(write))
    for attempt in range(1, 20):
        left = 3 * attempt  # reads and writes
        try:
            prune_checkpoint(src, tmp_path / "dst", config, ids_for())
            break
        except Stopped:
            assert not (tmp_path / "dst").exists()
    assert attempt > 4
    expected = AutoModelForCausalLM.from_pretrained(src)
    expected.prune(config, ids_for())
    assert same(hf_prune.load(tmp_path / "dst"), snapshot(expected))


def test_what_changed_meanwhile_is_told(tmp_path, monkeypatch):
    src, config = saved(tmp_path / "src"), PruningConfig("sparsegpt", **SMALL)
    expected, write = AutoModelForCausalLM.from_pretrained(src), checkpoint.Checkpoint.write
    expected.prune(config, ids_for(), tokens_per_batch=48)

    def write_the_first(self, part):
        if part != 0:
            raise Stopped
        write(self, part)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pruning, "_CPU_BATCH_TOKENS", 48)  # as if there were less memory
        patch.setattr(checkpoint.Checkpoint, "write", write_the_first)
        prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    with open(tmp_path / "dst.unfinished" / ".lock") as file, pytest.raises(ValueError, match="another process is writing"):
        fcntl.flock(file, fcntl.LOCK_EX)
        prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="versions .*then .*now .*9.9"):
        patch.setattr(hf_prune, "__version__", "9.9")
        prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    edit(src / "config.json", rms_norm_eps=0.01)
    with pytest.raises(ValueError, match="What differs: model's rms_norm_eps .then 1e-06, now 0.01"):
        prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    edit(src / "config.json", rms_norm_eps=1e-6)
    prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    assert same(hf_prune.load(tmp_path / "dst"), snapshot(expected))


_KILLER = """
import os, shutil, signal, sys, threading, time
sys.path.insert(0, "tests")
import torch, tqdm
torch.set_num_threads(1)
from test_streaming import *
tqdm.tqdm.set_lock(threading.RLock())
from pathlib import Path
folder = Path(sys.argv[1])
src, dst, config = saved(folder / "src", num_hidden_layers=4), folder / "dst", PruningConfig(GBLM(), **SMALL)

def forked():
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        prune_checkpoint(src, dst, config, ids_for())
        os._exit(0)
    return pid

expected = AutoModelForCausalLM.from_pretrained(src)
expected.prune(config, ids_for())
os.waitpid(forked(), 0)
assert same(hf_prune.load(dst), snapshot(expected))
work = folder / "dst.unfinished"
found = set()
for i in range(6):
    shutil.rmtree(dst)
    pid, seen = forked(), set()
    while len(seen) < 4 * i + 2 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen.add(len(list(work.rglob("*"))) if work.exists() else 0)  # what has been written, not seconds, tells the moments apart
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found.add(len(list(work.rglob("*"))) if work.exists() else 0)
    if not dst.exists():
        os.waitpid(forked(), 0)
    assert same(hf_prune.load(dst), snapshot(expected))
print(len(found))
"""


def test_killed_at_6_moments(tmp_path):
    result = subprocess.run([sys.executable, "-c", _KILLER, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 2  # the moments were different ones


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lose_shard(src):
    sorted(src.glob("model-*.safetensors"))[1].unlink()


def damage_shard(src):
    path = sorted(src.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def lose_tensor(src, name="model.layers.1.mlp.up_proj.weight", change=None):
    for path in src.glob("model-*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            old = tensors.pop(name)
            save_file(tensors if change is None else {**tensors, name: change(old)}, path)


def lose_tensor_and_entry(src):
    lose_tensor(src)
    index = json.loads((src / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    edit(src / "model.safetensors.index.json", **index)


def to_pickles(src):
    (src / "model.safetensors.index.json").unlink()
    for path in src.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lose_shard, "model-00002.*is missing: download"),
        (damage_shard, "model-00002.*is damaged"),
        (lose_tensor, "lacks model.layers.1.mlp.up_proj.weight, which .*index"),
        (lose_tensor_and_entry, "lacks the weights of model.layers.1.mlp.up_proj.weight"),
        (lambda src: lose_tensor(src, change=lambda w: w / 0), "model.layers.1.mlp.up_proj.weight are not finite"),
        (
            lambda src: lose_tensor(src, change=lambda w: w[:4].clone()),
            r"has shape \(4, 32\) in the checkpoint, but \(64, 32\)",
        ),
        (lambda src: edit(src / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized"),
        (to_pickles, "no model.safetensors and no .*from_pretrained"),
        (lambda src: (src / "config.json").unlink(), "config.json"),
        (lambda src: (src / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_bad_sources(tmp_path, change, words):
    src = saved(tmp_path / "src")
    change(src)
    with pytest.raises((ValueError, OSError), match=words):
        prune_checkpoint(src, tmp_path / "dst", PruningConfig(**SMALL), ids_for())
    assert not (tmp_path / "dst").exists() and not (tmp_path / "dst.unfinished" / "model").exists()


def test_bad_arguments(tmp_path):
    src = saved(tmp_path / "src")
    (tmp_path / "there").mkdir()
    (tmp_path / "there.unfinished").mkdir()
    (tmp_path / "there.unfinished" / "done").touch()  # as a kill leaves it, once there is an output
    (tmp_path / "other").mkdir()
    (tmp_path / "other.unfinished").mkdir()
    (tmp_path / "other.unfinished" / "journal.json").write_text("{}")  # of a run in its first block
    for dst, config, words in [
        (src, PruningConfig(**SMALL), "is the source"),
        (src / "in" / "it", PruningConfig(**SMALL), "is the source or in it"),
        (tmp_path / "there", PruningConfig(**SMALL), "exists already"),
        (tmp_path / "other", PruningConfig(**SMALL), "exists already"),
        (tmp_path / "dst", PruningConfig("magnitude", comparison_group="model"), "all blocks at once"),
        (tmp_path / "dst", PruningConfig("taylor", pattern="ffn:0.5"), "all blocks at once"),
        (tmp_path / "dst", PruningConfig(include=["*.nothing"], **SMALL), "matches no linear"),
        (tmp_path / "dst", PruningConfig("wanda", n_samples=6, sequence_length=100), "positions"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune_checkpoint(src, dst, config, ids_for())
    pruned = AutoModelForCausalLM.from_pretrained(src)
    pruned.prune(PruningConfig("magnitude"))
    pruned.save_pretrained(tmp_path / "compact", compact=True)
    with pytest.raises(ValueError, match="is compact: make it ordinary with hf_prune.expand"):
        prune_checkpoint(tmp_path / "compact", tmp_path / "dst", PruningConfig("magnitude"))
    for missing in (str(tmp_path / "no" / "folder"), "../nothing", Path("no/folder")):
        with pytest.raises(ValueError, match=f"there is no folder {missing}: give that of a model"):
            prune_checkpoint(missing, tmp_path / "dst", PruningConfig("magnitude"))
    with pytest.raises(TypeError, match="PruningConfig"):
        prune_checkpoint(src, tmp_path / "dst", "wanda", ids_for())
    with pytest.raises(ValueError, match="device 'cuda:99' is not here .*: give 'cpu'"):
        prune_checkpoint(src, tmp_path / "dst", PruningConfig(**SMALL), ids_for(), device="cuda:99")
    for options, words in [
        ({"device": "meta"}, "device 'meta' is not here"),
        ({"store": "nowhere"}, "store 'nowhere' is not here .* or 'disk'"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune_checkpoint(src, tmp_path / "dst", PruningConfig(**SMALL), ids_for(), **options)
    assert list(tmp_path.glob("*.unfinished")) == [tmp_path / "other.unfinished"]


def test_source_changed_meanwhile(tmp_path, monkeypatch):
    src, config = saved(tmp_path / "src", num_hidden_layers=4), PruningConfig(**SMALL)
    write = checkpoint.Checkpoint.write

    def and_change(self, part):
        write(self, part)
        if part == 1:
            lose_tensor(src, change=lambda w: w + 1)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="src was changed while it was pruned"):
        patch.setattr(checkpoint.Checkpoint, "write", and_change)
        prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    with pytest.raises(ValueError, match="another pruning. What differs: weights.*or delete .*dst.unfinished to begin anew"):
        prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("where, name", [(checkpoint, "model-00003"), (journal, "hidden-00001"), (masks, "layers.1.mlp")])
def test_disk_full(tmp_path, monkeypatch, where, name):
    src, config, save = saved(tmp_path / "src"), PruningConfig(**SMALL), where.save_file

    def full(tensors, path, *metadata):
        if name in path.name:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device")
        save(tensors, path, *metadata)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left.*What is finished is kept"):
        patch.setattr(where, "save_file", full)
        prune_checkpoint(src, tmp_path / "dst", config, ids_for())
    assert not (tmp_path / "dst").exists()
    check_equal(src, tmp_path / "dst", config)


def test_command_line(tmp_path, tokenizer, capsys):
    src = saved(tmp_path / "src")
    tokenizer.save_pretrained(src)
    (tmp_path / "text.txt").write_text(" ".join(str(i % 100 + 3) for i in range(300)))
    words = ["prune", str(src), str(tmp_path / "dst"), "--stream", "--calibration", str(tmp_path / "text.txt")]
    words += ["--n-samples", "4", "--sequence-length", "32"]
    assert main([*words, "--compact"]) == 2 and "leave out --compact" in capsys.readouterr().err
    assert main(words) == 0 and "saved to" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "dst")]) == 0 and "agree" in capsys.readouterr().out
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
