"""Tokens spread over real ranks, against dense attention over each sequence, in float64: every step of some short lives."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.attention.backends import pick_attention
from common.attention.context_parallel import ContextParallelAttention
from common.attention.context_table import ContextTable
from common.attention.kv_cache import PagedKVCache
from common.parallel_state import TPGroup, get_tensor_parallel
from tests.common.attention.test_merge import dense
from tests.common.kernels.where import GPU, kernel

ROOT = Path(__file__).parents[3]
LAYERS, LAYER, HKV, GROUP, D = 2, 1, 2, 3, 8


class Life:
    """Some sequences on this rank, whose keys and values everybody can work out, and a pool that was full of NaN."""

    def __init__(self, cp: TPGroup, page_size: int, num_pages: int, seed: int, dtype=torch.float64, attention=None):
        self.attention = attention or pick_attention(cp.device, cp_size=cp.size)
        self.cp, self.page_size, self.draw = cp, page_size, random.Random(seed)
        self.rng = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.cache = PagedKVCache(LAYERS, -(-num_pages // cp.size), page_size, HKV, D, self.dtype, cp.device)
        self.cache.kv.fill_(torch.nan)
        self.table = ContextTable(16, 40, page_size, cp.device, cp)
        self.table.kernels |= self.attention.capturable
        self.free = list(range(num_pages))
        self.draw.shuffle(self.free)
        self.k: dict[int, torch.Tensor] = {}  # row -> [S, Hkv, D]
        self.v: dict[int, torch.Tensor] = {}
        self.pages: dict[int, list[int]] = {}
        self.worst = 0.0

    def begin(self, row: int, like: int | None = None, tokens: int = 0) -> None:
        """A sequence; `like` another one whose first `tokens` tokens, whole pages, are its own."""
        n = tokens // self.page_size
        self.pages[row] = self.pages[like][:n] if like is not None else []
        none = torch.zeros(0, HKV, D, dtype=torch.float64)
        self.k[row] = self.k[like][: n * self.page_size] if n else none
        self.v[row] = self.v[like][: n * self.page_size] if n else none
        self.table.set_pages([(row, 0, self.pages[row])])

    def step(self, new: dict[int, int], decode: bool = False) -> None:
        """new[row] more tokens of each; what comes out is compared."""
        rows = np.array(list(new))
        counts = np.array(list(new.values()))
        cached = np.array([len(self.k[row]) for row in new])
        q, k, v = (
            torch.randn(counts.sum(), h, D, generator=self.rng, dtype=torch.float64).to(self.dtype).double()
            for h in (HKV * GROUP, HKV, HKV)
        )
        for row, more_k, more_v in zip(new, k.split(counts.tolist()), v.split(counts.tolist()), strict=True):
            self.k[row], self.v[row] = torch.cat((self.k[row], more_k)), torch.cat((self.v[row], more_v))
            missing = -(-len(self.k[row]) // self.page_size) - len(self.pages[row])
            if missing > 0:
                first, fresh = len(self.pages[row]), [self.free.pop() for _ in range(missing)]
                self.pages[row] = self.pages[row] + fresh
                self.table.set_pages([(row, first, fresh)])
        if decode:
            inputs, mine = self.table.decode(rows, cached), np.arange(len(rows))
        else:
            inputs = self.table.prefill(np.arange(counts.sum()), rows, cached, counts)
            mine = inputs.input_ids.cpu().numpy()  # the tokens were numbered
            assert np.array_equal(
                np.flatnonzero(inputs.owner == self.cp.rank)[np.argsort(inputs.place[inputs.owner == self.cp.rank])],
                mine,
            )
        positions = np.concatenate([c + np.arange(n) for c, n in zip(cached, counts, strict=True)])
        assert np.array_equal(inputs.positions.cpu().numpy(), positions[mine])
        attention = self.attention(self.cache, inputs.meta)
        o = attention(LAYER, *(x[mine].to(self.cp.device, self.dtype) for x in (q, k, v))).cpu().double()
        whole = [
            dense(x, self.k[row], self.v[row], causal=True)[0]
            for row, x in zip(new, q.split(counts.tolist()), strict=True)
        ]
        if len(mine):
            self.worst = max(self.worst, (o - torch.cat(whole)[mine]).abs().max().nan_to_num(1e9).item())


def live(
    page_size: int, seed: int, dtype: torch.dtype = torch.float64, cp: TPGroup | None = None, attention=None
) -> float:
    """Prefill, chunks behind it, a shared prefix (one of this very step), rows that decode in between, decode."""
    life = Life(cp or get_tensor_parallel(), page_size, 200, seed, dtype, attention)
    draw = life.draw
    some = lambda: draw.choice([1, 2, 3, draw.randrange(4, 40)])  # noqa: E731
    for row in range(3):
        life.begin(row)
    life.step({0: draw.randrange(16, 40), 1: some(), 2: 1})
    life.step({row: 1 for row in range(3)}, decode=True)
    life.begin(3, like=0, tokens=16)
    life.step({3: some(), 1: some(), 0: 1, 2: 1})  # a prompt behind a prefix, a chunk, and two that decode
    for _ in range(draw.randrange(1, 2 * page_size + 2)):
        life.step({row: 1 for row in draw.sample(range(4), 3)}, decode=True)
    life.begin(4)
    life.step({4: 1})  # most ranks have nothing to do
    life.step({4: 2, 2: some()})
    return life.worst


@pytest.mark.parametrize("size", [2, 3])
def test_every_step_is_dense_attention(size, ranks):
    for page_size in (1, 4, 16):
        for seed in range(3):
            assert max(ranks(size).run(live, page_size, seed)) < 1e-12, (page_size, seed)


def live_by_kernels(page_size: int, seed: int) -> float:
    """In Triton's interpreter; pieces of fewer queries than 6 are launched together."""
    from common.attention import context_table  # noqa: PLC0415, on each rank
    from common.kernels.spread_attention import TritonContextParallelAttention  # noqa: PLC0415

    before, context_table.LONG = context_table.LONG, 6
    try:
        return live(page_size, seed, torch.float32, attention=TritonContextParallelAttention)
    finally:
        context_table.LONG = before


