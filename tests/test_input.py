"""Wrong input gives a clear error before any weight is touched, and an interrupted run leaves the weights as they were."""

import copy
import errno
import io
import itertools
import json
import pickle
import random
from dataclasses import asdict, dataclass, replace

import datasets
import numpy
import pandas
import pytest
import torch
import yaml
from conftest import ids_for, make, same, snapshot
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from hf_prune import PruningConfig, Wanda, calibration, calibration_sequences, perplexity
from hf_prune.checkpoint import check_finite
from hf_prune.patterns import Unstructured
from hf_prune.undo import Undo


def config(**changes):
    return PruningConfig(**{"n_samples": 6, "sequence_length": 24, **changes})


@pytest.mark.parametrize(
    "values,message",
    [
        ({"method": "wandas"}, "wanda"),
        ({"pattern": "4:2"}, "2:4"),
        ({"pattern": "3:5:1"}, "N:M"),
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": float("nan")}, r"\[0, 1\)"),
        ({"method_options": {"dampening": 0.1}, "method": "sparsegpt"}, "damping"),
        ({"method": "sparsegpt", "comparison_group": "block", "propagate": "block"}, "one matrix"),
        ({"method": "wanda", "comparison_group": "model"}, "magnitude"),
        ({"comparison_group": "column"}, "row"),
        ({"propagate": "sideways"}, "linear"),
        ({"n_samples": 0}, "at least 1"),
        ({"method": "sparsegpt", "method_options": {"block_size": 2.5}}, "whole number"),
        ({"method": "sparsegpt", "method_options": {"refit": -1}}, "refit of sparsegpt must be a whole number"),
        ({"sequence_length": "long"}, "whole number"),
        ({"overrides": {"*": "5:4"}}, "4:5"),
        ({"method": "gblm", "method_options": {"alpha": "papers"}}, "paper"),
        ({"method": "gblm", "method_options": {"alpha": 100.0}}, "0 to 1 or 'paper'"),
        ({"method": "gblm", "method_options": {"norm": "l3"}}, "l1"),
        ({"method": "gblm", "method_options": {"over": "words"}}, "tokens, samples"),
        ({"method": "gblm", "method_options": {"over": "tokens", "alpha": "paper"}}, "leave out"),
    ],
)
def test_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**values)


def test_unknown_config_key():
    with pytest.raises(ValueError, match="spasity.*Allowed"):
        PruningConfig.from_dict({"method": "wanda", "spasity": 0.5})


def test_config_round_trip(tmp_path):
    first = config(method="gblm", pattern="4:8", overrides={"*.mlp.*": 0.7}, method_options={"alpha": 0.5})
    first.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == first
    assert PruningConfig.from_dict(json.loads(json.dumps(config(sparsity=0.7).to_dict()))) == config(sparsity=0.7)


def refuses(model, message, error=ValueError, calibration="ids", masks=None, **changes):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        model.prune(config(**changes), ids_for() if isinstance(calibration, str) else calibration, masks=masks)
    assert same(model, before)
    assert model.__dict__.get("_hf_prune_state") is None


def test_a_config_that_is_changed(monkeypatch):
    monkeypatch.setattr("hf_prune.config.logger.warning", pytest.fail)
    given = config(sparsity=0.6)
    given.sparsity = 0.75
    assert given == config(sparsity=0.75) and given.to_dict()["sparsity"] == 0.75
    given.pattern = "1:4"
    assert given == config(pattern="1:4")
    with pytest.raises(ValueError, match="0 < N < M"):
        given.pattern = "4:2"
    with pytest.raises(TypeError, match="sparcity"):
        given.sparcity = 0.7
    for method, changes in (("sparsegpt", {}), ("sparsegpt", {"comparison_group": "row"}), ("alps", {"propagate": "block"})):
        assert replace(config(method="gblm"), method=method, **changes) == config(method=method, **changes)
    for again in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        again.method = "sparsegpt"
        assert again == config(method="sparsegpt", pattern="1:4") != given
    assert {type(value) for value in given.to_dict().values()} == {str, float, dict, list, int}
    assert given == config(pattern="1:4") == PruningConfig.from_dict(yaml.safe_load(yaml.safe_dump(given.to_dict())))


