"""Architectures that are unlike the families of `conftest`, each in one way that has to be seen by running it."""

import copy

import pytest
import torch
import transformers
from conftest import _BASE, _TOKENS, ids_for, same, snapshot
from conftest import make as family
from test_resume import Stopped, stop_after
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import hf_prune
from hf_prune import Decoder, PruningConfig
from hf_prune.perp import attach


HEADS = dict(_BASE, head_dim=8)
LATENT = dict(
    HEADS, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
)  # fmt: skip
SSM = dict(_BASE, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_chunk_size=16)
UNLIKE = {
    # hands keys and values of its first blocks on to the others
    "gemma3n": ("Gemma3nTextConfig", dict(HEADS, intermediate_size=[64] * 4, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2, laurel_rank=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128, sliding_window=8)),
    # an image tower with a stack of its own; the sizes are in a config within the config
    "gemma3_vision": ("Gemma3Config", dict(text_config=dict(HEADS, layer_types=["sliding_attention", "full_attention"], sliding_window=8), vision_config=dict(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=128))),
    # layers without gradient checkpointing, as code outside of Transformers has them
    "unmarked": ("GPTNeoXJapaneseConfig", {k: v for k, v in _BASE.items() if k != "num_key_value_heads"}),
    # experts that are called without a token
    "jetmoe": ("JetMoeConfig", dict(_BASE, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)),
    # a linear whose outputs read different inputs, group by group
    "deepseek_v4": ("DeepseekV4Config", dict(HEADS, q_lora_rank=16, qk_rope_head_dim=8, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, index_n_heads=2, index_head_dim=8, index_topk=8, o_groups=2, o_lora_rank=8, sliding_window=8, layer_types=["heavily_compressed_attention", "compressed_sparse_attention"], mlp_layer_types=["hash_moe", "moe"])),
    # an indexer that runs without gradients
    "deepseek_v32": ("DeepseekV32Config", dict(LATENT, index_n_heads=2, index_head_dim=8, index_topk=8)),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "mamba": ("MambaConfig", dict(_TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "falcon_h1": ("FalconH1Config", dict(SSM, head_dim=8, mamba_d_ssm=64)),
    "bamba": ("BambaConfig", dict(SSM, attn_layer_indices=[1])),
    # one attention block that several layers share
    "zamba2": ("Zamba2Config", dict(_BASE, num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, n_mamba_heads=8, mamba_d_state=16, chunk_size=16)),
    "recurrent_gemma": ("RecurrentGemmaConfig", dict(HEADS, num_hidden_layers=3, lru_width=32, block_types=("recurrent", "recurrent", "attention"), attention_window_size=8)),
}  # fmt: skip


def make(name):
    words, values = UNLIKE[name]
    if not hasattr(transformers, words):
        pytest.skip(f"no {words} in transformers {transformers.__version__}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, words)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def config(method, **changes):
    return PruningConfig(method, **{"sparsity": 0.5, "n_samples": 4, "sequence_length": 24, **changes})


@pytest.mark.parametrize("name", sorted(UNLIKE))
@torch.no_grad()
def test_blocks_run_one_by_one_give_what_the_model_gives(name):
    model, ids = make(name), ids_for(4)
    expected, decoder = model(input_ids=ids).logits, Decoder(model)
    (hidden,), calls = decoder.capture([ids])
    for block, (call,) in zip(decoder.blocks, calls):
        hidden = call.run(block, hidden)
    torch.testing.assert_close(decoder.logits(ids, hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(UNLIKE))
def test_pruned_trained_and_loaded(name, tmp_path):
    for method in "gblm", "sparsegpt":
        model = make(name)
        report = model.prune(config(method), ids_for(4))
        assert report.sparsity == pytest.approx(0.5, abs=0.02) and not model.pruning_masks.violations(model)
        assert all(linear.pattern_holds for linear in report.linears)
    attached = attach(model, model.pruning_masks, "mask_lora")
    model(input_ids=ids_for(4), labels=ids_for(4)).loss.backward()
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.add_(0.01)
    attached.merge()
    model.save_pretrained(tmp_path)
    again = hf_prune.load(tmp_path)
    assert not again.pruning_masks.violations(again)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids_for(4)).logits, model(input_ids=ids_for(4)).logits, atol=0, rtol=0)


def test_what_blocks_share_is_in_the_journal(tmp_path, monkeypatch):
    expected = make("gemma3n")
    expected.prune(config("sparsegpt"), ids_for(4), tokens_per_batch=48)
    again = make("gemma3n")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        again.prune(config("sparsegpt"), ids_for(4), tokens_per_batch=48, resume_dir=tmp_path / "journal")
    again.prune(config("sparsegpt"), ids_for(4), tokens_per_batch=48, resume_dir=tmp_path / "journal")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected.parameters()))
    make("gemma3n").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="hand keys and values on to others"):
        hf_prune.prune_checkpoint(tmp_path / "dense", tmp_path / "out", config("gblm"), calibration=ids_for(4))
    hf_prune.prune_checkpoint(
        tmp_path / "dense", tmp_path / "out", config("sparsegpt"), calibration=ids_for(4), tokens_per_batch=48
    )
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(streamed.parameters(), expected.parameters()))


