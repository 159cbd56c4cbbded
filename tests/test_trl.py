"""The callbacks in TRL's SFTTrainer."""

import pytest
import torch
from conftest import ids_for, make, snapshot
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import hf_prune
from hf_prune import EfficientLLMCallback, KeepMasksCallback, PERPCallback, PruningConfig


DATA = Dataset.from_dict({"text": [" ".join(map(str, ids.tolist())) for ids in ids_for(24, 16)]})


def trained(model, tokenizer, folder, callback, **changes):
    values = dict(
        max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False, seed=1,
        disable_tqdm=True, max_length=24, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    arguments = SFTConfig(output_dir=str(folder), **{**values, **changes})
    trainer = SFTTrainer(model, arguments, train_dataset=DATA, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    return trainer


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(
    "callback", [lambda: PERPCallback(("mask_lora", "norm")), lambda: PERPCallback("full"), KeepMasksCallback]
)
def test_masks_hold(callback, gradient_checkpointing, tokenizer, tmp_path):
    model = make("llama")
    model.prune(PruningConfig(pattern="2:4", n_samples=6, sequence_length=24), ids_for())
    masks, before = model.pruning_masks, snapshot(model)
    changes = {"gradient_checkpointing": gradient_checkpointing, "save_strategy": "steps", "save_steps": 3}
    trainer = trained(model, tokenizer, tmp_path / "run", callback(), **changes)
    assert not masks.violations(model)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    trainer.save_model(tmp_path / "out")
    again = hf_prune.load(tmp_path / "out")
    assert again.pruning_masks.digest() == masks.digest() and not masks.violations(again)


def test_a_push_keeps_our_section_of_the_card(hub, tokenizer, tmp_path):
    model = make("llama")
    model.prune(PruningConfig("magnitude", pattern="2:4"))
    trained(model, tokenizer, tmp_path, KeepMasksCallback(), max_steps=1, hub_model_id="tester/sft").push_to_hub()
    card = hub.files("tester/sft")["README.md"].decode()
    assert "hf_prune:begin" in card and {"2:4", "trl"} <= set(ModelCard(card).data.tags)
    assert hf_prune.load("tester/sft").pruning_masks


def test_an_adapter_of_peft_is_not_perps(tokenizer, tmp_path):
    model = make("llama")
    model.prune(PruningConfig("magnitude", pattern="2:4"))
    arguments = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    rest = {"train_dataset": DATA, "processing_class": tokenizer, "callbacks": [PERPCallback()]}
    with pytest.raises(ValueError, match="leave out peft_config=.*KeepMasksCallback"):
        SFTTrainer(model, arguments, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), **rest)


def test_shrinks(tokenizer, tmp_path):
    model = make("llama")
    before = sum(parameter.numel() for parameter in model.model.layers.parameters())
    trainer = trained(model, tokenizer, tmp_path / "run", EfficientLLMCallback(0.7))
    sizes = [entry["block_parameters"] for entry in trainer.state.log_history if "loss" in entry]
    assert sizes[-1] <= 0.7 * before and model.config.intermediate_size < 64
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ids_for(2, 12)
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-6)
