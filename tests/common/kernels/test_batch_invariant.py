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
    whole = fixed_linear(x, weight, bias)
    want = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(whole, want) < TOLERANCE[dtype]
    # the interpreter multiplies by a library, to which the place in a tile of 64 rows may matter; to tensor cores it does not
    elsewhere = (slice(3, 20), slice(69, 70), slice(5, 70)) if GPU else ()
    for rows in (slice(0, 1), slice(0, 20), slice(64, 70), *elsewhere):
        assert torch.equal(fixed_linear(x[rows], weight, bias), whole[rows])
    assert torch.equal(fixed_linear(x[:9], weight), fixed_linear(x, weight)[:9])


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
