"""Latent rows in pages: both forms against attention over keys and values that are made from all rows at once."""

import numpy as np
import pytest
import torch

from common.attention.backends import pick_attention
from common.attention.kv_cache import PagedKVCache
from common.attention.latent import LatentNativeAttention, _Decode, attend_in_one_call, expand, multiplications
from common.attention.sequence_table import SequenceTable

H, DN, R, DV, C = 5, 6, 4, 7, 12
SCALE = 0.31  # not (dn + r)^-0.5: with yarn it is another
LENGTHS = (1, 4, 9, 16, 17)  # of the sequences, before a step
CASES = [
    pytest.param("cpu", "torch_native"),
    pytest.param("cuda", "auto", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
every_device = pytest.mark.parametrize(("device", "backend"), CASES)
every_page_size = pytest.mark.parametrize("page_size", [1, 4, 16])


class World:
    """Sequences whose cached rows lie in scattered pages of a pool that is full of NaN."""

    def __init__(self, page_size, device="cpu", backend="torch_native", dtype=torch.float32):
        torch.manual_seed(0)
        self.attention = pick_attention(torch.device(device), backend, latent=True)
        self.device, self.pages = device, 64 // page_size + 1
        self.cache = PagedKVCache(2, self.pages * len(LENGTHS), page_size, 1, C + R, dtype, device, planes=1)
        self.cache.kv.fill_(torch.nan)
        order = torch.randperm(self.pages * len(LENGTHS)).view(len(LENGTHS), -1).tolist()
        self.table = SequenceTable(len(LENGTHS), self.pages, page_size, torch.device(device))
        self.table.set_pages([(row, 0, pages) for row, pages in enumerate(order)])
        self.kv_b = torch.randn(H, DN + DV, C, device=device)
        self.rows = [torch.randn(80, C + R, device=device) for _ in LENGTHS]
        for row, n in enumerate(LENGTHS):
            at = torch.arange(n, device=device)
            slots = self.table.page_table[row, at // page_size] * page_size + at % page_size
            self.cache.write(1, slots, self.rows[row][:n].unsqueeze(1))

    def step(self, new):
        """`new` tokens of each sequence -> (what attention gives, what it should)."""
        rows = np.flatnonzero(new)
        cached, new = np.array(LENGTHS)[rows], np.array(new)[rows]
        total = int(sum(new))
        q = torch.randn(total, H, DN + R, device=self.device)
        row = torch.cat([self.rows[b][n : n + m] for b, n, m in zip(rows, cached, new, strict=True)])
        if max(new) == 1:
            meta = self.table.decode(rows, cached).meta
        else:
            meta = self.table.prefill(np.zeros(total, dtype=np.int64), rows, cached, new).meta
        o = self.attention(self.cache, meta)(1, q, row, self.kv_b, SCALE)
        parts = zip(q.split(new.tolist()), rows, cached + new, strict=True)
        return o, torch.cat([self.dense(part, self.rows[b][:n]) for part, b, n in parts])

    def dense(self, q, rows):
        """q [n, H, dn + r] of the last n of `rows`, from the definition."""
        rows = rows.to(self.cache.kv.dtype).to(rows.dtype)
        keys = torch.einsum("sc,hdc->shd", rows[:, :C], self.kv_b[:, :DN])
        values = torch.einsum("sc,hdc->shd", rows[:, :C], self.kv_b[:, DN:])
        scores = torch.einsum("nhd,shd->hns", q[..., :DN], keys) + torch.einsum("nhr,sr->hns", q[..., DN:], rows[:, C:])
        later = torch.ones(len(q), len(rows), dtype=torch.bool, device=q.device).triu(len(rows) - len(q) + 1)
        shares = (scores * SCALE).masked_fill(later, -torch.inf).softmax(dim=-1)
        return torch.einsum("hns,shd->nhd", shares, values)


@every_page_size
@every_device
@pytest.mark.parametrize(
    "new", [(1, 1, 1, 1, 1), (0, 1, 0, 0, 1), (2, 5, 3, 17, 40), (1, 3, 1, 1, 4), (0, 0, 7, 0, 0)], ids=str
)
def test_decodes_prompts_and_both_at_once_attend_as_the_definition_says(new, page_size, device, backend):
    torch.testing.assert_close(*World(page_size, device, backend).step(new), atol=1e-4, rtol=1e-4)


@every_page_size
@pytest.mark.parametrize("new", [(1, 1, 1, 1, 1), (2, 5, 3, 17, 40)], ids=str)
def test_both_forms_read_what_a_smaller_dtype_has_kept(new, page_size):
    torch.testing.assert_close(*World(page_size, dtype=torch.bfloat16).step(new), atol=1e-4, rtol=1e-4)


def test_one_token_absorbed_and_the_same_expanded_are_the_same():
    world = World(4)
    rows, cached = np.arange(len(LENGTHS)), np.array(LENGTHS)
    q, row = torch.randn(len(rows), H, DN + R), torch.stack([world.rows[b][n] for b, n in enumerate(LENGTHS)])
    absorbed = world.attention(world.cache, world.table.decode(rows, cached).meta)(1, q, row, world.kv_b, SCALE)
    for b, n in enumerate(LENGTHS):
        k, v = expand(world.rows[b][: n + 1], world.kv_b, DN + R)
        shares = (torch.einsum("hd,hsd->hs", q[b], k) * SCALE).softmax(dim=-1)
        torch.testing.assert_close(absorbed[b], torch.einsum("hs,hsd->hd", shares, v), atol=1e-5, rtol=1e-5)


@every_device
def test_padding_leaves_no_trace(device, backend):
    """A row -1 of a decode step stores nothing, even where every row is one: a data rank without work runs such a step."""
    world = World(4, device, backend)
    for rows in ([0, -1, 2, -1], [-1, -1]):
        before = world.cache.kv.clone()
        at = torch.tensor(rows, device=device)
        positions = torch.tensor([LENGTHS[row] if row >= 0 else 0 for row in rows], device=device)
        meta = world.table.decode_on_device(at, positions, world.pages).meta
        new = torch.full((len(rows), C + R), 5.0, device=device)
        world.attention(world.cache, meta)(1, torch.randn(len(rows), H, DN + R, device=device), new, world.kv_b, SCALE)
        changed = (world.cache.kv[1, 0, ..., 0].nan_to_num(9) != before[1, 0, ..., 0].nan_to_num(9)).sum()
        assert changed == sum(row >= 0 for row in rows)
        assert torch.equal(world.cache.kv[0].isnan(), before[0].isnan())


def test_a_gpu_s_way_to_store_gives_the_same_pages():
    """There nobody may ask how many rows are padding: rows of padding repeat a real one, or what lies there."""

    class AsOnAGPU(LatentNativeAttention):
        def _plan_store(self, slots):
            super()._plan_store(_SaysItIsOnAGPU(slots))

    for slots in ([3, -1, 9, -1], [-1, 5, 6, 7], [-1, -1, -1, -1]):
        pages = []
        for kind in (LatentNativeAttention, AsOnAGPU):
            world = World(4)
            world.cache.kv.fill_(2.0)
            meta = world.table.decode(np.arange(4), np.array(LENGTHS[:4])).meta
            step = kind.__new__(kind)
            step.cache, step.meta = world.cache, meta
            step._plan_store(torch.tensor(slots))
            step.store(1, torch.arange(4.0).unsqueeze(1).expand(4, C + R))
            pages.append(world.cache.kv)
        assert torch.equal(*pages)


class _SaysItIsOnAGPU:
    """A tensor of slots that says so: the planning of a GPU runs on its numbers."""

    is_cuda, device = True, torch.device("cpu")

    def __init__(self, slots):
        self.slots = slots

    def __ge__(self, other):
        return self.slots >= other

    def __len__(self):
        return len(self.slots)

    def __getitem__(self, at):
        return self.slots[at]


@every_page_size
def test_a_gpu_s_way_to_decode_reads_the_whole_table_and_no_row_too_many(page_size):
    """There nobody may ask how long the sequences are: all of them attend at once, over as many slots as a table has."""
    world = World(page_size)
    for row, n in enumerate(LENGTHS):
        world.table.page_table[row, -(-n // page_size) :] = -1  # as the contract allows
    q = torch.randn(len(LENGTHS), H, C + R)
    got = _Decode(world.cache, world.table.page_table, torch.tensor(LENGTHS)).attend(1, q, C, SCALE)
    for b, n in enumerate(LENGTHS):
        rows = world.rows[b][:n]
        want = (SCALE * q[b] @ rows.T).softmax(dim=-1) @ rows[:, :C]
        torch.testing.assert_close(got[b], want, atol=1e-5, rtol=1e-5)


@every_page_size
@pytest.mark.parametrize("reads", [1, 6])
def test_a_page_can_be_read_in_the_step_that_writes_it(reads, page_size):
    """Two sequences share their first 16 tokens, which the first computes in this step."""
    world = World(page_size)
    pages = 16 // page_size
    world.table.set_pages([(1, 0, world.table.page_table[0, :pages].tolist())])
    q, row = torch.randn(16 + reads, H, DN + R), torch.randn(16 + reads, C + R)
    meta = world.table.prefill(
        np.zeros(16 + reads, dtype=np.int64), np.arange(2), np.array([0, 16]), np.array([16, reads])
    ).meta
    o = world.attention(world.cache, meta)(1, q, row, world.kv_b, SCALE)
    torch.testing.assert_close(o[16:], world.dense(q[16:], row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("absorbs", [False, True])
@pytest.mark.parametrize("new", [(2, 5, 3, 17, 40), (1, 3, 1, 1, 4)], ids=str)
def test_several_new_tokens_may_take_either_form(new, absorbs, monkeypatch):
    monkeypatch.setattr("common.attention.latent.multiplications", lambda *sizes: (1, 0) if absorbs else (0, 1))
    torch.testing.assert_close(*World(4).step(new), atol=1e-4, rtol=1e-4)


def test_the_form_that_multiplies_less_is_taken():
    """DeepSeek-V3's sizes: a prompt is expanded, a decode absorbed; some 170 new tokens behind a long prefix are the border."""
    sizes = 512, 64, 128, 128

    def absorbs(new, length):
        expanded, absorbed = multiplications(new, length, *sizes)
        return absorbed < expanded

    assert multiplications(1, 1, *sizes) == (131_072 + 320, 131_072 + 1088)
    assert not any(absorbs(n, n) for n in (1, 10, 100, 1000, 10_000))
    assert all(absorbs(1, length) for length in (2, 10, 100_000))
    assert absorbs(160, 10_000)
    assert not absorbs(180, 10_000)


def test_heads_take_turns_where_keys_and_values_of_all_would_be_too_many(monkeypatch):
    monkeypatch.setattr("common.attention.latent.EXPANDED_BYTES", 3000)
    monkeypatch.setattr("common.attention.latent.multiplications", lambda *sizes: (0, 1))
    torch.testing.assert_close(*World(4).step((2, 5, 3, 17, 40)), atol=1e-4, rtol=1e-4)


@every_page_size
@pytest.mark.parametrize("new", [(2, 5, 3, 17, 40), (1, 3, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("absorbs", [False, True])
def test_a_gpu_s_way_to_extend_sees_the_same_without_a_mask(absorbs, new, page_size, monkeypatch):
    """Both forms: values narrower than keys, and as wide."""
    monkeypatch.setattr("common.attention.latent.skips_above", lambda device: True)
    monkeypatch.setattr("common.attention.latent.multiplications", lambda *sizes: (1, 0) if absorbs else (0, 1))
    torch.testing.assert_close(*World(page_size).step(new), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [DV, DN + R, DN + R + 3])
@pytest.mark.parametrize(("new", "length"), [(1, 9), (4, 4), (4, 9)])
def test_the_last_queries_see_everything_up_to_themselves(new, length, width):
    torch.manual_seed(0)
    q, k, v = torch.randn(new, H, DN + R), torch.randn(H, length, DN + R), torch.randn(H, length, width)
    later = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
    shares = (SCALE * torch.einsum("nhd,hsd->hns", q, k)).masked_fill(later, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(attend_in_one_call(q, k, v, SCALE), torch.einsum("hns,hsd->nhd", shares, v))


def test_many_decodes_are_read_in_rounds_that_fit_the_cache(monkeypatch):
    monkeypatch.setattr("common.attention.latent.ROOM_BYTES", 20 * (C + R) * 4)
    torch.testing.assert_close(*World(4).step((1, 1, 1, 1, 1)), atol=1e-4, rtol=1e-4)


def test_bytes_of_a_page_are_those_of_its_rows():
    cache = PagedKVCache(3, 7, 4, 1, C + R, planes=1)
    assert (
        cache.kv.nbytes
        == 7 * PagedKVCache.bytes_per_page(3, 4, 1, C + R, torch.float32, planes=1)
        == 7 * 3 * 4 * 16 * 4
    )


@pytest.mark.parametrize(
    ("name", "cp_size", "words"),
    [
        (
            "auto",
            2,
            "cp_size=2: the ring sends K and V of heads round, and this model caches latent rows; use attn_dp_size",
        ),
        (
            "flashinfer",
            1,
            "attention_backend=flashinfer attends to K and V here, and this model caches latent rows; use auto",
        ),
        ("triton", 1, "attention_backend=triton"),
        ("paged", 1, "attention_backend='paged' is unknown"),
    ],
)
def test_what_latent_rows_cannot_be_read_by_is_one_line(name, cp_size, words):
    with pytest.raises(ValueError, match=f"^{words}") as error:
        pick_attention(torch.device("cpu"), name, cp_size, latent=True)
    assert "\n" not in str(error.value)