def test_what_was_given_and_what_was_made(monkeypatch):
    monkeypatch.setattr("hf_prune.config.logger.warning", pytest.fail)
    assert yaml.safe_load(yaml.safe_dump(asdict(config())))["comparison_group"] == "row"
    assert config(method="sparsegpt", comparison_group=config().comparison_group).comparison_group == "row"
    assert replace(config(method="sparsegpt", comparison_group="row"), method="alps").comparison_group == "row"
    assert replace(config(method="sparsegpt", comparison_group="row"), comparison_group=None) == config(method="sparsegpt")
    for first in (config(), config(sparsity=0.6), config(pattern="unstructured:0.6"), config(pattern=Unstructured(0.6))):
        for again in (first, pickle.loads(pickle.dumps(first))):
            assert replace(again, sparsity=0.5) == config() and replace(again, sparsity=0.7) == config(sparsity=0.7)
            assert replace(again, pattern="2:4") == config(pattern="2:4")
    taylor = config(method="taylor", parameters=0.8)
    for again in (taylor, pickle.loads(pickle.dumps(taylor))):
        assert replace(again, parameters=0.7) == config(method="taylor", parameters=0.7)
        assert replace(again, pattern="heads:0.25") == config(method="taylor", pattern="heads:0.25")
        assert replace(again, method="wanda", pattern="2:4") == config(pattern="2:4")
        again.parameters = 0.6
        assert again == config(method="taylor", parameters=0.6)
        with pytest.raises(ValueError, match="cannot give pattern"):
            again.parameters = None
        assert again == config(method="taylor", parameters=0.6)
    tuned = config(method="sparsegpt", method_options={"damping": 0.05})
    assert replace(tuned, seed=1).method.damping == 0.05 and replace(tuned, method_options={}) == config(method="sparsegpt")
    with pytest.raises(ValueError, match="'wanda' has no option damping"):
        tuned.method = "wanda"
    with pytest.raises(ValueError, match="set the fields of the instance"):
        replace(config(method=Wanda()), method_options={"damping": 0.05})
    assert (
        replace(config(), method=Wanda(), seed=0) == config()
        and replace(config(method=Wanda()), method="alps").method.name == "alps"
    )
    tuned.method_options = {"damping": 0.2}
    assert tuned == config(method="sparsegpt", method_options={"damping": 0.2})
    tuned.include.append("*.mlp.*")
    tuned.seed = 2
    assert tuned.include == ["*", "*.mlp.*"]


def test_a_config_of_a_subclass():
    class After(PruningConfig):
        def __post_init__(self):
            super().__post_init__()
            self.n_samples, self.origin = 32, "here"

    class Around(PruningConfig):
        def __init__(self, *args, note, **kwargs):
            super().__init__(*args, **kwargs)
            self.note, self.method = note, "sparsegpt"

    @dataclass
    class More(PruningConfig):
        extra: int = 3

    assert (After().n_samples, After(seed=3).seed, replace(After(), sparsity=0.7).sparsity) == (32, 3, 0.7)
    assert (Around(note="a").note, Around(note="a").comparison_group) == ("a", PruningConfig("sparsegpt").comparison_group)
    assert replace(More(extra=4), sparsity=0.7) == More(extra=4, sparsity=0.7) != More(sparsity=0.7)


