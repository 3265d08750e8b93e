"""Several steps on their way at once, as over several pipeline stages; here one rank keeps their logits back."""

from collections import deque
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.schedule_batch import ScheduleBatch
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy


class KeptBack:
    """A control plane whose logits come when they are asked for, in order, as a last stage's do."""

    def __init__(self, control):
        self.control, self.logits, self.most = control, deque(), 0

    def __getattr__(self, name):
        return getattr(self.control, name)

    def begin(self, task):
        logits = self.control.execute(task)
        if task.num_emitting:
            self.logits.append(logits)
        self.most = max(self.most, len(self.logits))

    def finish(self):
        return self.logits.popleft()


@cache
def wrapper(pages: int) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(TINY_QWEN_PATH, "cpu", 4, max_total_tokens=4 * pages, max_running_requests=8)


def make(lanes: int, pages: int = 4096, **options) -> TPScheduler:
    scheduler = TPScheduler(wrapper(pages), num_lanes=lanes, check=True, **options)
    if lanes > 1:
        scheduler.control = KeptBack(scheduler.control)
    return scheduler


PROMPTS = [[5 + i, 9, 11 + i % 3, *range(40, 40 + 7 * i)] for i in range(7)]


@pytest.fixture(scope="module")
def right():
    return [greedy(TINY_QWEN_PATH, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_tokens_equal_transformers(right, lanes, overlap):
    scheduler = make(lanes, overlap=overlap, chunked_prefill_size=16)
    for prompt in PROMPTS:
        scheduler.add_request(input_ids=prompt, max_new_tokens=12)
    results = scheduler.process_requests()
    assert [out.output_ids for out in results.values()] == right
    if lanes > 1:
        assert scheduler.control.most == lanes, "all lanes were on their way at once"
        assert not scheduler.control.logits


@given(st.data())
@settings(deadline=None, max_examples=max(10, settings().max_examples // 4))
def test_any_options_give_the_same_tokens_and_keep_every_page(data):
    scheduler = make(
        data.draw(st.integers(2, 3)), data.draw(st.sampled_from((26, 40, 4096))),
        overlap=data.draw(st.booleans()), chunked_prefill_size=data.draw(st.sampled_from((8, 32, -1))),
        enable_mixed_chunk=data.draw(st.booleans()), disable_radix_cache=data.draw(st.booleans()),
        max_lane_size=data.draw(st.sampled_from((None, 1, 3))),
    )  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(range(len(PROMPTS))), min_size=1, max_size=9))
    params = [SamplingParams(max_new_tokens=data.draw(st.integers(1, 12))) for _ in chosen]
    for i, one in zip(chosen, params, strict=True):
        scheduler.add_request(input_ids=PROMPTS[i], sampling_params=one)
    results = scheduler.process_requests()
    for out, i, one in zip(results.values(), chosen, params, strict=True):
        assert out.output_ids == greedy(TINY_QWEN_PATH, PROMPTS[i], one.max_new_tokens)
    assert not scheduler.busy
    assert not scheduler.held_slots


def test_lanes_share_those_that_run_evenly_when_some_have_ended():
    scheduler = make(2)
    for n in (2, 2, 2, 30, 30, 30):
        scheduler.add_request(input_ids=[n, 8, 9], sampling_params=SamplingParams(max_new_tokens=n, ignore_eos=True))
    sizes = []
    while scheduler.step():
        if len(scheduler.running) > 1:
            sizes.append(sorted(sum(req.lane == lane for req in scheduler.running) for lane in range(2)))
    assert max(b - a for a, b in sizes[8:]) <= 1


def test_whoever_is_aborted_while_a_step_is_on_its_way_leaves_no_page_behind(right):
    scheduler = make(2)
    rids = [scheduler.add_request(input_ids=prompt, max_new_tokens=12) for prompt in PROMPTS]
    for _ in range(5):
        scheduler.step()
    assert scheduler.abort(rids[0]) == scheduler.abort(rids[1]) == 1
    results = scheduler.process_requests()
    assert [results[rid].output_ids for rid in rids[2:]] == right[2:]
    assert not scheduler.held_slots


def test_a_failure_forgets_what_is_on_its_way():
    scheduler = make(2)
    for prompt in PROMPTS:
        scheduler.add_request(input_ids=prompt, max_new_tokens=12)
    for _ in range(5):
        scheduler.step()
    assert scheduler.busy
    scheduler.drop_all()
    assert not scheduler.busy
    assert not scheduler.control.logits
    assert not scheduler.held_slots


def test_whoever_leaves_a_lane_leaves_its_batch():
    """It may come back, further on, before the lane decodes again."""
    scheduler = make(2)
    for prompt in PROMPTS[:4]:
        scheduler.add_request(input_ids=prompt, max_new_tokens=12)
    while len(scheduler.running) < 4 or not all(batch.reqs for batch in scheduler.batches):
        scheduler.step()
    scheduler.settle_all()
    for req in scheduler.running:
        req.lane = scheduler.lane
    scheduler.batch.become(scheduler.running)
    scheduler.data_ranks[0].even_out_lanes()
    assert sorted(req.lane for req in scheduler.running) == [0, 0, 1, 1]
    assert not scheduler.batch.reqs


def test_a_batch_that_is_grouped_may_become_empty():
    """The last one stops while a batch is made: with overlap, or when room is needed. Only some forms of attention group."""
    scheduler = make(1)
    for prompt in PROMPTS[:3]:
        scheduler.add_request(input_ids=prompt, max_new_tokens=12)
    while len(scheduler.running) < 3:
        scheduler.step()
    batch = ScheduleBatch(scheduler.memory, group=True)
    for reqs in (scheduler.running, scheduler.running[:1], [], scheduler.running):
        batch.become(reqs)
        assert set(batch.reqs) == set(reqs)
        assert len(batch.rows) == len(batch.positions) == len(batch.ends) == len(reqs)
