"""The real engine with the bundled tiny model: its answers must stay as they were, and no page may be lost."""

import random

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from common.teaching.expect import expect

MAX_STEPS = 400  # a wrong answer may keep an engine busy for ever


def an_engine(kind: type[TPScheduler] = TPScheduler, *, pool: int = 256, **options) -> TPScheduler:
    """Pages of 4; every step is followed by a count of all pages."""
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 4, max_total_tokens=pool, max_running_requests=8)
    return kind(wrapper, check=True, **options)


def answers(
    engine: TPScheduler, prompts: list[list[int]], max_new_tokens: int, stop: tuple[int, ...] = ()
) -> list[list[int]]:
    """Greedy answers to prompts that all arrive at once."""
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, stop_token_ids=stop)
    ids = [engine.add_request(input_ids=prompt, sampling_params=params) for prompt in prompts]
    last = engine.step_number + MAX_STEPS

    def nobody_comes(step: int) -> bool:
        assert step < last, f"the real engine: got no end after {MAX_STEPS} steps, wanted {len(prompts)} answers"
        return False

    results = engine.process_requests(arrivals=nobody_comes)
    expect("requests of the real engine that never came to an end", [i for i in ids if i not in results], [])
    return [results[i].output_ids for i in ids]


def some_prompts(count: int, shared: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    head = [rng.randrange(300, 3000) for _ in range(shared)]
    return [head + [rng.randrange(300, 3000) for _ in range(3 + i % 4)] for i in range(count)]


def same(got: list[list[int]], want: list[list[int]]) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    expect(f"in the real engine, requests of {len(want)} with another answer than before", wrong, [])


def nothing_held(engine: TPScheduler) -> None:
    tree = engine.tree
    expect("all requests have ended: slots that are still locked", tree.protected_size, 0)
    left = engine.pool.size - engine.pool.free_slots - tree.evictable_size
    expect("all requests have ended: slots that are neither free nor in the tree", left, 0)
