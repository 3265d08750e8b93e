"""Rows that are cut over ranks (layers/communicator.py): the tokens of transformers, and the messages that the formula says."""

from math import ceil

import numpy as np
import pytest
import torch

from common.executor import Executor, StepParts
from common.layers.communicator import LayerCommunicator
from common.layers.vocab import gather_logits
from common.models.config import ModelConfig
from common.parallel_state import TPGroup, broadcast
from tests.oracle import greedy
from tests.ranks import layout_of_the_pool

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [20, 21, 22, 23]]
NEW, P, PAGES = 6, 4, 10
NOTHING = np.zeros(0, dtype=np.int64)


def serve(folder, attn_dp: int, where: list[int]):
    """Prompt i on data rank where[i]. Returns the tokens, the messages of the prefill and of the first decode step."""
    parallel = layout_of_the_pool(attention_data_parallel_size=attn_dp)
    executor = Executor(folder, "cpu", P, max_total_tokens=512, parallel=parallel, enable_layernorm_sp=attn_dp == 1)
    part_of = [[i for i, rank in enumerate(where) if rank == part] for part in range(attn_dp)]
    order, mine = [i for part in part_of for i in part], part_of[parallel.place.attn_dp]
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in range(len(mine))])
    out = [[] for _ in PROMPTS]

    def draw(logits):
        full = gather_logits(logits, executor.config.vocab_size, executor.tp)
        tokens = torch.empty(len(order), dtype=torch.int64) if full is None else full.argmax(dim=-1)
        broadcast(tokens, executor.tp, "tokens")
        executor.receive_tokens(tokens)
        for i, token in zip(order, tokens.tolist(), strict=True):
            out[i].append(token)

    lengths = [np.array([len(PROMPTS[i]) for i in part], dtype=np.int64) for part in part_of]
    own, rows = lengths[parallel.place.attn_dp], np.arange(len(mine))
    tokens = np.array([token for i in mine for token in PROMPTS[i]], dtype=np.int64)
    parts = StepParts([int(n.sum()) for n in lengths], [np.cumsum(n) - 1 for n in lengths], [NOTHING] * attn_dp)
    with executor.tp.ledger.recording() as ledger:
        logits = executor.ragged(tokens, rows, 0 * own, own, 0 * own + 1, parts=parts if attn_dp > 1 else None)
        prefill = ledger.summary()
    draw(logits)
    for step in range(NEW - 1):
        with executor.tp.ledger.recording() as ledger:
            logits = executor.decode(rows, own + step, parts=[len(part) for part in part_of] if attn_dp > 1 else None)
            decode = ledger.summary()
        draw(logits)
    held = executor.kv_cache.kv.nbytes
    return out, prefill, decode, held


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_sequence_parallel_tokens_and_messages(checkpoint, ranks, size, name):
    """12 tokens of a prefill step, then 3 a step: neither is a multiple of 2 or 3 ranks each time, so rows are padded."""
    folder = checkpoint(name)
    config = ModelConfig.from_folder(folder)
    layers, row = config.num_layers, config.hidden_size * 4
    for rank, (out, prefill, decode, _) in enumerate(ranks(size).run(serve, folder, 1, [0, 0, 0])):
        assert out == [greedy(folder, prompt, NEW) for prompt in PROMPTS]
        held, last = ceil(12 / size), (6, 7, 11)
        mine = sum(held * rank <= i < held * (rank + 1) for i in last)  # rows that emit, on this rank
        assert prefill == {
            "reduce_scatter": {"calls": 1 + 2 * layers, "bytes": (1 + 2 * layers) * held * size * row},
            "all_gather": {"calls": 2 * layers, "bytes": 2 * layers * held * row},
            "all_to_all": {"calls": 1, "bytes": size * mine * row},
        }
        held = ceil(3 / size)
        assert decode == {
            "reduce_scatter": {"calls": 1 + 2 * layers, "bytes": (1 + 2 * layers) * held * size * row},
            "all_gather": {"calls": 1 + 2 * layers, "bytes": (1 + 2 * layers) * held * row},
        }


