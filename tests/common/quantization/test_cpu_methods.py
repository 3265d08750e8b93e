"""Layers that keep codes on a CPU: exact where the codes are, and rounded as the scheme says."""

import pytest
import torch
from torch import nn

from common.kernels.quantized_layout import pack
from common.layers.heads import HeadLayout
from common.layers.linear import RowParallelLinear
from common.models.weights import TensorSource
from common.parallel_state import TPGroup
from common.quantization.codes import Codes, one_group
from common.quantization.cpu_methods import SMALLEST, HalfCodes, Int8OfHalves, RoundedInFloats, rounded
from common.quantization.linear_methods import pick_linear_method
from common.quantization.method import Hardware
from common.quantization.reader import RoundedTensor
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Activations, Scheme

CPU, F32 = Hardware("cpu"), torch.float32
FP8 = Scheme("fp8", 8, "float", activations=Activations(8, "float"))
INT8 = Scheme("w8a8_int8", 8, "int", activations=Activations(8, "int"))
BLOCK = Scheme(
    "fp8", 8, "float", "block", block=(128, 128), activations=Activations(8, "float", strategy="group", group_size=128)
)
GPTQ = Scheme("gptq", 4, "int", "group", 128)
half_codes = pytest.mark.skipif(not HalfCodes.works(), reason="this build of torch has no float16 kernel for this CPU")
int8 = pytest.mark.skipif(not Int8OfHalves.works(), reason="this build of torch has no INT8 kernel for this CPU")


def layer_of(kind: type, codes: Codes, scheme: Scheme, static: float | None = None):
    layer, method = nn.Module(), kind(scheme)
    layer.dtype = F32
    if static is not None:
        method.input_scales.append(static)
    method.pack(layer, codes)
    return lambda x, bias=None: method.apply(layer, x, bias)


@half_codes
@pytest.mark.parametrize("scheme", [FP8, INT8], ids=str)
def test_codes_in_float16_are_exact(scheme):
    codes = round_to_nearest(torch.randn(70, 300), scheme)
    x, bias = torch.randn(9, 300), torch.randn(70)
    got, want = layer_of(HalfCodes, codes, scheme)(x, bias), x.double() @ codes.dequantise(torch.float64).t() + bias
    assert (got - want).norm() / want.norm() < 2e-6


@half_codes
@pytest.mark.parametrize("heads", [(8, 2), (16, 8), (14, 2)])
@pytest.mark.parametrize("rank", range(3))
def test_heads_that_a_rank_pads_take_no_scale_from_the_others(heads, rank):
    """8 heads of 2 groups over 3 ranks: what rank 1 holds begins with two heads of zeros."""
    layout, tp = HeadLayout.of(*heads, rank, 3), TPGroup(rank, 3)
    w = torch.randn(24, heads[0] * 4)
    source, held = RoundedTensor(FP8, TensorSource(w), "o_proj", tuple(w.shape)), (layout.num_q * 4, layout.q_pieces(4))
    layers = [
        RowParallelLinear(heads[0] * 4, 24, tp, pieces=held, reduce_results=False, method=method)
        for method in (HalfCodes(FP8), RoundedInFloats(FP8), None)
    ]
    for layer in layers:
        layer.weight.weight_loader(source)
    codes, rounded_, plain = layers
    x = torch.randn(5, layout.num_q * 4)
    assert torch.allclose(codes(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(rounded_.plain, plain.weight)


@pytest.mark.parametrize("first", [0, 8])
def test_a_padded_matrix_with_a_scale_a_row_stays_one(first):
    """GPU kernels that round x multiply by one scale a row, or by one for each 128 columns."""
    method, codes = HalfCodes(FP8), round_to_nearest(torch.randn(16, 40), FP8)
    method.parts = {None: [(first, codes.cut(columns=slice(0, 24))), (first + 32, codes.cut(columns=slice(24, 40)))]}
    together = method.together(1, (16, 60))
    packed = pack(together, 8)
    assert (packed.group, packed.order) == (0, None)
    assert torch.equal(together.dequantise(), method.dequantised(1, (16, 60)))


@int8
@pytest.mark.parametrize("static", [None, 0.03])
def test_int8_sums_are_those_of_integers_in_8_bits(static):
    """In one product of u8 and s8 they would saturate on most CPUs without VNNI."""
    codes = Codes(torch.full((40, 300), 127, dtype=torch.int8), torch.rand(40, 1), None, one_group(300))
    codes.q[::2, ::3] = -128
    x = torch.randn(5, 300)
    x[0], x[1], x[2] = 1.0, -1.0, 0.0
    q, scale = rounded(x, "int", static)
    want = (q.double() @ codes.q.double().t()) * scale.double() * codes.scale.double().t()
    got = layer_of(Int8OfHalves, codes, INT8, static)(x)
    assert (got - want).norm() / want.norm() < 1e-6


def test_no_row_depends_on_its_neighbours():
    codes = round_to_nearest(torch.randn(20, 64), INT8)
    x = torch.randn(3, 64)
    for kind in [RoundedInFloats] + [Int8OfHalves] * Int8OfHalves.works():
        multiply = layer_of(kind, codes, INT8)
        together = multiply(torch.cat([x, 1000 * torch.randn(4, 64)]))
        assert torch.allclose(together[:3], multiply(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", [FP8, INT8, BLOCK], ids=str)
def test_rounding_in_floats_is_the_scheme_by_hand(scheme):
    codes = round_to_nearest(torch.randn(130, 200), scheme)
    x = torch.randn(4, 200)
    parts = [x[:, :128], x[:, 128:]] if scheme is BLOCK else [x]
    largest = 127 if scheme is INT8 else 448
    by_hand = []
    for part in parts:
        scale = part.abs().max(dim=1, keepdim=True).values / largest
        q = part / scale
        by_hand.append((q.round() if scheme is INT8 else q.to(torch.float8_e4m3fn).float()) * scale)
    want = torch.cat(by_hand, dim=1) @ codes.dequantise().t()
    assert torch.allclose(layer_of(RoundedInFloats, codes, scheme)(x), want, rtol=1e-5, atol=1e-4)


def test_what_is_too_large_for_a_given_scale_becomes_the_largest_code():
    assert rounded(torch.tensor([[1.0, -1e9]]), "int", 0.5)[0].tolist() == [[2.0, -127.0]]
    assert rounded(torch.tensor([[1.0, -1e9]]), "float", 0.5)[0].tolist() == [[2.0, -448.0]]


@half_codes
def test_auto_on_a_cpu_keeps_codes_of_large_matrices_only():
    method = pick_linear_method(INT8, CPU, F32, "auto")
    assert type(method) is HalfCodes
    assert method.smallest == SMALLEST
    assert pick_linear_method(INT8, CPU, F32, "weight_only").smallest == 0
    assert pick_linear_method(GPTQ, CPU, F32, "auto") is None
    assert pick_linear_method(BLOCK, CPU, F32, "auto") is None
    assert pick_linear_method(INT8, CPU, torch.bfloat16, "auto") is None
    assert pick_linear_method(INT8, CPU, F32, "dequantise") is None


@int8
def test_activations_are_rounded_by_the_fastest_that_takes_the_scheme():
    assert type(pick_linear_method(INT8, CPU, F32, "activations")) is Int8OfHalves
    assert type(pick_linear_method(FP8, CPU, F32, "activations")) is RoundedInFloats
    assert type(pick_linear_method(BLOCK, CPU, F32, "activations")) is RoundedInFloats
    with pytest.raises(ValueError, match="nothing here multiplies float32 by gptq int4 group 128"):
        pick_linear_method(GPTQ, CPU, F32, "activations")
