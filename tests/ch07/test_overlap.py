"""Queueing a step before the last one's tokens are seen changes nothing but the time at which they are seen."""

import pytest

from common.sampling.params import SamplingParams
from tests.ch07.test_scheduler import make
from tests.oracle import greedy, some_prompts

KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 4},
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "seed": 5},
    {"temperature": 0.0, "logprobs": True},
]


def run(scheduler, prompts, lengths, **params):
    ids = [
        scheduler.add_request(
            input_ids=prompt,
            sampling_params=SamplingParams(max_new_tokens=n, **{"ignore_eos": True}, **KINDS[i % 5], **params),
        )
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    results = scheduler.process_requests()
    return [(results[i].output_ids, results[i].finish_reason, results[i].logprobs) for i in ids]


@pytest.mark.parametrize("pool", [None, 72])
@pytest.mark.parametrize("chunk", [8, -1])
@pytest.mark.parametrize("page_size", [1, 4])
def test_same_answers_with_and_without(page_size, chunk, pool, checkpoint):
    """Greedy, sampled, truncated and penalized requests side by side, with retraction where the pool is small."""
    prompts, lengths = some_prompts(1009, 10, shared=24, longest=12), [1, 30, 29, 20, 5, 30, 1, 30, 17, 30]
    answers, retractions = [], []
    for overlap in (False, True):
        scheduler = make(
            checkpoint("qwen2"), page_size=page_size, pool=pool, chunked_prefill_size=chunk, overlap=overlap
        )
        if pool:
            scheduler.new_token_ratio = 0.1  # admit too many
        answers.append(run(scheduler, prompts, lengths))
        retractions.append(scheduler.retractions)
        assert scheduler.pool.free_slots + scheduler.tree.evictable_size == scheduler.pool.size
        assert scheduler.tree.protected_size == 0
    for (tokens, reason, logprobs), (other, other_reason, other_logprobs) in zip(*answers, strict=True):
        assert tokens == other
        assert reason == other_reason
        assert logprobs == pytest.approx(other_logprobs, abs=1e-4)
    assert (min(retractions) > 0) == bool(pool), "the small pool must retract, the large one must not"


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_stop_token_is_seen_one_step_late_and_costs_one_token(page_size, checkpoint):
    folder, prompt = checkpoint("qwen2"), some_prompts(1009, 4)[0]
    long = greedy(folder, prompt, 12)
    stop = next(i for i in range(3, 12) if long[i] not in long[:i])
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(long[stop],))
    sampled, cached = {}, {}
    for overlap in (False, True):
        scheduler = make(folder, page_size=page_size, overlap=overlap)
        scheduler.add_request(input_ids=prompt, sampling_params=params)
        (out,) = scheduler.process_requests().values()
        assert out.output_ids == long[: stop + 1]
        assert out.finish_reason == {"type": "stop", "matched": long[stop]}
        sampled[overlap] = scheduler.work["sampled"]
        cached[overlap] = scheduler.tree.evictable_size
    assert sampled == {False: stop + 1, True: stop + 2}
    assert cached[False] == cached[True], "the token too many is not in the tree"


def test_an_answer_of_known_length_wastes_nothing(checkpoint):
    scheduler = make(checkpoint("qwen2"), overlap=True)
    for n in (1, 3, 8):
        scheduler.add_request(input_ids=[n] * 6, sampling_params=SamplingParams(max_new_tokens=n, ignore_eos=True))
    scheduler.process_requests()
    assert scheduler.work["sampled"] == 12


def test_the_next_step_is_queued_before_the_last_tokens_are_seen(checkpoint):
    scheduler, seen = make(checkpoint("qwen2"), overlap=True), []
    execute, settle = scheduler.control.execute, scheduler._settle
    scheduler.control.execute = lambda task: (seen.append(f"queue {task.step}"), execute(task))[1]
    scheduler._settle = lambda: (seen.append("look") if scheduler._queued else None, settle())[1]
    scheduler.add_request(input_ids=[1, 2, 3], sampling_params=SamplingParams(max_new_tokens=3, ignore_eos=True))
    scheduler.process_requests()
    assert seen == ["queue 0", "queue 1", "look", "queue 2", "look", "look"]