@pytest.mark.parametrize(
    ("size", "attn_dp", "where"), [(2, 2, [0, 1, 0]), (2, 2, [1, 1, 1]), (3, 3, [0, 2, 0]), (4, 2, [0, 1, 1])]
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_data_parallel_attention_tokens_and_messages(checkpoint, ranks, size, attn_dp, where, name):
    """Uneven parts, one of them empty in two cases: it has no rows, and takes part."""
    folder = checkpoint(name)
    config = ModelConfig.from_folder(folder)
    layers, row, attn_tp = config.num_layers, config.hidden_size * 4, size // attn_dp
    tokens = [sum(len(PROMPTS[i]) for i in range(3) if where[i] == part) for part in range(attn_dp)]
    answers = ranks(size).run(serve, folder, attn_dp, where)
    for rank, (out, prefill, decode, _) in enumerate(answers):
        assert out == [greedy(folder, prompt, NEW) for prompt in PROMPTS]
        held = [ceil(n / attn_tp) for n in tokens for _ in range(attn_tp)]
        first = held[rank] * (rank % attn_tp)  # of this rank's rows, among those of its part
        ends = np.cumsum([len(PROMPTS[i]) for i in range(3) if where[i] == rank // attn_tp]) - 1
        emitting = sum(first <= end < first + held[rank] for end in ends)
        # before the MLP: a copy of its own rows for each rank; after it: of all rows the partial sums; then the rows that emit
        mlp = layers * (size * held[rank] + sum(held)) * row
        expected = {"all_to_all": {"calls": 2 * layers + 1, "bytes": mlp + size * emitting * row}}
        if attn_tp > 1:  # attention is cut as well: its two messages, and the embedding's
            expected["all_gather"] = {"calls": layers, "bytes": layers * held[rank] * row}
            expected["reduce_scatter"] = {"calls": 1 + layers, "bytes": (1 + layers) * attn_tp * held[rank] * row}
        assert prefill == expected
        most = ceil(max(where.count(part) for part in range(attn_dp)) / attn_tp)
        over_heads = 1 if attn_tp > 1 else 0
        assert decode == {
            "all_gather": {
                "calls": layers * (1 + over_heads) + 1,
                "bytes": (layers * (1 + over_heads) + 1) * most * row,
            },
            "reduce_scatter": {
                "calls": layers + over_heads * (layers + 1),
                "bytes": (layers * size + over_heads * (layers + 1) * attn_tp) * most * row,
            },
        }


def test_rows_of_a_step():
    """As on paper: 4 ranks, two parts of two, 5 and 2 tokens."""
    comm = LayerCommunicator(TPGroup(3, 4), TPGroup(1, 2))
    assert (comm.parts, comm.part, comm.spreads) == (2, 1, True)
    assert comm.rows([5, 2]).held == (3, 3, 1, 1)
    assert comm.rows([5, 2], padded=True).held == (3, 3, 3, 3)
    assert comm.rows([5, 0]).held == (3, 3, 0, 0)
    assert comm.rows([5, 2]).mine == 2
    assert LayerCommunicator(TPGroup(1, 2)).rows([5]) is None  # plain tensor parallelism
    assert LayerCommunicator(TPGroup(1, 2), enable_layernorm_sp=True).rows([5]).held == (3, 3)
    with pytest.raises(ValueError, match="3 numbers of tokens for 2 parts; give each part its own"):
        comm.rows([1, 2, 3])


def test_which_rows_are_padding_is_the_same_from_numbers_and_from_the_device():
    """As above: of the second part's two rows each of its ranks has one, or with padding the first has both."""
    comm = LayerCommunicator(TPGroup(3, 4), TPGroup(1, 2))
    exact, padded = comm.rows([5, 2]), comm.rows([5, 2], padded=True)
    assert [exact.real_on(rank) for rank in range(4)] == [3, 2, 1, 1]
    assert [padded.real_on(rank) for rank in range(4)] == [3, 2, 2, 0]
    assert exact.live.tolist() == [True] * 5 + [False] + [True] * 2
    later = comm.rows([5, 5], padded=True, real=torch.tensor([5, 2]))  # a CUDA graph of five rows a part
    assert later.held == padded.held
    assert later.live.tolist() == padded.live.tolist() == [True] * 5 + [False] + [True] * 2 + [False] * 4
    assert [later.live_on(rank).sum().item() for rank in range(4)] == [3, 2, 2, 0]
    assert comm.rows([2, 2]).live is None
