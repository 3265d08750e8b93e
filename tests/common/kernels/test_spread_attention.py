"""Decode by kernels where the pages of a sequence lie on several ranks, all of which are played here, one after the other."""

import random

import numpy as np
import pytest
import torch

from common.attention.context_table import ContextTable
from common.attention.kv_cache import PagedKVCache
from common.attention.merge import attend_to_each, merge
from common.distributed import collectives
from common.layers.norm import RMSNorm
from common.layers.rotary import RotaryEmbedding, Turning
from common.parallel_state import TPGroup
from tests.common.attention.garbage import garbage
from tests.common.kernels.where import DEVICE, GPU, TOLERANCE, kernel, relative_error
from tests.ranks import layout_of_the_pool

pytestmark = kernel
SCALES = [(0.25, 0.031)]  # of K and V, of fp8
# positions of the new tokens; None: a row of padding. Short ones have no token on some ranks
STEPS = {
    "short": [0, 1, None, 3, 17, None],
    "one": [150],
    "unequal": [0, 700, 5, None, 33],
    "padding": [None, None],
}


def tables(size: int, num_rows: int, max_pages: int, page_size: int) -> list[ContextTable]:
    return [ContextTable(num_rows, max_pages, page_size, DEVICE, TPGroup(rank, size, DEVICE)) for rank in range(size)]


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_plan_is_that_of_the_cpu(size, page_size):
    """Rows get pages from anywhere on, and give way to other sequences; each page is on one rank, in the order of the context."""
    draw, most = random.Random(size * page_size), 2500
    for table in (every := tables(size, 5, most, page_size)):
        table.last_token.copy_(torch.arange(5) + 70)
    held = [0] * 5  # pages that each row has
    for _ in range(12):
        for row in draw.sample(range(5), draw.randrange(1, 4)):
            first = draw.choice((0, held[row], draw.randrange(held[row] + 1)))
            n = draw.choice((1, 2, draw.randrange(1, 1300)))
            n = min(n, most - first)
            pages = [draw.randrange(1000) for _ in range(n)]
            held[row] = first + n
            for table in every:
                table.set_pages([(row, first, pages)])
        rows = np.array([row for row in range(5) if held[row]])
        ends = np.array([draw.choice((1, held[row] * page_size, draw.randrange(1, held[row] * page_size + 1)))
                         for row in rows])  # fmt: skip
        padding = draw.randrange(3)
        told = [torch.tensor([*x, *[-1] * padding], device=DEVICE) for x in (rows, ends - 1)]
        found = np.zeros(len(rows), dtype=np.int64)
        for table in every:
            step = table.decode_on_device(*told, most)
            here, real = step.meta.here, len(rows)
            assert step.input_ids.tolist() == [*(rows + 70), *[0] * padding]
            assert step.positions.tolist() == [*(ends - 1), *[0] * padding]
            assert step.rows is told[0]
            assert here.slot_mapping.tolist() == [*table._slots(rows, ends - 1), *[-1] * padding]
            assert not here.context_lens[real:].any()
            for b, (row, end) in enumerate(zip(rows, ends, strict=True)):
                pages, tokens = table._mine(row, end)
                assert here.context_lens[b] == tokens
                assert here.page_table[b, : len(pages)].tolist() == pages.tolist()
            found += here.context_lens[:real].cpu().numpy()
        assert found.tolist() == ends.tolist()


