import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
import transformers
from conftest import ids_for, make, same, snapshot
from test_cli import llava
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_prune
from hf_prune import Masks, Perplexity, PruningConfig, atomic, perplexity, serialization
from hf_prune.cli import main


def pruned(**changes):
    model = make("llama")
    model.prune(PruningConfig(n_samples=6, sequence_length=24, **changes), ids_for())
    return model


def test_folder_is_ordinary(tmp_path):
    model = pruned(pattern="2:4")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("generation")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "pruning",
    ]
    assert sorted(p.name for p in (tmp_path / "pruning").iterdir()) == ["masks.safetensors", "pruning_config.json"]
    code = (
        "import sys, torch; sys.modules['hf_prune'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32)\n"
        f"torch.save(m(input_ids=torch.arange(5)[None]).logits, {str(tmp_path / 'logits.pt')!r})\n"
        "assert not hasattr(m, 'prune')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids=torch.arange(5)[None]).logits)


def test_masks_cost_a_bit_a_weight(tmp_path):
    model = make("llama", hidden_size=128, intermediate_size=512)
    model.prune(PruningConfig(method="magnitude", pattern="2:4"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "pruning" / "masks.safetensors").stat().st_size < model.pruning_masks.numel() / 8 + 4000


def test_report_and_config_come_back(tmp_path):
    model = pruned(pattern="2:4")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.pruning_report.to_dict() == model.pruning_report.to_dict()
    assert again.config.pruning_config["pattern"] == "2:4"
    assert PruningConfig.from_pretrained(tmp_path) == PruningConfig.from_dict(model.pruning_report.config)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path).prune(PruningConfig(method="magnitude", pattern="1:4")).sparsity == 0.75
    )


def test_changed_weights_are_found(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        again.model.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight"):
        again.pruning_masks  # noqa: B018


def test_changed_weights_are_saved_without_masks(tmp_path):
    model = pruned()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(ValueError, match="compact.*no longer zero.*up_proj.weight"):
        model.save_pretrained(tmp_path, compact=True)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "pruning").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.pruning_masks is None
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_pruned_again_from_the_dense_weights():
    model, dense = pruned(sparsity=0.7), make("llama").state_dict()
    model.load_state_dict(dense)
    with pytest.raises(ValueError, match="calibration"):
        model.prune(PruningConfig("wanda"))
    assert model.__dict__["_hf_prune_state"].report  # a pruning that failed forgets nothing
    assert model.prune(PruningConfig("magnitude")).sparsity == pytest.approx(0.5, abs=0.01)
    other = make("llama")
    other.prune(PruningConfig("magnitude"))
    assert model.pruning_masks.digest() == other.pruning_masks.digest()
    model.load_state_dict(dense)
    model.prune(PruningConfig("taylor", pattern="ffn:0.25", n_samples=6, sequence_length=24), ids_for())
    del other.pruning_masks
    assert other.pruning_masks is None and other.pruning_report is None


def test_a_folder_that_is_gone(tmp_path, monkeypatch):
    model, told = pruned(), []
    model.save_pretrained(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    moved, gone = (AutoModelForCausalLM.from_pretrained("one") for _ in range(2))
    monkeypatch.chdir("/")
    moved.save_pretrained(tmp_path / "two")
    assert hf_prune.load(tmp_path / "two").pruning_masks.digest() == model.pruning_masks.digest()
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(ValueError, match="not found in '.*one', which is gone"):
        gone.prune(PruningConfig("magnitude"))
    monkeypatch.setattr("hf_prune.mixin.logger.warning", told.append)
    gone.save_pretrained(tmp_path / "three")
    assert "saving without pruning masks: this model was pruned, but" in told[0] and not (tmp_path / "three/pruning").exists()
    assert same(hf_prune.load(tmp_path / "three"), snapshot(model))


def test_a_state_dict_of_other_weights(tmp_path):
    model = pruned()
    dense = {name: value + 0.01 for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="compact.*no longer zero"):
        model.save_pretrained(tmp_path / "dense", state_dict=dense, compact=True)
    model.save_pretrained(tmp_path / "dense", state_dict=dense)
    assert not (tmp_path / "dense" / "pruning").exists() and hf_prune.load(tmp_path / "dense").pruning_masks is None
    model.save_pretrained(tmp_path / "half", state_dict={name: value.half() for name, value in model.state_dict().items()})
    assert len(hf_prune.load(tmp_path / "half").pruning_masks) == len(model.pruning_masks)


def test_missing_masks_are_an_error(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path)
    (tmp_path / "pruning" / "masks.safetensors").unlink()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="masks.*not found"):
        again.pruning_masks  # noqa: B018


