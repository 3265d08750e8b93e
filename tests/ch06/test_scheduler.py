"""vLLM V1's rules, without a model: the scheduler and the blocks, and tokens that come from nowhere."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.request import Request, RequestStatus
from ch06_tp_vllm.scheduler import Scheduler
from common.sampling.params import SamplingParams


class Run:
    """A scheduler whose steps are "computed" at once: every emitted token is 7."""

    def __init__(self, num_blocks=64, block_size=4, budget=16, seqs=8, caching=True, at_allocation=True, **options):
        self.blocks = BlockManager(
            num_blocks, block_size, enable_prefix_caching=caching, name_blocks_at_allocation=at_allocation
        )
        self.scheduler = Scheduler(self.blocks, max_num_batched_tokens=budget, max_num_seqs=seqs, **options)
        self.requests = []

    def add(self, prompt, max_tokens=4, priority=0):
        prompt = [1000 * len(self.requests) + i for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
        number = len(self.requests)
        params = SamplingParams(max_new_tokens=max_tokens)
        request = Request(str(number), 0, prompt, params, 0, priority, number)
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self):
        """{number of the request: tokens computed} of one step, in order."""
        output = self.scheduler.schedule()
        for s in output.scheduled:
            assert s.num_computed == s.request.num_computed_tokens
            s.request.num_computed_tokens += s.num_new
            if s.emits:
                s.request.append(7, None)
                s.request.drawn_here = True
            if not self.blocks.name_blocks_at_allocation:
                self.blocks.cache_full_blocks(s.request, s.request.num_computed_tokens)
            if s.request.status.finished:
                self.scheduler.finish(s.request)
        self.blocks.check(self.scheduler.running)
        assert output.num_tokens <= self.scheduler.max_num_batched_tokens
        return {int(s.request.group): s.num_new for s in output.scheduled}

    def to_the_end(self, limit=10_000):
        steps = []
        while self.scheduler.running or self.scheduler.waiting:
            steps.append(self.step())
            assert steps[-1], "a step in which nothing runs"
            assert len(steps) < limit
        return steps


def test_running_requests_come_first_and_waiting_ones_fill_the_budget():
    run = Run(budget=16)
    run.add(6)
    run.add(20)
    run.add(3)
    assert run.step() == {0: 6, 1: 10}
    assert run.step() == {0: 1, 1: 10, 2: 3}, "one step: a decode, the rest of a prompt, a whole prompt"
    assert run.step() == {0: 1, 1: 1, 2: 1}


def test_a_long_prompt_does_not_stop_those_who_decode():
    run = Run(budget=8)
    run.add(4, max_tokens=20)
    run.step()
    run.add(50)
    for _ in range(7):
        assert run.step() == {0: 1, 1: 7}


def test_without_chunks_a_prompt_waits_for_a_step_with_room():
    run = Run(budget=16, enable_chunked_prefill=False)
    run.add(10, max_tokens=2)
    run.add(12)
    assert run.step() == {0: 10}
    assert run.step() == {0: 1, 1: 12}


def test_who_is_aborted_leaves_the_list_it_is_in():
    run = Run(seqs=1)
    running, waiting, last = run.add(2), run.add(2), run.add(2)
    run.step()
    for request in (waiting, running):
        request.status = RequestStatus.FINISHED_ABORTED
        run.scheduler.finish(request)
    assert (run.scheduler.running, run.scheduler.waiting) == ([], [last])
    assert run.scheduler.free_rows == [0]
    assert run.step() == {2: 2}
    run.scheduler.finish(running)  # who has left already
    assert run.scheduler.running == [last]


def test_at_most_max_num_seqs_run():
    run = Run(seqs=2)
    for _ in range(5):
        run.add(2, max_tokens=3)
    assert max(len(step) for step in run.to_the_end()) == 2
    assert sorted(run.scheduler.free_rows) == [0, 1]


def test_the_newest_is_preempted_and_waits_at_the_head():
    run = Run(num_blocks=4, block_size=4, caching=False)
    old, new = run.add(7, max_tokens=8), run.add(7, max_tokens=8)
    run.step()
    late = run.add(2)
    while new.status is RequestStatus.RUNNING:
        step = run.step()
    assert step == {0: 1}, "in the step of a preemption nobody else starts"
    assert run.scheduler.waiting == [new, late]
    assert new.num_computed_tokens == 0
    assert new.block_table == []
    assert len(new.output_token_ids) == 2, "its tokens are kept"
    assert (new.num_preemptions, old.num_preemptions, run.scheduler.num_preemptions) == (1, 0, 1)
    run.to_the_end()
    assert [len(r.output_token_ids) for r in (old, new, late)] == [8, 8, 4]
    assert run.scheduler.num_preemptions >= 1


def test_a_preempted_request_finds_what_it_left():
    run = Run(num_blocks=5, block_size=4, budget=64)
    run.add(8, max_tokens=12)
    second = run.add(8, max_tokens=4)
    run.step()
    while second.status is RequestStatus.RUNNING:
        run.step()
    assert second.status is RequestStatus.PREEMPTED
    assert second.num_cached_tokens == 0, "what it finds again later is no hit of the prompt"
    run.to_the_end()


def test_under_the_priority_policy_the_least_important_waits_and_is_preempted():
    run = Run(num_blocks=4, block_size=4, caching=False, policy="priority")
    low, high = run.add(7, max_tokens=8, priority=5), run.add(7, max_tokens=8, priority=1)
    urgent = run.add(1, max_tokens=1, priority=0)
    assert list(run.step()) == [2, 1, 0] or urgent.status.finished
    while low.status is RequestStatus.RUNNING:
        run.step()
    assert high.status is RequestStatus.RUNNING
    run.to_the_end()


def test_fcfs_keeps_the_order():
    run = Run(budget=6, seqs=64)
    for i in range(6):
        run.add(5, max_tokens=1 + i)
    first_seen = list(dict.fromkeys(number for step in run.to_the_end() for number in step))
    assert first_seen == [0, 1, 2, 3, 4, 5]


def test_a_cached_prefix_is_not_computed_again():
    run = Run()
    run.add(range(12), max_tokens=1)
    run.to_the_end()
    again = run.add(range(14), max_tokens=1)
    assert run.step() == {1: 2}
    assert again.num_cached_tokens == 12
    whole = run.add(range(12), max_tokens=1)
    assert run.step() == {2: 4}, "a fully cached prompt computes its last block again"
    assert whole.num_cached_tokens == 8
    assert (run.blocks.stats.hits, run.blocks.stats.queries) == (20, 38)


def test_equal_prompts_of_one_step_share_their_full_blocks():
    """nano-vllm #208 and #219 are about getting this wrong."""
    run = Run()
    for _ in range(3):
        run.add([*range(10)], max_tokens=2)
    assert run.step() == {0: 10, 1: 2, 2: 2}
    tables = [request.block_table for request in run.requests]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3, "the block in which prompt and answer meet is each one's own"
    assert run.blocks.stats.hits == 16


