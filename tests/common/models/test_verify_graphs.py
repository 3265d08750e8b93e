"""What verify graphs record, run as it is: a CPU has no CUDA graphs, but their steps are the same launches, padding and all."""

import numpy as np
import pytest
import torch

from common.draft_tree import DraftTree
from common.executor import Executor
from common.models.graph_runner import DecodeGraphs
from common.models.verify_graphs import MOST_NODES, VerifyGraphs

ROWS, LENGTHS = (0, 3, 4), (9, 30, 17)
LAYERS = (1, 3)


@pytest.fixture(scope="module")
def executor():
    executor = Executor(device="cpu", page_size=4, max_total_tokens=1024, max_running_requests=8)
    executor.table.set_pages([(row, 0, range(row * 16, row * 16 + 16)) for row in range(8)])
    one = np.ones(1, dtype=np.int64)
    for row, length in zip(ROWS, LENGTHS, strict=True):
        executor.ragged(np.arange(length) + 7 * row, row * one, 0 * one, length * one, one)
    executor.table.set_tokens(torch.tensor(ROWS), torch.tensor([11, 12, 13]))
    return executor


def unrecorded(kind, executor, *args):
    graphs = kind(executor.model, executor.attention, executor.kv_cache, executor.table, 8, *args)
    for shape in graphs.shapes:
        graphs._pad(shape)
        with torch.inference_mode():
            graphs._step(shape)
    graphs._replay = graphs._step
    return graphs


def some_trees(nodes, batch, seed=0):
    rng = torch.Generator().manual_seed(seed)
    parents = [[-1] + [int(torch.randint(0, i, (1,), generator=rng)) for i in range(1, nodes)] for _ in range(batch)]
    return DraftTree(torch.randint(0, 500, (batch, nodes), generator=rng), torch.tensor(parents))


@pytest.mark.parametrize("nodes", [1, 6])
@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.inference_mode()
def test_a_padded_step_of_trees_gives_what_the_step_itself_gives(executor, batch, nodes):
    graphs = unrecorded(VerifyGraphs, executor, (1, 6), LAYERS)
    rows, positions, tree = np.array(ROWS[:batch]), np.array(LENGTHS[:batch]), some_trees(nodes, batch)
    before = executor.kv_cache.kv.clone()
    done = graphs.run(rows, positions, tree)
    after = executor.kv_cache.kv.clone()
    executor.kv_cache.kv.copy_(before)
    step, heard = executor.table.tree(rows, positions, tree), dict.fromkeys(LAYERS)
    attention = executor.attention(executor.kv_cache, step.meta)
    hidden = executor.model(step.input_ids, step.positions, attention, entering=heard)
    torch.testing.assert_close(done.hidden, hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(done.logits, executor.model.compute_logits(hidden), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(done.entering, heard, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, executor.kv_cache.kv, atol=1e-4, rtol=1e-4)
    for name in ("input_ids", "positions", "rows"):
        assert torch.equal(getattr(done.inputs, name), getattr(step, name)), name
    assert torch.equal(done.inputs.meta.slot_mapping, step.meta.slot_mapping)


@torch.inference_mode()
def test_where_all_trees_are_chains_nobody_searches_them(executor):
    rows, positions = np.array(ROWS), np.array(LENGTHS)
    chains = DraftTree.chain(some_trees(6, 3).tokens)
    graphs = [unrecorded(VerifyGraphs, executor, (6,), (), 0, known) for known in (False, True)]
    before = executor.kv_cache.kv.clone()
    done = [one.run(rows, positions, chains) for one in graphs]
    executor.kv_cache.kv.copy_(before)
    assert torch.equal(*(one.logits for one in done))
    assert [one.holds(3, 6, chain=False) for one in graphs] == [True, False]


@torch.inference_mode()
def test_a_padded_decode_step_gives_what_the_step_itself_gives(executor):
    graphs = unrecorded(DecodeGraphs, executor)
    rows, positions = np.array(ROWS), np.array(LENGTHS)
    want = executor.decode(rows, positions)
    torch.testing.assert_close(graphs.run(rows, positions), want, atol=1e-3, rtol=1e-4)


def test_what_is_recorded_is_not_larger_than_worth_it(executor):
    graphs = VerifyGraphs(executor.model, executor.attention, executor.kv_cache, executor.table, 256, (1, 60))
    assert graphs.holds(256, 1)
    assert graphs.holds(MOST_NODES // 60, 60)
    assert not graphs.holds(MOST_NODES // 60 + 1, 60)
    assert not graphs.holds(1, 7)
    computed = [size * nodes for size, nodes in graphs.shapes]
    assert computed == sorted(computed, reverse=True)
