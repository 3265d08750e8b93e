"""Solution of exercise 4: Blocks of one expert."""

from collections.abc import Callable, Sequence


def pad_to_blocks(chosen: Sequence[Sequence[int]], num_experts: int, block: int) -> tuple[list[int], list[int]]:
    flat = [expert for experts in chosen for expert in experts]
    pairs, owners = [], []
    for expert in range(num_experts):
        mine = [pair for pair, chosen_expert in enumerate(flat) if chosen_expert == expert]
        blocks = -(-len(mine) // block)
        pairs += mine + [len(flat)] * (blocks * block - len(mine))
        owners += [expert] * blocks
    return pairs, owners


def mixture(
    x: Sequence[float], weights: Sequence[Sequence[float]], pairs: Sequence[int], owners: Sequence[int],
    experts: Sequence[Callable[[float], float]],
) -> list[float]:  # fmt: skip
    out = [0.0] * len(x)
    if not owners:
        return out
    top_k, block = len(weights[0]), len(pairs) // len(owners)
    for place, pair in enumerate(pairs):
        token, choice = divmod(pair, top_k)
        if token < len(x):
            out[token] += weights[token][choice] * experts[owners[place // block]](x[token])
    return out
