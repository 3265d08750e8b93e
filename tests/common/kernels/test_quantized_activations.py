"""FP8 times FP8 and INT8 times INT8, against the same codes in float64; on a CPU in Triton's interpreter."""

import itertools

import pytest
import torch

from common.kernels.quantized_layout import pack
from common.quantization.codes import Codes
from common.quantization.cpu_methods import RoundedInFloats
from common.quantization.cpu_methods import rounded as rounded_plain
from common.quantization.gpu_methods import RoundedActivations
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Activations, Scheme
from tests.common.kernels.where import DEVICE, GPU, TOLERANCE, gpu, kernel, relative_error

pytestmark = kernel
FP8, INT8 = torch.float8_e4m3fn, torch.int8
KINDS = {INT8: "int", FP8: "float"}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 70), (3, 300), (2, 5000)])
def test_int8_codes_of_rows_are_those_of_torch(rows, width, dtype):
    from common.kernels.quantized_activations import round_rows  # noqa: PLC0415

    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    x[0] = 0.0
    q, scale = round_rows(x, INT8)
    want, want_scale = rounded_plain(x.float(), "int")
    assert relative_error(scale, want_scale) < 1e-6
    assert (q.float() - want).abs().max() <= 1  # a division may end on the other side of a half
    assert (q.float() != want).float().mean() < 0.01


@gpu  # Triton 3.6's interpreter rounds to float8 in a way of its own
@pytest.mark.parametrize("grouped", [False, True])
def test_fp8_codes_of_rows_are_those_of_torch(grouped):
    from common.kernels.quantized_activations import round_rows  # noqa: PLC0415

    x = torch.randn(3, 300, device=DEVICE)
    q, scale = round_rows(x, FP8, grouped)
    assert scale.shape == (3, 3 if grouped else 1)
    for g, part in enumerate(x.split(128, dim=1) if grouped else [x]):
        want, want_scale = rounded_plain(part.contiguous(), "float")
        assert relative_error(scale[:, g : g + 1], want_scale) < 1e-6
        assert (q[:, 128 * g : 128 * g + part.shape[1]].float() == want).float().mean() > 0.99


