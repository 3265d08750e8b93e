"""A router chooses: eight tokens by hand, the rules of five families of models, and a sentence in a model that speaks.

    python ch07_sglang_radix/experts/demo_1_router.py

On paper a layer has four experts, and every token goes to two of them. Its logits are powers of two in disguise (log 8 is 2.08),
so that each probability can be worked out in the head: 8, 4, 2 and 2 of 16. Then one token is routed by five rules, and three
mistakes are made that no error message would tell of. At the end the bundled mixture routes a question, word by word.
"""

import math
from collections import Counter

import torch

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.layers.moe import MoE
from common.layers.router import RouterRule, Routing, choose
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen.upcycle import MIXTURE_PATH

TOKENS = ("the", "cache", "keeps", "what", "was", "computed", "once", ".")
POWERS = torch.tensor(
    [[8, 4, 2, 2], [1, 8, 1, 6], [2, 2, 8, 4], [4, 2, 1, 1], [1, 2, 4, 1], [9, 4, 2, 1], [2, 5, 1, 8], [1, 1, 6, 8]]
)
# six experts in three groups of two neighbours: what the sigmoids of DeepSeek-V3's router might be
SCORES, BIAS = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.2, 0.3]]), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.7, 0.0])
QUESTION = "What is a radix cache?"


def main() -> None:
    by_hand()
    five_rules()
    mistakes()
    in_a_model()


def words(values: torch.Tensor, digits: int = 3) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values.tolist())


def by_hand() -> None:
    heading("Eight tokens, four experts, two for each")
    logits = POWERS.log()
    weights, experts = choose(logits, RouterRule(top_k=2, normalise=False))
    divided = choose(logits, RouterRule(top_k=2, normalise=True)).weights
    table(
        ("token", "e^logit", "softmax over all", "experts", "as they are", "divided by their sum"),
        [
            (
                token, " ".join(str(int(power)) for power in POWERS[i]), words(logits[i].softmax(dim=0)),
                " ".join(map(str, experts[i].tolist())), words(weights[i]), words(divided[i]),
            )
            for i, token in enumerate(TOKENS)
        ],
    )  # fmt: skip
    load = Counter(experts.flatten().tolist())
    print(f"  rows that each expert computes: {' '.join(str(load[expert]) for expert in range(4))}, together 8 x 2")
    check("weights that are divided sum to 1, others to less", bool((weights.sum(dim=1) < divided.sum(dim=1)).all()))
    check("divided, they are the softmax over the two alone", torch.allclose(
        divided, logits.gather(1, experts).softmax(dim=1)))  # fmt: skip


def five_rules() -> None:
    heading("One token, six experts, and the rules of five families")
    logits = torch.logit(SCORES)  # such that the sigmoids are SCORES
    rules = {
        "Mixtral": RouterRule(2),
        "Qwen2-MoE": RouterRule(2, normalise=False),
        "Qwen3-MoE (norm_topk_prob: true)": RouterRule(2),
        "DeepSeek-V2, best 1 of 3 groups": RouterRule(2, normalise=False, groups=3, chosen_groups=1),
        "DeepSeek-V3, best 1 of 3 groups, bias": RouterRule(
            2, "sigmoid", scaling=2.5, groups=3, chosen_groups=1, group_score="two_best", bias=True
        ),
    }
    rows = []
    for name, rule in rules.items():
        weights, experts = choose(logits, rule, BIAS if rule.bias else None)
        scores = logits.sigmoid() if rule.scores == "sigmoid" else logits.softmax(dim=1)
        chosen = " ".join(map(str, experts[0].tolist()))
        rows.append((name, rule.scores, words(scores[0]), chosen, words(weights[0]), f"{weights.sum():.3f}"))
    table(("", "scores", "of experts 0 .. 5", "chosen", "weights", "sum"), rows)
    print(
        "  V2 and V3 look at one group of two: V2 at the one with the best expert, V3 at the one whose two are best together,"
    )
    print(f"  counted with the bias {words(BIAS, 1)}.")