def test_text_blocks_of_a_model_that_sees():
    model = make("gemma3_vision")
    assert "vision" not in Decoder(model).blocks[0].name
    model.prune(PruningConfig("taylor", pattern="ffn:0.5", n_samples=4, sequence_length=24), ids_for(4))
    assert model.config.text_config.intermediate_size == 32
    assert model.config.vision_config.intermediate_size == 128


def test_what_is_no_product_with_its_whole_input_is_left_dense():
    decoder = Decoder(make("deepseek_v4"))
    reasons = {name.split(".")[-1]: why for block in decoder.blocks for name, why in block.left_dense.items()}
    assert "group by group" in reasons["o_a_proj"]


def test_tiny_linears_are_left_dense():
    model = make("gemma3n")
    report = model.prune(config("magnitude", pattern="2:4", sparsity=None))
    assert not [linear.name for linear in report.linears if "altup" in linear.name]
    assert any("fewer than 8 numbers" in why for name, why in report.skipped.items() if "altup" in name)


class Layer(nn.Module):
    def __init__(self, experts=0):
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(32, 32)) for _ in range(experts)])

    def forward(self, hidden_states):
        for expert in (self.proj, *self.experts):
            hidden_states = hidden_states + expert(hidden_states)
        return hidden_states


class WithExperts(Layer):
    pass


class Custom(transformers.PreTrainedModel, transformers.GenerationMixin):
    """As code outside of Transformers has it: layers of two classes, none of which is marked."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.heads = nn.Embedding(128, 32), nn.ModuleList([nn.Linear(32, 32)])
        self.layers = nn.ModuleList([Layer(), WithExperts(4), Layer()])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.heads[0]

    def forward(self, input_ids=None, use_cache=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.heads[0](hidden))


def test_layers_without_a_mark_are_the_outermost_ones():
    model = Custom(transformers.LlamaConfig(**_BASE))
    assert [block.name for block in Decoder(model).blocks] == ["layers.0", "layers.1", "layers.2"]
    assert len(model.prune(config("sparsegpt"), ids_for(4)).linears) == 7
    model.layers = model.layers[:1]
    model.more = nn.Linear(32, 64)
    with pytest.raises(ValueError, match="no stack of decoder blocks"):
        Decoder(model)


def test_within_inference_mode():
    model, dense = family("llama"), family("llama")
    with torch.inference_mode():
        assert family("llama").prune(config("sparsegpt"), ids_for(4)).sparsity == 0.5
        assert model.prune(config("gblm"), ids_for(4)).sparsity == 0.5
        hf_prune.reconstruct(model, dense, ids_for(4), n_samples=4, how=hf_prune.Reconstruction(batch_tokens=48))
        dense.prune(PruningConfig("taylor", pattern="ffn:0.5", n_samples=4, sequence_length=24), ids_for(4))
    model(input_ids=ids_for(2), labels=ids_for(2)).loss.backward()


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "taylor"])
def test_masks_of_torch_itself_are_made_permanent_first(method):
    model = family("llama")
    up = model.model.layers[1].mlp.up_proj
    prune.l1_unstructured(up, "weight", 0.1)
    before = snapshot(model)
    how = config(method) if method != "taylor" else config(method, pattern="ffn:0.5", sparsity=None)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj carries a mask of torch.nn.utils.prune.*prune.remove\("):
        model.prune(how, ids_for(4))
    assert same(model, before)
    prune.remove(up, "weight")
    model.prune(how, ids_for(4))


@pytest.mark.parametrize("put_on", [nn.utils.spectral_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_made_of_others_is_left_dense(put_on):
    model = family("llama")
    put_on(model.model.layers[0].mlp.up_proj)
    report = model.prune(config("wanda"), ids_for(4))
    assert "its weight is no parameter" in report.skipped["model.layers.0.mlp.up_proj"]
    assert len(report.linears) == 13 and not model.pruning_masks.violations(model)


def test_a_block_that_is_in_the_model_twice_is_refused():
    model = family("llama")
    model.model.layers[1] = model.model.layers[0]
    before = snapshot(model)
    for how in config("wanda"), config("taylor", pattern="ffn:0.5", sparsity=None):
        with pytest.raises(ValueError, match="model.layers.0 and model.layers.1 are the same module"):
            model.prune(how, ids_for(4))
    assert same(model, before)
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    assert model.prune(config("wanda"), ids_for(4)).sparsity == 0.5
