"""The Triton kernels against their plain-PyTorch twin. Needs an NVIDIA GPU; skipped elsewhere."""

import random
from dataclasses import replace

import pytest
import torch

from common.attention.backends import pick_attention
from common.attention.contract import AttentionMetadata, SharedPrefixes
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.attention.torch_native import TorchNativeAttention
from common.layers.norm import RMSNorm
from common.layers.rotary import Turning

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def step(queries, cached, page_size, heads=(14, 2), d=64, dtype=torch.float32, seed=0, device="cuda"):
    """A ragged step on shuffled pages of a cache full of noise, its free slots full of NaN."""
    random.seed(seed)
    torch.manual_seed(seed)
    lens = [n + c for n, c in zip(queries, cached, strict=True)]
    pages = [-(-n // page_size) for n in lens]
    ids = torch.randperm(sum(pages) + 3).tolist()
    cache = PagedKVCache(1, len(ids), page_size, heads[1], d, dtype, device)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    table = torch.full((len(lens), max(pages)), -1)
    slots, old = [], []
    for b, length in enumerate(lens):
        own, ids = ids[: pages[b]], ids[pages[b] :]
        table[b, : len(own)] = torch.tensor(own)
        all_slots = [own[i // page_size] * page_size + i % page_size for i in range(length)]
        old += all_slots[: cached[b]]
        slots += all_slots[cached[b] :]
    cache.k[0].flatten(0, 1)[old] = torch.randn(len(old), heads[1], d, dtype=dtype, device=device)
    cache.v[0].flatten(0, 1)[old] = torch.randn(len(old), heads[1], d, dtype=dtype, device=device)
    starts = torch.tensor([0, *queries]).cumsum(0)
    on_gpu = [torch.as_tensor(x, device=device) for x in (slots, table, starts, lens)]
    meta = AttentionMetadata(*on_gpu, page_size, max(queries))
    qkv = [torch.randn(len(slots), h, d, dtype=dtype, device=device) for h in (heads[0], heads[1], heads[1])]
    return cache, meta, qkv


STEPS = {
    "decode": ([1] * 5, [0, 3, 17, 200, 1500]),
    "one long decode": ([1], [5000]),
    "many decodes": ([1] * 60, [37 * i for i in range(60)]),
    "prefill": ([70, 1, 33, 130], [0, 0, 0, 0]),
    "cached prefix": ([5, 64, 1, 200], [100, 16, 31, 777]),
}


@gpu
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("heads", "d"), [((14, 2), 64), ((16, 8), 128), ((7, 1), 8)])
def test_attention_is_the_plain_form_s(name, page_size, dtype, tolerance, heads, d):
    cache, meta, qkv = step(*STEPS[name], page_size, heads, d, dtype)
    twin = PagedKVCache(1, cache.num_pages, page_size, heads[1], d, torch.float32, "cuda")
    twin.k.copy_(cache.k.nan_to_num())  # it blanks a page that begins, not the rest of one in which NaN already stands
    twin.v.copy_(cache.v.nan_to_num())
    expected = TorchNativeAttention(twin, meta)(0, *(x.float() for x in qkv))
    o = pick_attention(torch.device("cuda"), "triton")(cache, meta)(0, *qkv)
    error = (o.float() - expected).norm() / expected.norm()
    assert error < tolerance
    attention = pick_attention(torch.device("cuda"), "triton")(cache, meta)
    for _ in range(3):  # the workspace is as it was before
        assert torch.equal(attention(0, *qkv), o)
    written = meta.slot_mapping
    assert torch.equal(cache.k[0].flatten(0, 1)[written], qkv[1])
    assert torch.equal(cache.v[0].flatten(0, 1)[written], qkv[2])


@gpu
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("heads", "d"), [((14, 2), 64), ((16, 8), 128)])
def test_flashinfer_is_the_plain_form_too(name, page_size, heads, d):
    pytest.importorskip("flashinfer")
    cache, meta, qkv = step(*STEPS[name], page_size, heads, d, torch.bfloat16)
    meta.page_table.clamp_(min=0)
    cache.k.nan_to_num_(0.0)
    cache.v.nan_to_num_(0.0)
    expected = TorchNativeAttention(cache, meta)(0, *qkv)
    assert relative_error(pick_attention(torch.device("cuda"), "flashinfer")(cache, meta)(0, *qkv), expected) < 1e-2


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("heads", "d"), [((14, 2), 64), ((16, 8), 128), ((28, 4), 128)])
def test_shared_prefixes_change_nothing(dtype, tolerance, heads, d):
    """40 sequences, the first 25 with 1200 tokens in common, the next 4 with 16, against each on its own."""
    lens = [1200 + 17 * i for i in range(25)] + [16 + i for i in range(4)] + [50 * i for i in range(11)]
    cache, meta, qkv = step([1] * 40, lens, 16, heads, d, dtype)
    meta.page_table[1:25, :75] = meta.page_table[0, :75]
    meta.page_table[26:29, :1] = meta.page_table[25, :1]
    cache.k.nan_to_num_(0.5)
    cache.v.nan_to_num_(0.5)
    members = pick_attention(torch.device("cuda"), "triton").tile_members(*heads)
    table = SequenceTable(64, 200, 16, torch.device("cuda"), members)
    tiles, tokens = (torch.from_numpy(x).cuda() for x in table.tiles([(0, 25, 75), (25, 4, 1)], 40))
    assert tokens[24] == 1200
    assert tokens[28] == 16
    expected = TorchNativeAttention(cache, meta)(0, *qkv)
    with_hint = replace(meta, prefixes=SharedPrefixes(tiles.view(3, -1), tokens))
    attention = pick_attention(torch.device("cuda"), "triton")(cache, with_hint)
    for _ in range(2):
        assert relative_error(attention(0, *qkv), expected) < tolerance


@gpu
def test_padding_tokens_are_stored_nowhere():
    cache, meta, qkv = step(*STEPS["decode"], 16)
    before = cache.k.clone()
    meta = replace(meta, slot_mapping=torch.full_like(meta.slot_mapping, -1))
    pick_attention(torch.device("cuda"), "triton")(cache, meta)(0, *qkv)
    assert torch.equal(cache.k.nan_to_num(7.0), before.nan_to_num(7.0))


def test_unknown_backends_are_refused():
    with pytest.raises(
        ValueError, match="attention_backend='flash' is unknown; use auto, torch_native, triton, flashinfer"
    ):
        pick_attention(torch.device("cpu"), "flash")
    with pytest.raises(ValueError, match="triton"):
        pick_attention(torch.device("cpu"), "triton")
    assert pick_attention(torch.device("cpu")) is TorchNativeAttention


def relative_error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [16, 128, 224, 896, 3584])
def test_fused_norms(size, dtype):
    from common.kernels import fused  # noqa: PLC0415

    x, residual = (torch.randn(37, size, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.randn(size, device="cuda", dtype=dtype)

    def plain(x):
        return torch.nn.functional.rms_norm(x.float(), (size,), weight.float(), 1e-6)

    assert relative_error(fused.rms_norm(x, weight, 1e-6), plain(x)) < TOLERANCE[dtype]
    y, total = fused.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert relative_error(y, plain(x + residual)) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_and_mul(dtype):
    from common.kernels import fused  # noqa: PLC0415

    x = torch.randn(37, 2 * 4864, device="cuda", dtype=dtype)
    gate, up = x.float().chunk(2, dim=-1)
    assert relative_error(fused.silu_and_mul(x), torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "d"), [((14, 2), 64), ((16, 8), 128), ((7, 1), 8), ((28, 4), 128)])
def test_turn(dtype, normed, heads, d):
    """Queries and keys as views of the fused projection, against norm, then rotary in plain PyTorch."""
    from common.kernels import fused  # noqa: PLC0415

    qkv = torch.randn(37, (heads[0] + 2 * heads[1]) * d, device="cuda", dtype=dtype)
    q, k, _ = qkv.split([heads[0] * d, heads[1] * d, heads[1] * d], dim=-1)
    q, k = q.view(37, -1, d), k.view(37, -1, d)
    weights = [torch.randn(d, device="cuda", dtype=dtype) for _ in range(2)] if normed else [None, None]
    angles = torch.outer(torch.arange(100.0), torch.rand(d // 2)).cuda()
    positions = torch.randint(0, 100, (37,), device="cuda")
    cos, sin = fused.angles(positions, angles.cos(), angles.sin(), torch.float32)
    want = torch.cat((angles.cos(), angles.cos()), -1)[positions].unsqueeze(1)
    assert relative_error(cos, want) < 1e-6
    for x, weight, got in zip((q, k), weights, fused.turn(q, k, cos, sin, *weights, 1e-6), strict=True):
        here = torch.nn.functional.rms_norm(x.float(), (d,), weight.float(), 1e-6) if normed else x.float()
        other = torch.cat((-here[..., d // 2 :], here[..., : d // 2]), -1)
        bare = torch.cat((angles.sin(), angles.sin()), -1)[positions].unsqueeze(1)
        assert relative_error(got, here * want + other * bare) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", ["decode", "many decodes"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("heads", "d"), [((14, 2), 64), ((28, 4), 128)])
def test_decode_turns_what_it_reads(heads, d, dtype, tolerance, name, normed):
    cache, meta, (q, k, v) = step(*STEPS[name], 16, heads, d, dtype)
    angles = torch.outer(meta.context_lens - 1.0, torch.rand(d // 2, device="cuda"))
    cos, sin = (
        torch.cat(halves, -1).to(dtype).unsqueeze(1) for halves in ([angles.cos()] * 2, [-angles.sin(), angles.sin()])
    )
    norms = [RMSNorm(d, 1e-6).to("cuda", dtype) for _ in range(2)] if normed else []
    for norm in norms:
        norm.weight.normal_()
    turning = Turning((cos, sin), *norms)
    want = pick_attention(torch.device("cuda"), "triton")(cache, meta)(0, *turning(q, k), v)
    stored = cache.k.clone()
    cache.k[0].flatten(0, 1)[meta.slot_mapping] = 0.0
    attention = pick_attention(torch.device("cuda"), "triton")(cache, meta)
    assert attention.turns
    assert relative_error(attention(0, q, k, v, turning), want) < tolerance
    assert relative_error(cache.k.nan_to_num(), stored.nan_to_num()) < tolerance


@gpu
def test_embed_gives_zeros_for_rows_of_another_rank():
    from common.kernels import fused  # noqa: PLC0415

    weight = torch.randn(100, 112, device="cuda")
    ids = torch.tensor([0, 99, 100, 150, 199, 200, 1000], device="cuda")
    x = fused.embed(ids, weight, 100)
    assert torch.equal(x[2:5], weight[[0, 50, 99]])
    assert not x[[0, 1, 5, 6]].any()


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("out", "width"), [(1152, 896), (896, 4864), (151_936, 896), (37, 100), (3584, 18_944)])
def test_linear_of_one_row(dtype, out, width):
    check_linear(1, out, width, dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 16, 17, 32])
@pytest.mark.parametrize(("out", "width"), [(896, 4864), (19_000, 896), (37, 3100), (3584, 18_944)])
def test_linear_of_few_rows(dtype, rows, out, width):
    check_linear(rows, out, width, dtype)


@gpu
@pytest.mark.parametrize(
    ("rows", "out", "width"),
    [(33, 3584, 18_944), (64, 8001, 200), (50, 4608, 3584), (65, 1152, 896), (256, 896, 896), (130, 2001, 2048)],
)
def test_linear_of_more_rows(rows, out, width):
    check_linear(rows, out, width, torch.bfloat16)


def check_linear(rows: int, out: int, width: int, dtype: torch.dtype) -> None:
    from common.kernels import linear, linear_choice  # noqa: PLC0415

    x, weight = (torch.randn(n, width, device="cuda", dtype=dtype) for n in (rows, out))
    bias = torch.randn(out, device="cuda", dtype=dtype)
    with linear_choice.forgotten():
        assert linear_choice.wanted(x, weight)
        assert rows == 1 or not linear_choice.wanted(x.float(), weight.float())
    want, limit = x.double() @ weight.double().t(), TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    for _ in range(2):  # the counters are as they were before
        assert relative_error(linear.linear(x, weight), want) < limit
    assert relative_error(linear.linear(x, weight, bias), want + bias) < limit
    assert relative_error(linear.linear(x, weight, bias, torch.float32), want + bias) < 3e-4  # and not a 16-bit float


@gpu
@pytest.mark.parametrize("rows", [[0], [3, -1, 0, 2], [1, 2, -1, -1]])
def test_plan_is_the_plain_form_s(rows, monkeypatch):
    from common.attention import sequence_table  # noqa: PLC0415

    device = torch.device("cuda")
    table = sequence_table.SequenceTable(4, 300, 16, device)
    table.page_table.copy_(torch.randint(0, 10_000, (4, 300)))
    table.last_token.copy_(torch.randint(0, 1000, (4,)))
    rows = torch.tensor(rows, device=device)
    positions = torch.tensor([4799, 0, 15, 16], device=device)[: len(rows)]
    got = table.decode_on_device(rows, positions * (rows >= 0), 300)
    monkeypatch.setattr(sequence_table, "fused", None)
    want = table.decode_on_device(rows, positions, 300)
    assert torch.equal(got.input_ids, want.input_ids)
    assert torch.equal(got.meta.slot_mapping, want.meta.slot_mapping)
    assert torch.equal(got.meta.context_lens, want.meta.context_lens)
    for b, length in enumerate(want.meta.context_lens.tolist()):
        if rows[b] >= 0:
            pages = -(-length // 16)
            assert torch.equal(got.meta.page_table[b, :pages], want.meta.page_table[b, :pages])


SETTINGS = [
    {"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.8}, {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1}, {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
]  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [151_936, 1000])
@pytest.mark.parametrize("mixed", [False, True])
def test_sampling_draws_the_tokens_of_the_plain_form(dtype, vocab, mixed):
    """The same random numbers give the same tokens; a draw that falls on a border may go to a neighbour."""
    from common.sampling.batch import SamplingBatch, SamplingRow  # noqa: PLC0415
    from common.sampling.params import SamplingParams  # noqa: PLC0415
    from common.sampling.sampler import _sample, sample  # noqa: PLC0415

    torch.manual_seed(0)
    logits = (torch.randn(64, vocab, device="cuda") * 3).to(dtype)
    groups = [SETTINGS * 8] if mixed else [[one] * 64 for one in SETTINGS]
    for settings in groups:
        params = [SamplingParams(**one) for one in settings]
        batch = SamplingBatch([SamplingRow(p, seed, [], []) for seed, p in enumerate(params)])
        got = sample(logits, batch).tokens
        want, _ = _sample(logits.float(), batch)
        assert (got == want).sum() >= 62, settings[0]
        kept = logits.float().gather(1, got.unsqueeze(1))
        for i, p in enumerate(params):  # and every token is one that may be drawn
            if p.top_k > 0:
                assert (logits[i].float() > kept[i]).sum() < p.top_k
            if p.greedy:
                assert got[i] == logits[i].argmax()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [50, 5000])
def test_bad_rows_are_marked_as_on_a_cpu(dtype, vocab):
    """Every kind of bad row and every way to draw in one batch, each beside a good row, and all alone in a greedy batch."""
    from common.sampling.params import SamplingParams  # noqa: PLC0415
    from common.sampling.sampler import Drawn, sample  # noqa: PLC0415
    from tests.common.sampling.rows import row  # noqa: PLC0415
    from tests.common.sampling.test_bad_rows import BAD, GOOD, WAYS  # noqa: PLC0415

    ways = [SamplingParams(**way) for way in WAYS.values()]
    ends = [(logits, mark) for logits, mark in BAD.values()]
    logits = torch.tensor([one for bad, _ in ends for one in (bad, GOOD)] * len(ways))
    filler = torch.full((len(logits), vocab - logits.shape[1]), -torch.inf)
    filler[:, : filler.shape[1] // 2] = logits[:, -1:]
    logits = torch.cat((filler, logits), dim=1).to(dtype)  # what is bad stands at the very end
    rows = [row(params, seed, output=[1, 3]) for params in ways for seed in range(2 * len(ends))]
    greedy = [row(SamplingParams())] * len(rows)
    for batch in (rows, greedy):
        here, there = sample(logits, batch), sample(logits.cuda(), batch)
        taken = Drawn(there).take()
        assert taken.tokens[::2] == [mark for _, mark in ends] * len(ways)
        assert min(taken.tokens[1::2]) >= 0
        assert there.tokens.min() >= 0
        assert there.tokens.max() < vocab
        assert sum(a == b for a, b in zip(taken.tokens, Drawn(here).take().tokens, strict=True)) >= len(rows) - 2


@gpu
@pytest.mark.parametrize("seed", range(10))
def test_edits_and_log_probabilities_are_those_of_a_cpu(seed):
    from common.sampling.batch import SamplingBatch  # noqa: PLC0415
    from common.sampling.params import SamplingParams  # noqa: PLC0415
    from common.sampling.sampler import Drawn, sample  # noqa: PLC0415
    from tests.common.sampling.rows import random_logits, row  # noqa: PLC0415
    from tests.common.sampling.test_edits import random_params  # noqa: PLC0415

    rng, vocab = random.Random(seed), 14
    outputs = [[rng.randrange(vocab) for _ in range(i)] for i in range(8)]
    params = [
        replace(random_params(rng, vocab), logprobs=rng.random() < 0.5) if i % 2 else SamplingParams()
        for i in range(len(outputs))
    ]
    rows = [replace(row(p, i, end_ids={2, 5}), output_ids=outputs[i]) for i, p in enumerate(params)]
    here, there = SamplingBatch(rows), SamplingBatch(rows)
    for step in range(4):
        logits = random_logits(len(rows), vocab, seed=step)
        torch.testing.assert_close(there.edited(logits.cuda()).cpu(), here.edited(logits))
        got, want = Drawn(sample(logits.cuda(), there)).take(), Drawn(sample(logits, here)).take()
        assert got.tokens == want.tokens
        for a, b in zip(got.logprobs, want.logprobs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.rank == b.rank and abs(a.logprob - b.logprob) < 1e-5)
        here.advance()
        there.advance()
        for output in outputs:
            output.append(rng.randrange(vocab))
