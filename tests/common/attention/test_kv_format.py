"""How numbers become codes in a page, and come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.attention.kv_cache import PagedKVCache
from common.attention.kv_format import KV_DTYPES, kv_dtype, kv_format, kv_name, row_bytes, wire_dtype

CODED = {name: KV_DTYPES[name] for name in ("fp8_e4m3", "fp8_e5m2", "int8", "int4")}
coded = pytest.mark.parametrize("dtype", CODED.values(), ids=CODED)
ONE = torch.ones(())


def there_and_back(x: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    form = kv_format(dtype)
    return form.decode(form.encode(x, torch.tensor(scale)), torch.tensor(scale))


def test_int4_by_hand():
    """Largest 7, so the scale is 1; nibble = number + 8, the even one low: (7, -7) -> 15 + 16 * 1, (0, 3) -> 8 + 16 * 11."""
    codes, scale = kv_format(torch.int4).encode(torch.tensor([[7.0, -7.0, 0.4, 2.6]]), ONE)
    assert (codes.tolist(), scale.tolist()) == ([[0x1F, 0xB8]], [1.0])
    assert there_and_back(torch.tensor([[7.0, -7.0, 0.4, 2.6]]), torch.int4).tolist() == [[7.0, -7.0, 0.0, 3.0]]


def test_fp8_by_hand():
    """1.0 is 0x38 in e4m3 (exponent 7, bias 7) and 0x3C in e5m2 (exponent 15); 0.5 / 0.25 = 2, 300 / 0.25 is too much."""
    x, scale = torch.tensor([0.25, 0.5, 300.0, -300.0]), torch.tensor(0.25)
    assert kv_format(torch.float8_e4m3fn).encode(x, scale)[0].tolist() == [0x38, 0x40, 0x7E, 0xFE]
    assert kv_format(torch.float8_e5m2).encode(x[:2], scale)[0].tolist() == [0x3C, 0x40]
    assert there_and_back(x, torch.float8_e4m3fn, 0.25).tolist() == [0.25, 0.5, 112.0, -112.0], "448 * 0.25"


numbers = arrays("float32", (3, 8), elements=st.floats(-(2.0**18), 2.0**18, width=32, allow_subnormal=False))


@given(numbers, st.sampled_from(["int8", "int4"]))
def test_an_integer_code_is_half_a_scale_off_at_most(x, name):
    x, form = torch.from_numpy(x), kv_format(CODED[name])
    _, scales = form.encode(x, ONE)
    # a scale below 2^-14 has fewer bits in float16; half a unit of it, times the code, comes on top
    slack = form.most * (scales.float() * 2.0**-11).clamp(min=2.0**-25)
    assert ((there_and_back(x, CODED[name]) - x).abs().amax(-1) <= scales.float() / 2 + slack).all()


@given(numbers, st.sampled_from([0.01, 1.0, 37.0]), st.sampled_from(["fp8_e4m3", "fp8_e5m2"]))
def test_an_fp8_code_is_a_share_of_the_number_off_at_most(x, scale, name):
    dtype = CODED[name]
    x, bits, least = torch.from_numpy(x), {"fp8_e4m3": 3, "fp8_e5m2": 2}[name], torch.finfo(dtype).smallest_normal
    inside = x.clamp(-torch.finfo(dtype).max * scale, torch.finfo(dtype).max * scale)
    bound = inside.abs().clamp(min=least * scale) * 2.0 ** -(bits + 1) * 1.0001
    assert ((there_and_back(x, dtype, scale) - inside).abs() <= bound).all()


@given(numbers, st.sampled_from([0.01, 1.0, 37.0]), st.sampled_from(list(CODED)))
def test_what_came_back_goes_and_comes_back_as_it_is(x, scale, name):
    """Or a token that is read, passed on and stored again would wander."""
    once = there_and_back(torch.from_numpy(x), CODED[name], scale)
    assert torch.equal(there_and_back(once, CODED[name], scale), once)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4])
def test_nan_stays_visible_and_stays_in_its_row(dtype):
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    back = there_and_back(x, dtype)
    assert back[1].isnan().all()
    assert torch.allclose(back[[0, 2]], x[[0, 2]], rtol=2**-11)


@pytest.mark.parametrize(
    ("name", "size"), [("float32", 256), ("bf16", 128), ("fp8_e5m2", 64), ("int8", 66), ("int4", 34)]
)
def test_bytes_of_a_head_are_those_of_the_tensors(name, size):
    dtype = kv_dtype(name)
    assert row_bytes(dtype, 64) == size
    cache = PagedKVCache(3, 5, 16, 2, 64, dtype)
    assert cache.nbytes == 5 * PagedKVCache.bytes_per_page(3, 16, 2, 64, dtype) == 5 * 3 * 2 * 16 * 2 * size


def test_names():
    assert [kv_name(dtype) for dtype in KV_DTYPES.values()] == list(KV_DTYPES)
    assert (kv_dtype("auto"), kv_dtype("half"), kv_dtype("fp8")) == (None, torch.float16, torch.float8_e4m3fn)
    assert wire_dtype(torch.int8, torch.bfloat16) == torch.bfloat16
    assert wire_dtype(torch.float16, torch.float32) == torch.float16
    with pytest.raises(ValueError, match="kv_cache_dtype='int3' is unknown; use auto, float32"):
        kv_dtype("int3")
    with pytest.raises(ValueError, match="int4 packs two numbers in a byte, and a row has 7 here; use int8"):
        row_bytes(torch.int4, 7)
    with pytest.raises(ValueError, match=r"pages of torch\.int64 are not known here"):
        kv_format(torch.int64)


@coded
def test_what_moves_pages_moves_their_scales(dtype):
    cache = PagedKVCache(2, 6, 4, 2, 8, dtype, scales=[(0.5, 0.25), (1.0, 2.0)])
    k, v = torch.randn(2, 24, 2, 8)
    slots = torch.arange(24)
    for layer in range(2):
        cache.write(layer, slots, k, v)
    before = [cache.read(layer, slots) for layer in range(2)]
    cache.move(torch.tensor([5, 6]), torch.tensor([6, 1]))
    now = slots.clone()
    now[[6, 1]] = torch.tensor([5, 6])
    for layer in range(2):
        for x, y in zip(cache.read(layer, slots), before[layer], strict=True):
            assert torch.equal(x, y[now])
    halves = cache.halves_of(torch.tensor([1, 0]))
    gathered = cache.gather(1, halves)
    assert torch.equal(gathered, torch.stack(cache.read(1, torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))))
    room = cache.room(4)
    cache.gather_into(room, 1, halves)
    assert torch.equal(room.unflatten(0, (2, 2)).flatten(1, 2), gathered)
    other = PagedKVCache(2, 6, 4, 2, 8, dtype, scales=cache.scales)
    for here, there in zip(other.tensors, cache.tensors, strict=True):  # as transports and tiers do
        here.index_copy_(2, torch.tensor([5]), there.index_select(2, torch.tensor([1])))
    assert torch.equal(other.read(1, torch.arange(20, 24))[0], cache.read(1, torch.arange(4, 8))[0])
    cache.blank(torch.tensor([1]))
    assert not cache.read(1, torch.arange(4, 8))[0].any()
    cache.release()
    assert all(x.untyped_storage().nbytes() == 0 for x in cache.tensors)
    cache.resume()
    assert not any(x.any() for x in cache.tensors)


def test_a_fingerprint_tells_pages_apart_that_mean_something_else():
    told = [PagedKVCache(2, 1, 1, 1, 2, *one).fingerprint() for one in (
        (torch.float8_e4m3fn,), (torch.float8_e4m3fn, "cpu", 2, [(1.0, 1.0), (1.0, 0.5)]), (torch.float8_e5m2,), (torch.int8,),
    )]  # fmt: skip
    assert len(set(told)) == 4
    assert told[3] == PagedKVCache(2, 1, 1, 1, 2, torch.int8, scales=[(0.5, 1.0)] * 2).fingerprint() == "int8"
