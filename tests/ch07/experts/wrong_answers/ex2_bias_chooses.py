"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.experts.exercises.solutions import ex2_bias_chooses as right


def the_bias_weighs(scores, bias, k, scaling):
    return right.choose(
        [score + more for score, more in zip(scores, bias, strict=True)], [0.0] * len(scores), k, scaling
    )


def the_bias_is_left_out(scores, bias, k, scaling):
    return right.choose(scores, [0.0] * len(scores), k, scaling)


def divided_by_all_scores(scores, bias, k, scaling):
    return [(expert, scores[expert] / sum(scores) * scaling) for expert, _ in right.choose(scores, bias, k, scaling)]


def divided_by_what_chose(scores, bias, k, scaling):
    chosen = [expert for expert, _ in right.choose(scores, bias, k, scaling)]
    total = sum(scores[expert] + bias[expert] for expert in chosen)
    return [(expert, scores[expert] / total * scaling) for expert in chosen]


def scaled_before_it_is_divided(scores, bias, k, scaling):
    return right.choose(scores, bias, k, 1.0)


def not_divided(scores, bias, k, scaling):
    return [(expert, scores[expert] * scaling) for expert, _ in right.choose(scores, bias, k, scaling)]


def in_order_of_their_weights(scores, bias, k, scaling):
    return sorted(right.choose(scores, bias, k, scaling), key=lambda pair: -pair[1])


def the_hotter_the_more(bias, load, step):
    return right.nudge(bias, load, -step)


def as_far_as_it_is_off(bias, load, step):
    mean = sum(load) / len(load)
    return [old + step * (mean - tokens) for old, tokens in zip(bias, load, strict=True)]


def nobody_keeps_his(bias, load, step):
    mean = sum(load) / len(load)
    return [old + (step if tokens < mean else -step) for old, tokens in zip(bias, load, strict=True)]


def against_half_of_the_most(bias, load, step):
    half = max(load) / 2
    return [old + step * ((tokens < half) - (tokens > half)) for old, tokens in zip(bias, load, strict=True)]


WRONG = [
    ({"choose": the_bias_weighs}, "choose([0.8, 0.6, 0.2], [0.0, 0.0, 0.9], 2, 2.5)"),
    ({"choose": the_bias_is_left_out}, "wanted [(2, 0.5), (0, 2.0)]"),
    ({"choose": divided_by_all_scores}, "choose("),
    ({"choose": divided_by_what_chose}, "choose("),
    ({"choose": scaled_before_it_is_divided}, "wanted [(2, 0.5), (0, 2.0)]"),
    ({"choose": not_divided}, "choose("),
    ({"choose": in_order_of_their_weights}, "got [(0, 2.0), (2, 0.5)], wanted [(2, 0.5), (0, 2.0)]"),
    ({"nudge": the_hotter_the_more}, "nudge([0.5, 0.0, 0.0], [9, 4, 5], 0.25)"),
    ({"nudge": as_far_as_it_is_off}, "nudge("),
    ({"nudge": nobody_keeps_his}, "nudge([1.0, 1.0, 1.0], [6, 6, 6], 0.5)"),
    ({"nudge": against_half_of_the_most}, "nudge("),
]