def test_masks_that_are_given(llama):
    refuses(llama, "masks must map names of parameters to bool tensors, got a list", TypeError, masks=[1])
    refuses(llama, "must be a bool tensor with True = kept, got torch.float32", TypeError, masks={"a": torch.ones(2)})
    other = make("llama")
    other.prune(config(pattern="2:4"), ids_for())
    llama.prune(config(method="sparsegpt", pattern="2:4"), ids_for(), masks=dict(other.pruning_masks))
    assert llama.pruning_masks.digest() == other.pruning_masks.digest()


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"store": "nowhere"}, ValueError, "store 'nowhere' is not here .*: give 'cpu'.* or 'disk'"),
        ({"store": "meta"}, ValueError, "store 'meta' is not here .*: give 'cpu'.* or 'disk'"),
        ({"store": 3.5}, ValueError, "store '3.5' is not here .*: give 'cpu'.* or 'disk'"),
        *(({"tokens_per_batch": n}, ValueError, "tokens_per_batch must be a whole number") for n in ("a", 0, -5, 2.5, True)),
        ({"reconstruct": "yes"}, TypeError, "reconstruct must be True, False or a hf_prune.Reconstruction, got 'yes'"),
        ({"reconstruct": {"epochs": 2}}, TypeError, "reconstruct must be True, False or a hf_prune.Reconstruction"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_options_that_are_refused(llama, method, options, error, message):
    before = snapshot(llama)
    with pytest.raises(error, match=message):
        llama.prune(config(method=method), ids_for(), **options)
    assert same(llama, before) and llama.pruning_masks is None


def test_options_that_are_taken():
    masks = set()
    for options in ({}, {"store": "disk"}, {"store": torch.device("cpu")}, {"tokens_per_batch": numpy.int64(48)}):
        model = make("llama")
        model.prune(config(), ids_for(), reconstruct=False, **options)
        masks.add(model.pruning_masks.digest())
    assert len(masks) == 1


def test_shape_that_does_not_divide(llama):
    refuses(llama, r"q_proj has 32.*exclude=\['\*\.q_proj'\]", pattern="3:5")


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_glob_without_match(llama, field):
    refuses(llama, "matches no linear.*q_proj", **{field: ["*.query"]})


def test_override_without_match(llama):
    refuses(llama, "matches no linear", overrides={"*.experts.*": "2:4"})


def test_nothing_left(llama):
    refuses(llama, "leave no linear", exclude=["*"])


def test_models_that_are_no_causal_lm():
    tiny = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    refuses(BertForSequenceClassification(BertConfig(**tiny)), "no causal language model")
    refuses(
        T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        "an encoder too",
    )
    refuses(make("llama").model, "AutoModelForCausalLM")


def test_quantized_and_adapted_and_offloaded():
    model = make("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    refuses(model, "up_proj.weight is quantized")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj .*merge_and_unload"):
        adapted.prune(config(), ids_for())
    with torch.device("meta"):
        meta = type(model)(model.config)
    with pytest.raises(ValueError, match="on the device 'meta' and has no values"):
        meta.prune(config(), ids_for())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight.*not finite"):
        model.prune(config(), ids_for())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_large_weights_are_finite(dtype):
    weight = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)
    check_finite([("w", weight), ("w", -weight), ("w", weight[:0])])
    for value in (float("nan"), float("inf"), -float("inf")):
        for rest in (weight, torch.ones_like(weight), torch.arange(90000).view(300, 300) % 2 * 2 * weight - weight):
            rest = rest.clone()
            rest[299, 7] = value
            with pytest.raises(ValueError, match="weights of w are not finite"):
                check_finite([("w", rest)])


