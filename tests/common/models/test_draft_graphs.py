"""What draft graphs record, run as it is: a CPU has no CUDA graphs, but the launches are the same, padding and all."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.executor import Executor
from common.models.draft_graphs import DraftGraphs
from common.models.drafters.contract import DraftOptions
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


def kept_like(graphs):
    """A replay as a GPU's: what it leaves lies where that of the one before has lain."""
    kept = {}

    def replay(shape):
        new = DraftGraphs._step(graphs, shape)
        there = kept.setdefault(shape, replace(new, tokens=new.tokens.clone(), parents=new.parents.clone()))
        there.tokens.copy_(new.tokens)
        there.parents.copy_(new.parents)
        return there

    return replay


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
    graphs._replay = kept_like(graphs)
    rows, positions = np.array(ROWS[:batch]), np.array(LENGTHS[:batch])
    tree = graphs.run(rows, positions)
    want = executor.verifier.guess(rows, positions, 5)
    assert torch.equal(tree.tokens, want.tokens)
    assert torch.equal(tree.parents, want.parents)
    assert len(set(want.tokens[:, 1:].flatten().tolist())) > 2, "guesses, not filling alone"
    if batch > 1:
        again = graphs.run(rows[::-1], positions[::-1])
        assert not torch.equal(again.tokens, want.tokens)
        assert torch.equal(tree.tokens, want.tokens), "the next draft leaves this tree alone"
        assert torch.equal(tree.parents, want.parents)


@torch.inference_mode()
def test_the_verifier_takes_what_is_recorded_for_its_number_of_nodes(executor, monkeypatch):
    graphs, verifier = graphs_of(executor), executor.verifier
    asked = []
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