def test_named_after_the_step_equal_prompts_of_one_step_are_both_computed():
    run = Run(at_allocation=False)
    for _ in range(2):
        run.add([*range(10)], max_tokens=2)
    assert run.step() == {0: 10, 1: 6}
    tables = [request.block_table for request in run.requests]
    assert not set(tables[0]) & set(tables[1])
    late = run.add([*range(10)], max_tokens=2)
    assert run.step() == {0: 1, 1: 4, 2: 2}, "the next step finds them"
    assert late.num_cached_tokens == 8


def test_of_a_prompt_in_chunks_others_find_what_is_scheduled():
    run = Run(budget=7)
    run.add([*range(12)], max_tokens=1)
    assert run.step() == {0: 7}
    run.add([*range(12)], max_tokens=1)
    assert run.step() == {0: 5, 1: 2}
    assert run.requests[1].num_cached_tokens == 8, "the third block is full too, but its last token must be computed"
    assert run.step() == {1: 2}


def test_a_decode_that_fills_a_block_names_it_in_its_step():
    run = Run()
    first = run.add([*range(6)], max_tokens=5)
    run.step(), run.step()
    late = run.add([*range(6), 7, 7, 5], max_tokens=2)  # goes on from what the first one says
    assert run.step() == {0: 1, 1: 1}
    assert late.block_table[:2] == first.block_table[:2]


