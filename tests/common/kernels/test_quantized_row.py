"""One row of x by codes, on the ordinary cores; on a CPU in Triton's interpreter."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.kernels.quantized_layout import TURN, pack
from common.layers.activation import silu_and_mul
from common.quantization.codes import Codes
from common.quantization.gpu_methods import RoundedActivations
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Activations, Scheme
from tests.common.kernels.test_quantized_linear import MATRICES
from tests.common.kernels.where import DEVICE, GPU, TOLERANCE, kernel, relative_error

pytestmark = kernel
ROOT = Path(__file__).resolve().parents[3]
PLANS = [(1, 1, 8, 1), (2, 4, 4, 4), (4, 4, 4, 4), (4, 16, 2, 8), (8, 1, 4, 2), (2, 32, 1, 4)]
# A GPU has each compiled: there every second plan of a matrix, with one dtype. Each matrix and each plan meets both dtypes.
SHARES = [
    (name, plan, (torch.float16, torch.bfloat16)[(i // 2 + j // 2) % 2] if GPU else torch.float16)
    for i, name in enumerate(MATRICES)
    for j, plan in enumerate(PLANS)
    if not GPU or (i + j) % 2 == 0
]  # the interpreter rounds to bfloat16 in a way of its own


@pytest.mark.parametrize(("name", "plan", "dtype"), SHARES, ids=str)
def test_any_share_of_the_work_gives_the_numbers_of_float64(name, plan, dtype):
    from common.kernels import quantized_row  # noqa: PLC0415

    matrix, width = MATRICES[name], MATRICES[name].width
    codes = matrix.codes()
    packed = pack(Codes(*(None if x is None else x.to(DEVICE) for x in codes)), matrix.bits)
    bias = torch.randn(matrix.out, device=DEVICE)
    x = torch.randn(1, width, device=DEVICE).to(dtype)
    ordered = packed.ordered(x)
    if packed.e2m1 or packed.width % 4:
        assert not quantized_row.takes(ordered, packed)
        return
    assert quantized_row.takes(ordered, packed)
    got = quantized_row.one_row(ordered, packed, bias.to(dtype), quantized_row.Work(*plan))
    want = x.double() @ codes.dequantise(torch.float64).to(DEVICE).t() + bias.to(dtype)
    assert got.dtype == dtype
    assert relative_error(got, want) < 1.5 * relative_error(want.to(dtype), want)  # little more than its last rounding


@pytest.mark.parametrize("name", ["4 bits", "4 bits, zeros", "INT8", "FP8"])
def test_a_narrow_matrix_has_no_idle_warps(name):
    """224 columns, of a program that has some thousand of a wider one; a thread reads as much as there."""
    from common.kernels import quantized_row  # noqa: PLC0415

    matrix = dataclasses.replace(MATRICES[name], width=224)
    codes = matrix.codes()
    packed = pack(Codes(*(None if one is None else one.to(DEVICE) for one in codes)), matrix.bits)
    for out in (matrix.out, quantized_row.WIDE):
        plan = quantized_row.work(dataclasses.replace(packed, out=out))
        wider = quantized_row.work(dataclasses.replace(packed, out=out, width=4096))
        assert plan.warps == 1 or plan.turns * TURN // 2 < 224
        assert plan.turns // plan.warps == wider.turns // wider.warps
        assert wider.turns * TURN <= 4096
        assert plan._replace(turns=0, warps=0) == wider._replace(turns=0, warps=0)
        x = torch.randn(1, 224, device=DEVICE).half()
        want = x.double() @ codes.dequantise(torch.float64).to(DEVICE).t()
        got = quantized_row.one_row(packed.ordered(x), packed, None, plan)
        assert relative_error(got, want) < 1.5 * relative_error(want.half(), want)


@pytest.mark.parametrize("plan", [(4, 4, 4, 4), (8, 4, 4, 4)], ids=str)
@pytest.mark.parametrize(
    "name", ["4 bits", "4 bits, zeros", "4 bits, groups of several turns", "INT8", "8 bits, zeros", "FP8 in blocks"]
)
def test_rows_at_fixed_distances(name, plan):
    """Rows of which every program has as many: 256 of W, and 128 of gate and of up."""
    from common.kernels import quantized_row  # noqa: PLC0415

    matrix = dataclasses.replace(MATRICES[name], out=256)
    codes = matrix.codes()
    packed = pack(Codes(*(None if one is None else one.to(DEVICE) for one in codes)), matrix.bits)
    x = torch.randn(1, matrix.width, device=DEVICE).half() / 64
    product = x.double() @ codes.dequantise(torch.float64).to(DEVICE).t()
    for gated, want in ((False, product), (True, silu_and_mul(product))):
        assert quantized_row.near(quantized_row.Work(*plan), packed, gated)
        got = quantized_row.one_row(x, packed, None, quantized_row.Work(*plan), gated)
        assert relative_error(got, want) < 1.5 * relative_error(want.half(), want)


GUARDED = """
import ctypes, mmap, sys
import torch
from common.kernels.quantized_layout import pack
from common.kernels.quantized_row import Work, one_row
from common.layers.activation import silu_and_mul
from common.quantization.codes import Codes

