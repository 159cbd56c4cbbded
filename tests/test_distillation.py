"""Distillation from the likeliest tokens, from a cache on disk, and from an offloaded teacher."""

import copy

import accelerate
import pytest
import torch
from conftest import ids_for, make, snapshot
from test_perp import pruned, train

from hf_prune import Distillation, PERPCallback
from hf_prune.distillation import _Divergence, _identity, _top_of, _TopDivergence


IDS = ids_for(4, 12)


def counted(teacher):
    """`teacher`, and a list that gets the number of rows of each of its calls."""
    calls = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    return teacher, calls


def run(hook, student, ids=IDS, **inputs):
    """Loss and gradient of the head."""
    inputs.setdefault("labels", ids)
    handle = student.train().register_forward_hook(hook, with_kwargs=True)
    try:
        loss = student(input_ids=ids, **inputs).loss
    finally:
        handle.remove()
    return loss.detach(), *torch.autograd.grad(loss, student.lm_head.weight)


def close(one, other, atol=1e-3):
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_divergence_is_that_of_autograd(temperature, dtype):
    torch.manual_seed(0)
    student = (3 * torch.randn(300, 50)).to(dtype).requires_grad_()
    teacher, wanted = 3 * torch.randn(300, 50), torch.randperm(300)[:270].sort().values
    top, indices, rest = _top_of(teacher, 7, temperature)
    got = _TopDivergence.apply(student, top, indices, rest, wanted, temperature)
    (gradient,) = torch.autograd.grad(2 * got, student)
    plain = student.detach().double().requires_grad_()
    own, other = ((x[wanted].double() / temperature).softmax(-1) for x in (plain, teacher))
    where = indices[wanted].long()
    own, other = (torch.cat([x.gather(1, where), 1 - x.gather(1, where).sum(1, keepdim=True)], 1) for x in (own, other))
    divergence = (other * (other / own).log()).sum()
    (wish,) = torch.autograd.grad(2 * divergence, plain)
    assert torch.allclose(got.double(), divergence, rtol=2e-3)
    assert torch.allclose(gradient.double(), wish, atol=2e-3 if dtype == torch.float32 else 2e-2)
    assert not gradient[[i for i in range(300) if i not in set(wanted.tolist())]].any()


def test_gradient_is_exact():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 20, requires_grad=True), torch.randn(6, 20)
    top, indices, rest = _top_of(teacher, 5, 2.0)
    (got,) = torch.autograd.grad(_TopDivergence.apply(student, top, indices, rest, torch.arange(6), 2.0), student)
    other = torch.cat([top.double(), rest[:, None].double()], 1).softmax(1)  # the very same target, rounding included
    plain = student.detach().double().requires_grad_()
    own = (plain / 2).softmax(1)
    own = torch.cat([own.gather(1, indices.long()), 1 - own.gather(1, indices.long()).sum(1, keepdim=True)], 1)
    (wish,) = torch.autograd.grad((other * (other / own).log()).sum(), plain)
    assert torch.allclose(got.double(), wish, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 3, 15])  # of 20 tokens, 10 of which have a logit that is not -inf
def test_a_masked_part_of_the_vocabulary_counts_for_nothing(top_k):
    torch.manual_seed(0)
    student, teacher, every = torch.randn(6, 20), torch.randn(6, 20), torch.arange(6)

    def found(student, teacher, top_k):
        student.requires_grad_()
        known = [teacher] if top_k is None else _top_of(teacher, top_k, 2.0)
        loss = (_Divergence if top_k is None else _TopDivergence).apply(student, *known, every, 2.0)
        return loss, torch.autograd.grad(loss, student)[0]

    few = None if top_k is None else min(top_k, 9)
    want, gradient = found(student[:, ::2].clone(), teacher[:, ::2], few)
    masked = torch.full((6, 20), -torch.inf)
    got, spread = found(
        *(masked.index_copy(1, every.new_tensor(range(0, 20, 2)), x[:, ::2]) for x in (student, teacher)), top_k
    )
    assert torch.allclose(got, want, atol=1e-2 if top_k else 1e-6), (got, want)
    assert torch.allclose(spread[:, ::2], gradient, atol=1e-3) and not spread[:, 1::2].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_are_the_whole_divergence(temperature, tmp_path):
    dense, model = make("llama"), pruned()
    whole = run(Distillation(dense, 0.7, temperature), model)
    for how in (dict(top_k=127), dict(top_k=1000), dict(top_k=128, cache=tmp_path)):
        assert close(run(Distillation(dense, 0.7, temperature, **how), model), whole)
    coarse = run(Distillation(dense, 0.7, temperature, top_k=4), model)
    assert coarse[0] < whole[0]  # events that are merged are told apart less


def test_a_teacher_runs_once_a_sequence(tmp_path):
    (dense, calls), model = counted(make("llama")), pruned()
    hook = Distillation(dense, cache=tmp_path / "cache")
    assert hook.top_k == 64
    first = run(hook, model)
    again = run(hook, model)
    assert all(torch.equal(x, y) for x, y in zip(first, again)) and calls == [4]
    assert all(torch.equal(x, y) for x, y in zip(run(Distillation(dense, top_k=64), model), first))
    calls.clear()
    run(hook, model, IDS.flip(0))
    run(Distillation(copy.deepcopy(dense), cache=tmp_path / "cache"), model)
    run(hook, model, torch.cat([IDS[1:3], ids_for(2, 12, seed=9)]))
    assert calls == [2]  # only what is new
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 6 and {path.suffix for path in files} == {".safetensors"}


