import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.torch_native import MAX_PADDING, TorchNativeAttention, similar_lengths
from common.layers.heads import HeadLayout
from common.models.config import ModelConfig

LAYERS, LAYER, D = 2, 1, 4


def ints(values):
    return torch.tensor(values, dtype=torch.int64)


@dataclass
class Step:
    """A ragged step over random K and V, laid out in shuffled pages.

    lengths: (cached, new) of each sequence; `padding` one-token rows with slot -1 stand between them.
    Slots that hold no token of a sequence are full of garbage, but for those of a page that a sequence has begun.
    Sequences that have `shared` cached tokens begin with the same ones, in the same pages.
    """

    lengths: list[tuple[int, int]]
    page_size: int = 4
    num_kv_heads: int = 2
    group: int = 1
    padding: int = 0
    seed: int = 0
    garbage: float = 1e4
    page_padding: int = 0
    shared: int = 0
    scale: float = 1.0

    def __post_init__(self):
        rng = torch.Generator().manual_seed(self.seed)
        size, hkv = self.page_size, self.num_kv_heads
        needed = [-(-(cached + new) // size) for cached, new in self.lengths]
        self.num_pages = sum(needed) + 3
        pages = torch.randperm(self.num_pages - 1, generator=rng) + 1  # page 0 is nobody's
        self.pages = [p.tolist() for p in pages[: sum(needed)].split(needed)] if needed else []
        self.cache = PagedKVCache(LAYERS, self.num_pages, size, hkv, D)
        self.cache.k.fill_(self.garbage)
        self.cache.v.fill_(-self.garbage)
        self.k = [torch.randn(sum(x), hkv, D, generator=rng) for x in self.lengths]
        self.v = [torch.randn(sum(x), hkv, D, generator=rng) for x in self.lengths]
        sharing = [b for b, (cached, _) in enumerate(self.lengths) if cached >= self.shared]
        n = self.shared // size
        for b in sharing[1:]:
            self.pages[b][:n] = self.pages[sharing[0]][:n]
            self.k[b][: n * size], self.v[b][: n * size] = (x[sharing[0]][: n * size] for x in (self.k, self.v))
        for b, (cached, _) in enumerate(self.lengths):
            self.cache.begin(self.slots(b)[:cached])
            self.cache.write(LAYER, self.slots(b)[:cached], self.k[b][:cached], self.v[b][:cached])
        self.before = self.cache.k.clone(), self.cache.v.clone()
        # the rows of the step: sequences, and None for padding, mixed
        rows = [*range(len(self.lengths)), *[None] * self.padding]
        self.rows = [rows[i] for i in torch.randperm(len(rows), generator=rng).tolist()]
        self.new = [1 if b is None else self.lengths[b][1] for b in self.rows]
        total = sum(self.new)
        self.q = self.scale * torch.randn(total, hkv * self.group, D, generator=rng)

    def slots(self, b):
        """Where each token of sequence b lies."""
        return ints(
            [
                self.pages[b][i // self.page_size] * self.page_size + i % self.page_size
                for i in range(sum(self.lengths[b]))
            ]
        )

    def meta(self):
        slots, table, lens = [], [], []
        for b in self.rows:
            slots += [-1] if b is None else self.slots(b)[self.lengths[b][0] :].tolist()
            table.append([] if b is None else self.pages[b])
            lens.append(1 if b is None else sum(self.lengths[b]))
        width = max(1, *map(len, table)) if table else 1
        table = [[*row, *[self.page_padding] * (width - len(row))] for row in table]
        starts = [sum(self.new[:i]) for i in range(len(self.new) + 1)]
        return AttentionMetadata(ints(slots), ints(table), ints(starts), ints(lens), self.page_size)

    def new_kv(self):
        """K and V of the new tokens, row after row; ones for padding."""

        def of_row(x, b):
            return torch.ones(1, self.num_kv_heads, D) if b is None else x[b][self.lengths[b][0] :]

        return tuple(torch.cat([of_row(x, b) for b in self.rows]) for x in (self.k, self.v))

    def run(self):
        """[(b, what attention gave for the new tokens of sequence b)]"""
        o = TorchNativeAttention(self.cache, self.meta())(LAYER, self.q, *self.new_kv())
        assert o.shape == self.q.shape
        return [(b, part) for b, part in zip(self.rows, o.split(self.new), strict=True) if b is not None]

    def dense(self, b):
        """What attention must give for the new tokens of sequence b: one token and one head after the other."""
        cached, new = self.lengths[b]
        start = sum(self.new[: self.rows.index(b)])
        out = torch.zeros(new, self.num_kv_heads * self.group, D)
        for i in range(new):
            for h in range(out.shape[1]):
                k, v = (x[b][: cached + i + 1, h // self.group] for x in (self.k, self.v))
                out[i, h] = torch.softmax(k @ self.q[start + i, h] / math.sqrt(D), dim=0) @ v
        return out

    def check(self):
        for b, o in self.run():
            torch.testing.assert_close(o, self.dense(b), rtol=1e-4, atol=1e-4)


steps = st.builds(
    Step,
    lengths=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 40), st.integers(120, 600)),  # cached
            st.one_of(st.just(1), st.integers(1, 20)),  # new
        ),
        min_size=1,
        max_size=6,
    ),
    page_size=st.sampled_from([1, 4, 16]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 7]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
    shared=st.sampled_from([0, 5, 64, 100, 120]),
)
decodes_behind_a_shared_prompt = st.builds(
    Step,
    lengths=st.lists(st.tuples(st.integers(60, 300), st.just(1)), min_size=2, max_size=5),
    page_size=st.sampled_from([1, 4, 16]),
    num_kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 1000),
    shared=st.integers(50, 150),
)


