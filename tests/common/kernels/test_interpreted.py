"""The kernels of dense models in Triton's interpreter, a case or two of each; on a GPU test_kernels.py has them all."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.attention.contract import AttentionMetadata, SharedPrefixes
from common.attention.kv_cache import PagedKVCache
from common.attention.merge import merge_two
from common.attention.sequence_table import SequenceTable
from common.attention.torch_native import TorchNativeAttention
from tests.common.kernels.test_kernels import step
from tests.common.kernels.where import DEVICE, GPU, kernel, relative_error

pytestmark = [kernel, pytest.mark.skipif(GPU, reason="test_kernels.py runs on this GPU")]


@pytest.mark.parametrize(("queries", "cached"), [([1] * 3, [0, 17, 140]), ([5, 1, 20], [30, 9, 0])])
@pytest.mark.parametrize("page_size", [1, 16])
def test_attention(queries, cached, page_size):
    from common.kernels.paged_attention import TritonAttention  # noqa: PLC0415

    cache, meta, qkv = step(queries, cached, page_size, (7, 1), 8, device=DEVICE)
    twin = PagedKVCache(1, cache.num_pages, page_size, 1, 8)
    twin.kv.copy_(cache.kv.nan_to_num())
    want = TorchNativeAttention(twin, meta)(0, *qkv)
    assert relative_error(TritonAttention(cache, meta)(0, *qkv), want) < 2e-6
    assert torch.equal(cache.kv.nan_to_num(), twin.kv)


def test_pages_that_sequences_begin_with_are_read_once():
    """Four that share two pages and one that does not, as the table tells it of a batch."""
    from common.kernels.paged_attention import TritonAttention  # noqa: PLC0415

    cache, meta, qkv = step([1] * 5, [40, 37, 33, 35, 50], 16, (2, 1), 8, device=DEVICE)
    meta.page_table[1:4, :2] = meta.page_table[0, :2]
    cache.kv.nan_to_num_(0.5)
    want = TorchNativeAttention(cache, meta)(0, *qkv)
    table = SequenceTable(8, 4, 16, DEVICE, TritonAttention.tile_members(2, 1))
    tiles, tokens = map(torch.from_numpy, table.tiles([(0, 4, 2)], 5))
    for prefixes, right in ((tokens, True), (tokens + 16 * (tokens > 0), False)):
        hinted = replace(meta, prefixes=SharedPrefixes(tiles.view(3, -1), prefixes))
        assert (relative_error(TritonAttention(cache, hinted)(0, *qkv), want) < 2e-6) == right, "the hint is read"


@pytest.mark.parametrize("fixed", [False, True])
def test_tokens_and_seats_of_nobody(fixed):
    """A recorded prefill: three sequences, a seat without new tokens, and eleven tokens of no sequence."""
    from common.kernels.paged_attention import BatchInvariantTritonAttention, TritonAttention  # noqa: PLC0415

    cache, meta, qkv = step([5, 1, 20], [30, 9, 0], 4, (7, 1), 8, device=DEVICE)
    cache.kv.nan_to_num_()
    before, attention = cache.kv.clone(), BatchInvariantTritonAttention if fixed else TritonAttention
    want = attention(cache, meta)(0, *qkv)
    written = cache.kv.clone()
    cache.kv.copy_(before)
    padded = AttentionMetadata(
        F.pad(meta.slot_mapping, (0, 11), value=-1), F.pad(meta.page_table, (0, 0, 0, 1)),
        F.pad(meta.query_start, (0, 1), value=26), F.pad(meta.context_lens, (0, 1)), 4, 37, padded=True,
    )  # fmt: skip
    got = attention(cache, padded)(0, *(F.pad(x, (0, 0, 0, 0, 0, 11), value=torch.nan) for x in qkv))
    assert torch.equal(got[:26], want)
    assert not got[26:].any()
    assert torch.equal(cache.kv, written)


def test_parts_of_one_attention_are_merged():
    from common.kernels.merge import merge_into  # noqa: PLC0415

    o, part = torch.randn(2, 5, 3, 8)
    lse, part_lse = torch.randn(2, 5, 3)
    part_lse[2] = -torch.inf
    want = merge_two((o.clone(), lse.clone()), (part, part_lse))
    merge_into(o, lse, part, part_lse)
    assert relative_error(o, want) < 1e-6


def test_norms_activation_embedding():
    from common.kernels import fused  # noqa: PLC0415

    x, residual = torch.randn(2, 5, 37)
    weight = torch.randn(37)
    assert relative_error(fused.rms_norm(x, weight, 1e-6), F.rms_norm(x, (37,), weight, 1e-6)) < 1e-6
    y, total = fused.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert relative_error(y, F.rms_norm(total, (37,), weight, 1e-6)) < 1e-6
    assert relative_error(fused.silu_and_mul(x[:, :36].contiguous()), F.silu(x[:, :18]) * x[:, 18:36]) < 1e-6
    assert torch.equal(fused.embed(torch.tensor([0, 7, 9]), x, 5), torch.stack((0 * x[0], x[2], x[4])))


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (1, torch.float16), (9, torch.float16)])
def test_linear(rows, dtype):
    from common.kernels import linear  # noqa: PLC0415

    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 700), (37, 700), (37,)))
    want = x.double() @ weight.double().t() + bias.double()
    for _ in range(2):  # the counters are as they were before
        assert relative_error(linear.linear(x, weight, bias), want) < (1e-6 if dtype == torch.float32 else 1e-3)
    exact = linear.linear(x, weight, bias, torch.float32)
    assert exact.dtype == torch.float32
    assert relative_error(exact, want) < 1e-6


def test_numbers_of_programs_are_those_of_triton():
    import triton  # noqa: PLC0415

    from common.kernels.launch import cdiv, next_power_of_2  # noqa: PLC0415

    for n in (*range(70), 127, 128, 129, 4096, 151_936):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, by) for by in (1, 3, 64)] == [triton.cdiv(n, by) for by in (1, 3, 64)]
