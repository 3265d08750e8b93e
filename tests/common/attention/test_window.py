"""A step of trees: every backend that says `windows` against dense attention over each node's own path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.attention.backends import pick_attention
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.draft_tree import DraftTree
from tests.common.attention.garbage import garbage
from tests.common.kernels.where import DEVICE, GPU, kernel

KV_HEADS, GROUP, D = 2, 3, 8
LATENT, TURNED, DN, DV = 12, 4, 6, 7  # c, r, and what a head makes of them
SCALE = 0.31


def triton(latent):
    if latent:
        from common.kernels.latent_attention import TritonLatentAttention as Attention  # noqa: PLC0415
    else:
        from common.kernels.paged_attention import TritonAttention as Attention  # noqa: PLC0415
    return Attention


BACKENDS = {
    "torch_native": lambda latent: pick_attention(DEVICE, "torch_native", latent=latent),
    "triton": triton,
}
every_backend = pytest.mark.parametrize("backend", ["torch_native", pytest.param("triton", marks=kernel)])


class Trees:
    """Sequences with random K and V (or latent rows) in scattered pages of a pool full of NaN, and a random tree for each."""

    def __init__(self, cached, nodes, page_size=4, shared=0, latent=False, seed=0, parents=None, dtype=torch.float32,
                 kept=None):  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.cached, self.nodes, self.latent = cached, nodes, latent
        pages = [-(-(n + nodes) // page_size) for n in cached]
        row = (1, LATENT + TURNED) if latent else (KV_HEADS, D)
        planes = 1 if latent else 2
        self.cache = garbage(
            PagedKVCache(1, sum(pages) + 1, page_size, *row, kept or dtype, DEVICE, planes, scales=[(0.25, 0.031)])
        )
        order = torch.randperm(sum(pages) + 1, generator=rng).tolist()
        self.table = SequenceTable(len(cached), max(pages), page_size, DEVICE, last_position=max(cached) + 3)
        self.known = torch.randn(len(cached), max(cached) + nodes, self.cache.kv.shape[1], *row, device=DEVICE)
        self.known = self.known.to(dtype)
        if kept:  # what codes stand for is encoded without loss
            self.known = torch.stack([*map(self._rounded, self.known)])
        first = None
        for b, n in enumerate(cached):
            own, order = order[: pages[b]], order[pages[b] :]
            if n >= shared > 0 and first is None:
                first, begins = b, own[: shared // page_size]
            elif n >= shared > 0:
                own[: len(begins)] = begins
                self.known[b, : len(begins) * page_size] = self.known[first, : len(begins) * page_size]
            self.table.set_pages([(b, 0, own)])
            slots = self.slots(b, n)
            self.cache.begin(slots)
            self.cache.write(0, slots, *self.known[b, :n].unbind(1))
        if parents is None:
            parents = [[-1] + [int(torch.randint(0, i, (1,), generator=rng)) for i in range(1, nodes)] for _ in cached]
        parents = torch.tensor(parents, device=DEVICE)
        self.tree = DraftTree(torch.randint(0, 9, parents.shape, generator=rng).to(DEVICE), parents)

    def _rounded(self, known):
        return torch.stack(self.cache.rounded(0, *known.unbind(1)), dim=1)

    def slots(self, b, n):
        at, size = torch.arange(n, device=DEVICE), self.cache.page_size
        return self.table.page_table[b, at // size] * size + at % size

    def step(self, first=0):
        """The nodes from `first` on: a level of the trees."""
        if first == 0:
            return self.table.tree(np.arange(len(self.cached)), np.array(self.cached), self.tree)
        for b, n in enumerate(self.cached):
            self.cache.begin(self.slots(b, n + first)[n:])
            self.cache.write(0, self.slots(b, n + first)[n:], *self.known[b, n : n + first].unbind(1))
        rows, at = torch.arange(len(self.cached), device=DEVICE), torch.tensor(self.cached, device=DEVICE)
        level = (x[:, first:] for x in (self.tree.tokens, self.tree.depth, self.tree.ancestors))
        return self.table.tree_level(rows, at, *level, self.table.page_table.shape[1])

    def check(self, backend, first=0, tolerance=1e-4 if GPU else 1e-5):
        count, meta, dtype = self.nodes - first, self.step(first).meta, self.known.dtype
        new = torch.cat([self.known[b, n + first : n + self.nodes] for b, n in enumerate(self.cached)])
        attention = BACKENDS[backend](self.latent)
        assert attention.windows
        if self.latent:
            q = torch.randn(len(new), 5, DN + TURNED, device=DEVICE)
            kv_b = torch.randn(5, DN + DV, LATENT, device=DEVICE)
            got = attention(self.cache, meta)(0, q.to(dtype), new[:, 0, 0], kv_b.to(dtype), SCALE)
        else:
            q = torch.randn(len(new), KV_HEADS * GROUP, D, device=DEVICE)
            got = attention(self.cache, meta)(0, q.to(dtype), *new.unbind(1))
        for b, n in enumerate(self.cached):
            for i in range(first, self.nodes):
                on_path = (n + self.tree.ancestors[b, i].nonzero().flatten()).tolist()
                rows, row = self.known[b, [*range(n), *on_path]].double(), b * count + i - first
                if self.latent:
                    kv_b = kv_b.double()
                    keys = torch.einsum("sc,hdc->shd", rows[:, 0, 0, :LATENT], kv_b[:, :DN])
                    keys = torch.cat((keys, rows[:, 0, :, LATENT:].expand(-1, 5, -1)), dim=-1)
                    values = torch.einsum("sc,hdc->shd", rows[:, 0, 0, :LATENT], kv_b[:, DN:])
                    scale = SCALE
                else:
                    keys, values = (x.repeat_interleave(GROUP, 1) for x in rows.unbind(1))
                    scale = D**-0.5
                shares = (scale * torch.einsum("hd,shd->hs", q[row].double(), keys)).softmax(dim=-1)
                want = torch.einsum("hs,shd->hd", shares, values)
                most = tolerance * max(1.0, values.abs().max().item())  # a mean of large values rounds by their size
                torch.testing.assert_close(got[row].double(), want, atol=most, rtol=tolerance)
            slots = self.slots(b, n + self.nodes)
            for plane, values in zip(self.cache.read(0, slots), self.known[b, : n + self.nodes].unbind(1), strict=True):
                assert torch.equal(plane, values)


CASES = {
    "one": [9],
    "one that begins": [0],
    "a page begins with the tree": [8, 16],
    "of all lengths": [3, 40, 0, 17, 130],
    "in two groups": [3, 1050, 9],
    "a kernel's part of the context begins inside the tree": [254],
}


@every_backend
@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latent"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("cached", CASES.values(), ids=CASES.keys())
def test_every_node_attends_to_its_own_path(cached, page_size, latent, backend):
    Trees(cached, 6, page_size, latent=latent).check(backend)


@every_backend
@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latent"])
def test_a_level_attends_to_the_levels_before_it(latent, backend):
    for first in (1, 5):
        Trees([3, 40, 0, 17], 8, latent=latent).check(backend, first)


@every_backend
@pytest.mark.parametrize("page_size", [4, 16])
def test_behind_a_shared_prompt(page_size, backend):
    Trees([70, 100, 64, 130], 5, page_size, shared=64).check(backend)


@every_backend
@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latent"])
def test_in_sixteen_bits_it_is_close(latent, backend):
    dtype = torch.bfloat16 if GPU or backend == "torch_native" else torch.float16  # what the interpreter multiplies
    Trees([3, 40, 70], 5, latent=latent, dtype=dtype).check(backend, tolerance=0.1)


@settings(max_examples=60, deadline=None)
@given(
    cached=st.lists(st.one_of(st.integers(0, 40), st.integers(60, 200)), min_size=1, max_size=5),
    nodes=st.integers(1, 17),
    page_size=st.sampled_from([1, 4, 16]),
    shared=st.sampled_from([0, 0, 64]),
    latent=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_trees_behind_any_prompts(cached, nodes, page_size, shared, latent, seed):
    Trees(cached, nodes, page_size, shared, latent, seed).check("torch_native")


def test_a_chain_is_a_prompt_of_several_tokens():
    world = Trees([5, 30], 4, parents=[[-1, 0, 1, 2]] * 2)
    step = world.step()
    want = world.table.prefill(np.arange(8), np.arange(2), np.array([5, 30]), np.array([4, 4]))
    assert step.positions.tolist() == want.positions.tolist()
    assert step.meta.slot_mapping.tolist() == want.meta.slot_mapping.tolist()
    assert step.meta.context_lens.tolist() == want.meta.context_lens.tolist()
    q, kv = torch.randn(8, KV_HEADS * GROUP, D, device=DEVICE), torch.randn(2, 8, KV_HEADS, D, device=DEVICE)
    native = BACKENDS["torch_native"](False)
    torch.testing.assert_close(native(world.cache, step.meta)(0, q, *kv), native(world.cache, want.meta)(0, q, *kv))


def test_siblings_stand_in_one_place_and_lie_in_several():
    world = Trees([5, 30], 4, parents=[[-1, 0, 0, 2]] * 2)
    step = world.step()
    assert step.positions.tolist() == [5, 6, 6, 7, 30, 31, 31, 32]
    assert [len(set(slots)) for slots in step.meta.slot_mapping.view(2, 4).tolist()] == [4, 4]
    assert torch.equal(step.input_ids, world.tree.tokens.flatten())


def test_a_guess_beyond_the_last_position_of_the_model_stands_at_the_last():
    world = Trees([5, 30], 6, parents=[[-1, 0, 1, 2, 3, 4]] * 2)
    assert world.step().positions[6:].tolist() == [30, 31, 32, 33, 33, 33]


def test_padding_rows_leave_no_trace():
    world = Trees([5, 30], 3)
    rows, at = torch.tensor([1, -1], device=DEVICE), torch.tensor([30, 7], device=DEVICE)
    step = world.table.tree_level(rows, at, world.tree.tokens, world.tree.depth, world.tree.ancestors, 9)
    assert step.meta.slot_mapping[3:].tolist() == [-1, -1, -1]
    assert step.meta.context_lens.tolist() == [33, 3]
    assert step.input_ids[3:].tolist() == [0, 0, 0]


def test_moved_rows_are_those_that_were_there_and_all_is_read_before_any_is_written():
    cache = PagedKVCache(2, 4, 4, 1, 2)
    cache.kv.normal_()
    before = cache.kv.flatten(2, 3).clone()
    cache.move(torch.tensor([5, 6, 7]), torch.tensor([6, 5, 1]))
    after = cache.kv.flatten(2, 3)
    assert torch.equal(after[:, :, [6, 5, 1]], before[:, :, [5, 6, 7]])
    others = [slot for slot in range(16) if slot not in (6, 5, 1)]
    assert torch.equal(after[:, :, others], before[:, :, others])


@pytest.mark.skipif(GPU, reason="which backend `auto` is differs there")
def test_a_backend_without_windows_says_so():
    assert not pick_attention(torch.device("cpu"), cp_size=2).windows
