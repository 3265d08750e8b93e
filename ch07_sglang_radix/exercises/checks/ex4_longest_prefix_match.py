import random
from types import ModuleType

from ch07_sglang_radix.exercises.checks.trees import a_req, tree_with
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from common.teaching.expect import ask, expect

LIMIT, CHECK, SHARED = (
    128,
    32,
    32,
)  # SGLang 0.5, srt/managers/schedule_policy.py: queue, tokens in the tree, tokens in the queue

A, B, C = (list(range(first, first + 100)) for first in (1000, 2000, 3000))
TAILS = [[i, i] for i in range(9)]


def check(m: ModuleType) -> None:
    for prompts, cached, want, why in (
        ([[1, 2], [5, 6], [3, 4]], [], [0, 1, 2], "nothing is cached or shared: as they came"),
        ([B[:5], A[:9], A[:4], B[:5]], [A[:8]], [1, 2, 0, 3], "the longest match first, equals as they came"),
        ([A[:40] + TAILS[0], A[:40] + TAILS[1], B[:9]], [], [0, 2, 1], "one computes what two share, one waits"),
        ([A[:31] + TAILS[0], A[:31] + TAILS[1], B[:9]], [], [0, 1, 2], "31 shared tokens are not worth a wait: as they came"),
        ([A[:32] + TAILS[0], A[:32] + TAILS[1], B[:9]], [], [0, 2, 1], "32 shared tokens are worth it: one waits"),
        ([A[:70] + TAILS[0], A[:70] + TAILS[1], B[:9]], [A[:33]], [0, 1, 2], "33 of 70 tokens are in the tree: nobody waits"),
        ([A[:70] + TAILS[0], A[:70] + TAILS[1], B[:9]], [A[:32]], [0, 2, 1], "32 of 70 tokens are in the tree: one waits"),
        ([A[:60] + TAILS[0], A[:60] + TAILS[1], B[:9], A[:60] + TAILS[2]], [A[:20], B[:4]], [0, 2, 1, 3],
         "20 of 60 tokens are in the tree: two wait, even behind a shorter match"),
        ([A[:32], A[:32], B[:9]], [], [0, 2, 1], "equal prompts of 32 tokens share 32: one waits"),
        ([A[:31], A[:31], B[:9]], [], [0, 1, 2], "equal prompts of 31 tokens share 31: nobody waits"),
        ([A[:33], A[:33], A[:33] + TAILS[0]], [A[:40]], [2, 0, 1],
         "a prompt that is in the tree as a whole has found one token less: its last is computed"),
        ([A[:33], A[:33], B[:9]], [A[:33]], [0, 1, 2], "equal prompts of 33 tokens, all of them in the tree: nobody waits"),
        ([B[:50], A[:50], B[:51], A[:51]], [A[:20]], [1, 0, 2, 3],
         "those who wait keep the order of the queue, however much of them is in the tree"),
        ([B[:50], B[:50], B[:10], A[:50], A[:50], C[:9]], [A[:20], B[:5]], [3, 0, 2, 5, 1, 4],
         "two groups: one of each goes ahead, the rest waits as it came"),
        ([A[:35] + B[:40], A[:35] + C[:40], A[:60]], [], [0, 1, 2], "two share 35 tokens with the first: both wait for it"),
        ([A[:60] + B[:9], A[:60] + C[:9]], [A[:60] + B[:9]], [0, 1], "who finds all of it in the tree is waited for by nobody"),
        ([*([n] for n in range(LIMIT - 1)), A[:9]], [A[:8]], [LIMIT - 1, *range(LIMIT - 1)],
         "128 requests wait: the longest match first"),
        ([*([n] for n in range(LIMIT)), A[:9]], [A[:8]], list(range(LIMIT + 1)), "129 requests wait: as they came"),
    ):  # fmt: skip
        _compare(m, prompts, cached, want, why)

    rng = random.Random(0)
    for _ in range(60):
        heads = [[1000 * h + i for i in range(80)] for h in range(3)]
        cached = [rng.choice(heads)[: rng.choice((10, 20, 32, 33, 50))] for _ in range(2)]
        prompts = [
            rng.choice(heads)[: rng.choice((12, 32, 40, 64))] + [rng.randrange(9)] * rng.choice((0, 3))
            for _ in range(8)
        ]
        _compare(m, prompts, cached, wanted(prompts, cached), "a queue of eight")


def _compare(m: ModuleType, prompts: list[list[int]], cached: list[list[int]], want: list[int], why: str) -> None:
    tree = tree_with(*cached, tree=RadixCache(TokenToKVPool(num_pages=500)))
    waiting = [a_req(i, prompt) for i, prompt in enumerate(prompts)]
    given = list(waiting)
    ordered = ask(m.lpm, given, tree, why=f"{why}: order {want}", several=True)
    expect("the queue itself stays as it is; is it so", given == waiting, True)
    expect(f"{why}: order of the queue", [getattr(req, "rid", req) for req in ordered], want)


def wanted(prompts: list[list[int]], cached: list[list[int]]) -> list[int]:
    """The rule, token by token."""

    def begins_alike(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    if len(prompts) > LIMIT:
        return list(range(len(prompts)))
    matched = [max((begins_alike(one, key) for key in cached), default=0) for one in prompts]
    ahead, back = [], []
    for i, one in enumerate(prompts):
        if matched[i] <= CHECK:
            (back if any(begins_alike(one, prompts[j]) >= SHARED for j in ahead) else ahead).append(i)
    front = set(range(len(prompts))) - set(back)
    return sorted(front, key=lambda i: (-min(matched[i], len(prompts[i]) - 1), i)) + back
