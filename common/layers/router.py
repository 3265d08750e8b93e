"""Which experts a token is sent to, and how much each counts.

Every rule that the models here have is one function, `choose`, of the router's logits [T, E]:

                    scores              chosen by                    weights                             scaling
    Mixtral         softmax over all    score                        divided by their sum                1
    Qwen2-MoE       softmax over all    score                        as they are, unless norm_topk_prob  1
    Qwen3-MoE       softmax over all    score                        divided by their sum (norm_topk_prob)  1
    DeepSeek-V2     softmax over all    score, in the best groups    as they are                         routed_scaling_factor
    DeepSeek-V3     sigmoid of each     score + bias, in groups      scores divided by their sum         routed_scaling_factor

Scores are float32 and of all E experts: softmax over the k chosen ones alone would be another number, unless it is divided by
the sum afterwards. A group counts by its best expert (V2), or the sum of its two best (V3). What lies in other groups is -inf
and not 0: with a bias a score may be below 0, and a masked 0 would win. A bias chooses and never weighs.

transformers 5.23: Qwen2MoeTopKRouter, MixtralTopKRouter, DeepseekV2TopkRouter, DeepseekV3TopkRouter in models/*/modeling_*.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from common.layers.linear import loadable, multiply

try:  # a CPU build of torch comes without Triton
    from common.kernels import router as fused
except ImportError:
    fused = None


@dataclass(frozen=True)
class RouterRule:
    """How a model's router chooses.

    top_k: experts a token (k). scores: softmax | sigmoid. normalise: weights are divided by their sum, then multiplied by
    `scaling`. groups: the E experts lie in so many groups of adjacent ones, of which chosen_groups may be chosen from,
    ranked by group_score. bias: an e_score_correction_bias [E] is added for the choice. float32_gate: the product with the
    gate is float32, too; otherwise it is in the model's dtype, and only what follows is float32.
    """

    top_k: int
    scores: str = "softmax"
    normalise: bool = True
    scaling: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_score: str = "best"  # or two_best: the sum of the two best
    bias: bool = False
    float32_gate: bool = False


class Routing(NamedTuple):
    """weights [T, k], and the experts [T, k] (int64, numbers in the whole model) that they belong to."""

    weights: torch.Tensor
    experts: torch.Tensor


def choose(logits: torch.Tensor, rule: RouterRule, bias: torch.Tensor | None = None) -> Routing:
    """logits [T, E] of the gate, bias [E] -> k experts of each token with float32 weights, best first.

    The order is that of the choice: with a bias it need not be that of the weights.
    """
    logits = logits.float()
    scores = logits.sigmoid() if rule.scores == "sigmoid" else logits.softmax(dim=-1)  # [T, E]
    choosing = scores if bias is None else scores + bias
    if rule.chosen_groups < rule.groups:
        choosing = choosing.masked_fill(~_in_best_groups(choosing, rule), -torch.inf)
    experts = choosing.topk(rule.top_k, dim=-1).indices  # [T, k]
    weights = scores.gather(1, experts)
    if rule.normalise:
        # sigmoids may all be 0, the best of a softmax never is; the library's floor does not change any other sum
        weights = weights / (weights.sum(dim=-1, keepdim=True) + (1e-20 if rule.scores == "sigmoid" else 0.0))
    return Routing(weights * rule.scaling if rule.scaling != 1.0 else weights, experts)


def _in_best_groups(choosing: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    """choosing [T, E] -> [T, E], whether an expert lies in one of the chosen groups."""
    grouped = choosing.unflatten(-1, (rule.groups, -1))  # [T, groups, E/groups]
    counting = 2 if rule.group_score == "two_best" else 1
    ranks = grouped.topk(counting, dim=-1).values.sum(dim=-1)  # [T, groups]
    best = ranks.topk(rule.chosen_groups, dim=-1).indices
    allowed = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, best, True)
    return allowed.repeat_interleave(grouped.shape[-1], dim=-1)


class Router(nn.Module):
    """The gate of a layer: x [T, D] -> Routing, weights in x.dtype. Whole on every rank, which all come to the same choice."""

    def __init__(self, hidden_size: int, num_experts: int, rule: RouterRule):
        super().__init__()
        self.rule = rule
        self.weight = loadable(
            torch.zeros(num_experts, hidden_size), self.load_weight, {None: (num_experts, hidden_size)}
        )
        self.e_score_correction_bias = None
        if rule.bias:  # float32 in every checkpoint: the differences between scores are small
            values = torch.zeros(num_experts, dtype=torch.float32)
            self.e_score_correction_bias = loadable(values, self.load_bias, {None: (num_experts,)})

    def load_weight(self, source, shard_id=None) -> None:
        self.weight.copy_(source.read(0, 0, source.shape[0]))

    def load_bias(self, source, shard_id=None) -> None:
        self.e_score_correction_bias.copy_(source.read(0, 0, source.shape[0]))

    def route(self, x: torch.Tensor, live: torch.Tensor | None = None) -> Routing:
        """live [T]: which rows are real, None for all; the others choose expert -1, nobody, whose weights need not be read."""
        logits = multiply(x, self.weight, dtype=torch.float32 if self.rule.float32_gate else None)  # [T, E]
        if fused and logits.is_cuda:
            return Routing(*fused.choose(logits, self.rule, self.e_score_correction_bias, x.dtype, live))
        weights, experts = choose(logits, self.rule, self.e_score_correction_bias)
        if live is not None:
            experts = experts.where(live.unsqueeze(1), -1)
        return Routing(weights.to(x.dtype), experts)
