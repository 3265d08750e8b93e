"""Decode steps that say who begins with the same blocks: what is said is true, and the tokens are those without it."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch06_tp_vllm import LLMEngine, SamplingParams
from ch06_tp_vllm.input_batch import InputBatch
from ch06_tp_vllm.model_runner import StepMetadata
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.scheduler import ScheduledRequest, SchedulerOutput
from common.attention import prefix_groups
from common.attention.prefix_groups import Alike
from common.attention.torch_native import TorchNativeAttention
from common.sampling.params import SamplingParams as RowParams
from tests.common.attention.test_prefix_groups import assert_alike
from tests.oracle import save_random

BLOCK = 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Room for few at a time: some are sent back."""
    folder = save_random("qwen2", tmp_path_factory.mktemp("model"))
    return LLMEngine(
        str(folder), device="cpu", block_size=BLOCK, num_gpu_blocks_override=40, max_num_seqs=9, max_num_batched_tokens=64,
        check=True,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_prefixes():
    """16 tokens in common are worth saying here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_groups, "MIN_ALIKE_TOKENS", 16)
        yield


def serve(engine, requests, group, seen=None):
    """requests: (step in which it arrives, prompt, params). Returns the tokens of each; seen: gets each decode step's groups."""
    engine.batch = batch = InputBatch(engine._settle, BLOCK, group)
    metadata, began = batch.metadata, {}

    def watched(output, slots, alike):
        if output.is_decode:
            for s in output.scheduled:
                began.setdefault((s.request, s.request.num_preemptions), s.num_computed // BLOCK)
            full = [began[s.request, s.request.num_preemptions] for s in output.scheduled]
            blocks = [s.request.block_table[:n] for s, n in zip(output.scheduled, full, strict=True)]
            if group:
                assert_alike(blocks, alike, BLOCK)
        if seen is not None:
            seen.append(alike)
        return metadata(output, slots, alike)

    batch.metadata = watched
    tokens, step, waiting = {}, 0, list(enumerate(requests))
    while waiting or engine.has_unfinished_requests():
        for i, (at, prompt, params) in list(waiting):
            if at <= step:
                engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
                waiting.remove((i, (at, prompt, params)))
        for output in engine.step() if engine.has_unfinished_requests() else ():
            tokens[output.request_id] = output.outputs[0].token_ids
        step += 1
    assert engine.reset_prefix_cache()
    return tokens


def arrivals(random):
    systems = [[random.randrange(3, 60) for _ in range(n)] for n in (16, 21, 30)]
    systems.append(systems[0] + systems[2])
    params = [
        SamplingParams(temperature=0.0, max_tokens=random.randint(2, 12), ignore_eos=True),
        SamplingParams(temperature=1.0, seed=random.randrange(99), max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=9, min_tokens=4, presence_penalty=1.0),
        SamplingParams(temperature=0.8, seed=6, max_tokens=9, min_tokens=4, logit_bias={5: 2.0}),
    ]
    one = random.randint(0, 1)
    return [
        (
            random.randrange(12),
            random.choice(systems[one:]) + [random.randrange(3, 60) for _ in range(random.randint(1, 9))],
            random.choices(params, [8, 2, 1, 1])[0],
        )
        for _ in range(random.randint(4, 12))
    ]


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 1 << 30))
def test_the_hint_is_true_and_the_tokens_are_the_same(engine, seed):
    requests = arrivals(Random(seed))
    assert serve(engine, requests, group=True) == serve(engine, requests, group=False)


def test_who_is_sent_back_and_returns_is_asked_for_its_new_blocks(engine):
    """Nine that begin alike in a pool of 40 blocks: the newest go back to the queue, and groups are said before and after."""
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    requests = [(i // 4, [*range(3, 23), 30 + i], params) for i in range(9)]
    seen, before = [], engine.scheduler.num_preemptions
    tokens = serve(engine, requests, True, seen)
    assert engine.scheduler.num_preemptions > before
    assert {max((group.count for group in alike), default=0) for alike in seen} > {0, 4}
    assert tokens == serve(engine, requests, group=False)


def test_blocks_are_asked_for_again_if_a_request_went_back_and_no_decode_step_was_without_it():
    """Its first step after that is a prompt's, of which attention is told no groups."""
    params = RowParams(max_new_tokens=9)
    requests = [
        Request("r", i, [1] * 24, params, i, drawn_here=True, block_table=[1, 2, 3, 4, 5, 10 + i]) for i in range(5)
    ]
    output = SchedulerOutput([ScheduledRequest(request, 24, 1, True) for request in requests])
    batch = InputBatch(lambda: None, BLOCK, group=True)
    assert batch.in_order(output) == (output, (Alike(0, 5, 5),))
    requests[1].block_table, requests[1].num_preemptions = [1, 2, 3, 6, 7, 8], 1
    ordered, alike = batch.in_order(output)
    assert [s.request.index for s in ordered.scheduled] == [0, 2, 3, 4, 1]
    assert alike == (Alike(0, 4, 5),)


def test_attention_is_told_which_tokens_are_read_once(engine, monkeypatch):
    """Here by a table that believes its attention can do it; the kernel itself has test_interpreted.py and test_kernels.py."""
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    requests = [(0, [*range(3, 23), 30 + i], params) for i in range(5)] + [(0, [7, 8, 9], params)]
    want, seen, told = serve(engine, requests, group=False), [], []

    def attention(cache, meta):
        told.append(meta.prefixes)
        return TorchNativeAttention(cache, meta)

    monkeypatch.setattr(engine.runner, "attention", attention)
    monkeypatch.setattr(engine.runner.table, "tile_members", 4)
    assert serve(engine, requests, True, seen) == want
    assert seen == [()] + [(Alike(1, 5, 5),)] * 3
    assert told[0] is None
    for prefixes in told[1:]:
        assert prefixes.tokens.tolist() == [0] + [20] * 5
        assert prefixes.tiles.T.tolist() == [[1, 4, 20], [5, 1, 20]]


def test_a_step_is_read_as_it_was_written():
    five = np.arange(10).reshape(5, 2)
    for tokens, alike in ((np.array([4, 5, 6]), ()), (np.zeros(0, dtype=np.int64), [Alike(0, 4, 17), Alike(5, 6, 16)])):
        step = StepMetadata([(3, 1, [7, 8])], *five, tokens, alike)
        back = StepMetadata.decode(step.encode())
        assert (back.updates, back.alike) == (step.updates, list(alike))
        assert np.array_equal([back.rows, back.computed, back.new, back.emits, back.scored], five)
        assert np.array_equal(back.token_ids, tokens)
        for words in (step.encode()[:-1], np.append(step.encode(), 0), np.array([1, 0, 0, 0])):
            with pytest.raises(ValueError, match="step"):
                StepMetadata.decode(words)