def test_weights_in_bfloat16_are_summed_as_they_are(monkeypatch):
    seen, summed = [], torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda x, **how: (seen.append(how["dtype"]), summed(x, **how))[1])
    check_finite([("w", torch.ones(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)])
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("propagate", ["linear", "block"])
def test_activations_that_are_not_finite(llama, method, propagate):
    with torch.no_grad():
        llama.model.layers[1].post_attention_layernorm.weight.fill_(3e38)
    refuses(llama, "layers.1.mlp.gate_proj are not finite", method=method, propagate=propagate)


def test_already_pruned_and_less_is_asked(llama):
    llama.prune(config(method="magnitude", sparsity=0.7))
    before = snapshot(llama)
    with pytest.raises(ValueError, match="asks for less"):
        llama.prune(config(), ids_for())
    assert same(llama, before)


def test_same_call_twice_changes_nothing(llama):
    llama.prune(config(pattern="2:4"), ids_for())
    before = snapshot(llama)
    llama.prune(config(pattern="2:4"), ids_for())
    assert same(llama, before)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gblm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_half_way(method, error, monkeypatch):
    model = make("mixtral").train()
    before, keys, calls = snapshot(model), set(model.__dict__), []
    original = Undo.save

    def interrupted(self, parameter):
        calls.append(parameter)
        if len(calls) > 10:
            raise error
        original(self, parameter)

    monkeypatch.setattr(Undo, "save", interrupted)
    with pytest.raises(error):
        model.prune(config(method=method), ids_for())
    assert same(model, before) and model.training and set(model.__dict__) == keys
    assert (
        model.config._experts_implementation_internal != "eager"
        if hasattr(model.config, "_experts_implementation_internal")
        else True
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
    monkeypatch.undo()
    model.prune(config(method=method), ids_for())


@pytest.mark.parametrize("place", ["hf_prune.pruning.PruningReport", "hf_prune.mixin._attach"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_interrupted_at_the_very_end(method, place, llama, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    before = snapshot(llama)
    monkeypatch.setattr(place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llama.prune(config(method=method), ids_for())
    assert same(llama, before) and llama.pruning_masks is None
    monkeypatch.undo()
    assert llama.prune(config(method=method), ids_for()).peak_memory and llama.pruning_masks


def test_undo_in_memory_when_the_disk_is_small(monkeypatch):
    import collections
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(0))
    parameter = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    undo = Undo([parameter])
    undo.save(parameter)
    parameter.data.zero_()
    undo.restore()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    "calibration,error,message",
    [
        (None, ValueError, "needs calibration text"),
        ([], ValueError, "empty"),
        ([""], ValueError, "needs a tokenizer"),
        (torch.full((6, 24), 200), ValueError, "200.*vocabulary"),
        (torch.zeros(6, 70, dtype=torch.long), ValueError, "70 tokens"),
        (torch.rand(6, 24), ValueError, "whole numbers"),
        (torch.rand(6, 24).numpy(), ValueError, "whole numbers"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["3"]})), ValueError, "by split: give one of train"),
        ("some words that are text", ValueError, "list of texts"),
        ("missing.jsonl", ValueError, "does not exist"),
        ("words " * 500, ValueError, "list of texts"),
        ("words " * 500 + "end.txt", ValueError, "calibration file"),
        ([{"id": "a", "body": "one"}], ValueError, "needs a tokenizer"),
    ],
)  # fmt: skip
def test_calibration_refuses(llama, calibration, error, message):
    before = snapshot(llama)
    with pytest.raises(error, match=message):
        llama.prune(config(), calibration)
    assert same(llama, before)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.txt", "caf\xe9".encode("latin-1"), "a.txt is not text in UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{text: two}', "a.jsonl is not JSON in line 2"),
        ("a.json", b"[1,\n", "a.json is not JSON in line"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": "two"\n', "a.jsonl is not JSON in line 3"),
        ("a.jsonl", b'{"text": "one"}\n' * 200 + b'{"text": "caf\xe9"}', "a.jsonl is not text in UTF-8"),
        ("a.jsonl", b" \n\n", "a.jsonl is empty"),
        ("a.jsonl", None, "is a folder"),
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.jsonl", b"", "a.jsonl is empty"),
    ],
)
def test_calibration_files_that_cannot_be_read(llama, tokenizer, tmp_path, name, content, message):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        llama.prune(config(), str(tmp_path / name), tokenizer)


