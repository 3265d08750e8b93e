"""What a streaming session keeps between its turns: nobody else gets it, nothing is lost, and every answer is the model's."""

import random

import pytest

from ch07_sglang_radix.invariants import InvariantError, check_invariants
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from tests.ch07.test_lanes import KeptBack
from tests.oracle import greedy, some_prompts


def make(folder, *, page_size=4, pool=None, **options):
    """Conservation is checked after every step."""
    wrapper = TPRadixAttentionModelWrapper(str(folder), "cpu", page_size, max_total_tokens=pool)
    return TPScheduler(wrapper, check=True, **options)


def params(n, **more):
    return SamplingParams(max_new_tokens=n, ignore_eos=True, **more)


def begin(scheduler, ids, n, session="s", **more):
    return scheduler.enqueue(None, list(ids), params(n, **more), session=session)


def turn(scheduler, ids, n, session="s", **more):
    """A turn, alone, to its end."""
    rid = begin(scheduler, ids, n, session, **more)
    return scheduler.process_requests()[rid]


def whole(scheduler):
    """free + evictable + protected + held = all, each counted at its owner; returns what sessions hold of it."""
    check_invariants(scheduler)
    held = scheduler.memory.sessions.held_slots
    assert scheduler.held_slots == held, "nothing runs"
    tree = scheduler.tree
    assert scheduler.pool.free_slots + tree.evictable_size + tree.protected_size + held == scheduler.pool.size
    return held


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("disable_radix_cache", [False, True])
def test_each_turn_goes_on_where_the_last_one_ended_to_the_token(checkpoint, page_size, disable_radix_cache):
    folder = checkpoint("qwen2")
    scheduler = make(folder, page_size=page_size, disable_radix_cache=disable_radix_cache)
    ids, cached = list(range(7)), []
    for n, more in ((9, [50, 51]), (5, [60]), (6, [])):
        out = turn(scheduler, ids, n)
        assert out.output_ids == greedy(folder, ids, n)
        cached.append(out.cached_tokens)
        assert whole(scheduler) > 0
        ids = ids + out.output_ids + more
    assert cached == [0, 7 + 9 - 1, 7 + 9 + 2 + 5 - 1], "all but the last token of each answer, in the middle of a page"


def test_the_first_prompt_is_shared_through_the_tree_and_what_a_session_keeps_is_its_own(checkpoint):
    scheduler = make(checkpoint("qwen2"))
    prompt = list(range(13))
    first = turn(scheduler, prompt, 8, "one")
    assert turn(scheduler, prompt, 8, "two").cached_tokens == 12, "whole pages of the prompt"
    longer = prompt + first.output_ids + [9]
    assert turn(scheduler, longer, 1, None).cached_tokens == 12, "the answer is no part of the tree"
    assert scheduler.memory.sessions.slots["one"].prefix_len == 12
    assert whole(scheduler) == 2 * 8, "13 + 8 - 1 tokens on 5 pages, 3 of them the tree's"


def test_nothing_that_is_kept_is_evicted_while_others_can_go_on_without(checkpoint):
    folder = checkpoint("qwen2")
    scheduler = make(folder, pool=96)
    first = turn(scheduler, range(20), 11)
    for prompt in some_prompts(1009, 6, shared=0, longest=20):
        turn(scheduler, prompt, 20, None)
    assert scheduler.tree.evicted > 0
    ids = [*range(20), *first.output_ids, 5]
    second = turn(scheduler, ids, 4)
    assert (second.cached_tokens, second.output_ids) == (30, greedy(folder, ids, 4))


@pytest.mark.parametrize("when", [0, 1, 3, 6])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_aborted_turn_goes_back_to_where_the_last_one_ended(checkpoint, when, overlap):
    """when: after so many steps of the turn; a chunk of its prompt is a step."""
    folder = checkpoint("qwen2")
    scheduler = make(folder, overlap=overlap, chunked_prefill_size=4)
    first = turn(scheduler, range(10), 8)
    before = whole(scheduler)
    rid = begin(scheduler, [*range(10), *first.output_ids, *range(100, 109)], 30)
    for _ in range(when):
        scheduler.step()
    scheduler.abort(rid)
    while scheduler.step():
        pass
    assert whole(scheduler) == before
    assert scheduler.memory.sessions.slots["s"].ids.tolist() == [*range(10), *first.output_ids[:-1]]
    ids = [*range(10), *first.output_ids, 7]
    second = turn(scheduler, ids, 6)
    assert (second.cached_tokens, second.output_ids) == (17, greedy(folder, ids, 6))


