"""In which order waiting requests try to get in."""

from types import SimpleNamespace

import numpy as np
import pytest

from ch07_sglang_radix.admission import Admission
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.schedule_policy import LPM_QUEUE_LIMIT, POLICIES, STARVING, SchedulePolicy
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.test_scheduler import make, params
from tests.oracle import greedy

A, B, C = list(range(100)), list(range(200, 300)), list(range(400, 500))


def tree_with(*keys):
    tree = RadixCache(TokenToKVPool(num_pages=1000, page_size=1))
    for key in keys:
        tree.insert(key, tree.pool.alloc(len(key)))
    return tree


def reqs(*prompts, priorities=()):
    priorities = [*priorities, *[0] * len(prompts)]
    return [Req(i, None, list(p), SamplingParams(), 0, priority=priorities[i]) for i, p in enumerate(prompts)]


def order(name, tree, waiting, **options):
    return [req.rid for req in SchedulePolicy(name, tree, **options).order(waiting)]


def test_fcfs_leaves_the_order_alone():
    waiting = reqs(A, [*B, 1], C)
    waiting[1].passed_over = STARVING
    assert order("fcfs", tree_with(B), waiting) == [0, 1, 2]


def test_lpm_puts_the_longest_match_first():
    waiting = reqs([7, 8], [*A[:50], 1], [*B[:90], 1], [*A[:50], 2])
    assert order("lpm", tree_with(A, B), waiting) == [2, 1, 3, 0]


def test_lpm_sends_one_ahead_of_those_that_share_what_nobody_has_computed():
    new = [900 + i for i in range(40)]
    waiting = reqs([*new, 1], [*new, 2], [5] * 3, [*new[:20], 3])
    assert order("lpm", tree_with(A), waiting) == [0, 2, 3, 1], "20 shared tokens are not worth waiting for, 40 are"


def test_all_who_wait_for_others_have_the_same_last_rank():
    """However much of them is in the tree, they keep the order of the queue: SGLang 0.5.23, _sort_by_longest_prefix."""
    new, other = [900 + i for i in range(60)], [800 + i for i in range(60)]
    waiting = reqs([*new, 1], [*other, 1], [*other, 2], [*new, 2])
    assert order("lpm", tree_with(new[:20], other[:10]), waiting) == [0, 1, 2, 3]
    assert order("lpm", tree_with(new[:20], other[:10]), waiting[::-1]) == [3, 2, 1, 0]


@pytest.mark.parametrize(("shared", "waits"), [(31, False), (32, True)])
def test_32_shared_tokens_are_worth_waiting_for(shared, waits):
    waiting = reqs([*B[:shared], 1], [*B[:shared], 2], [5])
    assert order("lpm", tree_with(), waiting) == ([0, 2, 1] if waits else [0, 1, 2])


@pytest.mark.parametrize(("cached", "waits"), [(32, True), (33, False)])
def test_with_more_than_32_tokens_in_the_tree_nobody_waits(cached, waits):
    waiting = reqs([*A[:80], 1], [*A[:80], 2], [5])
    assert order("lpm", tree_with(A[:cached]), waiting) == ([0, 2, 1] if waits else [0, 1, 2])


def test_lof_puts_the_longest_answer_first():
    waiting = [Req(i, None, [i], SamplingParams(max_new_tokens=n), 0) for i, n in enumerate((5, 9, 5, 20))]
    assert order("lof", tree_with(), waiting) == [3, 1, 0, 2]


def test_routing_key_puts_those_first_whose_key_most_of_the_running_ones_have():
    waiting = [Req(i, None, [i], SamplingParams(), 0, routing_key=key) for i, key in enumerate("xbaab")]
    running = [Req(9, None, [9], SamplingParams(), 0, routing_key=key) for key in (*"aba", None)]
    policy = SchedulePolicy("routing-key", tree_with())
    assert [req.rid for req in policy.order(waiting, running)] == [2, 3, 1, 4, 0]
    assert [req.rid for req in policy.order(waiting)] == [0, 1, 2, 3, 4], "nobody runs: as they came"


