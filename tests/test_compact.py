"""Compact folders: small, equal bit for bit, refused by loaders that do not know them; and the forms that others orphaned."""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import FAMILIES, make, same, snapshot
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_integrity import elsewhere, flip
from transformers import AutoModelForCausalLM

import hf_prune
from hf_prune import Masks, PruningConfig, compact, conversion
from hf_prune.cli import main
from hf_prune.masks import _decode, _encode


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UP = "model.layers.1.mlp.up_proj.weight"


def pruned(family="llama", dtype=torch.float32, pattern="2:4", **changes):
    model = make(family, dtype=dtype, **changes)
    model.prune(PruningConfig(method="magnitude", pattern=pattern))
    return model


def weights(folder):
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pruned().save_pretrained(folder, compact=True, max_shard_size="60KB")
    assert len(list(folder.glob("pruning/values-*"))) > 1
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tmp_path):
    model = pruned(family, torch.bfloat16, "2:4")
    model.save_pretrained(tmp_path / "compact", compact=True)
    again = hf_prune.load(tmp_path / "compact", dtype="auto")
    assert same(again, snapshot(model)) and again.dtype == torch.bfloat16
    assert again.pruning_masks.digest() == model.pruning_masks.digest()
    hf_prune.expand(tmp_path / "compact", tmp_path / "out")
    model.save_pretrained(tmp_path / "plain")
    names = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*"))
    assert names == sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    assert same(hf_prune.load(tmp_path / "out", dtype="auto"), snapshot(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "1:4", "unstructured:0.03"])
def test_bits_are_the_same(dtype, pattern, tmp_path):
    model = pruned(dtype=dtype, pattern=pattern)
    with torch.no_grad():
        model.get_parameter(UP)[0].mul_(0)  # kept zeros, some of them -0.0
        model.model.layers[0].mlp.up_proj.weight[1].mul_(-0.0)
    model.save_pretrained(tmp_path, compact=True)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for (name, a), b in zip(model.named_parameters(), hf_prune.load(tmp_path, dtype="auto").parameters()):
        assert torch.equal(a.view(integer), b.view(integer)), name


@pytest.mark.parametrize("pattern, limit", [("unstructured", 0.57), ("2:4", 0.56)])
def test_size(pattern, limit, tmp_path):
    model = pruned(dtype=torch.bfloat16, pattern=pattern, hidden_size=512, intermediate_size=1024, vocab_size=32)
    model.save_pretrained(tmp_path / "compact", compact=True)
    model.save_pretrained(tmp_path / "plain")
    plain = (tmp_path / "plain/model.safetensors").stat().st_size
    assert weights(tmp_path / "compact") <= limit * plain


def test_shards_and_dtype_on_load(saved):
    model = hf_prune.load(saved, dtype=torch.bfloat16)
    expected = pruned()
    assert same(model, snapshot(expected.to(torch.bfloat16)))
    assert same(hf_prune.load(saved, device_map="cpu", dtype="auto"), snapshot(pruned()))
    assert not model.pruning_masks.violations(model) and model.config._name_or_path == str(saved)


def test_plain_transformers_says_what_to_do(saved):
    with pytest.raises(OSError, match="load_with_hf_prune.load"):
        AutoModelForCausalLM.from_pretrained(saved)
    code = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(saved)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "load_with_hf_prune.load" in done.stderr.splitlines()[-1]


def test_saving_again(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    hf_prune.load(folder).save_pretrained(folder)  # compact becomes ordinary, nothing of it is left
    assert sorted(p.name for p in folder.rglob("*.safetensors")) == ["masks.safetensors", "model.safetensors"]
    assert not list(folder.glob("*.index.json"))
    assert same(AutoModelForCausalLM.from_pretrained(folder), snapshot(pruned()))
    hf_prune.load(folder).save_pretrained(folder, compact=True)
    assert not (folder / "model.safetensors").exists()
    hf_prune.expand(folder, folder)
    assert same(AutoModelForCausalLM.from_pretrained(folder), snapshot(pruned()))
    with pytest.raises(ValueError, match="ordinary folder already"):
        hf_prune.expand(folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_compact_needs_masks_and_safetensors(tmp_path):
    with pytest.raises(ValueError, match="prune it first"):
        make("llama").save_pretrained(tmp_path / "m", compact=True)
    with pytest.raises(ValueError, match="no variants"):
        pruned().save_pretrained(tmp_path / "m", compact=True, variant="fp16")
    assert not list(tmp_path.iterdir())


def values(folder):
    return sorted((folder / "pruning").glob("values-*"))[0]


def rewrite(path, **metadata):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path), path, {**old, **metadata})