def mistakes() -> None:
    heading("Three mistakes that run without an error")
    logits = POWERS[:1].log()
    rule = RouterRule(2, normalise=False)
    mistake(
        "Qwen2-MoE: softmax over the two chosen logits, not over all four",
        wrong=words(logits[:, :2].softmax(dim=1)[0]), right=words(choose(logits, rule).weights[0]),
    )  # fmt: skip
    biased = RouterRule(2, "sigmoid", scaling=2.5, bias=True)
    weights, experts = choose(torch.logit(SCORES), biased, BIAS)
    with_bias = (SCORES + BIAS).gather(1, experts)
    mistake(
        f"DeepSeek-V3: a bias that weighs, of the experts {' '.join(map(str, experts[0].tolist()))}",
        wrong=words((with_bias / with_bias.sum() * 2.5)[0]), right=words(weights[0]),
    )  # fmt: skip
    low = torch.tensor([-2.0, -2.0, -3.0, -3.0])
    scores = torch.full((1, 4), 0.5)
    grouped = RouterRule(2, "sigmoid", groups=2, chosen_groups=1, group_score="two_best", bias=True)
    masked = (scores + low).masked_fill(torch.tensor([False, False, True, True]), 0.0)
    mistake(
        f"groups (0 1) and (2 3), scores with their bias {words((scores + low)[0], 1)}: the other group masked with 0, not -inf",
        wrong=str(sorted(masked.topk(2).indices[0].tolist())),
        right=str(sorted(choose(torch.zeros(1, 4), grouped, low).experts[0].tolist())),
    )


def in_a_model() -> None:
    with Engine(str(MIXTURE_PATH), tp_size=1, device="cpu") as engine:
        model, tokenizer = engine.wrapper.model, engine.wrapper.tokenizer
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        said: list[list[Routing]] = [[] for _ in layers]
        for layer, into in zip(layers, said, strict=True):
            layer.gate.route = recording(layer.gate.route, into)
        ids = tokenizer.encode(QUESTION)
        engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1})
        mixture = model.config.mixture
    heading(
        f"The bundled mixture, {mixture.num_experts} experts a layer, {mixture.router.top_k} a token: "
        "experts and weights of each word"
    )
    shown = (0, len(layers) - 1)
    routings = [all_steps(said[i]) for i in shown]
    table(
        ("token", *(f"layer {i}" for i in shown)),
        [
            (repr(tokenizer.decode([token])), *(pairs(routing, t) for routing in routings))
            for t, token in enumerate(ids)
        ],
    )
    for i, into in zip(range(len(layers)), said, strict=True):
        load = Counter(all_steps(into).experts.flatten().tolist())
        print(
            f"  layer {i}: rows of each expert {' '.join(str(load[expert]) for expert in range(mixture.num_experts))}"
        )
    check(
        f"each of {len(ids)} tokens has {mixture.router.top_k} experts in each of {len(layers)} layers",
        all(all_steps(into).experts.shape == (len(ids), mixture.router.top_k) for into in said),
    )
    check("their weights sum to 1", all(
        math.isclose(float(total), 1, abs_tol=1e-5) for into in said for total in all_steps(into).weights.sum(dim=1)))  # fmt: skip


def recording(route, into: list[Routing]):
    def recorded(x: torch.Tensor, live: torch.Tensor | None = None) -> Routing:
        into.append(route(x, live))
        return into[-1]

    return recorded


def all_steps(routings: list[Routing]) -> Routing:
    """Of all steps, one after the other."""
    return Routing(*map(torch.cat, zip(*routings, strict=True)))


def pairs(routing: Routing, token: int) -> str:
    return ", ".join(
        f"{expert} {weight:.2f}"
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True)
    )


if __name__ == "__main__":
    run_main(main)
