"""Each method equals its slow reference, and the papers' invariants hold."""

import copy

import pytest
import reference
import torch
from conftest import MASKING, ids_for, make, snapshot

import hf_prune
from hf_prune import ALPS, GBLM, RIA, Magnitude, SparseGPT, Wanda
from hf_prune.blocks import Decoder
from hf_prune.methods import REGISTRY, Taylor
from hf_prune.methods.base import Job
from hf_prune.patterns import NM, Unstructured
from hf_prune.sequential import mask_of
from hf_prune.statistics import ActivationNorm, GradientNorm, Hessian


PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8)]


def problem(out=48, width=256, tokens=2000, seed=0):
    """A weight, and inputs whose channels are correlated and of different size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.rand(width, generator=g) + torch.eye(width)
    return torch.randn(out, width, generator=g), torch.randn(tokens, width, generator=g) @ mix


def run(method, weight, x, pattern, gradients=(), group=None, kept=None, fixed=None):
    known = []
    for kind in method.needs:
        if kind is GradientNorm:
            statistic = GradientNorm(weight.shape, 1 if method.norm == "l1" else 2)
            for g in gradients:
                statistic.update(g.clone())
        else:
            statistic = kind(weight.shape[1])
            for piece in x.split(300):
                statistic.update(piece)
        known.append(statistic)
    [result] = method.prune([Job(weight, tuple(known), pattern, kept, fixed)], group or method.comparison_group)
    return result


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "method,slow",
    [(Magnitude(), reference.magnitude), (Wanda(), reference.wanda), (RIA(), reference.ria), (GBLM(alpha="paper"), reference.gblm_paper)],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_scores_equal_reference(method, slow, pattern):
    weight, x = problem()
    gradients = [0.01 * torch.randn_like(weight) for _ in range(4)]
    result = run(method, weight, x, pattern, gradients)
    expected = reference.keep_highest(slow(weight, x, gradients), pattern, method.comparison_group)
    assert (result.mask != expected).float().mean() < 2e-4  # summation order decides a near tie
    assert torch.equal(result.weight, weight * result.mask)


@pytest.fixture
def default_dtype():
    """Sets torch's, until the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", MASKING)
def test_the_default_dtype_plays_no_part(name, pattern, default_dtype):
    dense, results = make("llama"), []
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.copy_(dense.model.layers[0].mlp.up_proj.weight.bfloat16())  # with ties
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = copy.deepcopy(dense)
        default_dtype(dtype)
        model.prune(hf_prune.PruningConfig(name, pattern=pattern, n_samples=6, sequence_length=24), ids_for())
        results.append((model.pruning_masks.digest(), snapshot(model)))
    for digest, weights in results[1:]:
        assert digest == results[0][0]
        assert all(torch.equal(weight, results[0][1][name]) for name, weight in weights.items())


def test_statistics_sum_in_fp32_whatever_the_default(default_dtype):
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    default_dtype(torch.bfloat16)
    norm, hessian = ActivationNorm(8), Hessian(8)
    for statistic in (norm, hessian):
        statistic.update(x)
    torch.testing.assert_close(norm.norm.double(), x.double().norm(dim=0), rtol=1e-5, atol=0)
    assert {norm.norm.dtype, hessian.gram.dtype, hessian.damped(0.01).dtype, hessian.factor(0.01)[1].dtype} == {torch.float32}


@pytest.mark.parametrize("group", ["row", "block", "model"])
def test_pruning_a_mixture_again_unpacks_each_mask_a_few_times(group, monkeypatch):
    model, unpacked, unpack = make("qwen3_moe", num_experts=16), [], hf_prune.masks.unpack

    def counted(packed, width):
        unpacked.append(8 * packed.size)
        return unpack(packed, width)

    model.prune(hf_prune.PruningConfig("magnitude"))
    monkeypatch.setattr(hf_prune.masks, "unpack", counted)
    model.prune(hf_prune.PruningConfig("magnitude", sparsity=0.6, comparison_group=group))
    assert 0 < sum(unpacked) <= 3 * model.pruning_masks.numel()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gpt2"])
