"""What a config.json says about experts -> a Mixture; one function a family, named in schema.ARCHITECTURES.

`read` are the values of the architecture's fields (schema.py); errors name the file and the keys.
"""

from typing import Any

from common.layers.moe import Mixture
from common.layers.router import RouterRule
from common.models.json_file import json_shown

MOST_LAYERS = 1 << 16


def qwen_moe(read: dict[str, Any], where: str) -> Mixture | None:
    """Qwen2-MoE and Qwen3-MoE; None if no layer has experts."""
    step, dense = read["decoder_sparse_step"], set(read["mlp_only_layers"] or ())
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(_layers(read, where)))
    if not any(sparse):
        return None
    shared = read.get("shared_expert_intermediate_size", 0)
    return Mixture(
        num_experts=_experts(read, where),
        router=RouterRule(top_k=read["num_experts_per_tok"], normalise=read["norm_topk_prob"]),
        intermediate_size=read["moe_intermediate_size"],
        sparse=sparse,
        shared_size=shared,
        shared_gate=shared > 0,
    )


def mixtral(read: dict[str, Any], where: str) -> Mixture:
    """Experts in every layer, as wide as the MLP of the dense model would be."""
    return Mixture(
        num_experts=_experts(read, where),
        router=RouterRule(top_k=read["num_experts_per_tok"], normalise=True),
        intermediate_size=read["intermediate_size"],
        sparse=(True,) * _layers(read, where),
    )


def deepseek_v2(read: dict[str, Any], where: str) -> Mixture | None:
    """Softmax over all; with group_limited_greedy only experts of the best groups can be chosen. Never divided by the sum."""
    limited = read["topk_method"] == "group_limited_greedy"
    return _deepseek(read, where, limited, normalise=False)


def deepseek_v3(read: dict[str, Any], where: str) -> Mixture | None:
    """A sigmoid of each; a group counts by its two best, and a bias by which training balanced the load helps to choose."""
    return _deepseek(
        read, where, True, scores="sigmoid", normalise=read["norm_topk_prob"], group_score="two_best", bias=True
    )


def _deepseek(read: dict[str, Any], where: str, limited: bool, **rule: Any) -> Mixture | None:
    """limited: to some groups of experts."""
    first, layers = read["first_k_dense_replace"], _layers(read, where)
    if first >= layers:
        return None
    if read["num_experts_per_tok"] is None:
        raise ValueError(
            f"{where}: num_experts_per_tok=null, but layers from {first} on have experts; it must be an integer"
        )
    experts = _experts(read, where, "n_routed_experts")
    if limited:
        rule |= _groups(read, where, experts)
    return Mixture(
        num_experts=experts,
        router=RouterRule(
            read["num_experts_per_tok"], scaling=read["routed_scaling_factor"], float32_gate=True, **rule
        ),
        intermediate_size=read["moe_intermediate_size"],
        sparse=tuple(layer >= first for layer in range(layers)),
        shared_size=read["n_shared_experts"] * read["moe_intermediate_size"],
    )


def _groups(read: dict[str, Any], where: str, experts: int) -> dict[str, int]:
    groups, chosen, top_k = read["n_group"], read["topk_group"], read["num_experts_per_tok"]
    said = f"{where}: n_group={json_shown(groups)}, topk_group={json_shown(chosen)}, n_routed_experts={json_shown(experts)}"
    if groups is None or chosen is None or chosen > groups or experts % groups:
        raise ValueError(f"{said}: groups must divide the experts, and topk_group of them are chosen from")
    if experts // groups < 2 or chosen * (experts // groups) < top_k:
        raise ValueError(
            f"{said}: a group needs two experts, and the chosen ones num_experts_per_tok={json_shown(top_k)} together"
        )
    return {"groups": groups, "chosen_groups": chosen}


def _layers(read: dict[str, Any], where: str) -> int:
    """num_hidden_layers; each has an entry in `sparse`, before the weight files can say whether there are so many."""
    layers = read["num_hidden_layers"]
    if layers > MOST_LAYERS:
        raise ValueError(
            f"{where}: num_hidden_layers={json_shown(layers)}; a mixture of experts has at most {MOST_LAYERS} here"
        )
    return layers


def _experts(read: dict[str, Any], where: str, key: str = "num_experts") -> int:
    count, top_k = read[key], read["num_experts_per_tok"]
    if top_k > count:
        raise ValueError(
            f"{where}: num_experts_per_tok={json_shown(top_k)} is more than there are experts, {key}={json_shown(count)}"
        )
    return count
