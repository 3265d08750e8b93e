"""A decode batch that changes by rows says what its requests say, and who of them begins alike."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.schedule_batch import ScheduleBatch
from common.sampling.batch import SamplingBatch
from common.sampling.params import SamplingParams
from tests.common.attention.test_prefix_groups import assert_alike

PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(min_new_tokens=3, temperature=0.5),
    SamplingParams(presence_penalty=1),
]
PAGE, SYSTEM, CHAT = 64, 5, 3  # tokens; pages that all begin with, and that some go on with


class Running:
    """Requests that have their first token; some have found the same pages in the tree."""

    def __init__(self):
        pool, rows = TokenToKVPool(num_pages=4000, page_size=PAGE), ReqToTokenPool(64, 20 * PAGE)
        self.memory = RequestMemory(pool, rows, RadixCache(pool, rows))
        self.shared = self.memory.take(SYSTEM + CHAT)
        self.count = 0

    def admit(self, found, params, probe):
        """found: pages of the tree that it begins with."""
        self.count += 1
        req = Req(self.count, None, [1] * (10 * PAGE), params, self.count, probe=probe)
        self.memory.admit(req, self.memory.tree.match_prefix([]))
        self.memory.rows.req_to_token[req.row, : found * PAGE] = self.shared[: found * PAGE]
        req.allocated_len = req.prefix_len = found * PAGE
        self.memory.grow(req, 10 * PAGE)
        req.kv_len, req.pending, req.wanted = 10 * PAGE, 1, 50
        return req

    def leave(self, req):
        self.memory.rows.free(req.row)
        req.row, req.ended = -1, True


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_whoever_comes_and_goes_the_batch_says_what_its_requests_say(data):
    there, running = Running(), []
    batch = ScheduleBatch(there.memory, group=True)
    for _ in range(data.draw(st.integers(1, 6))):
        for req in [req for req in running if data.draw(st.integers(0, 3)) == 0]:
            running.remove(req)
            there.leave(req)
        for _ in range(data.draw(st.integers(0, 6))):
            found = data.draw(st.sampled_from([0, SYSTEM - 2, SYSTEM, SYSTEM + 1, SYSTEM + CHAT]))
            running.append(
                there.admit(
                    found, data.draw(st.sampled_from(PARAMS[: data.draw(st.integers(1, 3))])), data.draw(st.booleans())
                )
            )
        if not batch.is_of(running):
            batch.become(running, running)
        assert set(batch.reqs) == set(running)
        for _ in range(data.draw(st.integers(0, 2))):
            if not running:
                break
            batch.grow()
            batch.advance()
            told = batch.next_sampling()
            anew = SamplingBatch([req.sampling_row() for req in batch.reqs])
            cpu = torch.device("cpu")
            assert torch.equal(told.uniforms(cpu), anew.uniforms(cpu))
            assert torch.equal(told.columns(cpu), anew.columns(cpu))
            logits = torch.zeros(len(batch.reqs), 4)
            assert torch.equal(told.edited(logits), anew.edited(logits))
            for req in batch.reqs:
                if data.draw(st.booleans()):  # its tokens are looked at
                    req.output_ids += [3] * req.pending
                    req.pending = 0
        assert batch.rows.tolist() == [req.row for req in batch.reqs]
        assert batch.positions.tolist() == [req.kv_len for req in batch.reqs]
        assert batch.ends.tolist() == [req.allocated_len for req in batch.reqs]
        assert batch.counted == sum(not req.probe for req in running)
        assert batch.needs_last_token == any(req.needs_last_token for req in running)
        assert_alike([there.memory.tree_pages(req).tolist() for req in batch.reqs], batch.alike, PAGE)


def test_who_stays_keeps_its_place():
    """Of 64 sequences one leaves and one comes: nobody else moves, and the groups keep the others' neighbours."""
    there = Running()
    running = [there.admit(SYSTEM, PARAMS[0], False) for _ in range(60)]
    batch = ScheduleBatch(there.memory, group=True)
    batch.become(running)
    assert batch.alike == ((0, 60, SYSTEM),)
    left = running.pop(30)
    there.leave(left)
    running.append(there.admit(SYSTEM + 1, PARAMS[0], False))
    batch.become(running)
    assert batch.reqs == running
    assert batch.alike == ((0, 60, SYSTEM),)
    alone = there.admit(0, PARAMS[0], False)
    batch.become([*running, alone])
    assert batch.reqs == [alone, *running], "who shares nothing stands first"
    assert np.array_equal(batch.rows, [req.row for req in batch.reqs])
