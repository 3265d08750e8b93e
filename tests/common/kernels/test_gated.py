"""Gate, up and SiLU by one launch, against float64; on a CPU in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from common.kernels.quantized_layout import pack
from common.layers.activation import silu_and_mul
from common.quantization.codes import Codes
from common.quantization.gpu_methods import WeightOnlyKernels
from tests.common.kernels.test_quantized_linear import MATRICES
from tests.common.kernels.where import DEVICE, GPU, kernel, relative_error

pytestmark = kernel
SUMS = 3e-4 if GPU else 2e-6  # how far float32 is from float64 in a kernel; a tensor core keeps fewer bits
HALVES = (torch.bfloat16, torch.float16) if GPU else (torch.float16,)  # the interpreter does not multiply bfloat16
SIZES = [
    (5, 40),
    (37, 1100),
    (64, 256),
]  # F, width: less than a tile; an odd number, and cut along 1100 columns; whole tiles
NOT_BY_ROW = ("4 bits, one scale a row", "E2M1")  # codes that `one_row` does not take
PLANS = [(2, 4, 4, 4), (4, 4, 4, 4), (4, 16, 2, 8)]


def inputs(rows: int, out: int, width: int, dtype: torch.dtype, biased: bool):
    """x, the matrix of gate and up, their bias or None, and silu(gate) * up in float64."""
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=random).to(DEVICE, dtype)
        for shape in ((rows, width), (2 * out, width), (2 * out,))
    )
    weight /= width**0.5  # so that silu is neither 0 nor its argument
    want = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    return x, weight, bias if biased else None, silu_and_mul(want)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "width"), SIZES)
def test_of_one_row(out, width, dtype, biased):
    from common.kernels import linear  # noqa: PLC0415

    x, weight, bias, want = inputs(1, out, width, dtype, biased)
    got = linear.linear(x, weight, bias, gated=True)
    assert got.dtype == dtype
    assert got.shape == want.shape
    rounding = 1.01 * relative_error(want.to(dtype), want) + 2e-6
    cuts_off = not GPU and dtype == torch.bfloat16  # the interpreter does not round to it
    assert relative_error(got, want) < (2**-7 if cuts_off else rounding)
    assert relative_error(linear.linear(x, weight, bias, torch.float32, gated=True), want) < 2e-6


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "out", "width"),
    [(rows, *size) for size in SIZES for rows in (1, 2, 3, 16, 17, 64)] + [(rows, 4001, 32) for rows in (64, 70)],
)
def test_of_few_rows(rows, out, width, dtype, biased):
    """Rounded once, at the end: as near as float64 rounded."""
    from common.kernels import linear  # noqa: PLC0415

    x, weight, bias, want = inputs(rows, out, width, dtype, biased)
    for _ in range(2):  # the counters are as they were before
        got = linear.few_rows(x, weight, bias, gated=True)
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert relative_error(got, want) < 1.01 * relative_error(want.to(dtype), want) + SUMS


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_of_one_row_and_codes(name, plan):
    from common.kernels import quantized_row  # noqa: PLC0415

    matrix = replace(MATRICES[name], out=MATRICES[name].out // 2 * 2)
    codes = matrix.codes()
    packed = pack(Codes(*(None if x is None else x.to(DEVICE) for x in codes)), matrix.bits)
    random = torch.Generator().manual_seed(1)
    x, bias = (
        torch.randn(shape, generator=random).to(DEVICE, HALVES[0]) for shape in ((1, matrix.width), (matrix.out,))
    )
    ordered = packed.ordered(x)
    if not quantized_row.takes(ordered, packed):
        assert name in NOT_BY_ROW
        return
    small = (x / 64).contiguous()  # so that silu is not its argument
    product = small.double() @ codes.dequantise(torch.float64).to(DEVICE).t()
    first = (list(MATRICES).index(name) + PLANS.index(plan)) % 2
    for each in (bias, None)[first : first + 1] if GPU else (bias, None):  # a GPU has both compiled
        want = silu_and_mul(product if each is None else product + each)
        got = quantized_row.one_row(packed.ordered(small), packed, each, quantized_row.Work(*plan), gated=True)
        assert got.dtype == x.dtype
        assert got.shape == want.shape
        assert relative_error(got, want) < 1.5 * relative_error(want.to(x.dtype), want)
    method = WeightOnlyKernels()
    method.packed = packed
    want = silu_and_mul(product + bias)
    assert relative_error(method.gated(None, small, bias), want) < 1.5 * relative_error(want.to(x.dtype), want)
    assert method.gated(None, small.repeat(2, 1), bias) is None


def test_the_plans_of_codes_have_gate_and_up_in_pairs():
    from common.kernels import quantized_row  # noqa: PLC0415

    for name, matrix in MATRICES.items():
        for out in (matrix.out, quantized_row.WIDE):
            packed = replace(pack(matrix.codes(), matrix.bits), out=out)
            assert quantized_row.work(packed).deep % 2 == 0, name
