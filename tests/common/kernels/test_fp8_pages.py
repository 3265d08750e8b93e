"""fp8 pages beside 16-bit queries, which kernels multiply as float16 and read in pairs where they can (kv_rows.py)."""

from dataclasses import replace

import pytest
import torch

from common.attention.contract import AttentionMetadata, SharedPrefixes
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.attention.torch_native import TorchNativeAttention
from tests.common.attention import test_window
from tests.common.attention.garbage import garbage
from tests.common.attention.test_coded_pages import in_codes
from tests.common.kernels import test_latent_attention as latent
from tests.common.kernels.test_kernels import step
from tests.common.kernels.where import DEVICE, kernel, relative_error

ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 2e-3}  # of what comes out, too
pytestmark = [
    kernel,
    pytest.mark.parametrize("kept", [torch.float8_e4m3fn, torch.float8_e5m2]),
    pytest.mark.parametrize("compute", ROUNDING),
]


def each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [H, d], k, v [S, H, d], float64 -> [H, d]."""
    return torch.einsum("hs,shd->hd", (torch.einsum("hd,shd->hs", q, k) * scale).softmax(-1), v)


@pytest.mark.parametrize("d", [33, 34, 128])
@pytest.mark.parametrize(("queries", "cached"), [([1] * 3, [0, 17, 140]), ([5, 30, 1], [40, 16, 9])])
def test_decode_and_extend(queries, cached, d, compute, kept):
    from common.kernels.paged_attention import BatchInvariantTritonAttention, TritonAttention  # noqa: PLC0415

    plain, meta, (q, k, v) = step(queries, cached, 16, (4, 2), d, compute, 0, DEVICE)
    q[0] = 0  # nothing to divide by
    cache, twin = in_codes(plain, kept)
    want = TorchNativeAttention(twin, meta)(0, q.float(), *cache.rounded(0, k.float(), v.float()))
    for backend in (TritonAttention, BatchInvariantTritonAttention):
        assert relative_error(backend(cache, meta)(0, q, k, v), want) < ROUNDING[compute]


def test_a_shared_prefix(compute, kept):
    from common.kernels.paged_attention import TritonAttention  # noqa: PLC0415

    lens = [304, 310, 321, 20]
    plain, meta, (q, k, v) = step([1] * 4, lens, 16, (4, 2), 64, compute, 0, DEVICE)
    meta.page_table[1:3, :19] = meta.page_table[0, :19]
    cache, twin = in_codes(plain, kept)
    want = TorchNativeAttention(twin, meta)(0, q.float(), *cache.rounded(0, k.float(), v.float()))
    table = SequenceTable(8, 40, 16, DEVICE, TritonAttention.tile_members(4, 2))
    tiles, tokens = (torch.from_numpy(x).to(DEVICE) for x in table.tiles([(0, 3, 19)], 4))
    assert tokens.tolist() == [304, 304, 304, 0]
    for prefixes, right in ((tokens, True), (tokens - 16 * (tokens > 0), False)):
        hinted = replace(meta, prefixes=SharedPrefixes(tiles.view(3, -1), prefixes))
        got = TritonAttention(cache, hinted)(0, q, k, v)
        assert (relative_error(got, want) < ROUNDING[compute]) == right, "the hint is read"


def test_trees(compute, kept, monkeypatch):
    from common.kernels.paged_attention import TritonAttention  # noqa: PLC0415

    d = 34
    monkeypatch.setattr(test_window, "D", d)
    trees = test_window.Trees([0, 33, 300], 6, kept=kept)
    new = torch.cat([trees.known[b, n : n + 6] for b, n in enumerate(trees.cached)])
    k, v = (x.to(compute) for x in new.unbind(1))
    q = torch.randn(len(new), 6, d, device=DEVICE).to(compute)
    got = TritonAttention(trees.cache, trees.step().meta)(0, q, k, v)
    for b, n in enumerate(trees.cached):
        for i in range(6):
            path = [*range(n), *(n + trees.tree.ancestors[b, i].nonzero().flatten()).tolist()]
            seen = trees.cache.read(0, trees.slots(b, n + 6)[path])
            keys, values = (x.double().cpu().repeat_interleave(3, 1) for x in seen)
            want = each(q[b * 6 + i].double().cpu(), keys, values, d**-0.5)
            assert relative_error(got[b * 6 + i].cpu(), want) < ROUNDING[compute], (b, i)


@pytest.mark.parametrize(("c", "r", "heads"), [(40, 18, 20), (33, 18, 3), (64, 8, 5)])
def test_latent_rows(c, r, heads, compute, kept):
    from common.kernels.latent_attention import LatentWorkspace, decode, merge  # noqa: PLC0415

    plain, meta, _, row, _ = latent.step([1, 1, 1, 1], [0, 20, -1, 150], 16, heads, c, r, torch.float32)
    cache = garbage(
        PagedKVCache(1, plain.num_pages, 16, 1, c + r, kept, DEVICE, planes=1, scales=[(0.25, 0.031)])
    )  # fmt: skip
    known = plain.k[0].flatten(0, 1).isfinite().all(-1).all(-1).nonzero().squeeze(-1)
    cache.write(0, known, *plain.read(0, known))
    real = meta.slot_mapping >= 0
    cache.write(0, meta.slot_mapping[real], row[real].unsqueeze(1))
    q = torch.randn(4, heads, c + r, device=DEVICE).to(compute)
    q[0, 0] = 0
    space = LatentWorkspace(q, c)
    means = decode(q, cache.layer(0), cache.format, meta, 0.2, space)
    merge(means, meta, space)
    for b in range(4):
        if not real[b]:
            assert not means[b].any()
            continue
        slots = [int(meta.page_table[b, i // 16]) * 16 + i % 16 for i in range(int(meta.context_lens[b]))]
        (rows,) = cache.read(0, torch.tensor(slots, device=DEVICE))[:1]
        rows = rows.double().cpu().expand(-1, heads, -1)
        want = each(q[b].double().cpu(), rows, rows[..., :c], 0.2)
        assert relative_error(means[b].cpu(), want) < ROUNDING[compute]


@pytest.mark.parametrize("gap", [12, 18])
def test_a_sink_far_above_all_others(gap, compute, kept):
    """One token whose score is `gap` above 600 others' (e^18 is 6.6e7) and whose value is zero: the answer is theirs alone."""
    from common.kernels.paged_attention import TritonAttention  # noqa: PLC0415

    tokens, d = 600, 64
    cache = PagedKVCache(1, tokens // 16 + 1, 16, 1, d, kept, DEVICE)
    k, v = torch.zeros(tokens, 1, d, device=DEVICE), torch.randn(tokens, 1, d, device=DEVICE) * 0.1 + 1
    k[0, 0, 0], v[0] = 8, 0
    slots = torch.arange(tokens, device=DEVICE)
    cache.write(0, slots, k, v)
    q = torch.zeros(2, 1, d, device=DEVICE)
    q[:, 0, 0] = gap
    pages = torch.arange(cache.num_pages, device=DEVICE)[None]
    meta = AttentionMetadata(
        slots[-2:], pages, torch.tensor([0, 2], device=DEVICE), torch.tensor([tokens], device=DEVICE), 16, 2
    )  # fmt: skip
    got = TritonAttention(cache, meta)(0, q.to(compute), k[-2:].to(compute), v[-2:].to(compute))[1]
    want = each(q[1].double().cpu(), *(x.double().cpu() for x in cache.read(0, slots)), d**-0.5)
    assert want.norm() < {12: 0.1, 18: 1e-3}[gap]
    assert relative_error(got.cpu(), want) < 2 * ROUNDING[compute]
