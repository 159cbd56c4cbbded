import math

import pytest
import torch
from reference import keep_highest

from hf_prune.patterns import (
    NM,
    Structured,
    Unstructured,
    check_flag,
    check_number,
    kept_by_group,
    lowest,
    lowest_by_row,
    lowest_of_all,
    parse,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_exact_count_with_ties(dtype, sparsity, group):
    scores = torch.randint(0, 4, (37, 100)).to(dtype)
    pattern = Unstructured(sparsity)
    mask = pattern.mask(scores, group)
    assert torch.equal(mask, keep_highest(scores, pattern, group))
    if group == "row":
        assert ((~mask).sum(1) == pattern.count(100)).all()
    else:
        assert (~mask).sum() == pattern.count(3700)


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 16), (3, 7)])
def test_nm_keeps_n(n, m):
    scores = torch.randint(0, 5, (9, 16 * m)).float()
    mask = NM(n, m).mask(scores)
    assert torch.equal(mask, keep_highest(scores, NM(n, m), "row"))
    assert (mask.view(-1, m).sum(1) == n).all()
    assert NM(n, m).violations(mask) == 0


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 8, 16, 255, 256, 300])
def test_kept_by_group_is_the_plain_sum(m):
    whole = torch.rand(4 * m, 4 * m + 3) < torch.linspace(0, 1, 4 * m)[:, None]
    whole[0], whole[-1] = False, True
    flat, misaligned = whole.view(-1), torch.from_numpy(whole.numpy().reshape(-1)[3 : 3 + 8 * m])
    views = [whole[:, 3:], whole.t(), whole[::2, 1 : 1 + m], flat[1 : 1 + 4 * m], flat[2 : 2 + 4 * m], misaligned]
    for mask in [*views, torch.stack([whole, ~whole]).transpose(1, 2), whole[:0]]:
        expected = mask.reshape(-1, m).sum(1)
        assert torch.equal(kept_by_group(mask, m).long(), expected)
        for n in {1, m // 2, m - 1} - {0, m}:
            assert NM(n, m).violations(mask) == int((expected > n).sum())


def test_each_row_with_its_own_count():
    scores = torch.randint(0, 4, (6, 20)).float()
    counts = torch.tensor([0, 20, 7, 7, 1, 19])
    chosen = lowest_by_row(scores, counts)
    assert torch.equal(chosen, torch.cat([lowest(row[None], int(count)) for row, count in zip(scores, counts)]))


@pytest.mark.parametrize("value", ["1", None, True, math.nan, math.inf, -0.1])
def test_numbers_and_flags_that_are_none(value):
    with pytest.raises(ValueError, match="damping must be a number of at least 0, got"):
        check_number("damping", value)
    if value is not True:
        with pytest.raises(ValueError, match="fast must be True or False, got"):
            check_flag("fast", value)
    with pytest.raises(ValueError, match="above 0"):
        check_number("damping", 0, above=True)


def test_float_counts():
    assert Unstructured(0.29).count(100) == 29  # 0.29 * 100 is 28.999999999999996


def test_jointly_is_one_comparison():
    parts = [torch.tensor([[1.0, 9.0]]), torch.tensor([[2.0], [3.0], [8.0]])]
    gone = lowest_of_all(parts, 3)
    assert gone[0].tolist() == [[True, False]] and gone[1].tolist() == [[True], [True], [False]]


@pytest.mark.parametrize(
    "words,pattern",
    [("2:4", NM(2, 4)), ("unstructured", Unstructured(0.5)), ("unstructured:0.6", Unstructured(0.6)), (0.3, Unstructured(0.3)), ("60%", Unstructured(0.6)),
     ("parameters:20000000", Structured(parameters=20_000_000)), (0.123456789, Unstructured(0.123456789)), ("heads:0.5,ffn:0.25", Structured((("heads", 0.5), ("ffn", 0.25))))],
)  # fmt: skip
def test_parse(words, pattern):
    assert parse(words) == pattern
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "words", ["heads:0.25,heads:0.5", "4:2", "3:5:1", "4:4", "0:4", "half", "", "1.0", "-0.5", 1.0, math.nan, None, True]
)
def test_parse_refuses(words):
    with pytest.raises((ValueError, TypeError), match="pattern|sparsity|one share"):
        parse(words)


def test_error_says_the_way_out():
    with pytest.raises(ValueError, match="2:4"):
        parse("4:2")