def test_a_part_of_a_prompt_that_begins_within_a_page_ends_at_a_page_s_end(checkpoint):
    scheduler = make(checkpoint("qwen2"), chunked_prefill_size=8)
    first = turn(scheduler, range(10), 8)
    rid, ends = begin(scheduler, [*range(10), *first.output_ids, *range(100, 120)], 1), []
    scheduler.after_step.append(lambda: ends.append([req.kv_len for req in scheduler.admitted]))
    scheduler.process_requests()
    assert (rid, ends[:3]) == (1, [[24], [32], []]), "from token 17 to 24, to 32, to the end of 38"


def test_an_aborted_first_turn_leaves_nothing_but_what_the_tree_has(checkpoint):
    scheduler = make(checkpoint("qwen2"))
    rid = begin(scheduler, range(10), 30)
    for _ in range(3):
        scheduler.step()
    scheduler.abort(rid)
    assert whole(scheduler) == 0
    assert scheduler.tree.evictable_size == 8


def test_a_turn_that_is_retracted_keeps_what_its_session_had(checkpoint):
    folder = checkpoint("qwen2")
    scheduler = make(folder, pool=96)
    first = turn(scheduler, range(20), 5)
    scheduler.new_token_ratio = scheduler.init_new_token_ratio = 0.1  # admit too many
    ids = [*range(20), *first.output_ids, 7]
    prompts = some_prompts(1009, 6, shared=0, longest=8)[:2]
    for prompt in prompts:
        begin(scheduler, prompt, 36, None)
    scheduler.step(), scheduler.step()
    rid = begin(scheduler, ids, 36)
    while not scheduler.retractions:
        assert scheduler.step()
    assert rid in [req.rid for req in scheduler.waiting], "it came last"
    assert scheduler.memory.sessions.slots["s"].ids.tolist() == ids[:24], "all of the first turn but its last token"
    outputs = list(scheduler.process_requests().values())
    for prompt, out in zip([*prompts, ids], outputs, strict=True):
        assert out.output_ids == greedy(folder, prompt, 36)
    assert scheduler.memory.sessions.slots["s"].ids.tolist() == ids + outputs[-1].output_ids[:-1]
    whole(scheduler)


@pytest.mark.parametrize("disable_radix_cache", [False, True])
def test_nobody_starves_for_what_sessions_keep(checkpoint, disable_radix_cache):
    """Two sessions keep most of the pool; a request that needs all of it makes the older one, then the other, lose theirs."""
    folder = checkpoint("qwen2")
    scheduler = make(folder, pool=64, disable_radix_cache=disable_radix_cache)
    kept = {name: turn(scheduler, [i] * 20, 8, name) for i, name in enumerate(("old", "new"))}
    out = turn(scheduler, [7] * 10, 15, None)
    assert out.output_ids == greedy(folder, [7] * 10, 15)
    assert list(scheduler.memory.sessions.slots) == ["new"], "the longest idle went, and no more than that"
    assert len(turn(scheduler, [8] * 30, 30, None).output_ids) == 30
    assert not scheduler.memory.sessions.slots
    for i, (name, first) in enumerate(kept.items()):
        ids = [i] * 20 + first.output_ids + [3]
        assert turn(scheduler, ids, 4, name).output_ids == greedy(folder, ids, 4), "computed again"
    whole(scheduler)


def test_a_prompt_in_parts_whose_last_part_finds_no_page_takes_a_session_s(checkpoint):
    """Its place was reserved against a share of what the running turn needs, which then became a session's to the last page."""
    folder = checkpoint("qwen2")
    scheduler = make(folder, pool=64, chunked_prefill_size=4)
    scheduler.new_token_ratio = scheduler.init_new_token_ratio = 0.0
    begin(scheduler, range(4), 24)
    begin(scheduler, range(100, 146), 2, None)
    first, second = scheduler.process_requests().values()
    assert first.output_ids == greedy(folder, list(range(4)), 24)
    assert second.output_ids == greedy(folder, list(range(100, 146)), 2)
    whole(scheduler)


def test_a_prompt_that_is_not_the_session_s_gets_what_is_the_same(checkpoint):
    """Whoever made the prompt knows of no turn that the scheduler has still finished."""
    folder = checkpoint("qwen2")
    scheduler = make(folder)
    first = turn(scheduler, range(10), 8)
    ids = [*range(10), *first.output_ids[:4], 70, 71]
    assert ids[14] != first.output_ids[4]
    again = turn(scheduler, ids, 4)
    assert (again.cached_tokens, again.output_ids) == (14, greedy(folder, ids, 4))
    other = turn(scheduler, [500, 501], 4)
    assert (other.cached_tokens, other.output_ids) == (0, greedy(folder, [500, 501], 4))
    whole(scheduler)


