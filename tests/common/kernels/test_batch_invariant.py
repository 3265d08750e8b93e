"""The kernels of enable_deterministic_inference: right, and with the same bits in any company."""

import pytest
import torch
import torch.nn.functional as F

from common.attention.torch_native import TorchNativeAttention
from common.sampling.logprobs import log_softmax
from tests.common.attention.test_batch_invariant import HKV, HQ, D
from tests.common.kernels.where import DEVICE, GPU, TOLERANCE, gpu, kernel, relative_error

pytestmark = kernel


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_of_a_product(dtype):
    from common.kernels.linear import fixed_linear  # noqa: PLC0415

    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=rng).to(DEVICE, dtype) for shape in ((70, 130), (67, 130), (67,)))
    # the interpreter multiplies by a library, to which the tile and the place in it may matter; to tensor cores they do not
    whole = fixed_linear(x, weight, bias, one_tile=not GPU)
    want = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(whole, want) < TOLERANCE[dtype]
    elsewhere = (slice(3, 20), slice(69, 70), slice(5, 70)) if GPU else ()
    for rows in (slice(0, 1), slice(0, 20), slice(64, 70), *elsewhere):
        assert torch.equal(fixed_linear(x[rows], weight, bias, one_tile=not GPU), whole[rows])
    assert torch.equal(fixed_linear(x[:9], weight, None, not GPU), fixed_linear(x, weight, None, not GPU)[:9])


@pytest.mark.parametrize("rows", [1, 20, 40, 80, 130, 300])
@pytest.mark.parametrize(("out", "width"), [(67, 130), (300, 128)])
@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if dtype != torch.float32])
def test_every_tile(rows, out, width, dtype, monkeypatch):
    """On a GPU they give the same bits; a small chip has the large tiles early."""
    from common.kernels import linear  # noqa: PLC0415

    x, weight = (torch.randn(n, width).to(DEVICE, dtype) for n in (rows, out))
    bias, want = torch.randn(out).to(DEVICE, dtype), linear.fixed_linear(x, weight, one_tile=True)
    tiles = {linear.fixed_tile(n, out, processors) for n in (1, 20, 40, 80, 130, 300) for processors in (1, 2, 132)}
    assert len(tiles) > 4
    for tile in tiles:
        monkeypatch.setattr(linear, "fixed_tile", lambda *_, tile=tile: tile)
        got = linear.fixed_linear(x, weight)
        assert torch.equal(got, want) if GPU else relative_error(got, want) < TOLERANCE[dtype]
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert relative_error(linear.fixed_linear(x, weight, bias), exact) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize(("out", "width"), [(1024, 3072), (6144, 1024), (4608, 3584), (3584, 18944), (151_936, 1024)])
def test_rows_of_any_number_have_the_bits_of_one_tile(out, width):
    from common.kernels.linear import fixed_linear  # noqa: PLC0415
    from common.layers.batch_invariant import tiles_agree  # noqa: PLC0415

    weight = torch.randn(out, width, dtype=torch.bfloat16, device=DEVICE)
    assert tiles_agree(weight)
    most = 5000 if out < 100_000 else 500
    x = torch.randn(most, width, dtype=torch.bfloat16, device=DEVICE)
    want = fixed_linear(x, weight, one_tile=True)
    for rows in (1, 7, 16, 17, 64, 65, 200, 256, 257, 1000, 2048, 2500, 5000):
        assert rows > most or torch.equal(fixed_linear(x[:rows], weight), want[:rows])


@gpu
def test_rows_further_apart_than_32_bits_count():
    from common.kernels.linear import fixed_linear  # noqa: PLC0415

    x = torch.empty((1 << 31) + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 64), (1 << 30, 1))
    x.normal_()
    weight = torch.randn(64, 64, dtype=torch.float16, device=DEVICE)
    assert torch.equal(fixed_linear(x, weight), fixed_linear(x.contiguous(), weight))


@gpu
@pytest.mark.parametrize("vocab", [2048, 2049, 151_935])
def test_log_probabilities_of_a_row_anywhere(vocab):
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert all(torch.equal(one, log_softmax(row[None])[0]) for one in log_softmax(row.repeat(9, 1)))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_in_any_step(dtype):
    from common.kernels.paged_attention import BatchInvariantTritonAttention  # noqa: PLC0415

    n, beside = 70, 3
    got = steps(BatchInvariantTritonAttention, dtype, [[(0, n)]], n, beside)
    for order in ([[(0, 66)], [(66, 1)], [(67, 3)]], [[(0, 1)], [(1, 40)], [(41, 29)]]):
        assert torch.equal(steps(BatchInvariantTritonAttention, dtype, order, n, beside), got)
        assert torch.equal(steps(BatchInvariantTritonAttention, dtype, order, n, 0), got)
    if dtype == torch.float32:
        want = steps(TorchNativeAttention, dtype, [[(0, n)]], n, beside)
        assert relative_error(got, want) < 5e-6


def steps(attention, dtype, order, n, beside):
    """o [n, Hq, d] of a sequence whose tokens come as `order` says, with others of `beside` tokens in each step, if any."""
    from common.attention.contract import AttentionMetadata  # noqa: PLC0415
    from common.attention.kv_cache import PagedKVCache  # noqa: PLC0415

    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n + 3, heads, D, generator=rng).to(DEVICE, dtype) for heads in (HQ, HKV, HKV))
    cache, out = PagedKVCache(1, 2 * n, 4, HKV, D, dtype=dtype, device=DEVICE), []
    pages = -(-n // 4)
    table = torch.stack((torch.arange(pages), torch.arange(pages, 2 * pages)))
    for [(first, new)] in order:
        rows = torch.cat((torch.arange(first, first + new), torch.arange(n, n + beside)))
        slots = torch.cat((torch.arange(first, first + new), pages * 4 + torch.arange(beside)))
        sequences = 1 + (beside > 0)
        meta = AttentionMetadata(
            slots.to(DEVICE), table[:sequences].to(DEVICE), torch.tensor([0, new, new + beside][: sequences + 1], device=DEVICE),
            torch.tensor([first + new, beside][:sequences], device=DEVICE), 4, max(new, beside),
        )  # fmt: skip
        out.append(attention(cache, meta)(0, q[rows], k[rows], v[rows])[:new])
    return torch.cat(out)
