"""2:4 inference where it belongs: kernels as compiled code, cuSPARSELt itself, CUDA graphs, torch.compile. Two minutes on an H100."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen2Config

import hf_prune


if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="pip install 'hf-prune[sparse]'")

from hf_prune.runtimes import bitmask_kernel, decode_kernel, eight_bits, plans, products  # noqa: E402
from hf_prune.runtimes.decode_kernel import Schedule  # noqa: E402


HELD = [None, torch.int8, torch.float8_e4m3fn]
TILES = [Schedule(1, 64, 1, 1, 1), Schedule(8, 64, 1, 2, 4), Schedule(4, 64, 1, 4, 1), Schedule(16, 32, 4, 16, 2, 3)]


def two_of_four(*shape, dtype=torch.bfloat16):
    weight = torch.randn(shape[0], -(-shape[1] // 4), 4, device="cuda").to(dtype)
    return weight.scatter(-1, weight.abs().argsort(-1)[..., :2], 0.0).flatten(1)[:, : shape[1]].contiguous()


def close(y, expected, within):
    assert y.shape == expected.shape
    assert (y.double() - expected.double()).abs().max() <= within * expected.double().abs().max()


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dtype, shape", [(torch.float16, (33, 70)), (torch.bfloat16, (65, 198))])
def test_kernels(dtype, shape, held):
    source, weight, *scales = plans.held_in(held, two_of_four(*shape, dtype=dtype))
    packed = decode_kernel.pack(source)
    for rows in (1, 2, 3, 5, 8, 16, 17):
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        for how in TILES:
            close(decode_kernel.linear(x, *packed, how, *scales), x.double() @ weight.double().t(), 0.005)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_the_kernels_around_eight_bits(dtype):
    x = torch.randn(5, 1500, device="cuda").bfloat16()
    x[1], x[3, 7] = 0.0, float("nan")
    q, scales = eight_bits.quantised_tokens(x, dtype, 16)
    expected, its_scales = eight_bits.quantised(x, dtype)
    assert scales[:5].isnan().tolist() == [False] * 3 + [True, False] and not q[5:].float().any()
    torch.testing.assert_close(scales[:5], its_scales, equal_nan=True)
    finite = [0, 1, 2, 4]
    assert (
        q[finite].float() != expected[finite].float()
    ).float().mean() < 1e-3  # a tie is rounded by the last bit of a quotient
    y, bias = torch.randn(16, 1500, device="cuda").bfloat16(), torch.randn(1500, device="cuda").bfloat16()
    for added in (None, bias):
        words = scales.nan_to_num(1.0), torch.rand(1500, device="cuda"), added, torch.float16
        on_cpu = (word.cpu() if isinstance(word, torch.Tensor) else word for word in words)
        torch.testing.assert_close(eight_bits.rescaled(y, *words).cpu(), eight_bits.rescaled(y.cpu(), *on_cpu))


def test_operators_under_torch_compile():
    """Schedules that differ, one function: they are numbers of the graph, not its variables."""
    weight = two_of_four(576, 576)
    half = torch.randn_like(weight) * (torch.rand_like(weight) < 0.5)
    q, scales = eight_bits.quantised(weight, torch.int8)
    cases = [((*decode_kernel.pack(weight), list(how)), weight) for how in TILES]
    cases += [((*bitmask_kernel.pack(half), [32, 2, 1]), half)]
    cases += [((*decode_kernel.pack(q), list(TILES[2]), scales), eight_bits.dequantised(q, scales, torch.bfloat16))]
    product = torch.compile(lambda x, *args: 2 * products.packed_linear(x, *args), fullgraph=True)
    x = torch.randn(3, 576, device="cuda").bfloat16().requires_grad_()
    for arguments, dense in cases:
        close(products.packed_linear(x.detach(), *arguments), functional.linear(x, dense), 0.02)
        x.grad = None
        y = product(x, *arguments)
        close(y, 2 * functional.linear(x, dense), 0.02)
        y.sum().backward()
        close(x.grad, 2 * dense.sum(0).expand(3, -1), 0.02)


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    config = Qwen2Config(  # it has biases
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, vocab_size=512
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().eval()
    model.prune(hf_prune.PruningConfig("magnitude", pattern="2:4"))
    return model


@pytest.mark.parametrize(
    "use, held", [("any", None), ("any", torch.int8), ("decode", None), ("prefill", None), ("prefill", HELD[2])]
)
def test_models(pruned, use, held, monkeypatch):
    """Each way to run one: eagerly, as a CUDA graph, compiled with and without gradients, by `generate`; and back."""
    monkeypatch.setattr(plans, "ROWS", (1, 4, 16, 512, plans.PREFILL_ROWS))
    model, dense = copy.deepcopy(pruned), copy.deepcopy(pruned)
    report = hf_prune.to_semi_structured(model, use=use, dtype=held)
    if not report.plans:
        pytest.skip(f"nothing is faster than dense here:\n{report}")
    for name in report.plans:
        linear = dense.get_submodule(name)
        linear.weight.data = plans.held_in(held, linear.weight.data)[1]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in dense.state_dict().items())
    ids, within = torch.randint(0, 512, (1, 600), device="cuda"), 0.05 if held is None else 0.2
    with torch.no_grad():
        for rows in (1, 3, 17, 600):
            close(model(ids[:, :rows]).logits, dense(ids[:, :rows]).logits, within)
            plans.replayed(lambda n=rows: model(ids[:, :n], use_cache=False))()
        words = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        for how in ({}, {"cache_implementation": "static"}):
            assert model.generate(ids[:, :5], **words, **how).shape == (1, 13)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for rows in (1, 600):
        logits = compiled(ids[:, :rows]).logits
        close(logits, dense(ids[:, :rows]).logits, within)
        logits.float().sum().backward()
    hf_prune.to_dense(model)
    assert all(torch.equal(value, other) for value, other in zip(model.parameters(), dense.parameters()))