def test_log_probabilities_of_what_is_kept_are_computed_again(checkpoint):
    scheduler = make(checkpoint("qwen2"))
    first = turn(scheduler, range(10), 8)
    ids = [*range(10), *first.output_ids, 7]
    out = turn(scheduler, ids, 2, logprobs=True, prompt_logprobs=0, logprob_start=0)
    assert len(out.prompt_logprobs) == len(ids) - 1
    assert out.cached_tokens == 0
    whole(scheduler)


def test_another_namespace_gets_nothing_of_what_is_kept(checkpoint):
    scheduler = make(checkpoint("qwen2"))
    first = turn(scheduler, range(10), 8)
    rid = scheduler.enqueue(None, [*range(10), *first.output_ids, 7], params(2), extra_key="salt", session="s")
    assert scheduler.process_requests()[rid].cached_tokens == 0
    whole(scheduler)


@pytest.mark.parametrize("running", [False, True])
def test_a_closed_session_gives_everything_back(checkpoint, running):
    folder = checkpoint("qwen2")
    scheduler = make(folder)
    first = turn(scheduler, range(10), 8)
    ids = [*range(10), *first.output_ids, 7]
    if running:
        begin(scheduler, ids, 6)
        scheduler.step()
    scheduler.memory.sessions.close("s", scheduler.unfinished)
    if running:
        (out,) = scheduler.process_requests().values()
        assert out.output_ids == greedy(folder, ids, 6), "its turn goes on"
        assert turn(scheduler, ids + out.output_ids, 1, None).cached_tokens == 24, "and leaves its tokens to the tree"
    assert whole(scheduler) == 0


def test_a_flush_forgets_what_sessions_keep_too(checkpoint):
    scheduler = make(checkpoint("qwen2"))
    turn(scheduler, range(10), 8)
    scheduler.memory.flush()
    assert whole(scheduler) == 0
    assert scheduler.pool.free_slots == scheduler.pool.size


def test_a_page_that_a_session_has_lost_is_noticed(checkpoint):
    scheduler = make(checkpoint("qwen2"))
    turn(scheduler, range(10), 8)
    slot = scheduler.memory.sessions.slots.pop("s")
    with pytest.raises(InvariantError, match="has lock_ref=1, but 0 requests and sessions"):
        check_invariants(scheduler)
    scheduler.memory.sessions.slots["s"] = slot
    scheduler.pool.free(slot.slots[-4:])
    with pytest.raises(InvariantError, match="two owners: the free list and session s"):
        check_invariants(scheduler)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_in_whatever_order_nothing_is_lost(checkpoint, seed):
    """Turns of four sessions, other requests, aborts, closes and flushes in a small pool; every whole answer is the model's."""
    folder, rng = checkpoint("qwen2"), random.Random(seed)
    scheduler = make(
        folder, pool=128, page_size=rng.choice([1, 4]), overlap=seed == 1, chunked_prefill_size=16,
        schedule_policy="lpm", enable_mixed_chunk=seed == 2, num_lanes=2 if seed == 3 else 1,
    )  # fmt: skip
    if seed == 3:
        scheduler.control = KeptBack(scheduler.control)
    said = {name: [] for name in "abcd"}  # what each session has, by those who asked
    asked = {}
    for _ in range(200):
        busy = {name for name, _, _ in asked.values()}
        free = [name for name in said if name not in busy]
        event = rng.random()
        if event < 0.3 and free:
            name = rng.choice(free)
            ids = said[name][-60:] if len(said[name]) > 60 else said[name]
            ids = ids + [rng.randrange(1000) for _ in range(rng.randrange(1, 12))]
            n = rng.randrange(1, 20)
            asked[begin(scheduler, ids, n, name)] = name, ids, n
        elif event < 0.4:
            ids, n = [rng.randrange(5) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 20)
            asked[begin(scheduler, ids, n, None)] = None, ids, n
        elif event < 0.45 and asked:
            rid = rng.choice(list(asked))
            scheduler.abort(rid)
            asked.pop(rid)
        elif event < 0.47:
            scheduler.memory.sessions.close(rng.choice("abcd"), scheduler.unfinished)
        elif event < 0.5 and not scheduler.busy:
            scheduler.memory.flush()
        scheduler.step()
        for rid, out in scheduler.results.items():
            if rid in asked:
                name, ids, n = asked.pop(rid)
                assert out.output_ids == greedy(folder, ids, n)
                if name:
                    said[name] = ids + out.output_ids
        scheduler.results, scheduler.grown = {}, {}
    while scheduler.step():
        pass
    whole(scheduler)