def last(values):
    \'\'\'The same in memory behind which is a page that nobody may read.\'\'\'
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL("libc.so.6").mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    kept = torch.frombuffer(memory, dtype=torch.uint8)[size - values.nbytes : size].view(values.dtype).view(values.shape)
    return kept.copy_(values)

out, bits, grouped = (int(word) for word in sys.argv[1:])
group = torch.arange(512) // 128 * grouped
scale = torch.rand(out, 4 if grouped else 1) + 0.1
top = 1 << bits - 1
codes = Codes(torch.randint(-top, top, (out, 512)).to(torch.int8), scale, None, group)
packed = pack(codes, bits)
packed.q, packed.scale = last(packed.q), last(packed.scale)
x = torch.randn(1, 512, dtype=torch.float16) / 512
want = x.double() @ codes.dequantise(torch.float64).t()
wanted = {False: want} if out % 2 else {False: want, True: silu_and_mul(want)}  # of gate and up
for plan in (None, Work(4, 4, 4, 4)):
    for gated, want in wanted.items():
        assert ((one_row(x, packed, None, plan, gated).double() - want).norm() / want.norm()) < 1e-3
"""


@pytest.mark.skipif(GPU or sys.platform != "linux", reason="memory that nobody may read, on a CPU under Linux")
@pytest.mark.parametrize(("out", "bits", "grouped"), [(13, 8, 0), (13, 8, 1), (13, 4, 1), (14, 8, 1), (70, 4, 1)])
def test_nothing_is_read_behind_the_last_row(out, bits, grouped):
    words = [sys.executable, "-c", GUARDED, str(out), str(bits), str(grouped)]
    subprocess.run(words, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT)


def test_a_row_may_begin_anywhere():
    from common.kernels import quantized_row  # noqa: PLC0415

    packed = pack(Codes(*(None if one is None else one.to(DEVICE) for one in MATRICES["INT8"].codes())), 8)
    wide = torch.randn(1, 260, dtype=torch.float16, device=DEVICE)
    assert torch.equal(
        quantized_row.one_row(wide[:, 2:258], packed), quantized_row.one_row(wide[:, 2:258].clone(), packed)
    )


def test_who_has_another_kernel():
    from common.kernels import quantized_row  # noqa: PLC0415

    packed = pack(MATRICES["INT8"].codes(), 8)
    assert not quantized_row.takes(torch.zeros(2, 256, dtype=torch.float16), packed)
    assert not quantized_row.takes(torch.zeros(1, 256), packed)


def test_a_single_row_is_not_rounded():
    """INT8 by a row of one large number and small ones: rounding loses the small ones."""
    scheme = Scheme("w8a8_int8", 8, "int", activations=Activations(8, "int"))
    codes = round_to_nearest(torch.randn(64, 256), scheme)
    codes = Codes(*(None if x is None else x.to(DEVICE) for x in codes))
    layer, method = torch.nn.Module(), RoundedActivations(scheme)
    method.pack(layer, codes)
    dtype = next(kind for kind in TOLERANCE if kind != torch.float32)
    x = (0.01 * torch.randn(2, 256, device=DEVICE)).to(dtype)
    x[:, 0] = 100.0
    want = x.double() @ codes.dequantise(torch.float64).t()
    large = x.double()[:, :1] @ codes.dequantise(torch.float64).t()[:1]
    alone = method.apply(layer, x[:1], None)
    beside = method.apply(layer, x, None)[:1]
    assert relative_error(alone, want[:1]) < TOLERANCE[dtype]
    assert relative_error(beside, large[:1]) < TOLERANCE[dtype], "two rows are rounded, and the small numbers are gone"
    assert (alone.double() - want[:1]).norm() < 0.9 * (beside.double() - want[:1]).norm()


@pytest.mark.parametrize("name", ["4 bits", "4 bits, zeros", "INT8", "FP8"])
@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("at", [0, 3, 66, 130])
def test_one_large_number_costs_only_its_block_some_digits(name, size, at):
    """The large number meets weights of zero, so that y is as small as if it were not there."""
    from common.kernels import quantized_row  # noqa: PLC0415

    matrix = MATRICES[name]
    codes = matrix.codes()
    of_zero = codes.q.new_zeros(()) if codes.zero is None else codes.zero[:, codes.group[at]].to(torch.uint8) & 15
    codes.q[:, at] = of_zero
    weights = codes.dequantise(torch.float64).to(DEVICE)
    weights[:, at] *= weights[:, at].abs() > 0.05 if codes.zero is None else 1  # a zero point of 16 has no code
    packed = pack(Codes(*(None if one is None else one.to(DEVICE) for one in codes)), matrix.bits)
    x = torch.rand(1, matrix.width, device=DEVICE).half() + 0.5
    x[0, at] = size
    met = torch.isclose(weights[:, at], torch.zeros_like(weights[:, at]))
    assert met.sum() > 0.8 * matrix.out
    want = x.double() @ weights.t()
    turn, half = packed.turn, packed.turn // 2 if matrix.bits == 4 else packed.turn
    start = at // turn * turn + at % half // 4 * 4
    block = weights[:, start : start + 4].abs().sum(1)
    if matrix.bits == 4:
        block += weights[:, start + half : start + half + 4].abs().sum(1)
    if name == "FP8":
        block.zero_()
    got = quantized_row.one_row(packed.ordered(x), packed)
    off = (got.double() - want).abs()[0]
    assert (off <= 2.0**-15 * size * block + 1e-3 * want[0].abs() + 1e-3)[met].all()


@pytest.mark.parametrize("name", ["4 bits", "4 bits, zeros", "INT8", "FP8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 5, 66, 131])
def test_what_is_not_finite_reaches_every_number(name, value, at):
    """Also beside numbers that hide it from a maximum, and where the code is zero."""
    from common.kernels import quantized_row  # noqa: PLC0415

    codes = MATRICES[name].codes()
    codes.q[::2, at] = 0
    packed = pack(Codes(*(None if one is None else one.to(DEVICE) for one in codes)), MATRICES[name].bits)
    x = torch.randn(1, MATRICES[name].width, device=DEVICE).to(
        next(kind for kind in TOLERANCE if kind != torch.float32)
    )
    assert quantized_row.one_row(x, packed).isfinite().all()
    x[0, at] = value
    assert not quantized_row.one_row(x, packed).isfinite().any()


@pytest.mark.parametrize("name", ["4 bits", "4 bits, zeros", "INT8", "FP8"])
def test_zeros_and_the_smallest_numbers(name):
    from common.kernels import quantized_row  # noqa: PLC0415

    codes = MATRICES[name].codes()
    packed = pack(Codes(*(None if one is None else one.to(DEVICE) for one in codes)), MATRICES[name].bits)
    x = torch.zeros(1, MATRICES[name].width, dtype=torch.float16, device=DEVICE)
    assert not quantized_row.one_row(x, packed).any()
    smallest = 2.0**-24
    x += torch.randint(-9, 10, x.shape, device=DEVICE) * smallest
    want = x.double() @ codes.dequantise(torch.float64).to(DEVICE).t()
    got = quantized_row.one_row(x, packed).double()
    assert ((got - want).abs() <= 0.51 * smallest + want.abs() * 2.0**-11).all()
