"""Products by codes, against dequantised weights in float64; on a CPU in Triton's interpreter."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels.quantized_layout import PackedCodes, multiply_plain, pack, packed_bytes, unpack
from common.quantization.codes import Codes
from common.quantization.gpu_methods import WeightOnlyKernels
from common.quantization.scheme import Scheme
from tests.common.kernels.where import DEVICE, TOLERANCE, gpu, kernel, relative_error

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


@dataclass(frozen=True)
class Matrix:
    """group: columns that share a scale, 0 for all; start: of the first column within its group; shuffled: as GPTQ's act_order."""

    bits: int
    kind: str  # of a code: signed, unsigned (with zeros), float
    out: int
    width: int
    group: int = 0
    start: int = 0
    shuffled: bool = False
    same_zero: bool = False
    odd_zero: bool = False  # not the middle one
    blocks: bool = False  # rows share scales as well

    def codes(self, seed: int = 0) -> Codes:
        random = torch.Generator().manual_seed(seed)
        group = torch.zeros(self.width, dtype=torch.int64)
        if self.group:
            group = (torch.arange(self.width) + self.start) // self.group
        if self.shuffled:
            group = group[torch.randperm(self.width, generator=random)]
        shape, groups = (self.out, self.width), int(group.max()) + 1
        scale, zero = torch.rand(self.out, groups, generator=random) + 0.1, None
        if self.bits == 4:
            scale = scale.half().float()
        if self.blocks:
            scale = scale[::128].repeat_interleave(128, dim=0)[: self.out]
        top = 1 << self.bits
        if self.kind == "signed":
            q = torch.randint(-top // 2, top // 2, shape, generator=random).to(torch.int8)
        elif self.kind == "unsigned":
            q = torch.randint(0, top, shape, generator=random).to(torch.uint8)
            zero = torch.randint(0, top + 1, scale.shape, generator=random).float()  # top: of GPTQ's zeros + 1
            if self.same_zero:
                zero.fill_(top // 2 + 3 * self.odd_zero)
        elif self.bits == 4:
            q, scale = (
                E2M1[torch.randint(0, 15, shape, generator=random)].to(torch.float8_e4m3fn),
                scale.log2().round().exp2(),
            )
        else:
            q = (30 * torch.randn(shape, generator=random)).to(torch.float8_e4m3fn)
        return Codes(q, scale, zero, group)


MATRICES = {
    "4 bits": Matrix(4, "signed", 70, 256, 128),
    "4 bits, a group begins before the first column": Matrix(4, "signed", 65, 160, 128, start=50),
    "4 bits, zeros": Matrix(4, "unsigned", 70, 200, 64),
    "4 bits, one zero for all": Matrix(4, "unsigned", 64, 128, 32, same_zero=True),
    "4 bits, columns in another order": Matrix(4, "unsigned", 130, 300, 128, shuffled=True),
    "4 bits, groups of several turns": Matrix(4, "signed", 40, 1024, 256),
    "4 bits, one scale a row": Matrix(4, "signed", 30, 90),
    "E2M1": Matrix(4, "float", 40, 96, 32),
    "INT8": Matrix(8, "signed", 70, 256),
    "8 bits, zeros": Matrix(8, "unsigned", 70, 256, 128),
    "8 bits, one zero for all": Matrix(8, "unsigned", 70, 256, 128, same_zero=True, odd_zero=True),
    "FP8": Matrix(8, "float", 70, 200),
    "FP8 in blocks": Matrix(8, "float", 300, 256, 128, blocks=True),
}


@pytest.mark.parametrize("name", MATRICES)
def test_packed_codes_are_the_same_numbers(name):
    matrix = MATRICES[name]
    codes = matrix.codes()
    packed = pack(codes, matrix.bits)
    eye = torch.eye(matrix.width)
    assert torch.equal(multiply_plain(eye, packed).t(), codes.dequantise())
    if matrix.bits == 4:
        assert packed.q.nbytes == -(-matrix.out // 64) * 64 * -(-packed.width // packed.turn) * packed.turn // 2


def test_scales_are_kept_in_16_bits_only_if_that_is_exact_and_once_for_rows_that_share_them():
    exact, other = MATRICES["4 bits"].codes(), MATRICES["FP8 in blocks"].codes()
    assert pack(exact, 4).scale.dtype == torch.float16
    assert pack(other, 8).scale.dtype == torch.float32
    assert pack(other, 8).scale.shape == (2, 3)
    large = exact._replace(scale=(exact.scale * 2**20))
    assert pack(large, 4).scale.dtype == torch.float32


@pytest.mark.parametrize(("low", "high", "kept_in"), [(0, 255, torch.int8), (1, 256, torch.int16)])
def test_zeros_take_a_byte_wherever_one_holds_them(low, high, kept_in):
    """Those of 8-bit codes move by 128: 0 is kept as -128, and 256, of GPTQ's zeros + 1, does not fit."""
    codes = MATRICES["8 bits, zeros"].codes()
    codes.zero.clamp_(low, high)[0] = torch.tensor([low, high])
    packed = pack(codes, 8)
    assert packed.zero.dtype == kept_in
    assert torch.equal(unpack(packed).zero, codes.zero - 128)
    if kept_in == torch.int8:
        rows, groups = torch.arange(70), torch.arange(2)
        counted = packed_bytes(rows, codes.group, groups, 8, packed.scale.itemsize, symmetric=False)
        assert counted == packed.nbytes, "as a plan counts them"


def test_columns_that_only_fill_up_cost_nothing():
    """A group whose scales are 0 is padding of a rank's slice: it has no place in the order."""
    codes = Matrix(4, "signed", 16, 96, 32).codes()
    codes.scale[:, 1] = 0.0
    packed = pack(codes._replace(group=codes.group[torch.randperm(96)]), 4)
    assert packed.width == 64


@kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MATRICES)
def test_products(name, dtype):
    check(MATRICES[name], (1, 3, 20), dtype)


@kernel
@settings(deadline=None, max_examples=25)
@given(
    st.builds(
        Matrix, bits=st.sampled_from([4, 8]), kind=st.sampled_from(["signed", "unsigned", "float"]), out=st.integers(1, 140),
        width=st.integers(1, 300), group=st.sampled_from([0, 16, 32, 48, 128]), start=st.integers(0, 40), shuffled=st.booleans(),
        same_zero=st.booleans(),
    ),
    st.integers(1, 30) | st.just(1), st.sampled_from(list(TOLERANCE)),
)  # fmt: skip
def test_any_matrix(matrix, rows, dtype):
    check(matrix, (rows,), dtype)


def check(matrix: Matrix, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """In one piece and cut along the columns, with a bias and without; twice the same bits; and as many rows multiply it."""
    from common.kernels import quantized_linear  # noqa: PLC0415

    codes = matrix.codes()
    want_w = codes.dequantise(torch.float64)
    packed = pack(Codes(*(None if x is None else x.to(DEVICE) for x in codes)), matrix.bits)
    bias = torch.randn(matrix.out, device=DEVICE).to(dtype)
    for rows in counts:
        x = torch.randn(rows, matrix.width, device=DEVICE).to(dtype)
        want = x.double() @ want_w.to(DEVICE).t()
        cut = quantized_linear.Tiling(16, 64, 2, 4, 2)
        ordered = packed.ordered(x)
        for plan in (None, cut):
            got = quantized_linear.few_rows(ordered, packed, None, plan)
            assert got.dtype == dtype
            assert relative_error(got, want) < TOLERANCE[dtype]
            assert torch.equal(quantized_linear.few_rows(ordered, packed, None, plan), got)
        assert relative_error(quantized_linear.linear(x, packed, bias), want + bias) < TOLERANCE[dtype]
    eye = torch.eye(matrix.width, device=DEVICE)
    assert torch.equal(
        packed.ordered(eye) @ quantized_linear.dequantise(packed, torch.float32).t(), codes.dequantise().t().to(DEVICE)
    )


@kernel
def test_many_rows_are_multiplied_by_dequantised_weights():
    from common.kernels import quantized_linear  # noqa: PLC0415

    matrix = MATRICES["4 bits, columns in another order"]
    codes = matrix.codes()
    packed = pack(Codes(*(None if x is None else x.to(DEVICE) for x in codes)), 4)
    x = torch.randn(quantized_linear.MANY + 1, matrix.width, device=DEVICE)
    want = x.double() @ codes.dequantise(torch.float64).to(DEVICE).t()
    assert relative_error(quantized_linear.linear(x, packed), want) < TOLERANCE[torch.float32]


@kernel
def test_a_layer_keeps_codes_in_buffers_and_multiplies_by_them():
    layer = torch.nn.Module()
    method = WeightOnlyKernels(Scheme("awq", 4, "int", "group", 64, symmetric=False))
    matrix = MATRICES["4 bits, zeros"]
    codes = Codes(*(None if x is None else x.to(DEVICE) for x in matrix.codes()))
    method.pack(layer, codes)
    assert {name for name, _ in layer.named_buffers()} == {"q", "scale", "zero"}
    assert method.packed.q is layer.q
    x = torch.randn(2, matrix.width, device=DEVICE)
    assert relative_error(method.apply(layer, x, None), x.double() @ codes.dequantise(torch.float64).t()) < 2e-6


@gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_real_sizes_in_a_graph(bits, rows):
    from common.kernels import quantized_linear  # noqa: PLC0415

    codes = Matrix(bits, "signed", 4608, 3584, 128).codes()
    packed: PackedCodes = pack(Codes(*(None if x is None else x.cuda() for x in codes)), bits)
    x = torch.randn(rows, 3584, device="cuda", dtype=torch.bfloat16)
    quantized_linear.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = quantized_linear.linear(x, packed)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert relative_error(y, x.double() @ unpack(packed).dequantise(torch.float64).t()) < TOLERANCE[torch.bfloat16]