def test_the_mask_of_one_linear(family):
    model = make(family)
    model.prune(hf_prune.PruningConfig("magnitude"))
    masks = model.pruning_masks
    for linear in Decoder(model).linears:
        expected = linear.matrix(masks[linear.parameter_name])
        assert torch.equal(mask_of(masks, linear), expected)
        assert masks.kept(linear.parameter_name, linear.expert) == int(expected.count_nonzero())
    assert mask_of(hf_prune.Masks(), linear) is None


def test_a_share_leaves_a_multiple():
    model = make("llama", intermediate_size=100)
    for share, left in ((0.41, 56), (0.05, 48)):  # of 59 and 53, in eights; those nearest to 53 are all 56
        config = hf_prune.PruningConfig("taylor", pattern=f"ffn:{share}", n_samples=6, sequence_length=24)
        model.prune(config, ids_for())
        assert model.config.intermediate_size == left
    model.prune(hf_prune.PruningConfig("magnitude", pattern="2:4"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_equals_reference(pattern):
    weight, x = problem()
    result = run(SparseGPT(), weight, x, pattern)
    expected, mask = reference.sparsegpt(weight, x, pattern)
    assert (result.mask != mask).float().mean() < 2e-3
    rows = (result.mask == mask).all(1)
    assert rows.float().mean() > 0.8
    assert torch.allclose(result.weight[rows].double(), expected[rows], atol=2e-3)
    ours = ((result.weight - weight) @ x.t()).norm() / (weight @ x.t()).norm()
    theirs = ((expected.float() - weight) @ x.t()).norm() / (weight @ x.t()).norm()
    assert abs(ours / theirs - 1) < 0.01


def test_compensation_beats_masks():
    weight, x = problem()
    error = {
        m.name: float(((run(m, weight, x, NM(2, 4)).weight - weight) @ x.t()).norm())
        for m in (Magnitude(), Wanda(), SparseGPT())
    }
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


def test_identity_inputs_make_sparsegpt_magnitude():
    weight = torch.randn(32, 128)
    result = run(SparseGPT(), weight, torch.eye(128), Unstructured(0.5))
    assert torch.equal(result.mask, Unstructured(0.5).mask(weight.abs(), "matrix"))
    assert torch.allclose(result.weight, weight * result.mask)


def test_constant_norms_make_wanda_magnitude():
    weight = torch.randn(32, 64)
    assert torch.equal(run(Wanda(), weight, torch.ones(10, 64), NM(2, 4)).mask, run(Magnitude(), weight, None, NM(2, 4)).mask)


def test_gblm_from_wanda_to_gradients_alone():
    weight, x = problem()
    gradients = [torch.randn_like(weight) for _ in range(3)]
    half = Unstructured(0.5)
    assert torch.equal(run(GBLM(alpha=0), weight, x, half, gradients).mask, run(Wanda(), weight, x, half).mask)
    norm = torch.stack(gradients).square().mean(0).sqrt()
    only = half.mask(weight.abs() * norm, "row")
    assert (run(GBLM(alpha=1), weight, x, half, gradients).mask != only).float().mean() < 1e-3
    between = run(GBLM(), weight, x, half, gradients).mask
    assert (between != only).any() and (between != run(GBLM(alpha=0), weight, x, half, gradients).mask).any()


def test_gblm_has_no_unit():
    """Neither of the loss nor of a row: an output whose gradients are small is pruned as the others are."""
    weight, x = problem()
    gradients = [torch.randn_like(weight) for _ in range(3)]
    scale = 10.0 ** torch.linspace(-8, 2, len(weight))[:, None]
    a = run(GBLM(), weight, x, Unstructured(0.5), gradients).mask
    b = run(GBLM(), weight, x, Unstructured(0.5), [g * scale for g in gradients]).mask
    assert (a != b).float().mean() < 1e-3


def test_gblm_without_gradients_still_compares():
    """Of an expert that no sample reached all gradients are zero: it must not lose its first columns."""
    weight, x = problem()
    result = run(GBLM(), weight, x, Unstructured(0.5), [torch.zeros_like(weight)]).mask
    expected = Unstructured(0.5).mask(weight.abs() * x.norm(dim=0) ** (1 - GBLM().alpha), "row")
    assert (result != expected).float().mean() < 1e-3


@pytest.mark.parametrize("order", [1, 2])
def test_opposite_gradients_do_not_cancel(order):
    norm = GradientNorm(torch.Size([2, 2]), order)
    for sign in (1, -1):
        norm.update(sign * torch.full((2, 2), 3.0))
    assert torch.allclose(norm.value, torch.full((2, 2), 3.0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fixed_mask_is_only_refitted(pattern):
    weight, x = problem()
    mask = run(Wanda(), weight, x, pattern).mask
    result = run(SparseGPT(), weight, x, pattern, fixed=mask)
    assert torch.equal(result.mask, mask)
    before, after = ((weight * mask - weight) @ x.t()).norm(), ((result.weight - weight) @ x.t()).norm()
    assert after < before


def damped_gram(x):
    gram = x.double().t() @ x.double()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return gram


def output_error(result, weight, x):
    """With the part of damping that the solver minimises too."""
    missed = (result.weight - weight).double()
    return ((missed @ damped_gram(x)) * missed).sum()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_refit_nears_the_least_squares_fit(pattern, fixed):
    weight, x = problem()
    mask = run(Wanda(), weight, x, pattern).mask if fixed else None
    plain, some, many = (run(SparseGPT(refit=n), weight, x, pattern, fixed=mask) for n in (0, 10, 1000))
    gram = damped_gram(x)
    wanted = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept, dense in zip(wanted, plain.mask, weight.double()):
        row[kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ dense)
    for result in (some, many):
        assert torch.equal(result.mask, plain.mask) and not result.weight[~plain.mask].any()
    least = output_error(many._replace(weight=wanted), weight, x)
    first, tenth, last = (output_error(result, weight, x) for result in (plain, some, many))
    assert least * 0.9999 <= last <= least * 1.0001 and least * 0.9999 <= tenth < first
    assert first - tenth > 0.5 * (first - least)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_equals_reference_and_is_better(pattern):
    weight, x = problem()
    result = run(ALPS(), weight, x, pattern)
    expected, mask = reference.alps(weight, x, pattern)
    assert (result.mask != mask).float().mean() < 0.01  # rounding is fed back
    assert not result.weight[~result.mask].any()
    wanted, *others = (
        output_error(r, weight, x)
        for r in (result._replace(weight=expected), result, run(SparseGPT(refit=10), weight, x, pattern))
    )
    assert others[0] < 1.01 * wanted and others[0] < others[1]


def test_a_weight_does_not_depend_on_those_beside_it():
    weight, x = problem(out=96)
    alone = [run(ALPS(), part, x, NM(2, 4)) for part in weight.split(48)]
    hessian = Hessian(256)
    for piece in x.split(300):
        hessian.update(piece)
    together = ALPS().prune([Job(part, (hessian,), NM(2, 4)) for part in weight.split(48)], "matrix")
    for one, other in zip(alone, together):
        assert torch.equal(one.mask, other.mask) and torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    "method,values",
    [(ALPS, {"iterations": 0}), (ALPS, {"refit": 1.5}), (ALPS, {"penalty": 0}), (ALPS, {"penalty": "x"}), (ALPS, {"damping": 0}), (SparseGPT, {"damping": "abc"}),
     (SparseGPT, {"damping": float("inf")}), (SparseGPT, {"refit": None}), (RIA, {"power": "abc"}), (RIA, {"power": -1}), (GBLM, {"gradient_checkpointing": "False"}),
     (Taylor, {"compensate": "False"}), (Taylor, {"per_parameter": 1})],
)  # fmt: skip
def test_options_that_are_refused(method, values):
    with pytest.raises(ValueError, match=f"{next(iter(values))}.* of {method.name} must be"):
        method(**values)


@pytest.mark.parametrize("values", [{"scope": "block"}, {"gradient_samples": 2}])
def test_gblm_of_the_paper_has_one_number_of_samples(values):
    with pytest.raises(ValueError, match="the same sequences: leave out"):
        GBLM(alpha="paper", **values)


def test_refit_of_a_row_without_weights_and_of_old_zeros():
    weight, x = problem(out=8)
    old = torch.rand_like(weight) > 0.3
    old[0] = False
    result = run(SparseGPT(refit=50), weight * old, x, Unstructured(0.5), kept=old)
    assert not (result.mask & ~old).any() and result.weight.isfinite().all() and not result.weight[~result.mask].any()


@pytest.mark.parametrize("name", MASKING)
def test_old_zeros_stay(name):
    weight, x = problem()
    gradients = [torch.randn_like(weight)]
    old = Unstructured(0.4).mask(torch.rand_like(weight), "row")
    result = run(REGISTRY[name](), weight * old, x, Unstructured(0.6), gradients, kept=old)
    assert not (result.mask & ~old).any()
    rows = 1 if REGISTRY[name].comparison_group == "matrix" else len(weight)
    assert (~result.mask).sum() == rows * Unstructured(0.6).count(weight.numel() // rows)


@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("end", ["first", "last", "anywhere"])
def test_sparsegpt_prunes_on_to_the_exact_count(end, group):
    """Wherever most of the earlier zeros lie; a row that has too many keeps its own, and no more."""
    weight, x = problem()
    chance = {"first": torch.linspace(0.9, 0, 256), "last": torch.linspace(0, 0.9, 256), "anywhere": torch.full((256,), 0.45)}
    old = torch.rand_like(weight) > chance[end]
    old[3, :140] = False
    before = (~old).sum(1)
    result = run(SparseGPT(block_size=32), weight * old, x, Unstructured(0.5), group=group, kept=old)
    assert not (result.mask & ~old).any()
    gone = (~result.mask).sum(1)
    if group == "row":
        assert torch.equal(gone, before.clamp(min=128)) and gone[3] >= 140
    else:
        assert gone.sum() == 128 * len(weight)


def test_dead_inputs_go_first_and_damping_is_reported():
    weight, x = problem()
    x[:, 10:30] = 0
    result = run(SparseGPT(), weight, x, Unstructured(0.5))
    assert result.mask[:, 10:30].float().mean() < 0.2
    assert torch.equal(result.weight[:, 10:30], (weight * result.mask)[:, 10:30])
    raised = run(SparseGPT(damping=0.0), weight, x, Unstructured(0.5))
    assert raised.damping > 0 and raised.weight.isfinite().all()


def test_statistics_are_sums_over_all_batches():
    _, x = problem()
    norm, hessian = ActivationNorm(256), Hessian(256)
    for piece in x.split(333):
        norm.update(piece)
        hessian.update(piece)
    assert torch.allclose(norm.norm, x.norm(dim=0), rtol=1e-4)
    assert torch.allclose(hessian.gram.triu(), (x.t() @ x).triu(), rtol=1e-3, atol=1e-1)
    feedback, curvature, damping = hessian.factor(0.01)
    full = x.t() @ x
    assert torch.get_float32_matmul_precision() == "highest"  # what products of other modules use is as it was
    full += 0.01 * full.diagonal().mean() * torch.eye(256)
    assert torch.allclose(feedback * curvature @ feedback.t(), full, rtol=1e-3, atol=full.max() * 1e-5)


def test_block_gradients_are_of_the_first_sequences_whatever_their_length(llama, monkeypatch):
    from hf_prune import sequential

    seen, real = [], sequential.block_gradients
    monkeypatch.setattr(
        sequential,
        "block_gradients",
        lambda block, calls, hidden, *rest: seen.append([x.shape[1] for x in hidden]) or real(block, calls, hidden, *rest),
    )
    sequences = [ids_for(1, length)[0] for length in (24, 9, 24)]
    config = hf_prune.PruningConfig(GBLM(scope="block", gradient_samples=2), sparsity=0.5, n_samples=3, sequence_length=24)
    llama.prune(config, sequences)
    assert seen and all(lengths == [24, 9] for lengths in seen)