def test_shortest_prefill_first_counts_what_is_not_in_the_tree():
    waiting = reqs([*A[:90], 1], [7] * 5, [*B[:60], 1], [7] * 3)
    assert order("shortest-prefill-first", tree_with(A), waiting) == [0, 3, 1, 2]
    new = [900 + i for i in range(40)]
    waiting = reqs([*new, 1], [*new, 2], [5] * 60)
    assert order("shortest-prefill-first", tree_with(), waiting) == [0, 2, 1], "the second waits for the first"


def test_hrrn_goes_by_what_was_computed_meanwhile_over_what_there_is_to_compute():
    policy = SchedulePolicy("hrrn", tree_with(A))
    long, short = reqs([3] * 60, [4] * 6)
    policy.order([long])
    policy.computed(300)
    assert [r.rid for r in policy.order([long, short])] == [0, 1], "300 / 60 against 0 / 6: nobody had waited for it"
    policy.computed(60)
    assert [r.rid for r in policy.order([long, short])] == [1, 0], "360 / 60 against 60 / 6"


def test_hrrn_ages_so_that_nobody_starves():
    """Under a stream of short prompts a long one comes to its turn; passing over is not counted here."""
    policy, long = SchedulePolicy("hrrn", tree_with()), reqs([3] * 50)[0]
    for step in range(1, 60):
        short = Req(step, None, [step] * 5, SamplingParams(), 0)
        older = Req(1000 + step, None, [step + 100] * 5, SamplingParams(), 0)
        first = policy.order([long, older, short])[0]
        if first is long:
            break
        policy.computed(5)
    assert first is long


def test_shortest_prefill_first_needs_a_tree():
    tree = RadixCache(TokenToKVPool(num_pages=10), disable=True)
    with pytest.raises(ValueError, match="shortest-prefill-first' needs the radix cache"):
        SchedulePolicy("shortest-prefill-first", tree)
    assert order("hrrn", tree, reqs([1] * 9, [2])) == [0, 1], "the others are fcfs then"


def test_what_is_in_the_tree_already_need_not_wait_for_anybody():
    waiting = reqs([*A[:60], 1], [*A[:60], 2])
    assert order("lpm", tree_with(A), waiting) == [0, 1]


def test_of_a_prompt_that_is_in_the_tree_as_a_whole_the_last_token_does_not_count():
    """It must be computed, to have logits from."""
    assert order("lpm", tree_with(A), reqs(A, [*A, 1])) == [1, 0]
    assert order("shortest-prefill-first", tree_with(A), reqs([*A, 1, 2], A)) == [1, 0]


def test_lpm_leaves_the_order_alone_when_nothing_is_cached_at_all():
    tree = RadixCache(TokenToKVPool(num_pages=10), disable=True)
    assert order("lpm", tree, reqs([*A[:64], 1], [*A[:64], 2], [7] * 64)) == [0, 1, 2]


def test_looking_at_the_queue_does_not_make_the_first_in_it_the_next_to_be_evicted():
    tree = tree_with(A[:50], B[:60])
    SchedulePolicy("lpm", tree).order(reqs([*A[:50], 1], [*B[:60], 1]))
    tree.evict(1)
    assert len(tree.match_prefix(B[:60]).slots) == 60, "B is longer, goes first, and must stay"


def test_lpm_falls_back_to_fcfs_when_the_queue_is_long():
    waiting = reqs(*([i] for i in range(LPM_QUEUE_LIMIT)), [*A[:50], 1])
    assert order("lpm", tree_with(A), waiting) == list(range(LPM_QUEUE_LIMIT + 1))
    assert order("lpm", tree_with(A), waiting[1:])[0] == LPM_QUEUE_LIMIT