class Processor:
    """As of a model that sees: it makes tokens in a way of its own."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, images=None, text=None, **kwargs):
        raise KeyError("input_ids")


def test_a_processor_stands_for_its_tokenizer(llama, tokenizer):
    texts = ["3 4 5 " * 40, "6 7 8 " * 40]
    sizes = {"n_samples": 2, "sequence_length": 24}
    one, two = (calibration_sequences(texts, given, **sizes) for given in (tokenizer, Processor(tokenizer)))
    assert torch.equal(torch.stack(one), torch.stack(two))
    assert llama.prune(config(**sizes), texts, Processor(tokenizer)).tokens == 48
    one, two = (perplexity(llama, given, texts, sequence_length=24) for given in (tokenizer, Processor(tokenizer)))
    assert one == two
    assert perplexity(llama, Processor(tokenizer), texts, sequence_length=24, add_bos=True).bos


def test_what_is_no_tokenizer(llama):
    before = snapshot(llama)
    for given, what in ((llama, "a LlamaForCausalLM"), (3, "a int"), ("llama", "'llama'")):
        message = f"tokenizer must be such as AutoTokenizer.from_pretrained gives; got {what}"
        with pytest.raises(TypeError, match=message):
            llama.prune(config(), ["3 4 5"], given)
        with pytest.raises(TypeError, match=message):
            perplexity(llama, given, "3 4 5")
    assert same(llama, before)


def test_columns(llama, tokenizer):
    with pytest.raises(TypeError, match="2 texts: its columns are id, body"):
        llama.prune(config(), [{"id": "a", "body": "3 4 5"}], tokenizer)
    with pytest.raises(TypeError, match="no texts: its columns are id"):
        llama.prune(config(), [{"id": 3}], tokenizer)
    with pytest.raises(TypeError, match="from_pretrained gives; got 'llama'"):
        llama.prune(config(), ["3 4 5"], "llama")
    texts = ["3 4 5 " * 20, "6 7 8 " * 20]
    known, *others = (
        calibration_sequences(source, tokenizer, n_samples=2, sequence_length=24)
        for source in (texts, {"text": texts}, [{"id": i, "body": text} for i, text in enumerate(texts)])
    )
    for other in others:
        assert torch.equal(torch.stack(known), torch.stack(other))


@pytest.mark.parametrize(
    "calibration,error,message",
    [
        (
            [{"id": 1, "tokens": ["The", "cat"], "ner_tags": [1, 2]}],
            TypeError,
            "no texts: its columns are id, tokens, ner_tags",
        ),
        ([{"tokens": ["The", "cat"], "ner_tags": [1, 2]}], TypeError, "no batch of texts"),
        ([{"rows": [[1], [1, 2]], "more": [["a"], ["b"]]}], TypeError, "no texts: its columns are rows, more"),
        ([["The", "cat"], ["A", "dog"]], TypeError, r"no batch of texts: \['The', 'cat'\]. Join words"),
        ([["user", "3 4 5 6"], ["assistant", "7 8"]], TypeError, "lists of turns with 'role' and 'content'"),
        ([{"messages": [["user", "3 4 5 6"], ["assistant", "7 8"]]}], TypeError, "lists of turns with 'role' and 'content'"),
        (numpy.array([["3", "4"], ["5", "6"]]), TypeError, "no batch of texts"),
        (b"3 4 5", TypeError, "calibration is bytes"),
        ([b"3 4 5"], TypeError, "found a bytes"),
        ([True, False], TypeError, "found a bool"),
        ([3, 4, None], TypeError, "a NoneType among token ids"),
        ([3, 4, [5]], TypeError, "a list among token ids"),
        (itertools.count(3), ValueError, "has 1000 tokens"),
        ([{"input_ids": [torch.tensor([3, 4])] * 3}], ValueError, "by sequence or by position"),
        (pandas.DataFrame([["3 4", "5 6"]], columns=["text", "text"]), ValueError, "2 columns 'text'"),
    ],
)
def test_what_only_looks_like_texts_or_ids(tokenizer, monkeypatch, calibration, error, message):
    monkeypatch.setattr("hf_prune.calibration._ONE_SEQUENCE", 1000)
    with pytest.raises(error, match=message):
        calibration_sequences(calibration, tokenizer, n_samples=2, sequence_length=4)


def test_a_sparsity_that_the_pattern_overrules_is_named(monkeypatch):
    said = []
    monkeypatch.setattr("hf_prune.config.logger.warning", said.append)
    PruningConfig(pattern="2:4", sparsity=0.6)
    PruningConfig(pattern="1:4")
    PruningConfig.from_dict(PruningConfig(pattern="1:4").to_dict())
    assert len(said) == 1 and "sparsity=0.6 is not used" in said[0]


def test_sequence_longer_than_positions(llama):
    refuses(llama, "64 positions", sequence_length=65)


def test_wrong_types(llama):
    with pytest.raises(TypeError, match="PruningConfig"):
        llama.prune({"method": "wanda"})
    with pytest.raises(TypeError, match="method must be"):
        PruningConfig(method=3)


class TestCalibration:
    texts = [" ".join(str(3 + (i * j) % 120) for j in range(1, 40)) for i in range(1, 20)]

    def test_packed(self, tokenizer):
        one = calibration_sequences(self.texts, tokenizer, n_samples=8, sequence_length=50, seed=1)
        assert [len(ids) for ids in one] == [50] * 8
        assert torch.equal(
            torch.stack(one), torch.stack(calibration_sequences(self.texts, tokenizer, n_samples=8, sequence_length=50, seed=1))
        )
        other = calibration_sequences(self.texts, tokenizer, n_samples=8, sequence_length=50, seed=2)
        assert not torch.equal(torch.stack(one), torch.stack(other))

    def test_too_little(self, tokenizer):
        with pytest.raises(ValueError, match=r"760 tokens in 19 documents.*need 5000.*n_samples=15"):
            calibration_sequences(self.texts, tokenizer, n_samples=100, sequence_length=50)

    def test_paper(self, tokenizer):
        found = calibration_sequences(self.texts, tokenizer, n_samples=8, sequence_length=20, sampling="paper")
        streams = [tokenizer(text)["input_ids"] for text in self.texts]
        for ids in found:
            assert any(ids.tolist() == s[i : i + 20] for s in streams for i in range(len(s) - 20))
        with pytest.raises(ValueError, match="sampling='packed'"):
            calibration_sequences(self.texts, tokenizer, n_samples=8, sequence_length=60, sampling="paper")

    def test_sources(self, tokenizer, tmp_path):
        from datasets import Dataset

        rows = [{"text": text} for text in self.texts]
        jsonl, txt, parquet = tmp_path / "a.jsonl", tmp_path / "a.txt", tmp_path / "a.parquet"
        jsonl.write_text("\n".join(map(json.dumps, rows)))
        txt.write_text("\n".join(self.texts))
        Dataset.from_list(rows).to_parquet(str(parquet))
        chats = [[{"role": "user", "content": text}] for text in self.texts]
        sources = [
            jsonl,
            str(txt),
            str(parquet),
            Dataset.from_list(rows),
            iter(rows),
            chats,
            [{"messages": c} for c in chats],
            self.texts,
        ]
        for source in sources:
            found = calibration_sequences(source, tokenizer, n_samples=8, sequence_length=50)
            assert len(found) == 8

    def test_padding_is_cut_off(self):
        ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        loader = torch.utils.data.DataLoader([{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask)], batch_size=2)
        found = calibration_sequences(loader, n_samples=2)
        assert [f.tolist() for f in found] == [[5, 6, 7], [8, 9, 10, 11, 12]]

    def test_rows_of_other_libraries(self, tmp_path):
        data = torch.utils.data
        ids = ids_for(4, 12)
        for rows in (data.TensorDataset(ids), data.TensorDataset(ids, ids.clone())):
            found = calibration_sequences(data.DataLoader(rows, batch_size=2), n_samples=4)
            assert torch.equal(torch.stack(found), ids)
        table = pandas.DataFrame({"input_ids": list(ids.numpy())})
        for rows in (ids.numpy(), list(ids.numpy()), data.TensorDataset(ids), data.DataLoader(ids.numpy(), 2), table):
            assert torch.equal(torch.stack(calibration_sequences(rows, n_samples=4)), ids)
        for row in (ids[0], ids[0].numpy(), ids[0].tolist()):
            assert torch.equal(*calibration_sequences(row, n_samples=1), ids[0])
        ragged = {"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 1]]}  # tokenizer(texts)
        assert [f.tolist() for f in calibration_sequences(ragged, n_samples=2)] == [[5, 6, 7], [8, 9]]

    def test_batches_and_tables_of_texts(self, tokenizer):
        load = torch.utils.data.DataLoader
        known = calibration_sequences(self.texts, tokenizer, n_samples=8, sequence_length=50)
        rows = [{"id": i, "body": text} for i, text in enumerate(self.texts)]
        chats = [[{"role": "user", "content": text}] for text in self.texts]
        for source in (
            load(self.texts, batch_size=4), load(rows, batch_size=4),
            pandas.DataFrame({"text": self.texts, "other": self.texts}), pandas.DataFrame(rows), pandas.DataFrame({"messages": chats}),
            [{"body": text, "tags": ["a"]} for text in self.texts],
        ):  # fmt: skip
            found = calibration_sequences(source, tokenizer, n_samples=8, sequence_length=50)
            assert torch.equal(torch.stack(found), torch.stack(known))

        class Rows(torch.utils.data.Dataset):
            columns = ["text"]

            def __getitem__(self, index):
                return {"text": known_texts[index]}

        class Stream(torch.utils.data.IterableDataset):
            columns = ["text"]

            def __iter__(self):
                return iter(known_texts)

        known_texts, array = self.texts, numpy.array(self.texts)
        table = datasets.Dataset.from_dict({"text": self.texts}).data.table
        for source in (Rows(), Stream(), table, array, {"text": array}, [{"text": array}], array[:, None], [["", *self.texts]]):
            found = calibration_sequences(source, tokenizer, n_samples=4, sequence_length=50)
            assert len(found) == 4 and (isinstance(source, list) or torch.equal(torch.stack(found), torch.stack(known[:4])))

    def test_targets_are_no_sequences(self):
        rows = [(numpy.array([3, 4, 5]), numpy.array([1])), (numpy.array([6, 7]), 2), (torch.tensor([8, 9]), torch.tensor(1))]
        assert [f.tolist() for f in calibration_sequences(rows, n_samples=3)] == [[3, 4, 5], [6, 7], [8, 9]]
        batch = [{"input_ids": [torch.tensor([3, 4, 5]), torch.tensor([6, 7])]}]
        assert [f.tolist() for f in calibration_sequences(batch, n_samples=2)] == [[3, 4, 5], [6, 7]]

    def test_padded_lists(self):
        padded = {
            "input_ids": [[5, 6, 7], [8, 9, 0]],
            "attention_mask": [[1, 1, 1], [1, 1, 0]],
        }  # tokenizer(texts, padding=True)
        assert [f.tolist() for f in calibration_sequences(padded, n_samples=2)] == [[5, 6, 7], [8, 9]]

    def test_chats(self, tokenizer):
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        chats = [[{"role": role, "content": text} for role in names] for text in self.texts]
        other = [{"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in chat]} for chat in chats]
        seen, template = [], tokenizer.apply_chat_template
        tokenizer = copy.copy(tokenizer)
        tokenizer.apply_chat_template = lambda turns, **kwargs: (seen.append(turns), template(turns, **kwargs))[1]
        one, two = (calibration_sequences(c, tokenizer, n_samples=4, sequence_length=50) for c in (chats, other))
        assert torch.equal(torch.stack(one), torch.stack(two)) and seen[: len(seen) // 2] == seen[len(seen) // 2 :]
        assert seen[0] == chats[0]
        for turn in ({"role": "user"}, {"from": "human", "text": "3"}, {"role": "user", "content": None}):
            with pytest.raises(ValueError, match=f"no content: its keys are {', '.join(turn)}"):
                calibration_sequences([[turn]], tokenizer, n_samples=1, sequence_length=4)

    def test_a_template_brings_its_own_special_tokens(self, tokenizer):
        from tokenizers import processors

        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
        (ids,) = calibration_sequences([[{"role": "user", "content": "17 18"}]] * 3, tokenizer, n_samples=1, sequence_length=8)
        assert ids.tolist() == [1, 17, 18, 2, 1, 17, 18, 2]
        (ids,) = calibration_sequences(["17 18"] * 3, tokenizer, n_samples=1, sequence_length=8)
        assert ids.tolist() == [1, 17, 18, 2, 1, 17, 18, 2]

    def test_columns_in_a_file(self, tokenizer, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps({"text": self.texts}))
        assert len(calibration_sequences(tmp_path / "a.json", tokenizer, n_samples=8, sequence_length=50)) == 8

    def test_lines_of_a_file(self, tokenizer, tmp_path):
        texts = [f"{text} \u2028 3 \x85 4 \x0c \x1c 5" for text in self.texts]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        known = calibration_sequences(texts, tokenizer, n_samples=8, sequence_length=50)
        for name, content in {"a": "\n".join(lines), "b": "\r\n\r\n".join(lines) + "\r\n", "c": "\r".join(lines)}.items():
            (tmp_path / f"{name}.jsonl").write_bytes(content.encode())
            found = calibration_sequences(tmp_path / f"{name}.jsonl", tokenizer, n_samples=8, sequence_length=50)
            assert torch.equal(torch.stack(found), torch.stack(known))
        (tmp_path / "ids.jsonl").write_text("[3, 4]\n[5, 6, 7]\n[8]")
        assert [ids.tolist() for ids in calibration_sequences(str(tmp_path / "ids.jsonl"), n_samples=2)] == [[3, 4], [5, 6, 7]]

    def test_no_more_lines_are_read_than_are_used(self, tokenizer, tmp_path, monkeypatch):
        lines, read = [json.dumps({"text": text}) for text in self.texts] * 20, []
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        loads = json.loads
        monkeypatch.setattr("hf_prune.calibration.json.loads", lambda line: (read.append(line), loads(line))[1])
        found = calibration_sequences(tmp_path / "a.jsonl", tokenizer, n_samples=8, sequence_length=50)
        known = calibration_sequences(self.texts * 20, tokenizer, n_samples=8, sequence_length=50)
        assert torch.equal(torch.stack(found), torch.stack(known))
        assert len(read) == 40  # 4 * 8 * 50 tokens

    def test_padding_does_not_count(self, llama):
        ids = ids_for(6, 12)
        padded = [
            {
                "input_ids": torch.cat([row, torch.zeros(5, dtype=torch.long)]),
                "attention_mask": torch.tensor([1] * 12 + [0] * 5),
            }
            for row in ids
        ]
        other = make("llama")
        llama.prune(config(), ids)
        other.prune(config(), padded)
        assert same(llama, snapshot(other))

    def test_fewer_ids_than_asked_is_said(self, llama, caplog):
        report = llama.prune(config(n_samples=50), ids_for())
        assert report.sequences == 6


def long_text(seed: int, length: int = 40_000) -> str:
    """Of words, in whose midst there are a word and a gap of 8,000 characters each."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdeé世", k=rng.randint(1, 8))) + rng.choice(" \n,") for _ in range(length // 6)]
    return " ".join(words[: length // 30] + ["ab" * 4_000, "\n" * 8_000] + words[length // 30 :])


def trained(kind: str):
    """A tokenizer of words, of byte pairs that span words as Llama 2's do, or of the likeliest pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = long_text(0)
    if kind == "unigram":
        core, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=300, special_tokens=["<s>", "</s>"])
    else:
        core, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"])
    if kind == "words":
        core.pre_tokenizer = pre_tokenizers.ByteLevel()
    else:
        core.normalizer = normalizers.Replace(" ", "▁")
    core.train_from_iterator((text[i : i + 40] for i in range(0, 8000, 40)), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["words", "pairs", "unigram"])
def test_of_a_long_text_only_a_head_is_encoded(kind, tmp_path, monkeypatch):
    tokenizer, text, read, encode = trained(kind), long_text(1), [], calibration._encode
    monkeypatch.setattr(calibration, "_encode", lambda t, text, *how: (read.append(len(text)), encode(t, text, *how))[1])
    monkeypatch.setattr(calibration, "_MARGIN", 500)
    (tmp_path / "a.txt").write_text(text)
    sizes = {"n_samples": 4, "sequence_length": 50}
    for source in (str(tmp_path / "a.txt"), [text], iter([text])):
        found = calibration_sequences(source, tokenizer, **sizes)
        assert torch.cat(found).tolist() == tokenizer(text)["input_ids"][:200]
        assert sum(read) < len(text) / 2
        read.clear()
    for texts in ([text, "ab ba"], ["ab ba", text], [text[:900], text[:9000], text], [text[:9000], text, text[::-1], "ab"]):
        for seed in range(3):
            found = calibration_sequences(iter(texts), tokenizer, **sizes, seed=seed)
            with monkeypatch.context() as patch:
                patch.setattr(calibration, "_CHARACTERS", 10**9)  # whole texts
                known = calibration_sequences(texts, tokenizer, **sizes, seed=seed)
            assert torch.equal(torch.stack(found), torch.stack(known))


def test_a_text_without_a_space_is_encoded_whole(monkeypatch):
    tokenizer, text = trained("unigram"), "ab" * 5_001 + "a"
    monkeypatch.setattr(calibration, "_MARGIN", 0)
    found = calibration_sequences([text], tokenizer, n_samples=4, sequence_length=50)
    assert torch.cat(found).tolist() == tokenizer(text)["input_ids"][:200]


def test_undo_when_the_disk_fills_up(llama, monkeypatch):
    """What the file did not take is kept in memory, and the run ends with the disk's error."""

    class Small(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 20_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:1000])  # in parts, as a file may

    before = snapshot(llama)
    monkeypatch.setattr("hf_prune.undo.tempfile.TemporaryFile", lambda **kwargs: Small())
    with pytest.raises(OSError, match="No space left"):
        llama.prune(config(), ids_for())
    assert same(llama, before) and llama.pruning_masks is None
