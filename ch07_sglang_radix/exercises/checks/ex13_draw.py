import random
from types import ModuleType

import numpy as np

from common.sampling.batch import uniform
from common.teaching.expect import ask, expect

LARGE = 150_000  # tokens of a vocabulary


def check(m: ModuleType) -> None:
    for what, weights, u, want in (
        ("the first piece", [1, 0, 3], 0.2, 0),
        ("a place between two pieces belongs to the second", [1, 0, 3], 0.25, 2),
        ("the second piece", [1, 0, 3], 0.9, 2),
        ("u is 0, and the first token has no weight", [0, 0, 2, 1], 0.0, 2),
        ("the last tokens have no weight", [1, 1, 0, 0], 1 - 2**-24, 1),
        ("in the order of their ids, not of their weights", [1, 2, 1], 0.2, 0),
        ("weights that sum to 8", [2, 2, 4], 0.5, 2),
        ("one token", [0.5], 0.7, 0),
    ):
        got = ask(m.draw, np.array(weights, dtype=np.float32), u)
        expect(f"{what}: weights {weights}, u = {u}", got, want)
    weights = np.array([3, 1, 0, 4], dtype=np.float32)
    counts = np.bincount([ask(m.draw, weights, i / 64) for i in range(64)], minlength=4)
    expect("weights 3 1 0 4, u = 0, 1/64, 2/64 ..: how often each is drawn", counts, [24, 8, 0, 32])
    _check_large(m)
    _check_batches(m)


def _check_large(m: ModuleType) -> None:
    even = np.full(LARGE, 1 / LARGE, dtype=np.float32)
    for u in (0.5, 0.999, 1 - 2**-24):
        got = ask(m.draw, even, u)
        near = abs(int(got) - int(u * LARGE)) <= 1 and int(got) < LARGE
        expect(
            f"{LARGE} tokens, all equal, u = {u}: token, give or take 1",
            got if not near else int(u * LARGE),
            int(u * LARGE),
        )
    tail = even.copy()
    tail[: LARGE // 2] = 1.0
    tail[LARGE // 2 :] = 1e-6  # together 0.075 of 75,000: a float32 sum loses all of them
    got = ask(m.draw, tail, 1 - 2**-22)
    expect(
        "75,000 tokens of weight 1, then as many of 1e-6, u = 1 - 2**-22: is one of the second half drawn",
        bool(got >= LARGE // 2),
        True,
    )
    ends = np.zeros(LARGE, dtype=np.float32)
    ends[:1000] = 0.1
    got = ask(m.draw, ends, 1 - 2**-53)
    expect("1,000 tokens of weight 0.1, then 149,000 of weight 0, u just below 1", got, 999)


def _check_batches(m: ModuleType) -> None:
    rng = random.Random(0)
    weights = np.random.default_rng(0).random((6, 50)).astype(np.float32)
    seeds, outputs = [rng.randrange(1 << 24) for _ in range(6)], [0, 3, 0, 7, 20, 1]
    alone = [ask(m.draw, row, uniform(seed, n)) for row, seed, n in zip(weights, seeds, outputs, strict=True)]
    _batch(m, "six requests", weights, seeds, outputs, alone)
    for i in range(6):
        _batch(
            m,
            f"request {i} alone in its batch",
            weights[i : i + 1],
            seeds[i : i + 1],
            outputs[i : i + 1],
            alone[i : i + 1],
        )
    _batch(m, "the same six in another order", weights[::-1], seeds[::-1], outputs[::-1], alone[::-1])
    twins = [int(m.draw(weights[0], uniform(seeds[0], n))) for n in (4, 5)]
    same = np.stack([weights[0], weights[0]])
    _batch(m, "one request at its tokens 4 and 5", same, [seeds[0]] * 2, [4, 5], twins)
    expect("does the example draw two different tokens there", twins[0] != twins[1], True)


def _batch(
    m: ModuleType, what: str, weights: np.ndarray, seeds: list[int], outputs: list[int], want: list[int]
) -> None:
    said = f"{what}, who have drawn {outputs} tokens: each its own next number; tokens"
    got = ask(m.draw_batch, weights, list(seeds), list(outputs), uniform, why=f"{said} {want}", several=True)
    expect(said, got, want)
