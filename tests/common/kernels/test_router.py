"""The router's kernel against its rules in plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.layers.router import RouterRule, choose
from tests.common.kernels.where import DEVICE, gpu, kernel

pytestmark = kernel

RULES = {
    "Qwen2-MoE": (60, RouterRule(4, normalise=False)),
    "Qwen3-MoE": (128, RouterRule(8)),
    "Mixtral": (8, RouterRule(2)),
    "one choice of an odd number": (7, RouterRule(1)),
    "DeepSeek-V2": (160, RouterRule(6, normalise=False, scaling=16.0, groups=8, chosen_groups=3)),
    "DeepSeek-V3": (
        256, RouterRule(8, "sigmoid", scaling=2.5, groups=8, chosen_groups=4, group_score="two_best", bias=True),
    ),
}  # fmt: skip


def check(num_experts: int, rule: RouterRule, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
    from common.kernels import router  # noqa: PLC0415

    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=random).to(DEVICE, dtype)
    # some of what is chosen by lies below 0: groups that were masked with it would be chosen
    bias = (torch.randn(num_experts, generator=random) * 0.3 - 0.6).to(DEVICE) if rule.bias else None
    weights, experts = router.choose(logits, rule, bias, torch.float32)
    want = choose(logits, rule, bias)
    if dtype == torch.float32:  # else two logits may be equal, and either be chosen
        assert torch.equal(experts, want.experts)
    torch.testing.assert_close(weights, want.weights)


@pytest.mark.parametrize("name", RULES)
def test_every_family_s_rule(name):
    check(*RULES[name], tokens=20, seed=0)


@settings(deadline=None)
@given(
    groups=st.integers(1, 4), size=st.integers(2, 9), data=st.data(), scores=st.sampled_from(["softmax", "sigmoid"]),
    normalise=st.booleans(), two=st.booleans(), bias=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_rule(groups, size, data, scores, normalise, two, bias, seed):
    chosen = data.draw(st.integers(1, groups))
    top = data.draw(st.integers(1, min(chosen * size, 8)))
    kind = "two_best" if two else "best"
    check(groups * size, RouterRule(top, scores, normalise, 1.5, groups, chosen, kind, bias), 3, seed)


def test_of_equal_scores_the_first_is_chosen_and_nan_chooses_somebody():
    from common.kernels import router  # noqa: PLC0415

    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [torch.nan] * 5], device=DEVICE)
    _, experts = router.choose(logits, RouterRule(4), None, torch.float32)
    assert experts[0].tolist() == [1, 2, 4, 0]
    assert all(0 <= e < 5 for e in experts[1].tolist())


def test_padding_chooses_nobody():
    from common.kernels import router  # noqa: PLC0415

    logits = torch.randn(4, 9, device=DEVICE)
    live = torch.tensor([True, False, True, False], device=DEVICE)
    weights, experts = router.choose(logits, RouterRule(3), None, torch.float32, live)
    want = choose(logits, RouterRule(3))
    assert torch.equal(experts, want.experts.where(live[:, None], -1))
    torch.testing.assert_close(weights, want.weights)


@gpu
@pytest.mark.parametrize("name", RULES)
def test_weights_in_bfloat16_and_logits_too(name):
    check(*RULES[name], tokens=300, seed=1, dtype=torch.bfloat16)
