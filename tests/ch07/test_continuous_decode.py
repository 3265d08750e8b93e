"""Looking at the tokens of several decode steps together changes nothing but the time at which they are seen."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.test_overlap import KINDS
from tests.oracle import greedy

PROMPTS = [[5 + i, 9, 11 + i % 3, *range(40, 40 + 7 * i)] for i in range(6)]
MOST = 24


@cache
def wrapper(page_size: int, pool: int) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(None, "cpu", page_size, max_total_tokens=pool, max_running_requests=8)


def continuous(steps: int, page_size: int = 4, pool: int = 512, **options) -> TPScheduler:
    return TPScheduler(wrapper(page_size, pool), check=True, num_continuous_decode_steps=steps, **options)


def looks(scheduler) -> list[int]:
    """How many steps are looked at each time, from now on."""
    seen, settle = [], scheduler._settle

    def counted():
        if scheduler._queued:
            seen.append(len(scheduler._queued))
        settle()

    scheduler._settle = counted
    return seen


@given(st.data())
@settings(deadline=None, max_examples=max(8, settings().max_examples // 10))
def test_any_number_of_steps_and_any_arrivals_give_the_same_tokens_and_keep_every_page(data):
    """Greedy, drawn and penalized requests come at any time, with stop tokens or without, and some are aborted."""
    page_size, pool = data.draw(st.sampled_from(((1, 512), (4, 512), (16, 512), (4, 96))))
    options = {
        "page_size": page_size, "pool": pool, "chunked_prefill_size": data.draw(st.sampled_from((16, -1))),
        "enable_mixed_chunk": data.draw(st.booleans()), "overlap": data.draw(st.booleans()),
    }  # fmt: skip
    count = data.draw(st.integers(1, 6))
    coming = [
        (
            data.draw(st.integers(0, 12)),
            SamplingParams(
                max_new_tokens=data.draw(st.integers(1, MOST)), ignore_eos=True, **KINDS[data.draw(st.integers(0, 4))],
                stop_token_ids=tuple(data.draw(st.lists(st.sampled_from(greedy(TINY_QWEN_PATH, PROMPTS[i], MOST)), max_size=1))),
            ),
        )
        for i in range(count)
    ]  # fmt: skip
    aborted = data.draw(st.none() | st.tuples(st.integers(0, count - 1), st.integers(3, 20)))

    def answers(steps: int):
        scheduler, late = continuous(steps, **options), list(enumerate(coming))
        if pool == 96:
            scheduler.new_token_ratio = 0.1  # admit too many
        rids = {}

        def arrivals(step: int) -> bool:
            for one in [one for one in late if one[1][0] <= step or not scheduler.busy]:
                late.remove(one)
                i, (_, params) = one
                rids[i] = scheduler.add_request(input_ids=PROMPTS[i], sampling_params=params)
            if aborted and step >= aborted[1] and aborted[0] in rids:
                scheduler.abort(rids[aborted[0]])
            return bool(late)

        results = scheduler.process_requests(arrivals)
        assert not scheduler.busy
        assert scheduler.pool.free_slots + scheduler.tree.evictable_size == scheduler.pool.size
        return [results[rids[i]] for i in range(count)]

    one, several = answers(1), answers(data.draw(st.integers(2, 9)))
    for i, (a, b) in enumerate(zip(one, several, strict=True)):
        if aborted and aborted[0] == i:  # it has what was looked at, which may be less
            shorter = min(len(a.output_ids), len(b.output_ids))
            assert a.output_ids[:shorter] == b.output_ids[:shorter]
        else:
            assert (a.output_ids, a.finish_reason, a.text) == (b.output_ids, b.finish_reason, b.text)
            assert [x.token for x in a.logprobs] == [x.token for x in b.logprobs]


@pytest.mark.parametrize("overlap", [False, True])
def test_so_many_steps_are_looked_at_together_and_the_last_one_at_once(overlap):
    scheduler = continuous(4, overlap=overlap)
    seen = looks(scheduler)
    scheduler.add_request(input_ids=PROMPTS[0], sampling_params=SamplingParams(max_new_tokens=14, ignore_eos=True))
    scheduler.process_requests()
    # the prompt's own token by itself, then by fours, and the last token when it is there
    assert seen == [1, 4, 4, 4, 1]


def test_a_stop_token_costs_the_steps_behind_it_and_leaves_nothing_of_them():
    """Not looked at, they are computed; looked at, they are thrown away: from the answer, the tree and the pool."""
    long = greedy(TINY_QWEN_PATH, PROMPTS[1], MOST)
    at = next(i for i in range(3, MOST) if long[i] not in long[:i])
    params = SamplingParams(max_new_tokens=MOST, ignore_eos=True, stop_token_ids=(long[at],))
    cached = []
    for steps in (1, 6):
        scheduler = continuous(steps, page_size=1, overlap=False)
        scheduler.add_request(input_ids=PROMPTS[1], sampling_params=params)
        (out,) = scheduler.process_requests().values()
        assert out.output_ids == long[: at + 1]
        assert at + 1 <= scheduler.work["sampled"] <= at + steps
        cached.append(scheduler.tree.evictable_size)
    assert cached[0] == cached[1]


def test_who_arrives_is_admitted_by_the_next_step():
    """And has its first token looked at one by one, as have those that run while somebody waits."""
    scheduler = continuous(8, overlap=True)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    scheduler.add_request(input_ids=PROMPTS[0], sampling_params=params)
    for _ in range(4):
        scheduler.step()
    assert len(scheduler._queued) == 3, "nobody waits"
    scheduler.add_request(input_ids=PROMPTS[1], sampling_params=params)
    scheduler.step()
    assert scheduler.steps["prefill"] == 2
    assert len(scheduler._queued) == 1, "all before it was looked at"
    scheduler.drop_all()


def test_a_stream_tells_of_so_many_tokens_at_a_time():
    scheduler, lengths = continuous(4, overlap=True), []
    rid = scheduler.add_request(
        input_ids=PROMPTS[0], sampling_params=SamplingParams(max_new_tokens=10, ignore_eos=True)
    )
    while scheduler.step():
        if req := scheduler.grown.pop(rid, None):
            lengths.append(len(req.output_ids))
    assert lengths == [1, 5, 9, 10]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"num_continuous_decode_steps": 0}, "^num_continuous_decode_steps=0 must be"),
        ({"num_continuous_decode_steps": 2.5}, "^num_continuous_decode_steps=2.5 must be"),
        ({"num_continuous_decode_steps": 4, "pp_size": 2}, "^num_continuous_decode_steps=4: .*; use pp_size=1, or"),
        ({"num_continuous_decode_steps": 4, "attn_dp_size": 2}, "use attn_dp_size=1, or num_continuous_decode_steps=1$"),
        ({"num_continuous_decode_steps": 4, "speculative_algorithm": "NGRAM"}, "leave speculative_algorithm out, or"),
    ],
)  # fmt: skip
def test_what_needs_every_step_is_told_before_a_process_is_started(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        ServerArgs(**given)
