"""Tiny random models by family, seeded; a Hub on localhost, and no other network."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hub_server import TOKEN, Hub


HUB = Hub()  # before huggingface_hub reads where the Hub is
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.update(
    HF_ENDPOINT=HUB.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=tempfile.mkdtemp()
)
os.environ.setdefault("TQDM_DISABLE", "1")
# Before torch is imported, and for every process that a test starts. Two workers with two threads each wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # whatever the process that starts the workers has
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_prune.methods import REGISTRY


transformers.logging.set_verbosity_error()
MASKING = [name for name in sorted(REGISTRY) if not REGISTRY[name].structural]  # the methods that leave masks

_BASE = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_TOKENS = dict(vocab_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)

FAMILIES = {
    "llama": ("LlamaConfig", _BASE),
    "mistral": ("MistralConfig", {**_BASE, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", _BASE),
    "qwen3": ("Qwen3Config", {**_BASE, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_BASE, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**_BASE, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3Config", _BASE),
    "gpt2": ("GPT2Config", dict(_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _BASE.items() if k != "num_key_value_heads"}),
    "opt": ("OPTConfig", dict(_TOKENS, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)),
    "bloom": ("BloomConfig", dict(_TOKENS, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": ("FalconConfig", dict(_TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    "mpt": ("MptConfig", dict(_TOKENS, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "olmo2": ("Olmo2Config", _BASE),
    "starcoder2": ("Starcoder2Config", _BASE),
    "granite": ("GraniteConfig", _BASE),
    "mixtral": ("MixtralConfig", {**_BASE, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_BASE, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt_oss": ("GptOssConfig", {**_BASE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of `family` in evaluation mode, with norms and biases that are not trivial."""
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**{**values, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def ids_for(n: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(seed))


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.fixture(autouse=True)
def no_mixed_precision_left(monkeypatch):
    """`TrainingArguments(bf16=True)` of transformers 4.57 leaves it in the environment, for every training after it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def hub():
    """An empty Hub on localhost, where huggingface_hub looks; `hub.fault` makes it fail."""
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture
def llama():
    return make("llama")


@pytest.fixture(scope="session")
def tokenizer():
    """A word tokenizer over numbers: "17 23 9"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i for i in range(3, 128)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )  # fmt: skip


def in_two_processes(tmp_path, code: str) -> list[dict[str, torch.Tensor]]:
    """Runs `code`, which leaves a `model`, in two gloo processes within `tmp_path`; both state dicts, which must be equal."""
    script = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
{code}
assert torch.distributed.get_world_size() == 2
torch.save(model.state_dict(), f"{{torch.distributed.get_rank()}}.pt")
"""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "script.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return states
