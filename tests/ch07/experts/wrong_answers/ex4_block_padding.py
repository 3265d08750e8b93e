"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.experts.exercises.solutions import ex4_block_padding as right


def filled_with(value):
    def pad(chosen, num_experts, block):
        pairs, owners = right.pad_to_blocks(chosen, num_experts, block)
        sentinel = sum(map(len, chosen))
        return [value(chosen) if pair == sentinel else pair for pair in pairs], owners

    return pad


def a_block_for_everybody(chosen, num_experts, block):
    pairs, owners, flat = [], [], [expert for experts in chosen for expert in experts]
    for expert in range(num_experts):
        mine = [pair for pair, e in enumerate(flat) if e == expert]
        blocks = max(-(-len(mine) // block), 1)
        pairs += mine + [len(flat)] * (blocks * block - len(mine))
        owners += [expert] * blocks
    return pairs, owners


def filled_up_at_the_end_alone(chosen, num_experts, block):
    flat = [expert for experts in chosen for expert in experts]
    order = sorted((pair for pair in range(len(flat)) if flat[pair] >= 0), key=lambda pair: flat[pair])
    owners = [flat[pair] for pair in order[::block]]
    return order + [len(flat)] * (len(owners) * block - len(order)), owners


def a_block_more_than_needed(chosen, num_experts, block):
    pairs, owners, flat = [], [], [expert for experts in chosen for expert in experts]
    for expert in sorted({e for e in flat if e >= 0}):
        mine = [pair for pair, e in enumerate(flat) if e == expert]
        blocks = len(mine) // block + 1
        pairs += mine + [len(flat)] * (blocks * block - len(mine))
        owners += [expert] * blocks
    return pairs, owners


def foreign_ones_too(chosen, num_experts, block):
    known = [[max(expert, 0) for expert in experts] for experts in chosen]
    return right.pad_to_blocks(known, num_experts, block)


def foreign_ones_belong_to_the_last(chosen, num_experts, block):
    known = [[expert % num_experts for expert in experts] for experts in chosen]
    return right.pad_to_blocks(known, num_experts, block)


def tokens_instead_of_pairs(chosen, num_experts, block):
    pairs, owners = right.pad_to_blocks(chosen, num_experts, block)
    return [pair // len(chosen[0]) for pair in pairs], owners


def backwards(chosen, num_experts, block):
    pairs, owners = right.pad_to_blocks(chosen, num_experts, block)
    return [
        pair for i in range(len(owners)) for pair in sorted(pairs[i * block : (i + 1) * block], reverse=True)
    ], owners


def row_of_the_pair(x, weights, pairs, owners, experts):
    out = [0.0] * len(x)
    block = len(pairs) // max(len(owners), 1)
    for place, pair in enumerate(pairs):
        if pair < len(x):
            out[pair] += weights[pair][0] * experts[owners[place // block]](x[pair])
    return out


def the_last_pair_stands_for_what_is_missing(x, weights, pairs, owners, experts):
    last = len(x) * len(weights[0]) - 1
    return right.mixture(x, weights, [min(pair, last) for pair in pairs], owners, experts)


def without_weights(x, weights, pairs, owners, experts):
    return right.mixture(x, [[1.0] * len(row) for row in weights], pairs, owners, experts)


def weights_inside(x, weights, pairs, owners, experts):
    out = [0.0] * len(x)
    block = len(pairs) // max(len(owners), 1)
    for place, pair in enumerate(pairs):
        token, choice = divmod(pair, len(weights[0]))
        if token < len(x):
            out[token] += experts[owners[place // block]](weights[token][choice] * x[token])
    return out


def the_last_choice_alone(x, weights, pairs, owners, experts):
    out = [0.0] * len(x)
    block = len(pairs) // max(len(owners), 1)
    for place, pair in enumerate(pairs):
        token, choice = divmod(pair, len(weights[0]))
        if token < len(x):
            out[token] = weights[token][choice] * experts[owners[place // block]](x[token])
    return out


WRONG = [
    ({"pad_to_blocks": filled_with(lambda chosen: 0)}, "pairs"),
    ({"pad_to_blocks": filled_with(lambda chosen: -1)}, "pairs"),
    ({"pad_to_blocks": filled_with(len)}, "pairs"),
    ({"pad_to_blocks": a_block_for_everybody}, "the expert of each block"),
    ({"pad_to_blocks": filled_up_at_the_end_alone}, "pad_to_blocks([[2, 0], [2, 1], [0, 2]], 3, 2)"),
    ({"pad_to_blocks": a_block_more_than_needed}, "the expert of each block"),
    ({"pad_to_blocks": foreign_ones_too}, "pad_to_blocks([[-1, 0], [1, -1]], 2, 2)"),
    ({"pad_to_blocks": foreign_ones_belong_to_the_last}, "pad_to_blocks([[-1, 0], [1, -1]], 2, 2)"),
    ({"pad_to_blocks": tokens_instead_of_pairs}, "pairs"),
    ({"pad_to_blocks": backwards}, "pairs"),
    ({"mixture": row_of_the_pair}, "mixture("),
    ({"mixture": the_last_pair_stands_for_what_is_missing}, "mixture([10.0, 1.0]"),
    ({"mixture": without_weights}, "mixture([10.0, 1.0]"),
    ({"mixture": weights_inside}, "mixture([10.0, 1.0]"),
    ({"mixture": the_last_choice_alone}, "mixture([3.0, 5.0, 7.0]"),
]
