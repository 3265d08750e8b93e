"""The product of everything that may not change an answer, a hundred draws of it, against transformers.

pytest tests/ch07/test_product.py                              # 100 cases, as CI runs it; `make test` draws 10
pytest tests/ch07/test_product.py --hypothesis-profile=long    # 3000
"""

import random
from functools import cache

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.schedule_policy import POLICIES
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

NEW_TOKENS = 10
CHUNKS = {7: {1: 7, 4: 8, 16: 16}, 64: {1: 64, 4: 64, 16: 64}, -1: {1: -1, 4: -1, 16: -1}}  # by page size
SMALL_POOL = 112  # tokens; the longest request needs 74, some of them together do not fit


def family(seed: int = 0) -> list[list[int]]:
    """Prompts that share beginnings in a tree: three roots, branches of branches, equal ones, one of a single token."""
    rng = random.Random(seed)
    words = [[rng.randrange(1000) for _ in range(20)] for _ in range(12)]
    prompts = [words[a] + words[b][: rng.randrange(1, 20)] for a in (0, 1, 2) for b in (3, 4, 5)]
    prompts += [words[0] + words[3] + words[c] for c in (6, 7)] + [words[0] + words[3], words[0], [5]]
    return [*prompts, prompts[0], prompts[9]]


PROMPTS = family()


def _with_a_tree(options):
    """One policy is refused without one."""
    refused = options["schedule_policy"] == "shortest-prefill-first" and options["disable_radix_cache"]
    return options | {"disable_radix_cache": False} if refused else options


cases = st.fixed_dictionaries({
    "page_size": st.sampled_from([1, 4, 16]),
    "chunk": st.sampled_from([7, 64, -1]),
    "small_pool": st.booleans(),
    "options": st.fixed_dictionaries({
        "schedule_policy": st.sampled_from(sorted(POLICIES)),
        "radix_eviction_policy": st.sampled_from(sorted(STRATEGIES)),
        "overlap": st.booleans(),
        "enable_mixed_chunk": st.booleans(),
        "small_request_share": st.sampled_from([0.0, 0.3]),
        "radix_bigram": st.sampled_from([False, False, False, True]),
        "disable_radix_cache": st.sampled_from([False, False, False, True]),
        "gather_best": st.booleans(),
    }).map(_with_a_tree),
    # (step at which it comes, prompt, new tokens, priority, namespace, step at which it is aborted)
    "requests": st.lists(
        st.tuples(
            st.integers(0, 12), st.integers(0, len(PROMPTS) - 1), st.integers(1, NEW_TOKENS), st.integers(0, 2),
            st.sampled_from([None, None, None, "lora"]), st.one_of(st.none(), st.none(), st.integers(0, 20)),
        ),
        min_size=1, max_size=9,
    ),
})  # fmt: skip


@cache
def wrapper(page_size: int, pool: int) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(None, "cpu", page_size, max_total_tokens=pool)


def serve(case: dict, make=wrapper, prepare=lambda scheduler: None, **more) -> tuple[list, int]:
    """[(tokens, how it ended), ...] of the requests as they came, and how many were retracted."""
    model = make(case["page_size"], SMALL_POOL if case["small_pool"] else 4096)
    chunk = CHUNKS[case["chunk"]][case["page_size"]]
    scheduler = TPScheduler(model, chunked_prefill_size=chunk, check=True, **case["options"], **more)
    prepare(scheduler)
    if case["small_pool"]:
        scheduler.new_token_ratio = 0.1  # admit too many
    coming = sorted(case["requests"], key=lambda request: request[0])
    aborts: list[tuple[int, int]] = []

    def arrivals(step: int) -> bool:
        while coming and coming[0][0] <= step:
            _, prompt, new, priority, space, abort_at = coming.pop(0)
            params = SamplingParams(max_new_tokens=new, ignore_eos=True)
            rid = scheduler.enqueue(None, PROMPTS[prompt], params, priority=priority, extra_key=space)
            if abort_at is not None:
                aborts.append((abort_at, rid))
        for at, rid in aborts:
            if at == step:
                scheduler.abort(rid)
        if coming and not scheduler.busy:  # nothing would move the clock on
            coming[0] = (step, *coming[0][1:])
            return arrivals(step)
        return bool(coming)

    results = scheduler.process_requests(arrivals if scheduler.replica.rank == 0 else None)
    if scheduler.replica.rank == 0:
        held = scheduler.pool.free_slots + scheduler.tree.evictable_size
        assert (held, scheduler.tree.protected_size) == (scheduler.pool.size, 0)
        assert scheduler.req_to_token.num_free == model.max_running_requests
    return [(r.output_ids, r.finish_reason["type"]) for r in results.values()], scheduler.retractions


@settings(
    max_examples=settings().max_examples, deadline=None, derandomize=settings().max_examples <= 200,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking takes long
)  # fmt: skip
@given(size=st.sampled_from([1] * 7 + [2] * 3 + [4]), case=cases)
def test_nothing_changes_an_answer(size, case, ranks):
    by_rank = ranks(size).run(serve, case) if size > 1 else [serve(case)]  # a pool less
    for answers, _ in by_rank:
        see(answers, case)


def see(answers: list, case: dict) -> None:
    """They are transformers', or the beginning of them if they were aborted."""
    wanted = sorted(case["requests"], key=lambda request: request[0])
    assert len(answers) == len(wanted)
    for (tokens, ended), (_, prompt, new, _, _, abort_at) in zip(answers, wanted, strict=True):
        expected = greedy(TINY_QWEN_PATH, PROMPTS[prompt], NEW_TOKENS)[:new]
        if ended == "abort":
            assert abort_at is not None
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected


def test_the_draws_reach_what_they_are_for():
    """Retraction, chunks and aborts do happen in cases like these; else the test above would say nothing of them."""
    busy = [(0, i, NEW_TOKENS, 0, None, 4 if i == 7 else None) for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    options = {"schedule_policy": "fcfs", "overlap": True}
    answers, retractions = serve({
        "page_size": 1, "chunk": 64, "small_pool": True, "options": options, "requests": busy,
    })  # fmt: skip
    assert retractions > 0
    assert [ended for _, ended in answers].count("abort") == 1
