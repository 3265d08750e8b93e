"""The Triton kernels against their plain-PyTorch twin. Needs an NVIDIA GPU; skipped elsewhere."""

import random
from dataclasses import replace

import pytest
import torch

from common.attention_backends import pick_attention
from common.kv_cache import PagedKVCache
from common.paged_attention import AttentionMetadata, TorchNativeAttention

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def step(queries, cached, page_size, heads=(14, 2), d=64, dtype=torch.float32, seed=0):
    """A ragged step on shuffled pages of a cache full of noise, its free slots full of NaN."""
    random.seed(seed)
    torch.manual_seed(seed)
    lens = [n + c for n, c in zip(queries, cached, strict=True)]
    pages = [-(-n // page_size) for n in lens]
    ids = torch.randperm(sum(pages) + 3).tolist()
    cache = PagedKVCache(1, len(ids), page_size, heads[1], d, dtype, "cuda")
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
    cache.k[0].flatten(0, 1)[old] = torch.randn(len(old), heads[1], d, dtype=dtype, device="cuda")
    cache.v[0].flatten(0, 1)[old] = torch.randn(len(old), heads[1], d, dtype=dtype, device="cuda")
    starts = torch.tensor([0, *queries]).cumsum(0)
    on_gpu = [torch.as_tensor(x, device="cuda") for x in (slots, table, starts, lens)]
    meta = AttentionMetadata(*on_gpu, page_size, max(queries))
    qkv = [torch.randn(len(slots), h, d, dtype=dtype, device="cuda") for h in (heads[0], heads[1], heads[1])]
    return cache, meta, qkv


STEPS = {
    "decode": ([1] * 5, [0, 3, 17, 200, 1500]),
    "one long decode": ([1], [5000]),
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
    twin.k.copy_(cache.k)
    twin.v.copy_(cache.v)
    expected = TorchNativeAttention(twin, meta)(0, *(x.float() for x in qkv))
    o = pick_attention(torch.device("cuda"), "triton")(cache, meta)(0, *qkv)
    error = (o.float() - expected).norm() / expected.norm()
    assert error < tolerance
    written = meta.slot_mapping
    assert torch.equal(cache.k[0].flatten(0, 1)[written], qkv[1])
    assert torch.equal(cache.v[0].flatten(0, 1)[written], qkv[2])


@gpu
def test_padding_tokens_are_stored_nowhere():
    cache, meta, qkv = step(*STEPS["decode"], 16)
    before = cache.k.clone()
    meta = replace(meta, slot_mapping=torch.full_like(meta.slot_mapping, -1))
    pick_attention(torch.device("cuda"), "triton")(cache, meta)(0, *qkv)
    assert torch.equal(cache.k.nan_to_num(7.0), before.nan_to_num(7.0))


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="attention_backend='flash' is unknown; use auto, torch_native, triton"):
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
def test_fused_silu_and_rotary(dtype):
    from common.kernels import fused  # noqa: PLC0415

    x = torch.randn(37, 2 * 4864, device="cuda", dtype=dtype)
    gate, up = x.float().chunk(2, dim=-1)
    assert relative_error(fused.silu_and_mul(x), torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]
    qkv = torch.randn(37, 18, 64, device="cuda", dtype=dtype)
    q = qkv[:, :14]  # rows lie apart, as after the split of qkv
    cos, sin = (torch.randn(37, 1, 64, device="cuda", dtype=dtype) for _ in range(2))
    expected = q.float() * cos.float() + q.float().roll(32, dims=-1) * sin.float()
    assert relative_error(fused.rotary(q, cos, sin), expected) < TOLERANCE[dtype]
