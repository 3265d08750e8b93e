"""Queries and rows on their way to latent pages: the kernels against the layer's plain PyTorch."""

import pytest
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.kv_format import KV_DTYPES
from common.attention.latent import LatentNativeAttention
from common.layers.mla import LatentAttention, LatentTurning
from common.layers.norm import RMSNorm
from common.layers.rotary import RotaryEmbedding
from common.models.config import ModelConfig
from common.parallel_state import TPGroup
from tests.common.in_memory import InMemory
from tests.common.kernels.test_latent_attention import step
from tests.common.kernels.where import DEVICE, GPU, TOLERANCE, kernel, relative_error
from tests.oracle import DEEPSEEK, YARN

pytestmark = kernel
every_order = pytest.mark.parametrize("interleaved", [True, False])
SIZES = [(5, 12, 37, 6), (1, 3, 16, 2), (9, 8, 24, 64)]  # heads, dn, c, r


def turning_of(tokens, c, r, interleaved, dtype):
    """Positions far apart, angles of yarn, whose mscale lengthens cos and sin, and a norm with weights of its own."""
    scaling = {**YARN, "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    embedding = RotaryEmbedding(r, 64, 1e4, scaling).to(DEVICE)
    norm = RMSNorm(c, 1e-3)
    norm.load_weight(InMemory(torch.rand(c) + 0.5))
    norm.weight.data = norm.weight.data.to(dtype)
    norm = norm.to(DEVICE)
    norm.root_weight = norm.root_weight.to(DEVICE)
    positions = (torch.arange(tokens) * 13 + 5) % 64
    cos, sin = embedding.cos[positions.to(DEVICE)], embedding.sin[positions.to(DEVICE)]
    rotary = torch.cat((cos, cos), -1).unsqueeze(1).to(dtype), torch.cat((-sin, sin), -1).unsqueeze(1).to(dtype)
    return LatentTurning(rotary, norm, interleaved)


def plain(turning, q, row):
    """What a CPU computes, wherever this runs."""
    norm = RMSNorm(len(turning.norm.weight), turning.norm.eps)
    norm.load_weight(InMemory(turning.norm.weight.float().cpu()))
    on_cpu = turning._replace(rotary=tuple(x.cpu() for x in turning.rotary), norm=norm)
    return (x.to(DEVICE) for x in on_cpu(q.cpu(), row.cpu()))


@every_order
@pytest.mark.parametrize(("heads", "dn", "c", "r"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_s_queries_and_rows_are_turned_as_the_layer_turns_them(dtype, heads, dn, c, r, interleaved):
    from common.kernels.latent_rows import turn  # noqa: PLC0415

    torch.manual_seed(0)
    q, row = torch.randn(4, heads + 1, dn + r).to(DEVICE, dtype)[:, 1:], torch.randn(4, c + r).to(DEVICE, dtype)
    turning = turning_of(4, c, r, interleaved, dtype)
    (got_q, got_row), (want_q, want_row) = turn(q, row, turning), plain(turning, q, row)
    assert relative_error(got_q, want_q) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert relative_error(got_row, want_row) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(got_q[..., :dn], q[..., :dn])
    if dtype == torch.float32 and not GPU:  # there, as in addcmul, the last product and the sum are rounded once
        x, (cos, sin) = q[..., dn:], turning.rotary
        x = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1) if interleaved else x
        assert torch.equal(got_q[..., dn:], x.roll(r // 2, dims=-1) * sin + x * cos)


@every_order
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("cached", "heads", "c", "r"),
    [([0, -1, 70], 3, 37, 6), ([5, 9, 150, -1, 0, 33], 2, 70, 16)],
    ids=["few sequences", "more than merge their own parts"],
)
def test_a_decode_step_turns_norms_and_stores_as_the_layer_does(cached, heads, c, r, dtype, interleaved):
    from common.kernels.latent_attention import FEW, TritonLatentAttention  # noqa: PLC0415

    assert (len(cached) > FEW) == (len(cached) == 6)
    cache, meta, q, row, kv_b = step([1] * len(cached), cached, 4, heads, c, r, dtype)
    turning, twin = turning_of(len(cached), c, r, interleaved, dtype), PagedKVCache(
        1, cache.num_pages, 4, 1, c + r, torch.float64, DEVICE, planes=1
    )  # fmt: skip
    twin.kv.copy_(cache.kv)
    turned = tuple(plain(turning, q, row))
    want = LatentNativeAttention(twin, meta)(0, *(x.double() for x in turned), kv_b.double(), 0.3)
    attention, real = TritonLatentAttention(cache, meta), meta.slot_mapping >= 0
    assert attention.turns
    got = attention(0, q, row, kv_b, 0.3, turning)
    assert relative_error(got[real], want[real]) < 3 * TOLERANCE[dtype]  # the norm and the turn more
    assert not got[~real].any()
    stored = cache.read(0, meta.slot_mapping[real])[0].squeeze(1)
    assert relative_error(stored, turned[1][real]) < TOLERANCE[dtype]
    assert torch.equal(cache.kv.isnan(), twin.kv.isnan())  # nothing else was written


@pytest.mark.parametrize("kept", ["int8", "int4", "fp8_e4m3"])
def test_rows_are_stored_as_codes(kept):
    from common.kernels.latent_rows import absorb  # noqa: PLC0415

    _, _, q, row, kv_b = step([1, 1, 1], [3, 3, 3], 4, 2, 24, 8, torch.float32)
    cache, twin = (
        PagedKVCache(1, 2, 4, 1, 32, KV_DTYPES[kept], DEVICE, planes=1, scales=[(0.25, 1.0)]) for _ in range(2)
    )
    turning, slots = turning_of(3, 24, 8, True, torch.float32), torch.tensor([6, -1, 1], device=DEVICE)
    absorb(q, row, kv_b, cache.layer(0), cache.format, slots, turning)
    twin.write(0, slots[[0, 2]], tuple(plain(turning, q, row))[1][[0, 2]].unsqueeze(1))
    (got,), (want,) = (x.read(0, torch.arange(8, device=DEVICE)) for x in (cache, twin))
    step_size = want.abs().max() / 8  # of int4, or of e4m3 near the largest number
    assert (got - want).abs().max() <= step_size * 1.01  # a number that lies between two codes may become either
    assert ((got - want).abs() < 1e-6).float().mean() > 0.97


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (2, 3), (3, 4)])
@pytest.mark.parametrize("kind", ["V2", "V3"])
@torch.no_grad()
def test_a_layer_with_its_kernels_is_the_layer(kind, rank, size):
    """7 heads, some of them zeros on the last ranks."""
    from transformers import DeepseekV2Config, DeepseekV3Config  # noqa: PLC0415

    from common.kernels.latent_attention import TritonLatentAttention  # noqa: PLC0415

    raw = (DeepseekV2Config if kind == "V2" else DeepseekV3Config)(**DEEPSEEK, q_lora_rank=20, rope_parameters=YARN)
    config = ModelConfig.from_dict({**raw.to_dict(), "architectures": [f"Deepseek{kind}ForCausalLM"]})
    torch.manual_seed(0)
    block = LatentAttention(config.hidden_size, config.num_heads, config.latent, TPGroup(rank, size), 0, 0,
                            reduce_results=False)  # fmt: skip
    for param in block.parameters():
        shape = param.shard_shapes[None]
        param.weight_loader(InMemory(torch.rand(shape) + 0.5 if len(shape) == 1 else torch.randn(shape) * 0.3), None)
    latent = config.latent
    x, rotary = (
        torch.randn(3, config.hidden_size),
        RotaryEmbedding(**config.rotary)(torch.tensor([20, 0, 7]), torch.float32),
    )
    cache, meta, *_ = step([1, 1, 1], [20, 0, 7], 4, 1, latent.kv_rank, latent.rope_dim, torch.float32)
    twin = PagedKVCache(1, cache.num_pages, 4, 1, latent.row, planes=1)
    twin.kv.copy_(cache.kv.cpu())
    on_cpu = type(meta)(
        *(x.cpu() for x in (meta.slot_mapping, meta.page_table, meta.query_start, meta.context_lens)), 4, 1
    )
    want = block(x, rotary, LatentNativeAttention(twin, on_cpu))
    block.to(DEVICE)
    got = block(x.to(DEVICE), tuple(x.to(DEVICE) for x in rotary), TritonLatentAttention(cache, meta))
    assert relative_error(got.cpu(), want) < 1e-5
    assert relative_error(cache.kv.nan_to_num().cpu(), twin.kv.nan_to_num()) < 1e-6


@pytest.mark.parametrize(("out", "more", "width"), [(50, 7, 33), (1030, 3, 1500), (1, 1, 8)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_projections_of_one_row_are_one_launch(dtype, out, more, width):
    from common.kernels.linear import one_row  # noqa: PLC0415

    torch.manual_seed(0)
    x, one, other = (torch.randn(n, width).to(DEVICE, dtype) for n in (1, out, more))
    y = one_row(x, one, second=other)
    assert relative_error(y, x.double() @ torch.cat((one, other)).double().T) < TOLERANCE[dtype]
