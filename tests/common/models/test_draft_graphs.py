"""What draft graphs record, run as it is: a CPU has no CUDA graphs, but the launches are the same, padding and all."""

import numpy as np
import pytest
import torch

from common.executor import Executor
from common.models.draft_graphs import DraftGraphs
from common.models.drafters.contract import Drafter, DraftOptions
from common.models.verify_graphs import MOST_NODES

ROWS, LENGTHS = (0, 3, 4), (9, 30, 17)
CHAIN, TREE = (3, 1, 5), (3, 2, 5)  # steps, topk, nodes; a chain of fewer guesses than nodes is filled up


@pytest.fixture(scope="module", params=[
    ("STANDALONE", CHAIN), ("STANDALONE", TREE), ("MEDUSA", TREE), ("EAGLE", CHAIN), ("EAGLE", TREE), ("EAGLE3", TREE),
], ids=lambda param: f"{param[0]} {param[1]}")  # fmt: skip
def executor(request):
    name, options = request.param
    made = Executor(
        device="cpu", page_size=4, max_total_tokens=1024, max_running_requests=8,
        speculative=DraftOptions(name, None, *options),
    )  # fmt: skip
    made.table.set_pages([(row, 0, range(row * 16, row * 16 + 16)) for row in range(8)])
    one = np.ones(1, dtype=np.int64)
    for row, length in zip(ROWS, LENGTHS, strict=True):
        made.ragged(np.arange(length) + 7 * row, row * one, 0 * one, length * one, one)
        made.receive_tokens(torch.tensor([11 + row]))
    return made


def graphs_of(executor, nodes=5):
    parts = (executor.model, executor.attention, executor.kv_cache, executor.table)
    return DraftGraphs(executor.verifier.drafter, nodes, *parts, 8)


@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.inference_mode()
def test_a_padded_draft_is_the_draft_itself(executor, batch):
    graphs, caches = graphs_of(executor), executor.caches
    untouched = [cache.kv.clone() for cache in caches]
    for shape in graphs.shapes:
        graphs._pad(shape)
        graphs._step(shape)
    for cache, before in zip(caches, untouched, strict=True):
        assert torch.equal(cache.kv, before), "padding leaves nothing"
    graphs._replay = graphs._step
    rows, positions = np.array(ROWS[:batch]), np.array(LENGTHS[:batch])
    tree = graphs.run(rows, positions)
    want = executor.verifier.guess(rows, positions, 5)
    assert torch.equal(tree.tokens, want.tokens)
    assert torch.equal(tree.parents, want.parents)
    assert len(set(want.tokens[:, 1:].flatten().tolist())) > 2, "guesses, not filling alone"
    graphs.inputs.fill_(0)
    before = tree.tokens.clone()
    graphs.run(rows[::-1], positions[::-1])
    assert torch.equal(tree.tokens, before), "the next draft leaves this tree alone"


@torch.inference_mode()
def test_the_verifier_takes_what_is_recorded_for_its_number_of_nodes(executor, monkeypatch):
    graphs, verifier = graphs_of(executor), executor.verifier
    graphs._replay, asked = graphs._step, []
    monkeypatch.setattr(graphs, "_step", lambda shape: asked.append(shape) or DraftGraphs._step(graphs, shape))
    graphs._replay = graphs._step
    monkeypatch.setattr(verifier, "graphs", graphs)
    rows, positions = np.array(ROWS), np.array(LENGTHS)
    verifier.tree(rows, positions, 5)
    assert asked == [(4, 5)], "three rows are four of a recording"
    verifier.tree(rows, positions, 4)
    assert len(asked) == 1, "not recorded"
    assert not graphs.holds(9, 5)
    assert graphs_of(executor, 60).holds(MOST_NODES // 60, 60)
    assert not graphs_of(executor, 200).holds(3, 200)


def test_who_does_not_say_so_is_not_recorded():
    assert not Drafter.recordable