def test_a_given_scale_is_used_and_what_is_too_large_becomes_the_largest():
    from common.kernels.quantized_activations import round_rows  # noqa: PLC0415

    x = torch.tensor([[0.5, -3.0, 100.0, -100.0]], device=DEVICE)
    q, scale = round_rows(x, INT8, scale=0.5)
    assert q.tolist() == [[1, -6, 127, -127]]
    assert scale.tolist() == [[0.5]]
    q, _ = round_rows(x, FP8, scale=0.125)
    assert q.float().tolist() == [[4.0, -24.0, 448.0, -448.0]]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("rows", "out", "width", "grouped", "share"),
    [(1, 70, 200, False, 1), (3, 130, 256, True, 64), (20, 70, 300, True, 1), (5, 64, 1024, False, 128), (150, 200, 300, False, 1),
     (140, 130, 256, True, 128)],
)  # fmt: skip
def test_products(rows, out, width, grouped, share, dtype):
    from common.kernels import quantized_activations as kernels  # noqa: PLC0415

    groups = -(-width // 128) if grouped else 1
    x, w = (40 * torch.randn(n, width, device=DEVICE) for n in (rows, out))
    x, w = (one.clamp(-127, 127).round().to(dtype) for one in (x, w))
    x_scale = torch.rand(rows, groups, device=DEVICE) + 0.1
    w_scale = torch.rand(groups, -(-out // share), device=DEVICE) + 0.1
    bias = torch.randn(out, device=DEVICE)

    def numbers(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        scale = scale.repeat_interleave(128, dim=1)[:, :width] if grouped else scale
        return q.double() * scale.double()

    want = numbers(x, x_scale) @ numbers(w, w_scale.repeat_interleave(share, dim=1)[:, :out].t()).t() + bias
    for multiply in (kernels.few_rows, kernels.many_rows):
        got = multiply(x, x_scale, w, w_scale, share, torch.float32, bias)
        # Hopper's tensor cores keep some 14 bits of a sum of FP8 products (DeepSeek-V3's report, section 3.3.2): over the whole
        # width, or over a group of 128, whose sums are added up in float32
        bound = (1.2e-4 if grouped else 1e-3) if GPU and dtype == FP8 else 2e-6
        assert relative_error(got, want) < bound


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows", [3, 70])
def test_every_plan_gives_the_same_products(rows, grouped, dtype):
    from common.kernels import quantized_activations as kernels  # noqa: PLC0415

    out, width = 140, 700
    x, w = ((40 * torch.randn(n, width, device=DEVICE)).clamp(-127, 127).round().to(dtype) for n in (rows, out))
    x_scale, w_scale = (torch.rand(shape, device=DEVICE) + 0.1 for shape in ((rows, 6), (6, out)))
    if not grouped:
        x_scale, w_scale = x_scale[:, :1].contiguous(), w_scale[:1]
    taken = kernels.plan_of(rows, out, width, grouped, torch.device(DEVICE))
    assert taken.turn == kernels.GROUP
    want = kernels.few_rows(x, x_scale, w, w_scale, 1, torch.float32, plan=taken)
    plans = [kernels.Plan(128, 128, 1, 4, 3), kernels.Plan(64, 128, 4, 8, 2)]
    plans += [] if grouped else [kernels.Plan(64, 256, parts, 4, 3) for parts in (1, 2, 3)]
    for plan in plans:
        got = kernels.few_rows(x, x_scale, w, w_scale, 1, torch.float32, plan=plan)
        assert relative_error(got, want) < (1e-3 if GPU and dtype == FP8 else 2e-6)


def test_plans_are_those_that_were_the_fastest(monkeypatch):
    from common.kernels import quantized_activations as kernels  # noqa: PLC0415

    monkeypatch.setattr(kernels, "num_processors", lambda device: 132)
    room = 227 << 10
    monkeypatch.setattr(kernels, "shared_memory", lambda device: room)
    here, qkv, o, gate_up, down = torch.device(DEVICE), (4608, 3584), (3584, 3584), (37_888, 3584), (3584, 18_944)
    fastest = {
        (64, qkv, False): (64, 256, 1, 4, 6), (16, o, False): (64, 256, 2, 4, 6), (64, qkv, True): (64, 128, 3, 4, 3),
        (16, gate_up, False): (64, 256, 1, 4, 3), (32, gate_up, False): (64, 256, 1, 4, 3),
        (64, gate_up, False): (128, 128, 1, 4, 3), (32, gate_up, True): (128, 128, 1, 4, 3),
        (64, gate_up, True): (64, 128, 1, 8, 3), (32, down, False): (64, 256, 2, 4, 6), (64, down, False): (64, 256, 2, 4, 6),
        (16, down, True): (64, 128, 8, 4, 3), (64, down, True): (64, 128, 4, 4, 3),
    }  # fmt: skip
    for (rows, matrix, grouped), plan in fastest.items():
        assert kernels.plan_of(rows, *matrix, grouped, here) == plan, (rows, matrix, grouped)
    # between those: programs that need a processor each are one wave of most of them
    for out, width in itertools.product((2048, 4096, 4608, 5120, 6144, 7168), (2048, 4096, 13_824, 28_672)):
        for rows in (16, 32, 64, 128):
            plan = kernels.plan_of(rows, out, width, False, here)
            if plan.stages == 6:
                programs = -(-out // 64) * -(-rows // 64) * plan.parts
                assert (50 if width <= 8192 else 99) <= programs <= 132, (rows, out, width, plan)
    for matrix in ((28_672, 4096), (18_944, 3584)):
        assert kernels.plan_of(64, *matrix, False, here) == (128, 128, 1, 4, 3)
    assert (
        kernels.plan_of(64, 5120, 13_824, False, here)
        == kernels.plan_of(64, 5120, 27_648, False, here)
        == (64, 128, 4, 4, 3)
    )
    assert kernels.plan_of(64, 13_824, 5120, False, here) == (128, 128, 1, 8, 4)
    room = 99 << 10  # a card with less of it
    assert kernels.plan_of(64, *qkv, False, here).turn == kernels.GROUP


@pytest.mark.parametrize("scheme", [
    Scheme("w8a8_int8", 8, "int", activations=Activations(8, "int")),
    pytest.param(Scheme("fp8", 8, "float", activations=Activations(8, "float")), marks=gpu),
    pytest.param(
        Scheme("fp8", 8, "float", "block", block=(128, 128), activations=Activations(8, "float", strategy="group", group_size=128)),
        marks=gpu,
    ),
], ids=str)  # fmt: skip
def test_a_layer_computes_what_rounding_in_floats_does(scheme):
    codes = round_to_nearest(torch.randn(130, 256), scheme)
    codes = Codes(*(None if x is None else x.to(DEVICE) for x in codes))
    made = []
    for kind in (RoundedActivations, RoundedInFloats):
        layer, method = torch.nn.Module(), kind(scheme)
        layer.dtype = torch.float32
        method.pack(layer, codes)
        made.append((layer, method))
    for rows in (1, 70, 128):
        x = torch.randn(rows, 256, device=DEVICE)
        got, want = (method.apply(layer, x, None) for layer, method in made)
        assert relative_error(got, want) < 3e-3  # a number may be rounded the other way


@gpu
@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("rows", [64, 200])
def test_real_sizes_in_a_graph(kind, rows):
    scheme = Scheme("", 8, kind, activations=Activations(8, kind))
    codes = round_to_nearest(torch.randn(4608, 3584), scheme)
    codes = codes._replace(q=codes.q.cuda(), scale=codes.scale.cuda(), group=codes.group.cuda())
    layer, method = torch.nn.Module(), RoundedActivations(scheme)
    method.pack(layer, codes)
    assert pack(codes, 8).bits == 8
    x = torch.randn(rows, 3584, device="cuda", dtype=torch.bfloat16)
    method.apply(layer, x, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = method.apply(layer, x, None)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert relative_error(y, x.double() @ codes.dequantise(torch.float64).t()) < 0.05