def test_dfs_weight_goes_into_the_heaviest_subtree_first():
    tree = tree_with(A + B, A + C, B)
    waiting = reqs([*B[:50], 1], A + C[:10] + [1], A + B[:10] + [1], A + B[:10] + [2], [*A[:5], 9])
    got = order("dfs-weight", tree, waiting)
    assert got[:2] == [2, 3], "the subtree with most requests, depth first"
    assert got.index(1) < got.index(4), "children before the node itself"
    assert got[-1] == 0


def test_dfs_weight_counts_a_subtree_that_another_match_has_split():
    """The third request of A cuts A's node in two while it is matched; the two before it are below all the same."""
    waiting = reqs([*B, 1], [*B, 2], [*A, 1], [*A, 2], [*A[:50], 9])
    assert order("dfs-weight", tree_with(A, B), waiting) == [2, 3, 4, 0, 1]


def test_random_is_a_permutation_and_repeats_with_its_seed():
    waiting = reqs(*([i] for i in range(20)))
    first = order("random", tree_with(), waiting, seed=3)
    assert sorted(first) == list(range(20))
    assert first != list(range(20))
    assert first == order("random", tree_with(), waiting, seed=3) != order("random", tree_with(), waiting, seed=4)


def test_priority_then_arrival():
    assert order("priority", tree_with(), reqs([1], [2], [3], [4], priorities=(0, 2, 1, 2))) == [1, 3, 2, 0]


def test_dynamic_leaves_lpm_when_there_is_nothing_to_hit_and_tries_again_later():
    policy = SchedulePolicy("dynamic", tree_with(A))
    waiting = reqs([7, 8], [*A[:50], 1])
    assert [r.rid for r in policy.order(waiting)] == [1, 0]
    for _ in range(16):
        policy.admitted(0, 100)
    chosen = []
    for _ in range(20):
        policy.order(waiting)
        chosen.append(policy.active)
    assert chosen.count("fcfs") > 10
    assert "lpm" in chosen
    for _ in range(64):
        policy.admitted(90, 100)
    assert [r.rid for r in policy.order(waiting)] == [1, 0]


@pytest.mark.parametrize(("cached", "active"), [(10, "lpm"), (9, "fcfs")])
def test_a_hit_rate_of_a_tenth_is_worth_lpm(cached, active):
    policy = SchedulePolicy("dynamic", tree_with())
    for _ in range(8):
        policy.admitted(cached, 100)
    policy.order(reqs([1], [2]))
    assert policy.active == active


def test_the_policy_hears_what_each_request_found_when_it_was_admitted():
    scheduler = make(TINY_QWEN_PATH, page_size=4, schedule_policy="dynamic")
    for _ in range(8):
        scheduler.add_request(input_ids=list(range(20)), sampling_params=params(1))
        scheduler.process_requests()
    assert scheduler.policy.hit_rate == 7 * 16 / (8 * 20)
    assert scheduler.served == {"prompt": 8 * 20, "cached": 7 * 16}


def test_who_stands_in_front_of_those_that_are_taken_has_been_passed_over():
    waiting = reqs(*([i] for i in range(5)))
    state = SimpleNamespace(waiting=waiting)
    Admission(state, 64, False, 0.0, make_room=None)._leave_the_queue({waiting[1], waiting[3]})
    assert [req.passed_over for req in waiting] == [1, 0, 1, 0, 0]
    assert [req.rid for req in state.waiting] == [0, 2, 4]


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"fcfs"}))
def test_who_has_been_passed_over_too_often_goes_first(name):
    waiting = reqs([*A[:50], 1], [5] * 9, [*A[:50], 2], priorities=(1, 0, 1))
    waiting[1].passed_over = STARVING
    assert order(name, tree_with(A), waiting)[0] == 1


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="schedule_policy='lru' is unknown; use fcfs, lof, random, routing-key, lpm"):
        SchedulePolicy("lru", tree_with())


