"""Many pieces of attention in one launch, against each piece by itself in float64."""

import numpy as np
import pytest
import torch

from common.attention.context_table import Pieces
from common.attention.kv_cache import PagedKVCache
from common.attention.merge import attend, merge
from tests.common.attention.garbage import garbage
from tests.common.kernels.where import DEVICE, TOLERANCE, kernel, relative_error

pytestmark = kernel
CODED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int4)
# queries, keys, a triangle?
PIECES = [(1, 1, True), (70, 70, True), (3, 130, False), (65, 2, False), (1, 1, False), (17, 17, True)]


def seen_before(rows: int, heads: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What some keys have said already, and to every third row nothing."""
    o, lse = torch.randn(rows, heads, d), torch.randn(rows, heads)
    o[::3], lse[::3] = 0.0, -torch.inf
    return o.to(DEVICE), lse.to(DEVICE)


def told(pieces) -> Pieces:
    return Pieces(torch.tensor(pieces, device=DEVICE).t().contiguous(), max(piece[1] for piece in pieces))


def check(o, lse, before, parts, tolerance) -> None:
    """parts: (rows, o, lse) of each piece; the rows of none are as they were."""
    want_o, want_lse = (x.double().cpu() for x in before)
    for rows, *part in parts:
        want_o[rows], want_lse[rows] = merge([(want_o[rows], want_lse[rows]), part])
    none = want_lse == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, none)
    assert relative_error(o.cpu(), want_o) < tolerance
    assert relative_error(lse.cpu()[~none], want_lse[~none]) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "d"), [((4, 2), 24), ((7, 1), 64), ((2, 2), 7)])
def test_keys_in_a_block(heads, d, dtype):
    from common.kernels.pieces import attend_pieces  # noqa: PLC0415

    torch.manual_seed(0)
    pieces, row, key = [], 2, 1  # rows and keys of no piece before, between and behind them
    for queries, keys, triangle in PIECES:
        pieces.append((row, queries, key, keys, int(triangle)))
        row, key = row + queries + 1, key + keys + 2
    q, k, v = (
        torch.randn(n, h, d, device=DEVICE).to(dtype) for n, h in ((row, heads[0]), (key, heads[1]), (key, heads[1]))
    )
    before = seen_before(row, heads[0], d)
    o, lse = (x.clone() for x in before)
    attend_pieces(o, lse, q, k, v, told(pieces))
    parts = []
    for first, queries, start, keys, triangle in pieces:
        rows, seen = slice(first, first + queries), slice(start, start + keys)
        parts.append((rows, *attend(*(x.double().cpu() for x in (q[rows], k[seen], v[seen])), bool(triangle))))
    check(o, lse, before, parts, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kept", [None, *CODED])
# fp8 beside 16 bits is read in pairs above 16 numbers
@pytest.mark.parametrize(("page_size", "d"), [(1, 16), (16, 40)])
def test_keys_in_pages(page_size, d, kept, dtype):
    check_pages(page_size, d, kept, dtype)


def check_pages(page_size, d, kept, dtype, magnitude=1.0):
    from common.kernels.pieces import attend_paged_pieces  # noqa: PLC0415

    torch.manual_seed(0)
    rows = torch.randperm(100)
    cache = garbage(PagedKVCache(1, 300, page_size, 2, d, kept or dtype, DEVICE, scales=[(0.25 / magnitude, 0.031)]))
    free, pieces, ids, at, expected = torch.randperm(300), [], [], 0, []
    q = torch.randn(100, 4, d, device=DEVICE).to(dtype) * magnitude
    for queries, tokens in ((1, 5), (66, 40), (9, 16), (3, 1)):
        own, free = free[: -(-tokens // page_size)], free[-(-tokens // page_size) :]
        slots = torch.from_numpy(np.array([own[n // page_size] * page_size + n % page_size for n in range(tokens)])).to(
            DEVICE
        )
        k, v = torch.randn(2, tokens, 2, d, device=DEVICE).to(dtype)
        cache.write(0, slots, k / magnitude, v)
        mine = rows[at : at + queries]
        known = [x.double().cpu() for x in cache.read(0, slots)]
        expected.append((mine, *attend(q[mine.to(DEVICE)].double().cpu(), *known)))
        pieces.append((at, queries, sum(map(len, ids)), tokens, 0))
        ids.append(own)
        at += queries
    before = seen_before(100, 4, d)
    o, lse = (x.clone() for x in before)
    lists = rows[:at].to(DEVICE), torch.cat(ids).to(DEVICE)
    attend_paged_pieces(o, lse, q, cache.layer(0), cache.format, page_size, told(pieces), *lists)
    check(o, lse, before, expected, 2 * TOLERANCE.get(dtype, 1e-3))


@pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("kept", CODED[:2])
@pytest.mark.parametrize("d", [33, 40])
def test_queries_that_float16_has_no_room_for(d, kept, magnitude):
    check_pages(16, d, kept, torch.bfloat16, magnitude)
