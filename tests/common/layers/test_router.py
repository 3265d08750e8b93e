"""The rules of common/layers/router.py against transformers' own routers, and what goes wrong without their details."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from common.layers.router import Router, RouterRule, choose
from tests.common.in_memory import InMemory

D, E = 32, 12
GROUPS = {"n_group": 4, "topk_group": 2}
V2 = {"n_routed_experts": E, "num_experts_per_tok": 3, "hidden_size": D, "routed_scaling_factor": 2.5}
QWEN = {"num_experts": E, "num_experts_per_tok": 4, "hidden_size": D}
V3 = RouterRule(
    3, "sigmoid", True, 2.5, groups=4, chosen_groups=2, group_score="two_best", bias=True, float32_gate=True
)
CASES = {
    "Qwen2-MoE": (Qwen2MoeTopKRouter(Qwen2MoeConfig(**QWEN)), RouterRule(4, normalise=False)),
    "Qwen2-MoE, norm_topk_prob": (Qwen2MoeTopKRouter(Qwen2MoeConfig(**QWEN, norm_topk_prob=True)), RouterRule(4)),
    "Qwen3-MoE": (Qwen3MoeTopKRouter(Qwen3MoeConfig(**QWEN, norm_topk_prob=True)), RouterRule(4)),
    "Qwen3-MoE, one expert": (
        Qwen3MoeTopKRouter(Qwen3MoeConfig(**{**QWEN, "num_experts_per_tok": 1})), RouterRule(1, normalise=False)),
    "Mixtral": (MixtralTopKRouter(MixtralConfig(num_local_experts=E, num_experts_per_tok=2, hidden_size=D)), RouterRule(2)),
    "DeepSeek-V2-Lite": (
        DeepseekV2TopkRouter(DeepseekV2Config(**V2, topk_method="greedy")),
        RouterRule(3, normalise=False, scaling=2.5, float32_gate=True)),
    "DeepSeek-V2": (
        DeepseekV2TopkRouter(DeepseekV2Config(**V2, **GROUPS, topk_method="group_limited_greedy")),
        RouterRule(3, normalise=False, scaling=2.5, groups=4, chosen_groups=2, float32_gate=True)),
    "DeepSeek-V3": (DeepseekV3TopkRouter(DeepseekV3Config(**V2, **GROUPS, norm_topk_prob=True)), V3),
}  # fmt: skip


def pair(name, dtype):
    """(ours, theirs) with the same numbers."""
    theirs, rule = CASES[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(E, D, generator=generator).to(dtype)
    theirs.weight.data = weight
    torch.set_default_dtype(dtype)
    mine = Router(D, E, rule)
    torch.set_default_dtype(torch.float32)
    mine.weight.weight_loader(InMemory(weight))
    if rule.bias:
        theirs.e_score_correction_bias = 0.5 * torch.randn(E, generator=generator)
        mine.e_score_correction_bias.weight_loader(InMemory(theirs.e_score_correction_bias))
    return mine, theirs, torch.randn(64, D, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_experts_and_weights_are_those_of_transformers(name, dtype):
    mine, theirs, x = pair(name, dtype)
    weights, experts = mine.route(x)
    with torch.no_grad():
        _, want, chosen = theirs(x)
    order, their_order = experts.argsort(dim=1), chosen.argsort(dim=1)
    assert torch.equal(experts.gather(1, order), chosen.gather(1, their_order))
    assert torch.equal(weights.gather(1, order), want.to(dtype).gather(1, their_order))
    assert weights.dtype == dtype
    assert experts.dtype == torch.int64


def test_no_tokens_are_routed_nowhere():
    mine, _, x = pair("DeepSeek-V3", torch.float32)
    weights, experts = mine.route(x[:0])
    assert weights.shape == experts.shape == (0, 3)


# --- the details


def test_rows_of_padding_choose_nobody_and_change_nobody():
    mine, _, x = pair("Qwen3-MoE", torch.float32)
    live = torch.arange(len(x)) % 3 > 0
    weights, experts = mine.route(x, live)
    want = mine.route(x)
    assert (experts[~live] == -1).all()
    assert torch.equal(experts[live], want.experts[live])
    assert torch.equal(weights[live], want.weights[live])


def test_the_softmax_is_over_all_experts_so_that_weights_left_as_they_are_do_not_sum_to_one():
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    as_they_are = choose(logits, RouterRule(2, normalise=False)).weights
    assert as_they_are.sum() < 0.9
    torch.testing.assert_close(as_they_are[0], logits.softmax(dim=-1)[0, :2])
    torch.testing.assert_close(choose(logits, RouterRule(2)).weights, logits[:, :2].softmax(dim=-1))


def test_scores_are_float32_whatever_the_logits_are():
    logits = torch.tensor([[8.0, 8.03125, 0.0]]).bfloat16()  # neighbours in bfloat16
    assert choose(logits, RouterRule(1)).weights.dtype == torch.float32
    assert choose(logits, RouterRule(2, normalise=False)).weights[0, 0] != 0.5


def test_a_bias_chooses_and_never_weighs():
    rule = RouterRule(1, "sigmoid", normalise=False, bias=True)
    weights, experts = choose(torch.tensor([[1.0, 0.0]]), rule, torch.tensor([0.0, 5.0]))
    assert experts.tolist() == [[1]]
    assert weights.tolist() == [[0.5]]  # the sigmoid of 0, without the bias


def test_experts_of_other_groups_cannot_win_with_scores_below_zero():
    """Groups (0 1), (2 3), one chosen. A bias makes all scores negative: masked with 0, another group's expert would win."""
    rule = RouterRule(2, "sigmoid", groups=2, chosen_groups=1, group_score="two_best", bias=True)
    bias = torch.tensor([-2.0, -2.0, -3.0, -3.0])
    assert sorted(choose(torch.zeros(1, 4), rule, bias).experts[0].tolist()) == [0, 1]


@pytest.mark.parametrize(("group_score", "best"), [("best", 0), ("two_best", 1)])
def test_a_group_counts_by_its_best_or_by_its_two_best(group_score, best):
    logits = torch.tensor([[3.0, 0.0, 2.9, 2.9]])
    rule = RouterRule(1, "sigmoid", groups=2, chosen_groups=1, group_score=group_score)
    assert choose(logits, rule).experts[0, 0] // 2 == best


def test_sigmoids_that_are_all_zero_do_not_give_nan():
    weights, _ = choose(torch.full((1, 4), -200.0), RouterRule(2, "sigmoid"))
    assert weights.tolist() == [[0.0, 0.0]]