def test_a_request_enters_when_its_whole_prompt_fits():
    """vLLM's scheduler_reserve_full_isl."""
    for reserve, first_steps in ((True, [{0: 8}, {0: 1}]), (False, [{0: 8}, {0: 1, 1: 7}])):
        run = Run(num_blocks=6, budget=8, caching=False, scheduler_reserve_full_isl=reserve)
        run.add(8, max_tokens=4)
        run.add(16, max_tokens=2)
        assert [run.step(), run.step()] == first_steps
        run.to_the_end()
        assert run.scheduler.num_preemptions == (0 if reserve else 1)


def test_what_is_found_in_the_cache_needs_no_room_to_enter():
    run = Run(num_blocks=6)
    run.add([*range(13)], max_tokens=3)
    run.step()
    run.add([*range(12), 99], max_tokens=3)  # four blocks, three of them shared
    assert run.step() == {0: 1, 1: 1}


def test_the_watermark_keeps_blocks_for_those_who_run():
    run = Run(num_blocks=10, watermark=0.35)  # three blocks
    run.add(16, max_tokens=4)
    run.add(16, max_tokens=4)
    assert run.step() == {0: 16}
    alone = Run(num_blocks=10, watermark=0.35)
    alone.add(36, max_tokens=2)
    assert alone.step() == {0: 16}, "where nobody runs there is nobody to keep them for"


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_of_a_step_that_never_ran_nothing_is_found(leaves_first):
    """As after a step that failed: both go, the one that would have computed the shared blocks and the one that found them."""
    run = Run()
    for _ in range(2):
        run.add([*range(10)], max_tokens=2)
    scheduled = [s.request for s in run.scheduler.schedule().scheduled]
    for request in (scheduled[leaves_first], scheduled[1 - leaves_first]):
        request.status = RequestStatus.FINISHED_ABORTED
        run.scheduler.finish(request)
    run.blocks.check([])
    run.add([*range(10)], max_tokens=2)
    assert run.step() == {2: 10}


def test_who_is_decode_only():
    run = Run(budget=64)
    run.add(5)
    first = run.scheduler.schedule()
    assert not first.is_decode
    for s in first.scheduled:
        s.request.num_computed_tokens += s.num_new
        s.request.append(7, None)
        s.request.drawn_here = True
    assert run.scheduler.schedule().is_decode
    run.scheduler._preempt(run.requests[0])
    assert not run.scheduler.schedule().is_decode, "a prompt and its answers again: nano-vllm #144"


def test_a_decode_beside_a_prompt_is_no_decode_step():
    run = Run(budget=64)
    run.add(5)
    run.step()
    run.add(5)
    assert not run.scheduler.schedule().is_decode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "lottery"}, "scheduling_policy='lottery' is unknown; use fcfs or priority"),
        ({"budget": 0}, "max_num_batched_tokens=0"),
        ({"seqs": 0}, "max_num_seqs=0"),
        ({"watermark": 1.0}, "watermark=1.0 must be a share of the pool, from 0 to below 1"),
        ({"watermark": -0.1}, "watermark=-0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Run(**options)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(8, 24), st.integers(1, 4), st.integers(1, 40), st.integers(1, 6), st.booleans(),
    st.sampled_from(["fcfs", "priority"]), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_every_request_ends_whatever_the_pool(
    requests, num_blocks, block_size, budget, seqs, caching, policy, at_allocation, reserve, watermark
):
    """With few different prompts, so that many blocks are shared; conservation is checked after every step."""
    run = Run(
        num_blocks, block_size, budget, seqs, caching, at_allocation, policy=policy, watermark=watermark,
        scheduler_reserve_full_isl=reserve,
    )  # fmt: skip
    for prompt, max_tokens, priority in requests:
        if prompt + max_tokens <= num_blocks * block_size:
            run.add([i // 7 for i in range(prompt)], max_tokens, priority)
    run.to_the_end()
    for request in run.requests:
        assert len(request.output_token_ids) == request.params.max_new_tokens
    assert run.blocks.num_free_blocks == num_blocks