class Ranks:
    """A decode step over `size` ranks: `parts` and `whole` in float64, from what each rank's pages hold in the end."""

    def __init__(self, positions, size, page_size, heads, d, dtype=torch.float32, kept=None, turning=None):
        torch.manual_seed(0)
        real = [b for b, at in enumerate(positions) if at is not None]
        pages = [0 if at is None else at // page_size + 1 for at in positions]
        ids = torch.randperm(sum(pages) + size).tolist()
        self.tables = tables(size, len(positions), max(pages) + 1, page_size)
        self.caches = [
            garbage(PagedKVCache(1, -(-len(ids) // size), page_size, heads[1], d, kept or dtype, DEVICE, scales=SCALES))
            for _ in range(size)
        ]
        updates = [(b, 0, [ids.pop() for _ in range(pages[b])]) for b in real]
        for table in self.tables:
            table.set_pages(updates)
        self.rows, self.positions = (
            torch.tensor([-1 if at is None else x for x, at in zip(some, positions, strict=True)], device=DEVICE)
            for some in (range(len(positions)), positions)
        )
        self.qkv = [torch.randn(len(positions), h, d, device=DEVICE).to(dtype) for h in (heads[0], heads[1], heads[1])]
        q, k, v = self.qkv if turning is None else (*turning(*self.qkv[:2]), self.qkv[2])
        self.parts = []
        for table, cache in zip(self.tables, self.caches, strict=True):
            o = torch.zeros(q.shape, dtype=torch.float64)
            lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
            for b in real:
                slots = table._slots(np.full(positions[b] + 1, b), np.arange(positions[b] + 1))
                old = torch.from_numpy(slots[:-1][slots[:-1] >= 0]).to(DEVICE)
                cache.write(0, old, *torch.randn(2, len(old), heads[1], d, device=DEVICE).to(dtype))
                keys, values = cache.read(0, old)
                if slots[-1] >= 0:
                    new = cache.rounded(0, k[b : b + 1], v[b : b + 1])
                    keys, values = torch.cat((keys, new[0])), torch.cat((values, new[1]))
                if len(keys):
                    known, n = (x[None].double().cpu() for x in (keys, values)), torch.tensor([len(keys)])
                    told = attend_to_each(q[b : b + 1].double().cpu(), *known, n)
                    o[b], lse[b] = told[0][0], told[1][0]
            self.parts.append((o, lse))
        self.whole = merge(self.parts)[0]

    def answer(self, monkeypatch, turning=None) -> tuple[list, list]:
        """What each rank hands in, (o, lse), and what it has in the end; the messages are carried by hand."""
        from common.kernels import spread_attention  # noqa: PLC0415

        sent, inputs = {}, [turning] if turning else []
        steps = [table.decode_on_device(self.rows, self.positions, table.page_table.shape[1]) for table in self.tables]
        attentions = [
            spread_attention.TritonContextParallelAttention(cache, step.meta)
            for cache, step in zip(self.caches, steps, strict=True)
        ]
        assert all(attention.turns for attention in attentions)

        def gather(words, cp, name):  # of groups without memory that all see
            assert name == "layers.0.merge"
            sent[cp.rank] = words.clone()
            return torch.cat([sent.get(rank, words) for rank in range(cp.size)])

        monkeypatch.setattr(collectives, "all_gather_rows", gather)
        for attention in attentions:  # nobody has heard all yet
            attention(0, *self.qkv, *inputs)
        told = [(attention.answers.o.clone(), attention.answers.lse.clone()) for attention in attentions]
        whole = [attention(0, *self.qkv, *inputs) for attention in attentions]  # the workspace is as it was before
        for (o, lse), attention in zip(told, attentions, strict=True):
            assert torch.equal(attention.answers.o, o)
            assert torch.equal(attention.answers.lse, lse)
        assert all(torch.equal(one, whole[0]) for one in whole), "every rank goes on with the same bits"
        return told, whole

    def check(self, monkeypatch, tolerance: float, turning=None) -> None:
        told, whole = self.answer(monkeypatch, turning)
        for (o, lse), (want, want_lse) in zip(told, self.parts, strict=True):
            none = want_lse == -torch.inf
            assert torch.equal(lse.cpu() == -torch.inf, none)
            assert not o.cpu()[none].any()
            assert relative_error(o.cpu()[~none], want[~none]) < tolerance
            assert relative_error(lse.cpu()[~none], want_lse[~none]) < tolerance
        assert relative_error(whole[0].cpu(), self.whole) < tolerance
        assert not whole[0][self.rows < 0].any()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_each_rank_tells_its_part_and_all_have_the_whole(dtype, size, name, monkeypatch):
    Ranks(STEPS[name], size, 4, (4, 2), 24, dtype).check(monkeypatch, TOLERANCE[dtype])


@pytest.mark.parametrize("group", range(1, 9))
def test_heads_of_all_sizes(group, monkeypatch):
    d, page_size = ((64, 16), (128, 1), (7, 5))[group % 3]
    Ranks([0, 40, None, 9], 3, page_size, (2 * group, 2), d).check(monkeypatch, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kept", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int4, torch.float16])
def test_pages_of_codes(kept, dtype, monkeypatch):
    ranks = Ranks(STEPS["unequal"], 2, 16, (4, 2), 32, dtype, kept)
    ranks.check(monkeypatch, 2 * TOLERANCE[dtype])


def test_the_new_token_is_stored_on_its_rank_alone(monkeypatch):
    ranks = Ranks(STEPS["short"], 3, 4, (4, 2), 8)
    before = [cache.kv.clone() for cache in ranks.caches]
    ranks.answer(monkeypatch)
    stored = 0
    for table, cache, was in zip(ranks.tables, ranks.caches, before, strict=True):
        rows = (ranks.rows >= 0).nonzero().squeeze(1)
        slots = torch.from_numpy(table._slots(rows.cpu().numpy(), ranks.positions[rows].cpu().numpy()))
        for b, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            if slot >= 0:
                stored += 1
                for plane, new in zip((cache.k, cache.v), ranks.qkv[1:], strict=True):
                    assert torch.equal(plane[0].flatten(0, 1)[slot], new[b])
                was[0].flatten(1, 2)[:, slot] = cache.kv[0].flatten(1, 2)[:, slot]
        assert torch.equal(cache.kv.nan_to_num(9), was.nan_to_num(9)), "and nothing else is written"
    assert stored == (ranks.rows >= 0).sum()


@pytest.mark.parametrize("normed", [False, True])
def test_q_and_k_are_turned_while_they_are_read(normed, monkeypatch):
    d, positions = 16, [0, 40, None, 9]
    norms = [RMSNorm(d, 1e-6).to(DEVICE) for _ in range(2)]
    for norm in norms:
        norm.load_weight(type("Source", (), {"shape": (d,), "read": lambda self, *_: torch.rand(d) + 0.5})())
    at = torch.tensor([one or 0 for one in positions], device=DEVICE)
    turning = Turning(RotaryEmbedding(d, 64, 10_000.0).to(DEVICE)(at, torch.float32), *(norms if normed else ()))
    Ranks(positions, 2, 4, (6, 2), d, turning=turning).check(monkeypatch, 1e-5, turning)


def mailed(words: list[torch.Tensor], rows: int, width: int, heads: int, room: int, number: int) -> list[torch.Tensor]:
    """Each rank's (o, lse) as 64-bit words in the order of an inbox, [room]: a word, and the number of the round."""
    boxes = []
    for o, lse in words:
        box, each = np.zeros(room, dtype=np.int64), heads * (width + 1)
        for row in range(rows):
            first, i = row // heads * each, row % heads
            box[first + i * width : first + (i + 1) * width] = (o[row].numpy().astype(np.int64) << 32) | number
            box[first + heads * width + i] = (int(lse[row]) << 32) | number
        boxes.append(torch.from_numpy(box))
    return boxes


@pytest.mark.skipif(GPU, reason="on_gpus.py runs between GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "shape"), [(2, (1, 3, 8)), (3, (5, 3, 6)), (4, (2, 8, 16))])
def test_answers_that_are_pushed_are_merged(size, shape, dtype):
    """Two rounds of each rank; what the others have sent lies in its inbox, and what it sends must be of that form."""
    from common.kernels.all_reduce import letters, push_merge  # noqa: PLC0415
    from common.kernels.merge import HEADS, Answers, merge_answers  # noqa: PLC0415

    rows, width = shape[0] * shape[1], shape[2] * dtype.itemsize // 4
    room = (letters(Answers(torch.zeros(shape, dtype=dtype))) // 16 + 1) * 16
    boxes = torch.zeros(size, 2, size, room, dtype=torch.int64)  # by rank
    inboxes, rounds = torch.tensor([box.data_ptr() for box in boxes]), torch.zeros(size, room, dtype=torch.int32)
    for number in (1, 2):
        told = []
        for rank in range(size):
            told.append(Answers(torch.zeros(shape, dtype=dtype)))
            told[-1].o.copy_(torch.randn(shape))
            told[-1].lse.copy_(torch.randn(shape[:2]))
            none = torch.rand(shape[:2]) < (1.0 if rank == 0 else 0.3)
            told[-1].lse[none], told[-1].o[none] = -torch.inf, 0.0
        words = [(one.o.view(rows, -1).view(torch.int32), one.lse.flatten().view(torch.int32)) for one in told]
        sent = mailed(words, rows, width, HEADS, room, number)
        want = merge_answers(torch.cat([one.words for one in told]), told[0])
        plain = merge([(one.o.double(), one.lse.double()) for one in told])[0]
        assert relative_error(want, plain) < (1e-6 if dtype == torch.float32 else 5e-3)
        for rank in range(size):
            boxes[:, number % 2] = 0
            for other in range(size):
                boxes[rank, number % 2, other] = 0 if other == rank else sent[other]
            got = push_merge(told[rank], inboxes, rounds[rank], rank, size, room)
            assert torch.equal(got, want)
            for other in range(size):
                if other != rank:
                    assert torch.equal(boxes[other, number % 2, rank], sent[rank])
    assert rounds.amax() == 2


# --- what a CUDA graph would record, over real ranks


@torch.inference_mode()
def recorded_and_not(folder, layout: tuple[int, int]) -> list[float]:
    """Some prompts, by kernels and without; then decode steps: as on a CPU, and what DecodeGraphs records. How far the logits are
    apart."""
    from common.executor import Executor  # noqa: PLC0415, on each rank
    from common.kernels.spread_attention import TritonContextParallelAttention  # noqa: PLC0415
    from common.models.graph_runner import DecodeGraphs  # noqa: PLC0415

    tp, cp = layout
    executor = Executor(
        str(folder), "cpu", 4, max_total_tokens=480, parallel=layout_of_the_pool(tp, context_parallel_size=cp)
    )
    table, cache = executor.table, executor.kv_cache
    table.kernels = True
    executor._warm_up_short_prompts()
    assert executor.table.pages[0, : cp + 1].tolist() == list(range(cp + 1))
    ids = np.random.default_rng(0).permutation(90)
    table.set_pages([(row, 0, ids[30 * row : 30 * row + 30]) for row in range(3)])
    lengths, rows, away = np.array([17, 1, 40]), np.arange(3), []
    for cached, new in ((0 * lengths, lengths - 1), (lengths - 1, 0 * lengths + 1)):
        both = []
        for table.kernels in (True, False):
            asked = np.arange(new.sum()), rows[new > 0], cached[new > 0], new[new > 0], (new[new > 0] > 0) * 1
            both.append(executor.ragged(*asked))
        away.append(relative_error(*both))
    executor.receive_tokens(torch.tensor([5, 6, 7]))
    graphs = DecodeGraphs(executor.model, TritonContextParallelAttention, cache, table, 8)
    assert graphs.shapes == [(8, False), (4, False), (2, False), (1, False)]
    for step in range(6):  # some begin a page
        want = executor.decode(rows, lengths + step)
        before = cache.kv.clone()
        graphs._pad((4, False))
        graphs.inputs[:3], graphs.inputs[4:7] = torch.from_numpy(rows), torch.from_numpy(lengths + step)
        got = graphs._step((4, False))
        away.append(relative_error(got[:3], want))
        assert relative_error(cache.kv, before) < 1e-6, "the same tokens, and none of padding"
        executor.receive_tokens(torch.tensor([8, 9, 10]) + step)
    return away


@pytest.mark.skipif(GPU, reason="the ranks are CPUs, and here kernels are compiled")
@pytest.mark.parametrize(("name", "layout"), [("qwen3_moe", (2, 2)), ("qwen2", (4, 2))])
def test_what_is_recorded_is_the_step_of_a_cpu(name, layout, checkpoint, ranks):
    for away in ranks(layout[0]).run(recorded_and_not, checkpoint(name), layout):
        assert max(away) < 1e-5
