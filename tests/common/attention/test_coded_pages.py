"""Attention over pages of codes is attention over the numbers that they stand for, in every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.attention.kv_cache import PagedKVCache
from common.attention.latent import LatentNativeAttention
from common.attention.torch_native import TorchNativeAttention
from tests.common.attention.garbage import garbage
from tests.common.attention.test_window import Trees
from tests.common.kernels import test_latent_attention as latent
from tests.common.kernels.test_kernels import step
from tests.common.kernels.where import DEVICE, TOLERANCE, kernel, relative_error

CODED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int4)
SCALES = [(0.25, 0.031)]  # what a layer's K and V are divided by, of fp8
STEPS = {
    "decode": ([1] * 3, [0, 17, 140]), "prefill": ([30, 1], [0, 0]), "behind a prefix": ([5, 30, 1], [40, 16, 9]),
}  # fmt: skip
coded = pytest.mark.parametrize("dtype", CODED, ids=["e4m3", "e5m2", "int8", "int4"])


def triton():
    from common.kernels.paged_attention import TritonAttention  # noqa: PLC0415

    return TritonAttention


BACKENDS = {"torch_native": lambda: TorchNativeAttention, "triton": triton}
every_backend = pytest.mark.parametrize("backend", ["torch_native", pytest.param("triton", marks=kernel)])


def in_codes(plain: PagedKVCache, dtype: torch.dtype) -> tuple[PagedKVCache, PagedKVCache]:
    """The tokens of `plain` as codes, and a cache of the numbers that these stand for."""
    shape = 1, plain.num_pages, plain.page_size, plain.k.shape[3], plain.k.shape[4]
    cache, twin = garbage(PagedKVCache(*shape, dtype, DEVICE, scales=SCALES)), PagedKVCache(*shape, device=DEVICE)
    k, v = (x[0].flatten(0, 1) for x in (plain.k, plain.v))
    known = k.isfinite().all(-1).all(-1).nonzero().squeeze(-1)
    cache.begin(known)
    cache.write(0, known, k[known], v[known])
    twin.write(0, known, *cache.read(0, known))
    return cache, twin


def check(backend, queries, cached, page_size, heads, d, dtype, compute=torch.float32, seed=0):
    plain, meta, (q, k, v) = step(queries, cached, page_size, heads, d, compute, seed, DEVICE)
    cache, twin = in_codes(plain, dtype)
    rounded = cache.rounded(0, k.float(), v.float())
    want = TorchNativeAttention(twin, meta)(0, q.float(), *rounded)
    attention = BACKENDS[backend]()(cache, meta)
    got = attention(0, q, k, v)
    assert got.dtype == compute
    assert relative_error(got, want) < TOLERANCE[compute] * (1 if compute == torch.float32 else 2)
    for have, told in zip(cache.read(0, meta.slot_mapping), rounded, strict=True):
        assert torch.equal(have, told)
    assert torch.equal(attention(0, q, k, v), got)


@coded
@every_backend
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", STEPS)
def test_every_backend_reads_what_the_codes_stand_for(name, page_size, backend, dtype):
    check(backend, *STEPS[name], page_size, (4, 2), 24, dtype)


@coded
@kernel
@pytest.mark.parametrize("name", ["decode", "behind a prefix"])
def test_in_16_bits(name, dtype):
    check("triton", *STEPS[name], 16, (4, 2), 64, dtype, next(one for one in TOLERANCE if one.itemsize == 2))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 70)), min_size=1, max_size=4), st.integers(1, 20),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.sampled_from(CODED), st.integers(0, 1000),
)  # fmt: skip
def test_any_step(lengths, page_size, kv_heads, group, half, dtype, seed):
    queries, cached = zip(*lengths, strict=True)
    check("torch_native", queries, cached, page_size, (kv_heads * group, kv_heads), 2 * half, dtype, seed=seed)


@coded
@every_backend
@pytest.mark.parametrize("rows", ["K and V", "latent"])
def test_trees(rows, backend, dtype):
    Trees([0, 9, 33], 6, latent=rows == "latent", kept=dtype).check(backend)


@coded
@every_backend
@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 5, 3]], ids=["decode", "several"])
def test_latent_rows(queries, backend, dtype):
    plain, meta, q, row, kv_b = latent.step(queries, [0, 20, 150], 16, 3, 24, 8, torch.float32)
    shape, known = (
        (1, plain.num_pages, 16, 1, 32),
        plain.k[0].flatten(0, 1).isfinite().all(-1).all(-1).nonzero().squeeze(-1),
    )
    cache = garbage(PagedKVCache(*shape, dtype, DEVICE, planes=1, scales=SCALES))
    cache.write(0, known, *plain.read(0, known))
    twin = PagedKVCache(*shape, device=DEVICE, planes=1)
    twin.write(0, known, *cache.read(0, known))
    (rounded,) = cache.rounded(0, row.unsqueeze(1))
    want = LatentNativeAttention(twin, meta)(0, q, rounded.squeeze(1), kv_b, 0.2)
    attention = LatentNativeAttention
    if backend == "triton":
        from common.kernels.latent_attention import TritonLatentAttention as attention  # noqa: PLC0415
    assert relative_error(attention(cache, meta)(0, q, row, kv_b, 0.2), want) < 2 * TOLERANCE[torch.float32]
    assert torch.equal(cache.read(0, meta.slot_mapping)[0], rounded)