@pytest.mark.parametrize("damage", ["truncate", "foreign", "noise"])
def test_damaged_mask_file(tmp_path, damage):
    Masks({"a": torch.ones(4, 9, dtype=torch.bool)}).save(tmp_path)
    path = tmp_path / "masks.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "noise":
        path.write_bytes(b"\xff" * 100)
    else:
        safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="masks"):
        Masks.load(tmp_path)


def test_masks_round_trip_and_apply(llama, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    masks = Masks({name: torch.rand(64, 32) > 0.5})
    masks.save(tmp_path)
    again = Masks.load(tmp_path)
    assert torch.equal(again[name], masks[name]) and again.sparsity() == masks.sparsity()
    assert again.violations(llama)
    again.apply(llama)
    assert not again.violations(llama)
    before = snapshot(llama)
    for other, words in ("b", "no parameter 'b'.$"), ("experts.0.w1", "on_mismatch='drop'"):
        with pytest.raises(ValueError, match=words):
            Masks({name: masks[name], other: masks[name]}).apply(llama)
    with pytest.raises(ValueError, match="shape"):
        Masks({name: masks[name][:2]}).apply(llama)
    assert same(llama, before)
    with pytest.raises(TypeError, match="bool"):
        masks[name] = torch.ones(64, 32)


def test_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = pruned()
    (tmp_path / "file").write_text("")
    model.save_pretrained(tmp_path / "file")  # transformers logs an error
    assert (tmp_path / "file").read_text() == ""
    monkeypatch.setattr(type(model.config), "save_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder" / "pruning").exists()


def test_a_folder_of_a_lower_overlay_layer(tmp_path, monkeypatch):
    def moves_no_folder(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "notes").write_text("kept")
    pruned(method="magnitude").save_pretrained(tmp_path)
    monkeypatch.setattr(atomic, "_exchange", moves_no_folder)
    model = pruned(method="magnitude", sparsity=0.7)
    model.save_pretrained(tmp_path)
    assert same(hf_prune.load(tmp_path), snapshot(model)) and (tmp_path / "notes").read_text() == "kept"


def test_a_folder_that_another_process_has_just_made(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "exists", lambda path: False)  # as it was a moment ago
        atomic._exchange(tmp_path / "second", tmp_path / "first")
    assert (tmp_path / "first" / "text").read_text() == "second"


def test_two_threads_and_one_folder(tmp_path):
    def save(text):
        with atomic.replaced_folder(tmp_path / "folder", lambda name: True) as fresh:
            (fresh / "text").write_text(text)
            if text == "first":
                ThreadPoolExecutor(1).submit(save, "second").result()

    save("first")
    assert (tmp_path / "folder" / "text").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


class TestPerplexity:
    def reference(self, model, ids, length):
        """The papers' code: windows without overlap, mean of the means."""
        losses = [
            torch.nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:])
            for w in ids[: len(ids) // length * length].split(length)
        ]
        return torch.stack(losses).mean().exp().item()

    @torch.no_grad()
    def test_papers(self, llama):
        ids = ids_for(1, 300)[0]
        found = perplexity(llama, None, ids, sequence_length=40)
        assert found.perplexity == pytest.approx(self.reference(llama, ids, 40), rel=1e-5)
        assert (found.tokens, found.windows, found.sequence_length, found.bos) == (7 * 39, 7, 40, False)
        assert perplexity(llama, None, ids[:280].view(7, 40)).perplexity == pytest.approx(found.perplexity)

    @torch.no_grad()
    def test_stride_predicts_every_token_once(self, llama):
        ids = ids_for(1, 103)[0]
        found = perplexity(llama, None, ids, sequence_length=40, stride=10)
        assert found.tokens == 102
        losses = [torch.nn.functional.cross_entropy(llama(input_ids=ids[None, :40]).logits[0, :-1], ids[1:40], reduction="sum")]
        start, end = 10, 40
        while end < 103:
            window = ids[start : start + 40]
            new = start + len(window) - end
            losses.append(
                torch.nn.functional.cross_entropy(
                    llama(input_ids=window[None]).logits[0, :-1][-new:], window[-new:], reduction="sum"
                )
            )
            start, end = start + 10, start + len(window)
        assert found.perplexity == pytest.approx((torch.stack(losses).sum() / 102).exp().item(), rel=1e-5)

    @torch.no_grad()
    def test_bos(self, llama, tokenizer):
        text = " ".join(str(i) for i in ids_for(1, 78)[0].tolist())
        with_bos = perplexity(llama, tokenizer, text, sequence_length=40, add_bos=True)
        assert with_bos.tokens == 78 and with_bos.bos and with_bos.windows == 2
        bare = [perplexity(llama, tokenizer, words, sequence_length=39, add_bos=False) for words in (text, f"<s> {text}")]
        assert bare[0] == bare[1]
        assert not perplexity(llama, tokenizer, text, sequence_length=40).bos  # this tokenizer adds none itself

    def test_refuses(self, llama, tokenizer):
        for text, keywords, message in [
            ("3 4", {"sequence_length": 40}, "2 tokens"),
            ("3 4", {"sequence_length": 65}, "64 positions"),
            ("3 4", {"sequence_length": 0}, "64 positions, got 0"),
            ("3 4", {"sequence_length": 8, "stride": 9}, "stride"),
            (torch.full((40,), 500), {"sequence_length": 40}, "vocabulary"),
            ("", {"sequence_length": 8}, "0 tokens"),
        ]:
            with pytest.raises(ValueError, match=message):
                perplexity(llama, tokenizer, text, **keywords)

    @torch.no_grad()
    def test_ids_in_all_they_come_in(self, llama, tokenizer):
        ids = ids_for(2, 40)
        expected = perplexity(llama, None, ids)
        for given in (ids.numpy(), ids.tolist(), {"input_ids": ids.tolist()}, transformers.BatchEncoding({"input_ids": ids})):
            assert perplexity(llama, tokenizer, given) == expected
        padded = {"input_ids": [[*row, 0] for row in ids.tolist()], "attention_mask": [[1] * 40 + [0]] * 2}
        assert perplexity(llama, None, padded, sequence_length=40) == expected
        row = ids_for(1, 200)
        assert perplexity(llama, tokenizer, {"input_ids": row}) == perplexity(llama, None, row[0])  # more than its 64 positions
        for given in ([[3, 4], [5]], {"ids": [3, 4]}, None):
            with pytest.raises(TypeError, match="a text, a list of texts, or ids"):
                perplexity(llama, tokenizer, given)

    def test_positions_of_mpt(self, tokenizer):
        text = " ".join(["5"] * 200)
        assert perplexity(make("mpt"), tokenizer, text).sequence_length == 64
        with pytest.raises(ValueError, match="64 positions"):
            perplexity(make("mpt"), tokenizer, text, sequence_length=65)

    def test_as_evaluate_module(self, llama, tokenizer):
        evaluate = pytest.importorskip("evaluate")
        import hf_prune.metric

        texts = [" ".join(str(i) for i in row) for row in ids_for(4, 50).tolist()]
        expected = perplexity(llama, tokenizer, texts, sequence_length=40)
        for metric in (hf_prune.metric.Perplexity(), evaluate.load(hf_prune.metric.__file__)):
            found = metric.compute(predictions=texts, model=llama, tokenizer=tokenizer, sequence_length=40)
            assert Perplexity(**found) == expected