@kernel
@pytest.mark.skipif(GPU, reason="the ranks are CPUs, and here kernels are compiled")
@pytest.mark.parametrize("size", [2, 3])
def test_every_step_by_kernels(size, ranks):
    for seed, page_size in enumerate((1, 4, 16)):
        assert max(ranks(size).run(live_by_kernels, page_size, seed)) < 1e-5, page_size


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_every_step_between_two_gpus():
    module = ["-m", "tests.common.attention.on_gpus"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *module]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("all right\n"), done.stderr


def begin_in_the_same_step(page_size: int) -> float:
    """Two prompts that begin alike, the second behind pages that the first fills in this step: as a radix tree does it."""
    life = Life(get_tensor_parallel(), page_size, 64, 0)
    life.begin(0)
    tokens = 4 * page_size
    life.k[0] = life.v[0] = torch.zeros(0, HKV, D, dtype=torch.float64)
    _cp, table, cache = life.cp, life.table, life.cache
    pages = list(range(5, 5 + 6))
    table.set_pages([(0, 0, pages[:4]), (1, 0, pages)])
    rows, cached, new = np.array([0, 1]), np.array([0, tokens]), np.array([tokens, page_size + 1])
    inputs = table.prefill(np.arange(new.sum()), rows, cached, new)
    q, k, v = (torch.randn(new.sum(), h, D, generator=life.rng, dtype=torch.float64) for h in (HKV * GROUP, HKV, HKV))
    mine = inputs.input_ids
    o = ContextParallelAttention(cache, inputs.meta)(LAYER, q[mine], k[mine], v[mine])
    whole = torch.cat((dense(q[:tokens], k[:tokens], v[:tokens], True)[0], dense(q[tokens:], k, v, True)[0]))
    return (o - whole[mine]).abs().max().item() if len(mine) else 0.0


@pytest.mark.parametrize("size", [2, 3])
def test_a_prompt_may_begin_with_pages_that_another_fills_in_this_step(size, ranks):
    for page_size in (1, 4):
        assert max(ranks(size).run(begin_in_the_same_step, page_size)) < 1e-12


def say(lengths: list[tuple[int, int]]) -> tuple[dict, list[int]]:
    """What a step of (cached, new) lengths has sent on this rank by operation, as (calls, bytes); and the rows of each rank."""
    cp = get_tensor_parallel()
    table = ContextTable(8, 8, 4, cp.device, cp)
    table.set_pages([(row, 0, range(8 * row, 8 * row + 8)) for row in range(len(lengths))])
    cached, new = np.array(lengths).T
    inputs = table.prefill(np.arange(new.sum()), np.arange(len(lengths)), cached, new)
    cache = PagedKVCache(LAYERS, 32, 4, HKV, D)
    n = len(inputs.input_ids)
    with cp.ledger.recording() as ledger:
        ContextParallelAttention(cache, inputs.meta)(0, torch.ones(n, HKV * GROUP, D), *torch.ones(2, n, HKV, D))
        return {op: tuple(said.values()) for op, said in ledger.summary().items()}, list(inputs.meta.tokens)


@pytest.mark.parametrize("size", [2, 3])
def test_what_a_layer_says_is_its_formula(size, ranks):
    """R-1 exchanges of a rank's k and v; with something cached also an all-gather of queries and an all-to-all of answers."""
    token, answer = 2 * HKV * D * 4, HKV * GROUP * (D + 1) * 4  # bytes
    for rank, (said, tokens) in enumerate(ranks(size).run(say, [(0, 24), (0, 5)])):
        passed = [tokens[rank - step] for step in range(size - 1)]  # my own block, then those that I hand on
        assert said == {"exchange": (size - 1, sum(passed) * token)}
    for said, tokens in ranks(size).run(say, [(0, 2 * size), (8, 2 * size)]):
        assert tokens == [4] * size
        assert said == {
            "exchange": (size - 1, (size - 1) * 4 * token),
            "all_gather": (1, 2 * HKV * GROUP * D * 4),
            "all_to_all": (1, 2 * size * answer),
        }


def test_a_rank_s_pool_is_its_share():
    """Page g lies on rank g % R, as its page g // R: no page of two ranks, none of nobody."""
    for size in (2, 3):
        found = set()
        for rank in range(size):
            table = ContextTable(1, 12, 4, torch.device("cpu"), TPGroup(rank, size))
            table.set_pages([(0, 0, range(12))])
            slots = table._slots(np.zeros(48, dtype=np.int64), np.arange(48))
            assert slots.max() < 48 // size
            found |= set(np.flatnonzero(slots >= 0))
            assert (slots >= 0).sum() == 48 // size
        assert len(found) == 48


def test_the_plan_halves_the_pairs_of_a_ring_step():
    """Whoever's block comes by, each rank attends with as many pairs as the others: nobody waits."""
    n, size = 48, 3
    for distance in range(1, size):
        work = []
        for rank in range(size):
            table = ContextTable(1, 12, 4, torch.device("cpu"), TPGroup(rank, size))
            meta = table.prefill(
                np.zeros(n, dtype=np.int64), np.zeros(1, dtype=int), np.zeros(1, dtype=int), np.array([n])
            ).meta
            pieces = meta.pieces[(rank - distance) % size]
            work.append(sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in pieces))
        assert work == [n * n // size // size // 2] * size