DAMAGE = {
    **{f"byte {w}": lambda f, w=w: flip(values(f), w) for w in (0, 8, 60, 0.3, 0.6, 0.99)},
    **{f"cut {n}": lambda f, n=n: values(f).write_bytes(values(f).read_bytes()[:n]) for n in (0, 7, 500, -2)},
    "missing": lambda f: values(f).unlink(),
    "masks missing": lambda f: (f / "pruning/masks.safetensors").unlink(),
    "masks of another": lambda f: other_masks(f),
    "newer": lambda f: rewrite(values(f), version="7"),
    "link outside": lambda f: elsewhere(values(f)),
    "weights beside": lambda f: dense_weights(f),
    "index elsewhere": lambda f: set_index(f, "../other.safetensors"),
}


def dense_weights(folder):
    make("llama", seed=1).save_pretrained(folder.parent / "dense")
    shutil.copy(folder.parent / "dense/model.safetensors", folder)


def set_index(folder, name):
    """As by somebody who makes the digests right again."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "pruning/pruning_config.json").read_text())
    content = (folder / "model.safetensors.index.json").read_bytes()
    config["files"]["model.safetensors.index.json"] = hashlib.sha256(content).hexdigest()
    (folder / "pruning/pruning_config.json").write_text(json.dumps(config))


def other_masks(folder):
    Masks({name: ~mask for name, mask in Masks.load(folder / "pruning").items()}).save(folder / "pruning")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_an_error(saved, tmp_path, damage):
    """Whatever `on_mismatch` says: without its masks a compact weight means nothing."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder)
    for on_mismatch in hf_prune.serialization.ON_MISMATCH:
        with pytest.raises((ValueError, OSError)):
            hf_prune.load(folder, on_mismatch=on_mismatch)
    with pytest.raises(ValueError):
        hf_prune.expand(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_nobody_named_is_not_read(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    shutil.copy(values(folder), folder / "pruning/values-99999-of-99999.safetensors")
    assert same(hf_prune.load(folder), snapshot(pruned()))


def test_values_of_another_mask_are_named(saved, tmp_path):
    """Digests made right again, as by somebody who knows the format: numbers of values and bits still tell."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    masks = Masks.load(folder / "pruning")
    masks[UP] = torch.ones_like(masks[UP])
    masks.save(folder / "pruning")
    with pytest.raises(ValueError, match="not the file that was saved"):
        hf_prune.load(folder)
    config = json.loads((folder / "pruning/pruning_config.json").read_text())
    (folder / "pruning/pruning_config.json").write_text(json.dumps({**config, "masks": masks.digest()}))
    with pytest.raises(Exception, match=r"up_proj.weight: .* values, but its mask keeps"):
        hf_prune.load(folder)


def test_weights_from_elsewhere_are_refused(tmp_path):
    """A stranger's folder that names other weights than those that are checked."""
    pruned(family="llama").save_pretrained(tmp_path / "model")
    make("llama", seed=1).save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "transformers_weights": "../other/model.safetensors"}))
    with pytest.raises((ValueError, OSError)):
        hf_prune.load(tmp_path / "model")


def test_threads(saved):
    from transformers import modeling_utils

    before, expected = modeling_utils.safe_open, snapshot(pruned())
    with ThreadPoolExecutor(4) as pool:
        assert all(same(model, expected) for model in pool.map(lambda i: hf_prune.load(saved), range(8)))
    assert modeling_utils.safe_open is before