class TestCommandLine:
    @pytest.fixture
    def folder(self, tmp_path, tokenizer):
        make("llama").save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        (tmp_path / "text.txt").write_text(" ".join(str(i) for i in ids_for(1, 4000)[0].tolist()))
        return tmp_path

    def test_prune_inspect_perplexity(self, folder, capsys):
        arguments = ["--calibration", str(folder / "text.txt"), "--n-samples", "8", "--sequence-length", "32"]
        words = ["--method", "sparsegpt", "--pattern", "2:4", "--option", "damping=0.02", "--override", "*.down_proj=4:8"]
        assert main(["prune", str(folder / "dense"), str(folder / "out"), *arguments, *words]) == 0
        assert "2:4" in capsys.readouterr().out
        assert main(["inspect", str(folder / "out")]) == 0
        assert "zeros and masks agree" in capsys.readouterr().out
        assert main(["perplexity", str(folder / "out"), str(folder / "text.txt"), "--sequence-length", "32"]) == 0
        assert "perplexity" in capsys.readouterr().out
        weights = safetensors.torch.load_file(folder / "out" / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
        safetensors.torch.save_file(weights, folder / "out" / "model.safetensors", {"format": "pt"})
        assert main(["inspect", str(folder / "out")]) == 1
        assert "DISAGREE" in capsys.readouterr().out

    def test_errors(self, folder, capsys):
        dense = str(folder / "dense")
        assert main(["prune", dense, str(folder / "out")]) == 2
        assert "--calibration" in capsys.readouterr().err
        assert main(["prune", dense, str(folder / "out"), "--method", "x"]) == 2
        assert main(["prune", dense, str(folder / "out"), "--option", "x", "--method", "sparsegpt"]) == 2
        assert main(["inspect", dense]) == 2
        assert "no masks" in capsys.readouterr().err
        assert main(["inspect", str(folder / "nowhere")]) == 2
        assert "there is no folder" in capsys.readouterr().err
        assert not (folder / "out").exists()

    def test_what_cannot_be_written_is_said_first(self, folder, capsys, monkeypatch):
        monkeypatch.setattr("hf_prune.cli._load", lambda args: pytest.fail("the model was loaded"))
        for output in ("text.txt", "text.txt/out"):
            assert main(["prune", str(folder / "dense"), str(folder / output), "--method", "magnitude"]) == 2
            assert "text.txt is not a folder" in capsys.readouterr().err
        monkeypatch.setattr("tempfile.mkdtemp", lambda **options: (_ for _ in ()).throw(PermissionError("read-only")))
        assert main(["prune", str(folder / "dense"), str(folder / "new" / "out"), "--method", "magnitude"]) == 2
        assert "out cannot be written: read-only" in capsys.readouterr().err

    def test_interrupted(self, folder, capsys, monkeypatch):
        monkeypatch.setattr("hf_prune.mixin.prune_model", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        command = ["prune", str(folder / "dense"), str(folder / "out"), "--method", "magnitude"]
        assert main(command) == 130
        assert "interrupted; nothing was written" in capsys.readouterr().err
        assert main([*command, "--resume-dir", str(folder / "journal")]) == 130  # magnitude keeps none
        assert "interrupted; nothing was written" in capsys.readouterr().err
        (folder / "out.unfinished").mkdir()
        (folder / "out.unfinished" / "journal.json").write_text("{}")
        for out in ("out", "out/"):
            command[2] = f"{folder}/{out}"
            assert main(command) == 130 and "goes on from its journal" in capsys.readouterr().err
        assert not (folder / "out").exists()

    @pytest.mark.parametrize("error, code, says", [(KeyboardInterrupt, 130, "interrupted; "), (Exception, 2, "prune: ")])
    def test_without_a_tokenizer(self, folder, capsys, monkeypatch, error, code, says):
        command = ["prune", str(folder / "dense"), str(folder / "out"), "--method", "magnitude"]
        with monkeypatch.context() as patch:
            patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(error))
            assert main(command) == code
        assert f"{says}{folder / 'out'} has the model, but not its tokenizer" in capsys.readouterr().err
        for path in (folder / "dense").glob("tokenizer*"):
            path.unlink()
        assert main(command) == 0 and "no tokenizer is saved" in capsys.readouterr().err
        assert hf_prune.load(folder / "out").pruning_masks.sparsity() == 0.5

    def test_files_that_cannot_be_read(self, folder, capsys):
        (folder / "text.txt").write_bytes(b"3 4 \xe9")
        assert main(["perplexity", str(folder / "dense"), str(folder / "text.txt")]) == 2
        assert "text.txt is not text in UTF-8" in capsys.readouterr().err
        weights = folder / "dense" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        assert main(["prune", str(folder / "dense"), str(folder / "out"), "--method", "magnitude"]) == 2


@pytest.mark.filterwarnings("ignore")
def test_the_body_of_a_pruned_model(tmp_path):
    """It shares the config, not the masks; torch.jit.trace asks every module for every attribute."""
    model = make("llama").eval()
    model.prune(PruningConfig("magnitude", pattern="2:4"))
    model.save_pretrained(tmp_path)
    for whole in (model, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert whole.pruning_masks and whole.model.pruning_masks is None and whole.model.pruning_report is None
        ids, logits = torch.arange(3, 11)[None], _Logits(whole)
        if transformers.__version__ < "5":
            continue  # torch.jit.trace fails on its Llama, pruned or not
        torch.testing.assert_close(torch.jit.trace(logits, (ids,), check_trace=False)(ids), logits(ids))


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def test_models_of_one_config(tmp_path):
    """Each saves what it is itself."""
    config = make("llama").config
    one, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    one.prune(PruningConfig("magnitude"))
    assert other.config is one.config and other.pruning_masks is None
    other.save_pretrained(tmp_path / "other")
    one.save_pretrained(tmp_path / "one")
    assert hf_prune.load(tmp_path / "other").pruning_masks is None
    assert hf_prune.load(tmp_path / "one").pruning_masks.digest() == one.pruning_masks.digest()
    assert other.prune(PruningConfig("magnitude", sparsity=0.7)).sparsity == pytest.approx(0.7, abs=0.01)


def test_a_sharded_variant(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.fp16.json").exists()
    assert same(hf_prune.load(tmp_path, variant="fp16"), snapshot(model))
    with pytest.raises(ValueError, match="of variant 'fp16', not of None"):
        hf_prune.load(tmp_path)


def test_variants_beside_each_other(tmp_path):
    model = pruned()
    for variant in (None, "fp16", None):
        model.save_pretrained(tmp_path, variant=variant)
    for variant in (None, "fp16"):
        assert same(hf_prune.load(tmp_path, variant=variant), snapshot(model))
    (tmp_path / "model.fp16.safetensors").write_bytes(b"changed")
    hf_prune.load(tmp_path)
    with pytest.raises(ValueError, match="model.fp16.safetensors is damaged"):
        hf_prune.load(tmp_path, variant="fp16")
    model.save_pretrained(tmp_path, compact=True)
    model.save_pretrained(tmp_path, variant="fp16")  # its masks replace the compact weights too
    assert not (tmp_path / "model.safetensors.index.json").exists()
    hf_prune.load(tmp_path, variant="fp16")
    model.prune(PruningConfig("magnitude", sparsity=0.7))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fp16"):  # its masks are others
        hf_prune.load(tmp_path, variant="fp16")


@pytest.mark.parametrize("compact", [False, True])
def test_a_model_without_masks_in_place_of_a_pruned_one(tmp_path, compact):
    model = pruned(pattern="2:4")
    model.save_pretrained(tmp_path, compact=compact)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names and not names & {"pruning", "model.safetensors.index.json"}
    assert "Mine." in card.read_text() and "- pruned" not in card.read_text()
    assert "hf_prune:begin" not in card.read_text() and "2:4" not in card.read_text()
    again = hf_prune.load(tmp_path)
    assert again.pruning_masks is None and same(again, snapshot(model))


def test_the_card_names_what_came_before(tmp_path, llama):
    words = dict(n_samples=6, sequence_length=24)
    llama.prune(PruningConfig("taylor", pattern="ffn:0.5", **words), ids_for())
    llama.prune(PruningConfig("wanda", pattern="2:4", **words), ids_for())
    llama.prune(PruningConfig("magnitude", sparsity=0.7), masks=llama.pruning_masks)
    llama.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| pruned before | taylor, ffn:0.5, 6 sequences; wanda, 2:4, 6 sequences |" in card
    assert (
        "# before it: taylor, ffn:0.5, 6 sequences\n# before it: wanda, 2:4, 6 sequences\nmodel.prune(config, masks=masks)"
        in card
    )
    assert "given, of 14 parameters" in card and hf_prune.load(tmp_path).pruning_report.earlier


@pytest.mark.parametrize("compact", [False, True])
def test_a_classifier_made_from_a_pruned_model(tmp_path, compact):
    pruned(pattern="2:4").save_pretrained(tmp_path / "pruned")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned", num_labels=3).eval()
    model.save_pretrained(tmp_path / "out", compact=compact)
    again = hf_prune.load(tmp_path / "out")
    assert type(again) is type(model) and same(again, snapshot(model)) and len(again.pruning_masks) == 14
    assert main(["inspect", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "# LlamaForSequenceClassification, pruned to 2:4" in card


@pytest.mark.parametrize("compact", [False, True])
def test_a_model_that_sees(tmp_path, compact):
    model = llava()
    model.prune(PruningConfig("magnitude", pattern="2:4"))
    model.save_pretrained(tmp_path, compact=compact)
    again = hf_prune.load(tmp_path)
    assert type(again) is type(model) and same(again, snapshot(model)) and len(again.pruning_masks) == 14
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "README.md").read_text()


def test_the_class_of_a_body(tmp_path):
    for tied, kind in ((True, transformers.LlamaForCausalLM), (False, transformers.LlamaModel)):
        model = make("llama", tie_word_embeddings=tied)
        model.model.save_pretrained(tmp_path / str(tied))
        again = hf_prune.load(tmp_path / str(tied))
        assert type(again) is kind and torch.equal(again.get_input_embeddings().weight, model.model.embed_tokens.weight)


def test_remote_and_registered_classes_of_a_known_name(monkeypatch):
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    own = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {})
    assert serialization.class_of(config) is AutoModelForCausalLM
    monkeypatch.setattr(serialization, "MODEL_FOR_CAUSAL_LM_MAPPING", {transformers.LlamaConfig: own})
    assert serialization.class_of(config) is AutoModelForCausalLM  # which makes the registered one
    monkeypatch.setattr(serialization, "MODEL_FOR_CAUSAL_LM_MAPPING", {})
    assert serialization.class_of(config) is transformers.LlamaForCausalLM
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}
    assert serialization.class_of(config) is AutoModelForCausalLM


def test_an_interrupted_save_hashes_no_more_files(tmp_path, monkeypatch):
    hashed, begun = [], threading.Event()

    def slow(path):
        hashed.append(path)
        begun.wait(20)

    def interrupted(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(serialization, "_THREADS", 1)
    monkeypatch.setattr(serialization, "_digest", slow)
    monkeypatch.setattr(Masks, "save", interrupted)
    threading.Timer(0.5, begun.set).start()
    with pytest.raises(KeyboardInterrupt):
        pruned().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(hashed) <= 2 and not list(tmp_path.iterdir())


def test_a_model_that_lost_a_layer_is_pruned_again(tmp_path):
    model = pruned()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    model.prune(PruningConfig("magnitude", pattern="2:4"))
    assert len(model.pruning_masks) == 7


def test_masks_of_an_older_pickle():
    masks = Masks({"a": torch.ones(2, 8, dtype=torch.bool)})
    state = {name: value for name, value in vars(masks).items() if name != "_known"}
    old = Masks.__new__(Masks)
    old.__setstate__(state)
    assert old.kept("a") == 16 and old.shape("a") == (2, 8)


def test_shards_are_hashed_by_several_threads(tmp_path, monkeypatch):
    digest, together = serialization._digest, threading.Barrier(2)

    def waiting(path):
        if path.name.startswith(("model-00001", "model-00002")):
            together.wait(20)
        return digest(path)

    monkeypatch.setattr(serialization, "_THREADS", 2)
    monkeypatch.setattr(serialization, "_digest", waiting)
    model = pruned()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = json.loads((tmp_path / "pruning" / "pruning_config.json").read_text())["files"]
    assert files == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files}
    assert same(hf_prune.load(tmp_path), snapshot(model))


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    model, writer = make("llama"), gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    config = model.config
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem.endswith(("q_proj", "k_proj")):  # the order of rows in llama.cpp
            heads = 4 if stem.endswith("q_proj") else 2
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = hf_prune.load(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert same(again, snapshot(model)) and again.pruning_masks is None
    with pytest.raises(ValueError, match="on_mismatch"):
        hf_prune.load(tmp_path, gguf_file="model.gguf", on_mismatch="x")
    command = ["prune", str(tmp_path), str(tmp_path / "out"), "--method", "magnitude", "--gguf-file", "model.gguf"]
    assert main(command) == 0 and hf_prune.load(tmp_path / "out").pruning_masks.sparsity() == 0.5
    assert hf_prune.advise(tmp_path, gguf_file="model.gguf").parameters == model.num_parameters()
