"""Decode rows that begin with the same pages attend to them together: the numbers must not show it."""

import pytest
import torch

from common.attention import torch_native as paged_attention
from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.torch_native import TorchNativeAttention

SHARED = 128


def decode_step(page_size, lens, seed=0):
    """Rows of `lens` tokens whose first SHARED tokens lie on the same pages; the cache is full of noise."""
    torch.manual_seed(seed)
    pages, common = -(-max(lens) // page_size), SHARED // page_size
    cache = PagedKVCache(1, 64 * 16, page_size, 2, 16)
    cache.k.normal_()
    cache.v.normal_()
    ids = torch.randperm(cache.num_pages)
    own = pages - common
    rows = [torch.cat([ids[:common], ids[common + i * own : common + (i + 1) * own]]) for i in range(len(lens))]
    table, context = torch.stack(rows), torch.tensor(lens)
    last = context - 1
    slots = table[torch.arange(len(lens)), last // page_size] * page_size + last % page_size
    meta = AttentionMetadata(slots, table, torch.arange(len(lens) + 1), context, page_size)
    q, k, v = torch.randn(len(lens), 14, 16), torch.randn(len(lens), 2, 16), torch.randn(len(lens), 2, 16)
    return cache, meta, (q, k, v)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("lens", [[SHARED + 1, SHARED + 72, SHARED + 16], [SHARED + 1, SHARED + 1]])
def test_merged_attention_equals_attention_over_everything(page_size, lens, monkeypatch):
    cache, meta, qkv = decode_step(page_size, lens)
    together = TorchNativeAttention(cache, meta)
    assert len(together.decodes[0].shared) == 2 * SHARED // page_size  # of K and of V
    merged = together(0, *qkv)
    monkeypatch.setattr(paged_attention, "MIN_SHARED_TOKENS", 1 << 30)
    plain = TorchNativeAttention(cache, meta)
    assert plain.decodes[0].shared is None
    torch.testing.assert_close(merged, plain(0, *qkv), rtol=1e-5, atol=1e-6)


def test_a_row_that_ends_with_the_shared_part_keeps_a_page_of_its_own():
    """Nothing left over would be a softmax over nothing."""
    cache, meta, qkv = decode_step(16, [SHARED, SHARED + 5])
    attention = TorchNativeAttention(cache, meta)
    assert len(attention.decodes[0].shared) == 2 * (SHARED // 16 - 1)
    assert attention(0, *qkv).isfinite().all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("sequences", "sizes"), [(5, [5]), (3, [3, 2]), (0, [1, 1, 1, 1, 1])])
def test_rounds_that_copy_a_few_sequences_at_a_time_attend_to_the_same(sequences, sizes, shared, monkeypatch):
    if not shared:
        monkeypatch.setattr(paged_attention, "MIN_SHARED_TOKENS", 1 << 30)
    cache, meta, qkv = decode_step(16, [SHARED + 5, SHARED + 16, SHARED + 1, SHARED + 9, SHARED + 10])
    expected = TorchNativeAttention(cache, meta)(0, *qkv)
    copied = 16 if shared else SHARED + 16  # tokens of a sequence
    token = 2 * cache.k[0, 0, 0].nbytes
    monkeypatch.setattr(paged_attention, "ROOM_BYTES", max(1, sequences * copied * token))
    attention = TorchNativeAttention(cache, meta)
    assert [r.size for r in attention.decodes[0].rounds] == sizes
    torch.testing.assert_close(attention(0, *qkv), expected)