@settings(max_examples=100, deadline=None)
@given(steps)
def test_any_ragged_step_is_dense_attention_of_each_sequence(step):
    step.check()


@settings(max_examples=100, deadline=None)
@given(decodes_behind_a_shared_prompt)
def test_decoding_behind_a_shared_prompt_is_dense_attention_of_each_sequence(step):
    step.check()


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_a_shared_prompt_that_gets_all_or_none_of_the_attention(scale):
    """Large scores: of prompt and rest, one outweighs the other beyond what a float can say."""
    Step([(100, 1), (130, 1), (90, 1), (80, 1)], group=7, shared=80, scale=scale).check()


@settings(max_examples=50, deadline=None)
@given(steps)
def test_what_is_written_is_what_is_read_and_nothing_else_is_touched(step):
    step.run()
    want_k, want_v = (x.clone() for x in step.before)
    for b in range(len(step.lengths)):
        slots, cached = step.slots(b), step.lengths[b][0]
        k, v = step.cache.read(LAYER, slots)
        assert torch.equal(k, step.k[b])
        assert torch.equal(v, step.v[b])
        begun = slots[cached:][slots[cached:] % step.page_size == 0] // step.page_size
        want_k[:, begun] = want_v[:, begun] = 0
        want_k[LAYER].flatten(0, 1)[slots[cached:]] = step.k[b][cached:]
        want_v[LAYER].flatten(0, 1)[slots[cached:]] = step.v[b][cached:]
    assert torch.equal(step.cache.k, want_k)
    assert torch.equal(step.cache.v, want_v)


@settings(max_examples=40, deadline=None)
@given(steps, st.integers(1, 1000))
def test_which_pages_hold_a_sequence_makes_no_difference(step, seed):
    """The same step in other pages: bit for bit the same, since the same numbers are added in the same order."""
    other = Step(**{name: getattr(step, name) for name in Step.__dataclass_fields__})
    turn = torch.randperm(other.num_pages, generator=torch.Generator().manual_seed(seed))
    other.pages = [turn[p].tolist() for p in other.pages]
    other.page_padding = int(turn[0])
    other.cache.kv[:, :, turn] = step.cache.kv
    for (b, o), (b_other, o_other) in zip(step.run(), other.run(), strict=True):
        assert b == b_other
        assert torch.equal(o, o_other)


