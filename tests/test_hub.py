"""Push and pull over HTTP, against the Hub of `hub_server`; model cards."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ids_for, make, same, snapshot
from hub_server import TOKEN
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForQuestionAnswering, Trainer, TrainingArguments

import hf_prune
from hf_prune import KeepMasksCallback, Perplexity, PruningConfig


def pruned(seed=0, pattern="2:4"):
    model = make("llama", seed)
    model.prune(PruningConfig(pattern=pattern, n_samples=6, sequence_length=24), ids_for())
    return model


def logits(model):
    return model(input_ids=torch.arange(5)[None]).logits


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_and_pull(hub, tmp_path, way, compact):
    model = pruned()
    name = f"{way.replace('_', '-')}-{compact}".lower()
    if way == "push_to_hub":
        info = model.push_to_hub(name, compact=compact, max_shard_size="60KB", commit_message="mine")
        assert info.oid == hub.commits(f"tester/{name}")[-1]
    else:
        model.save_pretrained(tmp_path / name, push_to_hub=True, compact=compact, max_shard_size="60KB")
    repo = f"tester/{name}"
    assert len(hub.commits(repo)) == 2  # one beside that of the empty repository
    assert {"README.md", "config.json", "pruning/masks.safetensors", "model.safetensors.index.json"} <= set(hub.files(repo))
    again = hf_prune.load(repo, dtype="auto")
    assert torch.equal(logits(again), logits(model)) and again.config._name_or_path == repo
    assert again.pruning_masks.digest() == model.pruning_masks.digest()
    if compact:
        with pytest.raises(OSError, match=r"load_with_hf_prune.load"):
            AutoModelForCausalLM.from_pretrained(repo)
        return
    plain = AutoModelForCausalLM.from_pretrained(repo)
    assert torch.equal(logits(plain), logits(model)) and plain.pruning_masks.digest() == model.pruning_masks.digest()
    if way == "push_to_hub":
        code = (
            "import sys, torch; sys.modules['hf_prune'] = None\n"
            "from transformers import AutoModelForCausalLM\n"
            f"m = AutoModelForCausalLM.from_pretrained({repo!r})\n"
            f"torch.save(m(input_ids=torch.arange(5)[None]).logits, {str(tmp_path / 'logits.pt')!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_a_revision_has_its_own_masks(hub):
    first, second = pruned(), pruned(seed=1, pattern="1:4")
    first.push_to_hub("two")
    second.push_to_hub("two", compact=True)
    _, old, new = hub.commits("tester/two")
    for revision, model in ((old, first), (new, second), ("main", second)):
        again = hf_prune.load("tester/two", revision=revision)
        assert same(again, snapshot(model)) and again.pruning_masks.digest() == model.pruning_masks.digest()
    assert (
        AutoModelForCausalLM.from_pretrained("tester/two", revision=old).pruning_masks.patterns[
            "model.layers.0.mlp.up_proj.weight"
        ]
        == "2:4"
    )
    assert "model.safetensors" not in hub.files("tester/two")  # what the second push replaces is gone


def test_a_damaged_repository_is_an_error(hub):
    pruned().push_to_hub("bad")
    files = hub.files("tester/bad")
    files["pruning/masks.safetensors"] = files["pruning/masks.safetensors"][:-9]
    with pytest.raises(ValueError, match=r"masks.safetensors"):
        hf_prune.load("tester/bad")
    del files["pruning/masks.safetensors"]
    hub.repos["tester/bad"].append(("f" * 40, files))
    with pytest.raises(ValueError, match="not found"):
        hf_prune.load("tester/bad")
    with pytest.raises(OSError, match="tester/none"):
        hf_prune.load("tester/none")


@pytest.mark.parametrize("fault", [401, 403, 404, 409, 500, "drop"])
@pytest.mark.parametrize("where", ["/lfs/", "/commit/", "/preupload/"])
def test_a_failed_push_leaves_the_old_commit(hub, monkeypatch, where, fault):
    pruned().push_to_hub("repo")
    before = hub.repos["tester/repo"][:]
    model = pruned(seed=1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault = lambda method, path: fault if where in path and method != "GET" else None
    with pytest.raises(Exception) as error:
        model.push_to_hub("repo")
    assert (
        isinstance(error.value, (HfHubHTTPError, OSError, RuntimeError))
        or "Connection" in repr(error.value)
        or "httpx" in repr(type(error.value))
    )
    assert hub.repos["tester/repo"] == before
    hub.fault = None
    model.push_to_hub("repo")
    assert same(hf_prune.load("tester/repo"), snapshot(model))


def test_one_dropped_connection(hub):
    """In the middle of the body, once: the push goes through, or the next one does, and no commit is half."""
    model = pruned()
    dropped = []

    def once(method, path):
        if method == "PUT" and not dropped:
            dropped.append(path)
            return "drop"

    hub.fault = once
    try:
        model.push_to_hub("once")
    except Exception:
        assert len(hub.commits("tester/once")) == 1
        model.push_to_hub("once")
    assert dropped and len(hub.commits("tester/once")) == 2
    assert same(hf_prune.load("tester/once"), snapshot(model))


def test_without_a_token(hub, monkeypatch):
    with pytest.raises(HfHubHTTPError, match="401"):
        pruned().push_to_hub("mine", token="hf_wrong")
    assert not hub.repos


def test_dense_models_and_wrong_arguments(hub, tmp_path):
    dense = make("llama")
    dense.push_to_hub("dense")
    assert hf_prune.load("tester/dense").pruning_masks is None
    with pytest.raises(ValueError, match="prune it first"):
        dense.push_to_hub("dense", compact=True)
    with pytest.raises(TypeError, match="by name"):
        pruned().push_to_hub("x", "a message")
    dense.save_pretrained(tmp_path / "dense", True)
    model = pruned()
    model.save_pretrained(tmp_path / "other", False)  # another process saves
    assert not (tmp_path / "other/pruning").exists()
    model.save_pretrained(tmp_path / "sparse", True)
    hf_prune.load(tmp_path / "sparse")


def test_a_branch_begins_with_the_card_of_main(hub):
    model = pruned()
    model.push_to_hub("repo")
    edit(hub, "tester/repo", lambda text: text + b"\nEdited on the Hub.\n")
    model.push_to_hub("repo", revision="sparse")
    files = hub.branches["tester/repo", "sparse"][-1][1]
    assert b"Edited on the Hub." in files["README.md"]
    assert same(hf_prune.load("tester/repo", revision="sparse"), snapshot(model))


def edit(hub, repo, change):
    files = dict(hub.files(repo))
    files["README.md"] = change(files["README.md"])
    hub.repos[repo].append((f"{len(hub.repos[repo]):040x}", files))


def test_edits_on_the_hub_survive_or_nothing_is_pushed(hub, tmp_path, monkeypatch):
    model = pruned()
    model.push_to_hub("repo")
    edit(hub, "tester/repo", lambda text: text + b"\nEdited on the Hub.\n")
    model.push_to_hub("repo")
    assert b"Edited on the Hub." in hub.files("tester/repo")["README.md"]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    before = len(hub.commits("tester/repo"))
    hub.fault = lambda method, path: 503 if path.endswith("README.md") else None
    with pytest.raises((HfHubHTTPError, OSError)):
        model.push_to_hub("repo")
    assert len(hub.commits("tester/repo")) == before


def test_masks_that_the_hub_does_not_give_now(hub, tmp_path, monkeypatch):
    pruned().push_to_hub("repo")
    model = AutoModelForCausalLM.from_pretrained("tester/repo", cache_dir=tmp_path / "cache")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault = lambda method, path: 503
    for action in (lambda: model.save_pretrained(tmp_path / "out"), lambda: model.prune(PruningConfig("magnitude"))):
        with pytest.raises(OSError, match="'tester/repo' cannot be asked for its masks.*del model.pruning_masks"):
            action()
    assert not (tmp_path / "out").exists()
    hub.fault = None
    model.save_pretrained(tmp_path / "out")
    assert hf_prune.load(tmp_path / "out").pruning_masks.digest() == pruned().pruning_masks.digest()


def test_a_token_is_in_no_pickle(hub):
    pruned().push_to_hub("repo")
    model = AutoModelForCausalLM.from_pretrained("tester/repo", token=TOKEN)
    assert TOKEN.encode() not in pickle.dumps(model)
    assert model.pruning_masks and copy.deepcopy(model).pruning_masks


def test_an_adapter_leaves_the_masks(hub, tmp_path):
    peft = pytest.importorskip("peft")
    model = pruned()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.push_to_hub("adapter")
    assert model.pruning_masks and "adapter_model.safetensors" in hub.files("tester/adapter")
    with pytest.raises(ValueError, match="adapter"):
        model.save_pretrained(tmp_path, compact=True)


def test_loading_info_comes_along(tmp_path):
    for compact in (False, True):
        pruned().save_pretrained(tmp_path, compact=compact)
        model, info = hf_prune.load(tmp_path, output_loading_info=True)
        assert model.pruning_masks and not info["missing_keys"]


def test_card(tmp_path):
    model = pruned()
    report = model.pruning_report
    report.base_model = "someone/tiny-llama"
    dense, sparse = (Perplexity(p, 1000, 10, 101, 101, False) for p in (12.345, 45.678))
    report.add_perplexity("Some text", sparse, dense)
    with pytest.raises(ValueError, match="do not compare"):
        report.add_perplexity("Some text", sparse, Perplexity(1.0, 5, 1, 6, 6, False))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/tiny-llama" and card.data.library_name == "transformers"
    assert {"pruned", "wanda", "2:4"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert result.metric_value == 45.678 and result.dataset_name == "Some text"
    for part in ("| 12.35 | 45.68 |", "2306.11695", "Not measured.", "144 tokens", "seed 0", "hf_prune.load", "pattern='2:4'"):
        assert part in card.text, part
    again = hf_prune.load(tmp_path)
    assert again.pruning_report.evaluations == report.evaluations


def test_variants_and_a_model_without_masks(hub):
    model = pruned()
    model.push_to_hub("repo", variant="fp16")
    model.push_to_hub("repo")
    for variant in (None, "fp16"):
        assert same(hf_prune.load("tester/repo", variant=variant), snapshot(model))
    make("llama").push_to_hub("repo")
    files = hub.files("tester/repo")
    assert "model.fp16.safetensors" in files and not [name for name in files if name.startswith("pruning/")]
    assert b"hf_prune" not in files["README.md"] and hf_prune.load("tester/repo").pruning_masks is None


def test_how_it_can_be_made_again(tmp_path):
    model, ids = pruned(), ids_for(20, 16)
    model.pruning_report.add_perplexity("Some text", Perplexity(45.678, 1000, 10, 101, 101, False))
    model.pruning_report.add_timing("decode", 0.002, 0.001, "a machine")
    model.save_pretrained(tmp_path)
    assert "model.prune(config, calibration=texts, tokenizer=tokenizer)\n```" in (tmp_path / "README.md").read_text()
    how = hf_prune.Reconstruction(batch_tokens=32, epochs=1)
    hf_prune.reconstruct(model, make("llama"), ids, sequence_length=16, n_samples=20, how=how)
    assert not model.pruning_report.evaluations and not model.pruning_report.timings
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| reconstructed afterwards | train='full'" in text and "45.68" not in text
    assert "hf_prune.reconstruct(model, dense, calibration=texts, tokenizer=tokenizer, how=hf_prune.Reconstruction(" in text
    assert hf_prune.load(tmp_path).pruning_report.reconstructed["n_samples"] == 20


def test_a_measured_latency_is_in_the_card(tmp_path):
    model = pruned()
    model.pruning_report.add_timing("decode, batch 1", 0.002, 0.001, "a machine")
    model.save_pretrained(tmp_path)
    assert "| decode, batch 1 | 2.00 ms | 1.00 ms | a machine |" in (tmp_path / "README.md").read_text()


def test_edits_survive(tmp_path):
    model = pruned()
    model.pruning_report.add_perplexity("Some text", Perplexity(45.678, 1000, 10, 101, 101, False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    text = path.read_text().replace("\n---\n", "\nlicense: mit\nlanguage: en\n---\n\nMy own introduction.\n")
    text = text.replace("<!-- hf_prune:begin", "And a word before.\n\n<!-- hf_prune:begin") + "\nAnd after.\n"
    path.write_text(text.replace("- pruned\n", "- pruned\n- mine\n"))
    model.pruning_report.add_perplexity("Some text", Perplexity(50.0, 1000, 10, 101, 101, False))
    model.save_pretrained(tmp_path, compact=True)
    card = ModelCard.load(path)
    for words in ("My own introduction.", "And a word before.", "And after."):
        assert card.text.count(words) == 1
    assert card.text.count("hf_prune:begin") == 1 and "Compact: weights" in card.text
    assert card.data.license == "mit" and "mine" in card.data.tags
    assert [r.metric_value for r in card.data.eval_results] == [50.0]
    first = path.read_text()
    model.save_pretrained(tmp_path, compact=True)
    assert path.read_text() == first


def test_a_card_without_our_section_gets_it_at_the_end(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nText.\n")
    pruned().save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text.strip()
    assert text.startswith("# Mine\n\nText.\n\n<!-- hf_prune:begin") and text.endswith("hf_prune:end -->")


def test_what_was_measured_before_is_gone(tmp_path):
    model = pruned()
    model.pruning_report.add_perplexity("Some text", Perplexity(45.678, 1000, 10, 101, 101, False))
    model.save_pretrained(tmp_path)
    model.prune(PruningConfig(method="magnitude", pattern="1:4"))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert not card.data.eval_results and "2:4" not in card.data.tags and "wanda" not in card.data.tags
    assert "pruned to 1:4" in card.text and "pruned to 2:4" not in card.text


def test_cards_of_all_kinds(tmp_path):
    model, path = pruned(), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    path.write_text(path.read_text().replace("<!-- hf_prune:end -->", "") + "\nWritten where the end was deleted.\n")
    for _ in range(3):
        model.save_pretrained(tmp_path)
    assert path.read_text().count("Written where the end was deleted.") == 1
    path.write_bytes(b"Latin-1: caf\xe9\r\n")
    model.save_pretrained(tmp_path)
    assert b"caf\xe9\n" in path.read_bytes() and b"hf_prune:begin" in path.read_bytes()
    model.pruning_report.blocks[0].error = float("nan")
    model.save_pretrained(tmp_path)
    assert "nan" in path.read_text(encoding="latin-1")


def test_expand_writes_the_card_anew(tmp_path):
    pruned().save_pretrained(tmp_path / "compact", compact=True)
    hf_prune.expand(tmp_path / "compact", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "Compact: weights" not in text and "from_pretrained` loads it as well" in text


def test_a_broken_card_does_not_stop_a_save(tmp_path):
    broken = "---\nlicense: [\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(broken)
    pruned().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == broken
    hf_prune.load(tmp_path)


def test_license_of_the_base(hub, tmp_path):
    make("llama").push_to_hub("base")
    files = hub.files("tester/base")
    files["README.md"] = b"---\nlicense: llama3.1\nlanguage:\n- de\n---\n# base\n"
    hub.repos["tester/base"].append(("e" * 40, files))
    model = AutoModelForCausalLM.from_pretrained("tester/base")
    model.prune(PruningConfig(method="magnitude"))
    model.push_to_hub("sparse")
    data = ModelCard(hub.files("tester/sparse")["README.md"].decode()).data
    assert data.license == "llama3.1" and data.language == ["de"] and data.base_model == "tester/base"
    # ... and from there, edited on the Hub, on to the next
    files = hub.files("tester/sparse")
    files["README.md"] = files["README.md"].replace(b"# base", b"# Ours")
    hub.repos["tester/sparse"].append(("d" * 40, files))
    again = hf_prune.load("tester/sparse")
    again.prune(PruningConfig(method="magnitude", pattern="1:4"))
    again.push_to_hub("sparse")
    data = ModelCard(hub.files("tester/sparse")["README.md"].decode()).data
    assert data.license == "llama3.1" and data.base_model == "tester/base" and "1:4" in data.tags


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_trainer_pushes_masks_and_card(hub, tmp_path, strategy):
    model = pruned()
    args = TrainingArguments(
        tmp_path / "out", push_to_hub=True, hub_strategy=strategy, hub_model_id=f"tester/{strategy}", max_steps=4, save_steps=2,
        report_to=[], use_cpu=True, learning_rate=1e-2, weight_decay=0.1, hub_always_push=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in ids_for(16)]
    trainer = Trainer(model, args, train_dataset=data)
    trainer.add_callback(KeepMasksCallback())
    before = snapshot(model)
    trainer.train()
    assert not same(model, before)
    if strategy == "end":
        trainer.push_to_hub()
    trainer._finish_current_push()
    repo = f"tester/{strategy}"
    again = hf_prune.load(repo)
    assert same(again, snapshot(model)) and not again.pruning_masks.violations(again)
    text = hub.files(repo)["README.md"].decode()
    assert "hf_prune:begin" in text and "2:4" in ModelCard(text).data.tags
    if strategy == "end":
        assert "Training hyperparameters" in text
    else:
        assert len(hub.commits(repo)) >= 3
        hf_prune.load(repo, revision=hub.commits(repo)[-2])
    assert hf_prune.load(tmp_path / "out").pruning_masks


def test_a_push_that_trainer_leaves_out_changes_nothing(hub, tmp_path):
    """hub_strategy="end" saves checkpoints without a push: the older model in the output folder stays one."""
    model = pruned()
    model.save_pretrained(tmp_path / "out")
    args = TrainingArguments(
        tmp_path / "out", push_to_hub=True, hub_strategy="end", hub_model_id="tester/end", max_steps=2, save_steps=1,
        report_to=[], use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in ids_for(16)]
    Trainer(model, args, train_dataset=data, callbacks=[KeepMasksCallback()]).train()
    hf_prune.load(tmp_path / "out")
    hf_prune.load(tmp_path / "out/checkpoint-2")


def test_keep_masks_needs_masks(tmp_path):
    trainer = Trainer(
        make("llama"), TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in ids_for(4)], callbacks=[KeepMasksCallback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="has no masks"):
        trainer.train()


def test_nothing_but_localhost(hub):
    assert HfApi().endpoint == hub.url
    assert json.dumps(hub.requests) == "[]"


def test_a_model_that_never_had_the_pruned_weights(tmp_path):
    pruned().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="made from a config alone.*`del model.pruning_masks`"):
        model.prune(PruningConfig("magnitude", pattern="2:4"))
    del model.pruning_masks
    assert model.prune(PruningConfig("magnitude", pattern="2:4")).sparsity == 0.5
    answering = AutoModelForQuestionAnswering.from_pretrained(tmp_path)  # names its body "transformer"
    with pytest.raises(ValueError, match=r"names its weights transformer\.\*.*`del model.pruning_masks`"):
        answering.pruning_masks  # noqa: B018
