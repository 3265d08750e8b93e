"""Decode over latent pages: the kernel against the plain form, on shuffled pages with NaN in all free slots."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.latent import LatentNativeAttention
from tests.common.kernels.where import DEVICE, TOLERANCE, gpu, kernel, relative_error

pytestmark = kernel

DN, DV = 12, 10


def step(queries, cached, page_size, heads, c, r, dtype, seed=0):
    """(cache, step, q, row, kv_b) of a ragged step; -1 in cached: a row of padding."""
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    lens = [n + max(old, 0) for n, old in zip(queries, cached, strict=True)]
    pages = [-(-n // page_size) if old >= 0 else 0 for n, old in zip(lens, cached, strict=True)]
    ids = random.sample(range(sum(pages) + 3), sum(pages))
    cache = PagedKVCache(1, sum(pages) + 3, page_size, 1, c + r, dtype, DEVICE, planes=1)
    cache.kv.fill_(torch.nan)
    table = torch.full((len(lens), max(*pages, 1)), -1)
    slots, old_slots = [], []
    for b, length in enumerate(lens):
        if cached[b] < 0:
            slots += [-1] * queries[b]
            continue
        own, ids = ids[: pages[b]], ids[pages[b] :]
        table[b, : len(own)] = torch.tensor(own)
        every = [own[i // page_size] * page_size + i % page_size for i in range(length)]
        old_slots += every[: cached[b]]
        slots += every[cached[b] :]
    rows = torch.randn(len(old_slots), 1, c + r, generator=generator).to(DEVICE, dtype)
    cache.write(0, torch.tensor(old_slots, dtype=torch.int64, device=DEVICE), rows)
    starts = torch.tensor([0, *queries]).cumsum(0)
    meta = AttentionMetadata(
        *(torch.as_tensor(x).to(DEVICE) for x in (slots, table, starts, lens)), page_size, max(queries)
    )
    q, row, kv_b = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        for shape in ((len(slots), heads, DN + r), (len(slots), c + r), (heads, DN + DV, c))
    )
    return cache, meta, q, row, kv_b * c**-0.5


def check(queries, cached, page_size, heads, c, r, dtype=torch.float32, seed=0) -> None:
    from common.kernels.latent_attention import TritonLatentAttention  # noqa: PLC0415

    cache, meta, q, row, kv_b = step(queries, cached, page_size, heads, c, r, dtype, seed)
    twin = PagedKVCache(1, cache.num_pages, page_size, 1, c + r, torch.float64, DEVICE, planes=1)
    twin.kv.copy_(cache.kv)
    scale = (DN + r) ** -0.5
    want = LatentNativeAttention(twin, meta)(0, q.double(), row.double(), kv_b.double(), scale)
    attention = TritonLatentAttention(cache, meta)
    got = attention(0, q, row, kv_b, scale)
    real = meta.slot_mapping >= 0
    assert relative_error(got[real], want[real]) < 2 * TOLERANCE[dtype]  # two products more than attention's own
    assert got.isfinite().all()
    assert torch.equal(cache.read(0, meta.slot_mapping[real])[0].squeeze(1), row[real])
    assert torch.equal(cache.kv.isnan(), twin.kv.isnan())  # nothing else was written
    assert torch.equal(attention(0, q, row, kv_b, scale), got)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("cached", "page_size", "heads", "c", "r"),
    [
        ([0, 3, 17, 200], 16, 5, 37, 6), ([0], 16, 16, 64, 16), ([600], 7, 4, 20, 4), ([33, 256, 512, 129], 64, 3, 32, 8),
        ([5, -1, 40, -1], 16, 2, 24, 8), ([9, 31], 1, 20, 16, 2),
    ],
    ids=["odd sizes", "nothing cached", "odd pages", "ends of blocks", "padding", "pages of one, more heads than a program"],
)  # fmt: skip
def test_a_decode_step_is_the_plain_form_s(cached, page_size, heads, c, r, dtype):
    check([1] * len(cached), cached, page_size, heads, c, r, dtype)


@settings(deadline=None)
@given(
    st.lists(st.integers(-1, 70), min_size=1, max_size=2), st.integers(1, 20), st.integers(1, 5), st.integers(1, 30),
    st.integers(1, 4), st.integers(0, 1000),
)  # fmt: skip
def test_any_contexts_pages_and_sizes(cached, page_size, heads, c, half, seed):
    check([1] * len(cached), cached, page_size, heads, c, 2 * half, seed=seed)


def test_steps_with_several_new_tokens_are_the_plain_form_s():
    check([1, 5, 3], [20, 0, 9], 16, 3, 24, 8)


def test_a_context_is_cut_into_parts_and_merged():
    """As many parts as there are are used, and one that no sequence fills is used by none."""
    from common.kernels.latent_attention import LEAST, LatentWorkspace  # noqa: PLC0415

    space = LatentWorkspace(torch.empty(2, 4, 24, device=DEVICE), 20)
    assert space.splits > 4
    check([1, 1], [4 * LEAST + 1, 3], 16, 4, 20, 4)


@gpu
@pytest.mark.parametrize(("batch", "heads"), [(1, 16), (64, 16), (1, 128), (40, 32)])
def test_real_sizes_in_bfloat16(batch, heads):
    check([1] * batch, [7 + 61 * b if batch > 1 else 9000 for b in range(batch)], 16, heads, 512, 64, torch.bfloat16)


@gpu
def test_a_graph_follows_the_contexts():
    from common.kernels.latent_attention import TritonLatentAttention  # noqa: PLC0415

    cache, meta, q, row, kv_b = step([1, 1, 1], [900, 40, 0], 16, 4, 64, 16, torch.bfloat16)
    TritonLatentAttention(cache, meta)(0, q, row, kv_b, 0.1)
    graph, attention = torch.cuda.CUDAGraph(), TritonLatentAttention(cache, meta)
    with torch.cuda.graph(graph):
        o = attention(0, q, row, kv_b, 0.1)
    for shorter in range(3):
        meta.context_lens.sub_(shorter).clamp_(min=1)
        graph.replay()
        assert torch.equal(o, TritonLatentAttention(cache, meta)(0, q, row, kv_b, 0.1))