CASES = {
    "one prompt": [(0, 9)],
    "prompts": [(0, 9), (0, 4), (0, 17)],
    "a prompt of one token": [(0, 1)],
    "prompts behind cached prefixes": [(8, 5), (3, 2), (16, 16)],
    "decode": [(11, 1), (12, 1), (15, 1), (16, 1)],
    "decode behind 64 tokens that may be shared": [(64, 1), (70, 1), (100, 1), (127, 1)],
    "all of it": [(11, 1), (0, 7), (8, 5), (0, 1), (40, 1)],
}


@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("shared", [0, 64])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_every_kind_of_step(lengths, shared, page_size, group):
    Step(lengths, page_size=page_size, group=group, shared=shared).check()


@pytest.mark.parametrize("lengths", [[(40, 1), (17, 1), (3, 1)], [(3, 1), (40, 1)], [(17, 1), (20, 1), (40, 1)]])
def test_a_sequence_gone_bad_leaves_the_others_alone(lengths):
    step = Step(lengths, page_size=16, garbage=math.nan)
    longest = max(range(len(lengths)), key=lambda b: lengths[b])
    step.cache.kv[:, :, step.pages[longest]] = math.nan
    for b, o in step.run():
        if b == longest:
            assert o.isnan().all()
        else:
            torch.testing.assert_close(o, step.dense(b), rtol=1e-4, atol=1e-4)


def test_very_unequal_decode_lengths():
    Step([(0, 1), (1500, 1), (3, 1), (130, 1), (129, 1), (700, 1)], page_size=16, padding=2).check()
    orders = set()
    for seed in range(4):  # the longest first, and last
        step = Step([(3000, 1), (1500, 1)], page_size=16, seed=seed)
        step.check()
        orders.add(tuple(step.rows))
    assert len(orders) == 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5000), max_size=20))
def test_decode_groups_hold_every_row_once_and_pad_little(lens):
    groups = similar_lengths(list(range(len(lens))), lens)
    assert sorted(b for group in groups for b in group) == list(range(len(lens)))
    for group in groups:
        of_group = [lens[b] for b in group]
        assert sum(max(of_group) - length for length in of_group) <= MAX_PADDING


def test_decode_rows_that_pad_little_are_one_group_in_order():
    assert similar_lengths([0, 1, 2, 3], [1000, 801, 977, 900]) == [[0, 1, 2, 3]]
    assert similar_lengths([0, 1, 2], [2000, 10, 1990]) == [[0, 2], [1]]
    assert similar_lengths([], []) == []
    full = MAX_PADDING + 10
    assert similar_lengths([0, 1], [full, 10]) == [[0, 1]]
    assert similar_lengths([0, 1], [full + 1, 10]) == [[0], [1]]


def test_no_page_is_copied_that_nobody_attends_to():
    """A long prompt makes the step's page table wide; the decode rows beside it are as short as before."""
    step = Step([(0, 100), (9, 1), (5, 1)], page_size=4)
    attention = TorchNativeAttention(step.cache, step.meta())
    assert [len(part.pages) for part in attention.decodes[0].rounds] == [2 * 2 * 3], (
        "K and V of two rows, 10 tokens each"
    )
    assert attention.extends[0].pages is None, "all of the prompt is new"


def test_a_sequence_without_new_tokens_is_left_alone():
    step = Step([(5, 1), (6, 3)])
    meta = step.meta()
    idle = AttentionMetadata(
        meta.slot_mapping,
        torch.cat([meta.page_table, meta.page_table[:1]]),
        torch.cat([meta.query_start, meta.query_start[-1:]]),
        torch.cat([meta.context_lens, ints([4])]),
        meta.page_size,
    )
    want = TorchNativeAttention(step.cache, meta)(LAYER, step.q, *step.new_kv())
    assert torch.equal(TorchNativeAttention(step.cache, idle)(LAYER, step.q, *step.new_kv()), want)


