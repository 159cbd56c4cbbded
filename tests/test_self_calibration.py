"""Calibration text that the model writes itself."""

import accelerate
import pytest
import torch
from conftest import ids_for, make, snapshot
from transformers import AutoModel, GenerationConfig

from hf_prune import PruningConfig, self_calibration_sequences


def written(model, prompts=None, tokenizer=None, **options):
    return torch.stack(
        self_calibration_sequences(model, prompts, tokenizer, **{"n_samples": 5, "sequence_length": 12} | options)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_sequences_prune_a_model(family):
    model = make(family).train()
    before, state = snapshot(model), torch.random.get_rng_state()
    rows = written(model, ids_for(5, 12), batch_size=2)
    assert rows.shape == (5, 12) and rows.dtype == torch.int64
    assert torch.equal(rows, written(model, ids_for(5, 12), batch_size=2))
    assert not torch.equal(rows, written(model, ids_for(5, 12), batch_size=2, seed=1))
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    report = model.prune(PruningConfig("wanda", pattern="2:4", n_samples=5, sequence_length=12), list(rows))
    assert report.tokens == 60 and not model.pruning_masks.violations(model)


def test_prompts_are_windows_of_what_was_given():
    model, ids = make("llama"), ids_for(40, 12)
    rows = written(model, ids, n_samples=40, prompt_length=3)
    places = [[s for s in range(10) if torch.equal(row[:3], of[s : s + 3])] for row, of in zip(rows, ids)]
    assert all(places) and len({found[0] for found in places}) > 3
    same = written(model, ids[:, :3], n_samples=40, prompt_length=3)  # short enough: as they are
    assert torch.equal(same[:, :3], ids[:, :3])
    lengths = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6, 7])]
    mixed = written(model, lengths, n_samples=3, prompt_length=3)
    assert mixed.shape == (3, 12) and [row[0] for row in mixed.tolist()] == [1, 5, 4]


def test_fewer_prompts_are_taken_in_turns():
    rows = written(make("llama"), ids_for(3, 4), n_samples=8)
    assert rows.shape == (8, 12) and torch.equal(rows[:3, :4], rows[3:6, :4]) and not torch.equal(rows[:3], rows[3:6])


def test_offloaded_model():
    model = make("llama")
    want = written(model, ids_for(5, 4))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(written(model, ids_for(5, 4)), want)


def test_without_prompts_it_begins_with_bos(tokenizer):
    model = make("llama")
    model.generation_config.bos_token_id = 7
    assert (written(model)[:, 0] == 7).all()
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    assert (written(model, tokenizer=tokenizer)[:, 0] == tokenizer.bos_token_id).all()
    with pytest.raises(ValueError, match="no BOS token"):
        written(model)


def test_text_is_cut_by_the_tokenizer(tokenizer):
    texts = ["17 23 9 40 41 42 43 44", "100 99 98 97 96 95 94"]
    rows = written(make("llama"), texts, tokenizer, prompt_length=2, n_samples=8)
    pairs = {tuple(ids[i : i + 2]) for text in texts for ids in [tokenizer(text)["input_ids"]] for i in range(len(ids) - 1)}
    assert {tuple(row[:2]) for row in rows.tolist()} <= pairs


def test_a_processor_stands_for_its_tokenizer(tokenizer):
    model, texts = make("llama"), ["17 23 9 40 41 42 43 44", "100 99 98 97 96 95 94"]
    processor = type("Processor", (), {"tokenizer": tokenizer, "__call__": lambda self, images=None, text=None: {}})()
    assert torch.equal(written(model, texts, processor), written(model, texts, tokenizer))
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    assert (written(model, tokenizer=processor)[:, 0] == tokenizer.bos_token_id).all()
    for prompts in (texts, None):
        with pytest.raises(TypeError, match="from_pretrained gives; got a LlamaForCausalLM"):
            written(model, prompts, model)


def test_the_whole_distribution_is_sampled():
    model = make("llama")
    ends = 3
    model.generation_config = own = GenerationConfig(top_k=1, repetition_penalty=9.0, max_new_tokens=2, eos_token_id=ends)
    prompt = torch.tensor([[5, 9]]).repeat(4000, 1)
    rows = written(model, prompt, n_samples=4000, sequence_length=3, batch_size=500, prompt_length=2)
    with torch.no_grad():
        expected = model.eval()(input_ids=prompt[:1]).logits[0, -1].softmax(-1)
    found = torch.bincount(rows[:, 2], minlength=len(expected)) / 4000
    assert (found - expected).abs().sum() < 0.25, "total variation of 4000 draws"
    assert model.generation_config is own and own.top_k == 1
    assert written(model, prompt[:4], n_samples=4, sequence_length=40).shape == (4, 40), "what ends a text ends nothing here"
    cold = written(model, prompt[:50], n_samples=50, sequence_length=3, temperature=1e-4, prompt_length=2)
    assert (cold[:, 2] == expected.argmax()).all()


def test_errors():
    model, prompts = make("llama"), ids_for(2, 8)
    cases = [
        (dict(n_samples=0), "n_samples must be a whole number"),
        (dict(batch_size=1.5), "batch_size must be a whole number"),
        (dict(sequence_length=10**9), "sequence_length must be from 2 to the model's"),
        (dict(prompt_length=12), "leave nothing to write of sequence_length=12"),
        (dict(temperature=0), "temperature must be above 0"),
        (dict(prompts=[]), "the calibration data is empty"),
        (dict(prompts=["text"]), "needs a tokenizer"),
        (dict(prompts=torch.tensor([[10**6]])), "take its tokenizer"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            written(model, **{"prompts": prompts} | options)
    with pytest.raises(ValueError, match="cannot generate text"):
        written(AutoModel.from_config(model.config), prompts)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        written(model, prompts)
