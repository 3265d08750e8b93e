"""A sequence may begin with pages that another one fills in the same step."""

import numpy as np
import pytest
import torch

from common.attention.backends import pick_attention
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable

HEADS, KV_HEADS, D, SIZE = 14, 2, 16, 4
SHARED = 2 * SIZE  # tokens: the first two pages of both
PAGES = [3, 1, 5], [3, 1, 2, 6]  # of the writer, of the reader
CASES = [
    pytest.param("cpu", "torch_native"),
    pytest.param("cuda", "triton", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize(("device", "backend"), CASES)
@pytest.mark.parametrize("reader_first", [False, True])
@pytest.mark.parametrize("reads", [1, 6])
@pytest.mark.parametrize("before", [0, 4, 7], ids="the writer has computed {} tokens before".format)
def test_a_page_can_be_read_in_the_step_that_writes_it(device, backend, before, reads, reader_first):
    attention = pick_attention(torch.device(device), backend)
    new = np.array([SHARED - before, reads])
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(new), heads, D, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS))
    old = torch.randn(2, before, KV_HEADS, D, device=device)
    whose = np.repeat([0, 1], new)

    def cache_and_table():
        cache = PagedKVCache(1, 8, SIZE, KV_HEADS, D, device=device)
        cache.kv.fill_(1e4)  # seen by nobody, or far off
        table = SequenceTable(2, 8, SIZE, torch.device(device))
        table.set_pages([(row, 0, pages) for row, pages in enumerate(PAGES)])
        slots = torch.tensor([PAGES[0][i // SIZE] * SIZE + i % SIZE for i in range(before)], dtype=torch.int64)
        cache.write(0, slots.to(device), *old)
        return cache, table

    def step(cache, table, rows):
        """What the tokens of these sequences get in one step, in the order of q."""
        tokens = np.concatenate([np.flatnonzero(whose == row) for row in rows])
        inputs = table.prefill(tokens, np.array(rows), np.array([before, SHARED])[rows], new[rows])
        o = attention(cache, inputs.meta)(0, q[tokens], k[tokens], v[tokens])
        return o[np.argsort(tokens)]

    together = step(*cache_and_table(), [1, 0] if reader_first else [0, 1])
    cache, table = cache_and_table()
    one_after_the_other = torch.cat([step(cache, table, [row]) for row in (0, 1)])
    torch.testing.assert_close(together, one_after_the_other, atol=1e-4, rtol=1e-4)
