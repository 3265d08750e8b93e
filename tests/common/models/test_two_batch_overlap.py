"""Two halves in turn are one step: the same tokens as transformers, twice the messages of half the size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.executor import Executor
from common.layers.communicator import LayerCommunicator
from common.layers.vocab import gather_logits
from common.models.two_batch_overlap import Ragged, halves_of
from common.parallel_state import TPGroup, broadcast, get_tensor_parallel
from tests.oracle import greedy

PAGE, NEW = 4, 6


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6).filter(
        lambda b: sum(n for _, n in b) > 1
    )
)
def test_halves_are_the_step_cut_after_half_of_its_tokens(batch):
    cached, new = (np.array(column) for column in zip(*batch, strict=True))
    step = Ragged(np.arange(new.sum()), np.arange(len(batch)) + 100, cached, new)
    first, second = halves_of(step)
    assert len(first.tokens) == len(step.tokens) // 2
    assert [*places(first), *places(second)] == places(step)
    for half in (first, second):
        assert (half.new > 0).all()
        assert half.new.sum() == len(half.tokens)


def places(step: Ragged) -> list[tuple[int, int, int]]:
    """(token, row, position) of each token."""
    rows = np.repeat(step.rows, step.new)
    positions = np.concatenate([np.arange(c, c + n) for c, n in zip(step.cached, step.new, strict=True)])
    return list(zip(step.tokens.tolist(), rows.tolist(), positions.tolist(), strict=True))


def answers(folder, prompts: list[list[int]], chunk: int, flags: dict) -> tuple[list[list[int]], list[tuple]]:
    """NEW greedy tokens for each prompt, fed in `chunk` tokens a sequence and step; and the all-reduces of the last step."""
    tp = get_tensor_parallel()
    executor = Executor(folder, "cpu", PAGE, max_total_tokens=1024, max_running_requests=8, tp=tp, **flags)
    each = -(-(max(map(len, prompts)) + NEW) // PAGE)
    executor.table.set_pages([(row, 0, range(row * each, (row + 1) * each)) for row in range(len(prompts))])
    told: list[list[int]] = [[] for _ in prompts]

    def choose(rows, logits_local) -> None:
        logits = gather_logits(logits_local, executor.config.vocab_size, tp)
        best = torch.zeros(len(rows), dtype=torch.int64) if logits is None else logits.argmax(dim=-1)
        broadcast(best, tp, "tokens")
        executor.receive_tokens(best)
        for row, token in zip(rows, best.tolist(), strict=True):
            told[row].append(token)

    for at in range(0, max(map(len, prompts)), chunk):
        rows = np.array([row for row, prompt in enumerate(prompts) if len(prompt) > at])
        pieces = [prompts[row][at : at + chunk] for row in rows]
        emits = np.array([len(prompts[row]) <= at + chunk for row in rows])
        new = np.array([len(piece) for piece in pieces])
        logits = executor.ragged(np.concatenate(pieces), rows, 0 * rows + at, new, emits)
        if emits.any():
            choose(rows[emits], logits)
    rows, lengths = np.arange(len(prompts)), np.array([len(prompt) for prompt in prompts])
    for step in range(NEW - 1):
        with tp.ledger.recording() as ledger:
            logits = executor.decode(rows, lengths + step)
        choose(rows, logits)
    return told, [(e.label, e.shape) for e in ledger.entries if e.op == "all_reduce"]


PROMPTS = [[(7 * i + 3 * j) % 1000 for j in range(n)] for i, n in enumerate((23, 1, 9, 14, 5))]
FLAGS = [{"enable_two_batch_overlap": True}, {"enable_all_reduce_fusion": True}]


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("flags", FLAGS, ids=["two batches", "sums left to the norms"])
@pytest.mark.parametrize("chunk", [100, 7])
def test_tokens_equal_transformers(ranks, checkpoint, family, flags, chunk):
    folder = checkpoint(family)
    for told, _ in ranks(2).run(answers, folder, PROMPTS, chunk, flags):
        assert told == [greedy(folder, prompt, NEW) for prompt in PROMPTS]


def test_one_sequence_alone_is_cut_through(ranks, checkpoint):
    folder = checkpoint("qwen2")
    for told, sums in ranks(2).run(answers, folder, PROMPTS[:1], 100, FLAGS[0]):
        assert told == [greedy(folder, PROMPTS[0], NEW)]
        assert len(sums) == 1 + 2 * 3  # its decode steps have one row, and no halves


def test_the_ledger_has_each_sum_twice_in_turn_at_half_the_rows(ranks, checkpoint):
    for _, sums in ranks(2).run(answers, checkpoint("qwen2"), PROMPTS, 100, FLAGS[0]):
        blocks = [f"layers.{i}.{block}" for i in range(3) for block in ("o_proj", "down_proj")]
        begun, rest = ["embed_tokens", blocks[0]], [label for label in blocks[1:] for _ in range(2)]
        assert [label for label, _ in sums] == [*begun, *begun, *rest]
        assert [shape for _, shape in sums] == [(2, 112), (2, 112), (3, 112), (3, 112)] + [(2, 112), (3, 112)] * 5


def test_sums_that_are_left_to_the_norms_are_the_same_messages(ranks, checkpoint):
    plain, left = (
        [sums for _, sums in ranks(2).run(answers, checkpoint("qwen2"), PROMPTS, 100, flags)]
        for flags in ({}, FLAGS[1])
    )
    assert plain == left


def test_rows_that_are_spread_have_no_all_reduce_to_hide():
    for flags in FLAGS:
        with pytest.raises(
            ValueError, match=r"^enable_all_reduce_fusion and enable_two_batch_overlap are about all-reduces, and rows"
        ):
            LayerCommunicator(TPGroup(0, 2), enable_layernorm_sp=True, **flags)


def test_one_rank_alone_has_no_halves(checkpoint):
    executor = Executor(checkpoint("qwen2"), "cpu", PAGE, max_total_tokens=64, tp=TPGroup(), **FLAGS[0])
    assert not executor.two_batch_overlap
    assert not executor.communicator.defers
