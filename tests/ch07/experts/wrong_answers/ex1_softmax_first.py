"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from math import exp

from ch07_sglang_radix.experts.exercises.solutions import ex1_softmax_first as right


def softmax_of_the_chosen(logits, k, normalise):
    return right.route(logits, k, normalise=True)


def never_divided(logits, k, normalise):
    return right.route(logits, k, normalise=False)


def divided_by_all(logits, k, normalise):
    routed = right.route(logits, k, normalise=False)
    return [(expert, weight / len(logits)) for expert, weight in routed] if normalise else routed


def sigmoid(logits, k, normalise):
    scores = [1 / (1 + exp(-min(max(logit, -700), 700))) for logit in logits]
    chosen = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:k]
    total = sum(scores[expert] for expert in chosen) if normalise else 1.0
    return [(expert, scores[expert] / total) for expert in chosen]


def large_powers(logits, k, normalise):
    powers = [exp(logit) for logit in logits]
    chosen = sorted(range(len(powers)), key=lambda expert: -powers[expert])[:k]
    total = sum(powers[expert] for expert in chosen) if normalise else sum(powers)
    return [(expert, powers[expert] / total) for expert in chosen]


def by_number(logits, k, normalise):
    return sorted(right.route(logits, k, normalise))


def the_last_of_two_alike(logits, k, normalise):
    turned = right.route(logits[::-1], k, normalise)
    return [(len(logits) - 1 - expert, weight) for expert, weight in turned]


def weights_alone(logits, k, normalise):
    return [weight for _, weight in right.route(logits, k, normalise)]


WRONG = [
    (
        {"route": softmax_of_the_chosen},
        "2, normalise=False): got [(0, 0.625), (1, 0.375)], wanted [(0, 0.5), (1, 0.3)]",
    ),
    ({"route": never_divided}, "2, normalise=True)"),
    ({"route": divided_by_all}, "normalise=True)"),
    ({"route": sigmoid}, "normalise=False)"),
    ({"route": large_powers}, "OverflowError"),
    ({"route": by_number}, "got [(1, 0.3), (2, 0.5)], wanted [(2, 0.5), (1, 0.3)]"),
    ({"route": the_last_of_two_alike}, "wanted [(1, 0.25), (2, 0.25), (4, 0.25)]"),
    ({"route": weights_alone}, "wanted [(0, 0.5), (1, 0.3)]"),
]
