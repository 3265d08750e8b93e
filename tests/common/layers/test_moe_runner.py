"""The forms of common/layers/moe_runner.py against the loop of transformers, and against each other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from common.layers.moe_runner import grouped, grouped_mm_takes, loop, pick_runner, sort_by_expert

CPU = torch.device("cpu")
forms = pytest.mark.parametrize("run", [loop, grouped], ids=lambda run: run.__name__)


def problem(tokens, hidden, width, experts, top_k, seed=0, dtype=torch.float32):
    """x, weights, chosen, w13, w2: every token has different experts."""
    generator = torch.Generator().manual_seed(seed)
    x, w13, w2, logits = (
        torch.randn(shape, generator=generator)
        for shape in (
            (tokens, hidden),
            (experts, 2 * width, hidden),
            (experts, hidden, width),
            (tokens, experts),
        )
    )
    weights, chosen = logits.softmax(dim=-1).topk(top_k)
    return x.to(dtype), weights.to(dtype), chosen, (0.2 * w13).to(dtype), (0.2 * w2).to(dtype)


def of_transformers(x, weights, chosen, w13, w2):
    count, hidden, width = w2.shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=count)
    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config)
    theirs.gate_up_proj.data, theirs.down_proj.data = w13, w2
    with torch.no_grad():
        return theirs(x, chosen, weights)


@given(
    tokens=st.integers(0, 20), hidden=st.integers(1, 40), width=st.integers(1, 30), experts=st.integers(1, 9),
    top_k=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_loop_is_that_of_transformers_bit_for_bit(tokens, hidden, width, experts, top_k, seed):
    """float32 on a CPU, any size: none, one, or few tokens; widths that are not aligned; experts that nobody chose."""
    arguments = problem(tokens, hidden, width, experts, min(top_k, experts), seed)
    want = of_transformers(*arguments)
    assert torch.equal(loop(*arguments), want)
    torch.testing.assert_close(grouped(*arguments), want)


@forms
def test_what_is_added_comes_last(run):
    arguments, added = problem(7, 12, 5, 4, 2), torch.randn(7, 12)
    assert torch.equal(run(*arguments, added), run(*arguments) + added)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (60, 33)])
@forms
def test_half_precision_is_float32_but_for_its_rounding(run, hidden, width, dtype):
    x, weights, chosen, w13, w2 = problem(30, hidden, width, 6, 2, dtype=dtype)
    want = loop(x.float(), weights.float(), chosen, w13.float(), w2.float())
    got = run(x, weights, chosen, w13, w2)
    assert got.dtype == dtype
    assert ((got.float() - want).norm() / want.norm()).item() < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@forms
def test_what_is_not_here_adds_nothing_and_two_halves_are_the_whole(run):
    """Experts 0-2 on one rank and 3-6 on another: each rank's numbers are its own, and -1 stands for the other's."""
    x, weights, chosen, w13, w2 = problem(25, 24, 10, 7, 3)
    first = torch.where(chosen < 3, chosen, -1)
    second = torch.where(chosen >= 3, chosen - 3, -1)
    parts = run(x, weights, first, w13[:3], w2[:3]), run(x, weights, second, w13[3:], w2[3:])
    torch.testing.assert_close(sum(parts), loop(x, weights, chosen, w13, w2))
    assert not run(x, weights, torch.full_like(chosen, -1), w13, w2).any()


@forms
def test_columns_over_ranks_are_the_whole(run):
    """Width 11 over three ranks: 4, 4 and 3 columns and one of padding, which is zero."""
    x, weights, chosen, w13, w2 = problem(9, 24, 11, 4, 2)
    gate, up = (F.pad(half, (0, 0, 0, 1)) for half in w13.split(11, dim=1))
    down, parts = F.pad(w2, (0, 1)), []
    for rank in range(3):
        mine = slice(4 * rank, 4 * rank + 4)
        parts.append(run(x, weights, chosen, torch.cat([gate[:, mine], up[:, mine]], dim=1), down[:, :, mine]))
    torch.testing.assert_close(sum(parts), loop(x, weights, chosen, w13, w2))


@forms
def test_an_expert_that_nobody_chose_is_not_computed(run):
    """Its weights may be anything: with NaN in them, 0 x NaN would be NaN."""
    x, weights, chosen, w13, w2 = problem(12, 16, 8, 5, 2)
    chosen = torch.where(chosen == 4, -1, chosen)
    want = run(x, weights, chosen, w13, w2)
    w13[4], w2[4] = torch.nan, torch.nan
    assert torch.equal(run(x, weights, chosen, w13, w2), want)


@forms
def test_arguments_are_left_alone(run):
    arguments = problem(12, 16, 8, 5, 2)
    before = [one.clone() for one in arguments]
    run(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_pairs_are_sorted_by_expert_then_by_token_and_foreign_ones_are_last():
    order, ends = sort_by_expert(torch.tensor([[2, 0], [-1, 2], [0, 2]]), 4)
    assert order.tolist() == [1, 4, 0, 3, 5, 2]  # 0: tokens 0 2; 2: tokens 0 1 2; foreign: token 1
    assert ends.tolist() == [2, 2, 5, 5]
    assert ends.dtype == torch.int32  # the only kind that torch's grouped product takes


@pytest.mark.parametrize(
    ("hidden", "width", "dtype", "calls"),
    [(32, 16, torch.float32, 2), (32, 13, torch.float32, 1), (33, 13, torch.float32, 0), (12, 12, torch.bfloat16, 0)],
)
def test_torch_s_grouped_product_is_taken_where_rows_begin_at_16_bytes(monkeypatch, hidden, width, dtype, calls):
    made, product = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **more: made.append(1) or product(*a, **more))
    grouped(*problem(6, hidden, width, 4, 2, dtype=dtype))
    assert len(made) == calls


def test_it_says_so_itself_where_it_does_not_take_them():
    """Otherwise the rule above would be a guess."""
    weight = torch.randn(3, 8, 33)
    assert not grouped_mm_takes(weight)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        F.grouped_mm(torch.randn(5, 33), weight.transpose(1, 2), offs=torch.tensor([1, 2, 5], dtype=torch.int32))


def test_a_form_is_picked_by_name():
    assert pick_runner("loop", CPU).run is loop
    assert pick_runner("grouped", CPU).run is pick_runner("auto", CPU).run is grouped
    assert not pick_runner("loop", CPU).capturable
    with pytest.raises(ValueError, match=r"^moe_runner='fast' is unknown; use auto, loop, grouped, triton$"):
        pick_runner("fast", CPU)


def test_the_form_for_gpus_is_refused_in_one_line_elsewhere(monkeypatch):
    monkeypatch.setattr("common.layers.moe_runner.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^moe_runner=triton needs an NVIDIA GPU with Triton, and .*; use auto, loop"):
        pick_runner("triton", CPU)