def test_nobody_starves_behind_a_stream_of_better_matches():
    """Under lpm each step brings two requests that match; the one that matches nothing still gets its turn."""
    scheduler = make(TINY_QWEN_PATH, page_size=4, pool=400, rows=2, schedule_policy="lpm")
    hot = list(range(48))
    scheduler.add_request(input_ids=hot, sampling_params=params(1))
    scheduler.process_requests()
    cold, done_at = scheduler.add_request(input_ids=[9] * 40, sampling_params=params(2)), []

    def arrivals(step):
        if cold in scheduler.results:
            done_at.append(step)
        if done_at or step > 100:
            return False
        for i in range(2):
            scheduler.add_request(input_ids=[*hot, step % 90, i], sampling_params=params(2))
        return True

    scheduler.process_requests(arrivals)
    assert done_at, "never served"


@pytest.mark.parametrize(
    ("option", "through_at"), [({"small_request_share": 0.25}, 4), ({"schedule_policy": "shortest-prefill-first"}, 2)]
)
def test_a_long_prompt_leaves_room_for_short_ones(option, through_at):
    """Short prompts do not wait until the long one that has begun is through; the answers are the same."""
    long, short = [i % 700 for i in range(300)], [[i] * 8 for i in range(1, 4)]
    steps = []
    for options in ({}, option):
        scheduler = make(TINY_QWEN_PATH, page_size=4, chunked_prefill_size=64, **options)
        rids, first = [scheduler.add_request(input_ids=long, sampling_params=params(3))], {}

        def arrivals(step, scheduler=scheduler, rids=rids, first=first):
            if step == 1 and len(rids) == 1:  # the long one has begun
                rids += [scheduler.add_request(input_ids=p, sampling_params=params(3)) for p in short]
            for req in scheduler.running:
                first.setdefault(req.rid, step)
            return step < 1

        results = scheduler.process_requests(arrivals)
        assert [results[rid].output_ids for rid in rids] == [greedy(TINY_QWEN_PATH, p, 3) for p in (long, *short)]
        steps.append(max(first[rid] for rid in rids[1:]))
    assert steps == [7, through_at], "behind the long prompt, or beside its next parts"


def test_shortest_prefill_first_limits_the_part_of_a_long_prompt_by_what_is_shorter():
    """Whole pages for each that waits, as long as a page is left: SGLang 0.5.23, shortest_prefill_chunk_limit."""
    tree = RadixCache(TokenToKVPool(num_pages=100, page_size=4))
    policy = SchedulePolicy("shortest-prefill-first", tree)
    long, five, eight, longer = reqs([1] * 100, [2] * 5, [3] * 8, [4] * 101)
    assert policy.chunk_limit(long, [five, eight, longer], 64) == 64 - 8 - 8
    assert policy.chunk_limit(long, [longer], 64) is None, "nobody has less to do"
    assert policy.chunk_limit(long, [five, eight], 12) == 12 - 8, "the second would leave it no page"
    assert policy.chunk_limit(long, [five], 4) is None
    assert SchedulePolicy("lpm", tree).chunk_limit(long, [five], 64) is None


@pytest.mark.parametrize("mixed", [False, True])
def test_a_decode_waits_for_one_chunk_at_most(mixed):
    """While a long prompt is computed, a running request gets a token at least every second step; mixed, in every step."""
    scheduler = make(TINY_QWEN_PATH, page_size=4, chunked_prefill_size=16, enable_mixed_chunk=mixed)
    runner = scheduler.add_request(input_ids=[1, 2, 3], sampling_params=params(60))
    grown = []

    def arrivals(step):
        if step == 4:
            for i in range(3):
                scheduler.add_request(input_ids=[i + 5] + [3] * 120, sampling_params=params(2))
        req = next((r for r in scheduler.running if r.rid == runner), None)
        grown.append(len(req.output_ids) if req else None)
        return step < 4

    results = scheduler.process_requests(arrivals)
    assert results[runner].output_ids == greedy(TINY_QWEN_PATH, [1, 2, 3], 60)
    during = np.diff([n for n in grown[4:40] if n is not None])
    assert scheduler.steps["prefill"] > 20
    if mixed:
        assert during.min() == 1
    else:
        assert (during[:-1] + during[1:]).min() >= 1
        assert during.min() == 0
