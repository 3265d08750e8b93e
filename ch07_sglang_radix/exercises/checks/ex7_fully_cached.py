from types import ModuleType

import numpy as np

from ch07_sglang_radix.exercises.checks.engines import an_engine, answers, some_prompts
from ch07_sglang_radix.exercises.checks.trees import tree_with
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.tasks import PageUpdate, PrefillSequence, PrefillTask
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for page_size in (1, 4):
        tree = tree_with(list(range(12)), tree=RadixCache(TokenToKVPool(num_pages=16, page_size=page_size)))
        for prompt in (
            [*range(12), 99],
            list(range(12)),
            list(range(9)),
            list(range(4)),
            [*range(6), 99, 98],
            [99],
            [0],
        ):
            known = next((i for i, token in enumerate(prompt) if token != i), len(prompt))
            cached = min(len(prompt) - 1, known) // page_size * page_size
            what = f"prompt {prompt}, pages of {page_size}, 0 .. 11 cached"
            slots, tokens = ask(
                m.split_prompt, tree, list(prompt), why=f"{what}: {cached} slots and the other tokens", several=2
            )
            expect(f"{what}: is a token computed, to take logits from", len(tokens) > 0, True)
            expect(f"{what}: tokens from the cache that are no whole page", len(slots) % page_size, 0)
            expect(f"{what}: tokens from the cache", len(slots), cached)
            expect(f"{what}: the slots from the cache", slots, tree.match_prefix(prompt).slots[:cached])
            expect(f"{what}: tokens that are computed", tokens, prompt[cached:])
    prompt, engine = some_prompts(1, 20)[0][:20], an_engine()
    (want,) = answers(engine, [prompt], 1)
    slots, tokens = m.split_prompt(engine.tree, prompt)
    row = np.concatenate([slots, engine.pool.alloc(-(-len(tokens) // 4))])
    task = PrefillTask(
        0,
        (PageUpdate(3, 0, tuple((row[::4] // 4).tolist())),),
        (PrefillSequence(3, len(slots), len(tokens), 1),),
        tuple(tokens),
    )
    logits = engine.control.execute(task)
    expect("answer of the real model to a prompt that is cached", logits.argmax(-1), want)