@pytest.mark.parametrize("lengths", [[(5, 1), (7, 1)], [(5, 1)], [(0, 6)], [(5, 1), (0, 6)]], ids=str)
def test_padding_tokens_behind_the_last_sequence_change_nothing(lengths):
    """A step padded to a fixed T: the tokens from query_start[-1] on belong to no sequence."""
    step = Step(lengths)
    meta, (k, v) = step.meta(), step.new_kv()
    want = TorchNativeAttention(step.cache, meta)(LAYER, step.q, k, v)
    slots = torch.cat([meta.slot_mapping, ints([-1, -1])])
    padded = AttentionMetadata(slots, meta.page_table, meta.query_start, meta.context_lens, meta.page_size)
    q, k, v = (torch.cat([x, torch.ones(2, *x.shape[1:])]) for x in (step.q, k, v))
    o = TorchNativeAttention(step.cache, padded)(LAYER, q, k, v)
    torch.testing.assert_close(o[:-2], want)


@pytest.mark.parametrize("page_padding", [0, -1, 1 << 40])
@pytest.mark.parametrize("lengths", [[(3, 1), (30, 1)], [(0, 3), (0, 30)]], ids=["decode", "prefill"])
def test_what_stands_in_the_page_table_behind_a_sequences_pages_does_not_matter(lengths, page_padding):
    Step(lengths, page_padding=page_padding).check()


NEIGHBOURS = {
    "decode": [(3, 1), (30, 1)],
    "decode that begins a page": [(4, 1), (30, 1), (0, 1)],
    "decode behind a shared prompt": [(80, 1), (101, 1)],
    "prefill": [(0, 3), (0, 30)],
    "prefill behind a prefix": [(4, 3)],
}


@pytest.mark.parametrize("lengths", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_nan_left_behind_in_free_slots_does_not_reach_other_sequences(lengths):
    """A request that overflowed leaves NaN in pages that the next one fills only in part."""
    Step(lengths, garbage=math.nan, shared=64).check()


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_bfloat16_stays_bfloat16_and_is_close(lengths):
    step = Step(lengths, group=2, garbage=100.0, shared=64)
    cache = PagedKVCache(LAYERS, step.num_pages, step.page_size, step.num_kv_heads, D, dtype=torch.bfloat16)
    cache.k.copy_(step.cache.k)
    cache.v.copy_(step.cache.v)
    q, k, v = (x.bfloat16() for x in (step.q, *step.new_kv()))
    o = TorchNativeAttention(cache, step.meta())(LAYER, q, k, v)
    assert o.dtype == torch.bfloat16
    for b, part in zip(step.rows, o.split(step.new), strict=True):
        torch.testing.assert_close(part.float(), step.dense(b), rtol=5e-2, atol=5e-2)


def test_one_object_serves_every_layer():
    step = Step([(5, 1), (0, 6)])
    attention = TorchNativeAttention(step.cache, step.meta())
    first = attention(LAYER, step.q, *step.new_kv())
    attention(0, step.q, *(2 * x for x in step.new_kv()))
    assert torch.equal(attention(LAYER, step.q, *step.new_kv()), first)


def test_the_page_size_of_the_step_must_be_the_caches():
    cache = PagedKVCache(1, 4, 16, 1, D)
    meta = AttentionMetadata(ints([0]), ints([[0]]), ints([0, 1]), ints([1]), page_size=8)
    with pytest.raises(ValueError, match="page_size=8 of the step is not the cache's page_size=16"):
        TorchNativeAttention(cache, meta)


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 2), (2, 1), (3, 2), (4, 1)])
def test_bytes_per_page_are_those_of_the_tensors(ranks, kv_heads):
    raw = {
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": 10, "hidden_size": 112, "intermediate_size": 10,
        "num_hidden_layers": 3, "num_attention_heads": 14, "num_key_value_heads": 2,
    }  # fmt: skip
    cache = PagedKVCache(3, 5, 16, kv_heads, 8, dtype=torch.bfloat16)
    total = cache.k.numel() * 2 + cache.v.numel() * 2
    config = ModelConfig.from_dict(raw)
    heads = HeadLayout.of(config.num_heads, config.num_kv_heads, 0, ranks)
    per_page = PagedKVCache.bytes_per_page(config.num_layers, 16, heads.num_kv, config.head_dim, torch.bfloat16)
    assert per_page * 5 == total