@pytest.mark.parametrize("where", [compact, conversion])
def test_a_full_disk(saved, tmp_path, monkeypatch, where):
    def full(*_):
        raise SafetensorError("No space left")

    monkeypatch.setattr(where, "save_file", full)
    with pytest.raises(OSError, match="out cannot be written: No space left"):
        if where is compact:
            pruned().save_pretrained(tmp_path / "out", compact=True)
        hf_prune.expand(saved, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_names_that_end_like_our_own(tmp_path):
    (tmp_path / "pruning").mkdir()
    half = torch.randn(8, 16) * (torch.arange(16) % 4 < 2)
    tensors = {"z:bits": torch.randn(4), "b": half}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    compact.compress(tmp_path, tmp_path / "pruning", Masks())
    files = compact.CompactFiles((tmp_path / "pruning").glob("*"), Masks())
    assert set(files.keys()) == set(tensors) and all(torch.equal(files.get_tensor(k), v) for k, v in tensors.items())
    save_file({"b": half, "b:bits": torch.randn(4)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=":bits"):
        compact.compress(tmp_path, tmp_path / "pruning", Masks())


def test_expand_follows_no_link(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes.txt is a link"):
        hf_prune.expand(folder, tmp_path / "out")
    (folder / "notes.txt").unlink()
    (folder / "logs").mkdir()
    (folder / "logs/a.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"logs/a.txt is a link"):
        hf_prune.expand(folder, tmp_path / "out")
    (folder / "logs/a.txt").unlink()
    (folder / "kept").write_text("kept")
    (folder / "logs/a.txt").symlink_to("../kept")  # as in a snapshot of the Hub
    (folder / "kept").chmod(0o444)
    hf_prune.expand(folder, tmp_path / "out")
    copied = tmp_path / "out/logs/a.txt"
    assert copied.read_text() == "kept" and not copied.is_symlink() and (tmp_path / "out/kept").stat().st_mode & 0o200


def test_codes_hold_every_mask_of_two_in_four():
    two = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]).bool()
    for rows in (1, 2, 3, 7):
        mask = two[torch.randint(6, (rows * 4,), generator=torch.Generator().manual_seed(rows))].view(rows, 16)
        packed = Masks({"a": mask}).packed("a")
        codes = _encode(packed, (rows, 16))
        assert codes.nbytes == -(-rows * 4 // 3)
        assert (_decode(codes, (rows, 16)) == packed).all()
    mask[0, 0] = ~mask[0, 0]
    assert _encode(Masks({"a": mask}).packed("a"), (rows, 16)) is None


def test_command_line(saved, tmp_path, capsys):
    assert main(["inspect", str(saved)]) == 0
    assert "zeros and masks agree" in capsys.readouterr().out
    assert main(["expand", str(saved), str(tmp_path / "out")]) == 0
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), snapshot(pruned()))
    assert main(["expand", str(tmp_path), str(tmp_path / "no")]) == 2
    assert "no config.json" in capsys.readouterr().err


def legacy(folder, form, drop=None):
    """What compressed-tensors 0.14 wrote: its names, its shapes, its bit order."""
    model = pruned(dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.rmtree(folder / "pruning")
    dense, tensors = load_file(folder / "model.safetensors"), {}
    for name, weight in dense.items():
        if name not in model.pruning_masks:
            tensors[name] = weight
            continue
        prefix, mask = name.removesuffix(".weight"), model.pruning_masks[name]
        tensors[f"{prefix}.bitmask"] = torch.from_numpy(model.pruning_masks.packed(name).copy())
        if form == "sparse-24-bitmask":
            tensors[f"{prefix}.compressed"] = weight[mask].view(len(weight), -1)
            tensors[f"{prefix}.shape"] = torch.tensor(weight.shape).view(-1, 1)
        else:
            tensors[f"{prefix}.compressed"] = weight[mask]
            tensors[f"{prefix}.shape"] = torch.tensor(weight.shape)
            tensors[f"{prefix}.row_offsets"] = mask.sum(-1).cumsum(0) - mask.sum(-1)
    save_file({k: v for k, v in tensors.items() if k != drop}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("pruning_config")
    sparsity = {
        "format": form,
        "global_sparsity": 0.5,
        "ignore": ["lm_head"],
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
    }
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}, "sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("form", ["sparse-bitmask", "sparse-24-bitmask"])
def test_orphaned_checkpoints(form, tmp_path):
    model = legacy(tmp_path / "old", form)
    hf_prune.expand(tmp_path / "old", tmp_path / "new")
    again = hf_prune.load(tmp_path / "new", dtype="auto")
    assert same(again, snapshot(model))
    assert all(torch.equal(again.pruning_masks[name], mask) for name, mask in model.pruning_masks.items())
    again.prune(PruningConfig(method="magnitude", pattern="1:4"))


def test_orphaned_checkpoints_that_cannot_be_read(tmp_path):
    legacy(tmp_path / "cut", "sparse-bitmask", drop=UP.replace("weight", "bitmask"))
    with pytest.raises(ValueError, match=r"up_proj.bitmask is missing"):
        hf_prune.expand(tmp_path / "cut", tmp_path / "new")
    legacy(tmp_path / "fp8", "sparse-24-bitmask")
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {}}
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized as well"):
        hf_prune.expand(tmp_path / "fp8", tmp_path / "new")
    legacy(tmp_path / "scalar", "sparse-bitmask")
    more = {**load_file(tmp_path / "scalar/model.safetensors"), "model.layers.0.input_scale": torch.tensor(1.0)}
    save_file(more, tmp_path / "scalar/model.safetensors", {"format": "pt"})
    save_file({k: v * 0 for k, v in more.items()}, tmp_path / "scalar/model.zzz.safetensors", {"format": "pt"})
    hf_prune.expand(tmp_path / "scalar", tmp_path / "with-scalar")
    assert load_file(tmp_path / "with-scalar/model.safetensors")["model.layers.0.input_scale"] == 1
    for content in ("[]", "{"):
        (tmp_path / "scalar/config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json is damaged"):
            hf_prune.expand(tmp_path / "scalar", tmp_path / "new")
    make("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is no compact folder"):
        hf_prune.expand(tmp_path / "dense", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loading_takes_one_model_and_a_little(tmp_path):
    model = pruned(dtype=torch.bfloat16, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=64)
    total = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path, compact=True, max_shard_size="20MB")
    del model

    def resident(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    before = resident("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the system does not count the highest memory anew")
    again = hf_prune.load(tmp_path, dtype="auto")
    assert sum(p.nbytes for p in again.parameters()) == total > 90e6
    assert resident("VmHWM") - before < 1.6 * total + 40e6  # the files are mapped, and count while they are read