def test_padding_is_not_the_sequences(tmp_path):
    (dense, calls), model = counted(make("llama")), pruned()
    hook = Distillation(dense, cache=tmp_path)
    short = run(hook, model, IDS[:, :8])
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    padded = dict(attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100))
    assert close(run(hook, model, **padded), short, atol=1e-5) and calls == [4]
    assert close(run(hook, model, **padded), run(Distillation(dense, top_k=64), model, **padded), atol=1e-6)
    calls.clear()
    bits = mask.bool()
    run(hook, model, attention_mask=bits, labels=IDS)  # labels reach into the padding: it belongs to the sequence then
    assert torch.equal(bits, mask.bool()) and calls == [4]
    calls.clear()
    run(hook, model, attention_mask=mask.flip(1))
    run(hook, model, position_ids=torch.arange(12)[None] + 3)
    assert calls == [4, 4]


def test_no_teacher(tmp_path):
    dense, model = make("llama"), pruned()
    want = run(Distillation(dense, cache=tmp_path), model)
    alone = Distillation(None, cache=tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(run(alone, model), want))
    with pytest.raises(ValueError, match="1 of 2 sequences .* are not in the cache .*: give the teacher"):
        run(alone, model, torch.cat([IDS[:1], ids_for(1, 12, seed=9)]))
    for how in (dict(top_k=3), dict(temperature=2.0), dict(cache=tmp_path / "none")):
        with pytest.raises(ValueError, match="must hold one teacher's predictions"):
            run(Distillation(None, **{"cache": tmp_path, **how}), model)
    run(Distillation(make("llama", seed=4), cache=tmp_path), model)
    with pytest.raises(ValueError, match="must hold one teacher's predictions"):
        run(Distillation(None, cache=tmp_path), model)


def test_every_teacher_has_its_own(tmp_path):
    model = pruned()
    dense = make("llama")
    (other, calls) = counted(make("llama", seed=1))
    want = run(Distillation(other, top_k=64), model)
    run(Distillation(dense, cache=tmp_path), model)
    calls.clear()
    assert all(torch.equal(x, y) for x, y in zip(run(Distillation(other, cache=tmp_path), model), want)) and calls == [4]
    assert _identity(dense) == _identity(make("llama")) != _identity(other)
    dense.config._name_or_path = "other/name"
    assert _identity(dense) != _identity(make("llama"))


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    dense, model = make("llama"), pruned()
    hook = Distillation(dense, cache=tmp_path)
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(hook, model)
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.undo()
    want = run(hook, model)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*Delete it"):
        run(hook, model)
    path.unlink()
    assert all(torch.equal(x, y) for x, y in zip(run(hook, model), want))


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
def test_offloaded_teacher(how, tmp_path):
    dense, model = make("llama"), pruned()
    want, kept = run(Distillation(dense), model), run(Distillation(dense, cache=tmp_path / "cache"), model)
    name, far = _identity(dense), copy.deepcopy(dense)
    if how == "cpu_offload":
        accelerate.cpu_offload(far, execution_device="cpu")
    else:
        places = {
            "model.embed_tokens": "disk",
            "model.layers": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "disk",
        }
        far = accelerate.dispatch_model(far, places, main_device="cpu", offload_dir=str(tmp_path / "weights"))
    assert next(far.parameters()).is_meta and _identity(far) == name
    assert all(torch.equal(x, y) for x, y in zip(run(Distillation(far), model), want))
    far, calls = counted(far)
    assert all(torch.equal(x, y) for x, y in zip(run(Distillation(far, cache=tmp_path / "cache"), model), kept)) and not calls
    assert all(torch.equal(x, y) for x, y in zip(run(Distillation(far, cache=tmp_path / "new"), model), kept)) and calls == [4]


def test_training_from_a_cache(tmp_path):
    (dense, calls), one = counted(make("llama")), pruned()
    two = copy.deepcopy(one)
    changes = dict(learning_rate=1e-3, max_steps=-1, num_train_epochs=2)
    train(one, tmp_path / "one", PERPCallback("norm", distillation=Distillation(dense, cache=tmp_path / "cache")), **changes)
    assert sum(calls) == 24
    train(two, tmp_path / "two", PERPCallback("norm", distillation=Distillation(None, cache=tmp_path / "cache")), **changes)
    assert all(torch.equal(p, snapshot(one)[name]) for name, p in two.named_parameters())


def test_errors(tmp_path):
    dense, model = make("llama"), pruned()
    for how, match in ((dict(top_k=0), "top_k must be a whole number of at least 1"), (dict(weight=2), "weight must be in")):
        with pytest.raises(ValueError, match=match):
            Distillation(dense, **how)
    with pytest.raises(ValueError, match="give cache="):
        Distillation(None)
    with pytest.raises(ValueError, match="do not match the student's"):
        run(Distillation(make("llama", vocab_size=130), cache=tmp_path), model)
    with pytest.raises(ValueError, match="the teacher knows 100 tokens and the student 128"):
        run(Distillation(make("llama", vocab_size=100)), model)
    with pytest.raises(ValueError, match="a cache needs input_ids"):
        run(Distillation(dense, cache=tmp_path), model, attention_mask=torch.ones(4, 1, 12, 12, dtype=torch.bool))
    assert not list(tmp_path.rglob("*.safetensors"))
