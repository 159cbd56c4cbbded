"""Every causal language model that Transformers knows, tiny and random: are its blocks run one by one what the model computes, is it
pruned, trained under its masks, pruned from disk to disk, saved and loaded, and can it lose FFN channels?

    python benchmarks/architectures.py [MODEL_TYPE ...]

Configs are the architectures' own defaults with small numbers; those that cannot be built that way are counted, and named.
"""

import collections
import logging
import os
import sys
import tempfile
import warnings


os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_prune
from hf_prune.perp import attach


warnings.filterwarnings("ignore")
transformers.logging.set_verbosity(transformers.logging.CRITICAL)
logging.getLogger("hf_prune").setLevel(logging.ERROR)
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "lru_width", "conv_dim", "embedding_size", "dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "block_dim"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dff", "d_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "mamba_d_ssm", "max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("max_seq_len", "n_ctx", "seq_length", "context_length"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "altup_num_inputs", "index_n_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_key_value_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "rotary_dim", "laurel_rank", "sliding_window", "attention_window", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("index_head_dim", "index_topk"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_state", "ssm_state_size", "state_size", "qk_head_dim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group", "mamba_n_groups", "n_groups"), 1),
    "first_k_dense_replace": 1, "linear_num_key_heads": 2, "num_kv_shared_layers": 0, "rescale_every": 0,
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNSAID = ("head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
OWN = {
    **{kind: {"is_decoder": True} for kind in ("bert", "roberta", "electra", "rembert", "roformer", "camembert")},
    "gemma3n_text": {"intermediate_size": [64] * 2, "activation_sparsity_pattern": [0.0] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "kimi_linear": {"num_experts": 4, "num_experts_per_token": 2, "linear_head_dim": 8, "linear_num_heads": 4},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mamba2": {"expand": 2, "num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ("recurrent", "recurrent", "attention")},
}
IDS = torch.randint(3, 120, (4, 32), generator=torch.Generator().manual_seed(0))


def small(kind: type, own: dict) -> PretrainedConfig | dict:
    """The default config of a kind with small numbers, one layer of each type that it has."""
    base = kind()
    base.allow_global_per_layer_attribute_access = True
    values = {key: SMALL[key] for key, value in base.to_dict().items() if key in SMALL and type(value) in (int, float)}
    values |= {key: SMALL[key] for key in UNSAID if getattr(base, key, 0) is None}
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        types, given = getattr(base, key, None), isinstance(getattr(kind, key, None), property) or key in kind.attribute_map
        if isinstance(types, (list, tuple)) and types and not given:
            found = list(dict.fromkeys(types))
            count = max(2, len(found), *(len(v) for v in values.values() if isinstance(v, list)), 0)
            values = {k: (v * 4)[:count] if isinstance(v, list) else v for k, v in values.items()}
            values |= {key: (found * 4)[:count]} | {k: count for k in LAYERS if k in values}
    for name in getattr(kind, "sub_configs", None) or {}:
        if isinstance(part := getattr(base, name, None), PretrainedConfig):
            values[name] = small(type(part), {}).to_dict()
    return kind(**{**values, **own})


def steps(model_type: str):
    """Names and functions; each raises if it is not as it should be."""
    config = small(CONFIG_MAPPING[model_type], OWN.get(model_type, {}))

    def make():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in filter(torch.is_floating_point, model.parameters()):
                parameter.add_(0.02 * torch.randn_like(parameter))
        if sum(p.numel() for p in model.parameters()) > 2e7:
            raise ValueError("not small")
        return model

    def pruning(method, **words):
        return hf_prune.PruningConfig(method, n_samples=4, sequence_length=32, **words)

    @torch.no_grad()
    def same(model, folder, load=AutoModelForCausalLM.from_pretrained):
        model.save_pretrained(folder)
        again = load(folder).eval()
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits), "other logits"
        return again

    @torch.no_grad()
    def replay():
        model = make()
        decoder, expected = hf_prune.Decoder(model), model(input_ids=IDS).logits
        (hidden,), calls = decoder.capture([IDS])
        for block, (call,) in zip(decoder.blocks, calls):
            hidden = call.run(block, hidden)
        assert (decoder.logits(IDS, hidden) - expected).abs().max() <= 1e-5 * expected.abs().max(), "other logits"

    def prune(method, **words):
        model = make()
        model.prune(pruning(method, **words), IDS)
        assert not model.pruning_masks.violations(model), "masks do not hold"
        return model

    def saved():
        with tempfile.TemporaryDirectory() as folder:
            same(prune("wanda", sparsity=0.5), folder, hf_prune.load)

    def stream():
        with tempfile.TemporaryDirectory() as folder:
            make().save_pretrained(f"{folder}/dense")
            hf_prune.prune_checkpoint(f"{folder}/dense", f"{folder}/out", pruning("wanda", sparsity=0.5), calibration=IDS)
            streamed = dict(AutoModelForCausalLM.from_pretrained(f"{folder}/out").named_parameters())
            assert all(torch.equal(p, streamed[n]) for n, p in prune("wanda", sparsity=0.5).named_parameters()), "other weights"

    def train():
        model = prune("magnitude", sparsity=0.5)
        attached = attach(model, model.pruning_masks, "mask_lora")
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in attached.trainable.values():
                parameter.add_(0.01)
        attached.merge()  # raises if masks do not hold

    def shrink():
        with tempfile.TemporaryDirectory() as folder:
            same(prune_structure(), folder)

    def prune_structure():
        model = make()
        model.prune(pruning("taylor", pattern="ffn:0.25"), IDS)
        return model

    make()(input_ids=IDS)
    yield "blocks one by one", replay
    yield "Wanda, saved and loaded", saved
    yield "SparseGPT", lambda: prune("sparsegpt", sparsity=0.5)
    yield "GBLM", lambda: prune("gblm", sparsity=0.5)
    yield "disk to disk", stream
    yield "MaskLoRA", train
    yield "FFN channels", shrink


def main():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    counts, reasons = collections.Counter(), collections.defaultdict(list)
    kinds = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for kind in tqdm(kinds, desc="architectures", disable=False):
        try:
            todo = list(steps(kind))
            counts["built"] += 1
        except Exception as error:
            todo = []
            reasons["not built", f"{type(error).__name__}: {error}".splitlines()[0][:120]].append(kind)
        for name, step in todo:
            try:
                step()
                counts[name] += 1
            except Exception as error:
                reasons[name, f"{type(error).__name__}: {error}".splitlines()[0][:160]].append(kind)
    print(
        f"transformers {transformers.__version__}: {len(kinds)} model types; "
        + ", ".join(f"{n} {what}" for what, n in counts.items())
    )
    for (name, reason), which in sorted(reasons.items()):
        print(f"{name}: {', '.join(which)}: {reason}")


if __name__ == "__main__":
    main()
