"""Norms and gates that put out codes: the bits of the norm or gate and a rounding behind it; and who asks for them."""

import pytest
import torch

from common.layers.communicator import LayerCommunicator
from common.layers.lora import give_slots
from common.models.config import ModelConfig
from common.models.decoder import DecoderLayer
from common.parallel_state import TPGroup
from common.quantization.codes import Codes
from common.quantization.gpu_methods import GROUP, RoundedActivations, WeightOnlyKernels
from common.quantization.method import PLAIN, LayerMethods
from common.quantization.rounded_rows import RoundedRows, Rounding
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Activations, Scheme
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.kernels.where import DEVICE, GPU, TOLERANCE, gpu, kernel, relative_error

FP8, INT8 = torch.float8_e4m3fn, torch.int8
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter does not multiply bfloat16
ROUNDINGS = [
    Rounding(INT8), Rounding(FP8), Rounding(FP8, keep=True), Rounding(FP8, grouped=True), Rounding(INT8, grouped=True, keep=True),
    Rounding(INT8, scale=0.03), Rounding(FP8, scale=0.01), Rounding(FP8, grouped=True, scale=0.01),
]  # fmt: skip
CHANNEL = Scheme("w8a8_int8", 8, "int", activations=Activations(8, "int"))
FP8_CHANNEL = Scheme("w8a8_fp8", 8, "float", activations=Activations(8, "float"))
FP8_BLOCK = Scheme(
    "fp8", 8, "float", "block", block=(128, 128), activations=Activations(8, "float", strategy="group", group_size=GROUP)
)  # fmt: skip
STATIC = Scheme("w8a8_int8", 8, "int", activations=Activations(8, "int", dynamic=False))


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)
    x[0] = 0.0  # a row whose largest number is 0
    return x


def assert_same(got: RoundedRows, want: torch.Tensor, rounding: Rounding) -> None:
    from common.kernels.quantized_activations import round_rows  # noqa: PLC0415

    codes, scales = round_rows(want, rounding.dtype, rounding.grouped, rounding.scale)
    assert torch.equal(got.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got.scales, scales)
    assert got.dtype == want.dtype
    assert len(got) == len(want)
    assert torch.equal(got.x, want) if rounding.keep else got.x is None


@kernel
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [70, 300, 1024])
def test_a_norm_has_the_bits_of_the_norm_and_a_rounding_behind_it(width, dtype, rounding):
    from common.kernels import fused, rounded_rows  # noqa: PLC0415

    x, residual = drawn(3, width, dtype=dtype), drawn(4, width, dtype=dtype)[:3]
    weight = torch.rand(width, device=DEVICE).to(dtype) + 0.5
    got, got_total = rounded_rows.add_rms_norm(x, residual, weight, 1e-6, rounding)
    want, total = fused.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(got_total, total)
    alone = rounded_rows.rms_norm(x, weight, 1e-6, rounding)
    for rows, same in ((got, want), (alone, fused.rms_norm(x, weight, 1e-6))):
        if GPU and dtype == torch.float32 and width > 512:  # threads add up a row's squares in another order
            scales = rows.scales.repeat_interleave(GROUP, dim=1)[:, :width] if rounding.grouped else rows.scales
            assert relative_error(rows.codes.float() * scales, same) < 0.05
        else:
            assert_same(rows, same, rounding)


@kernel
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [37, 300, 4700])  # the last is more than a program reads at once
def test_a_gate_has_the_bits_of_the_gate_and_a_rounding_behind_it(width, dtype, rounding):
    from common.kernels import fused, rounded_rows  # noqa: PLC0415

    x = drawn(3, 2 * width, dtype=dtype)
    assert_same(rounded_rows.silu_and_mul(x, rounding), fused.silu_and_mul(x), rounding)


@kernel
def test_no_row_is_no_launch():
    from common.kernels import rounded_rows  # noqa: PLC0415

    weight = torch.ones(70, device=DEVICE)
    assert len(rounded_rows.rms_norm(drawn(2, 70, dtype=torch.float32)[:0], weight, 1e-6, Rounding(INT8))) == 0


# --- a decoder layer


def layer_of(
    kind: type, scheme: Scheme, dtype: torch.dtype = HALF, config: ModelConfig | None = None, **communicator
) -> DecoderLayer:
    """A layer whose matrices are random codes; those of x's columns lie as in the whole matrix."""
    tp, before = TPGroup(device=DEVICE), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            config = config or ModelConfig.from_folder(TINY_QWEN_PATH)
            methods = PLAIN if kind is None else LayerMethods(lambda name: kind(scheme))
            layer = DecoderLayer(config, LayerCommunicator(tp, **communicator), 0, methods=methods)
    finally:
        torch.set_default_dtype(before)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.copy_(torch.rand(norm.weight.shape) + 0.5)
    for name, one in layer.named_modules():
        if getattr(one, "method", None) is not None:
            random = torch.Generator().manual_seed(len(name))
            values = torch.randn(one.weight.shape, generator=random) / one.weight.shape[1] ** 0.5
            codes = round_to_nearest(values, scheme)
            if scheme.activations and not scheme.activations.dynamic:
                one.method.input_scales.append(0.02)
            one.method.pack(one, Codes(*(None if x is None else x.to(DEVICE) for x in codes)))
    return layer


class Attention:
    turns = True

    def __call__(self, number, q, k, v, turning):
        return q.contiguous()


def run(layer: DecoderLayer, count: int, adapters=None) -> tuple[torch.Tensor, torch.Tensor]:
    size = len(layer.input_layernorm.weight)
    x, residual = drawn(count, size, dtype=HALF), drawn(count + 1, size, dtype=HALF)[1:]
    return layer(x, residual, None, Attention(), None, adapters=adapters)


@pytest.fixture
def roundings(monkeypatch):
    """A list that grows with each launch of a rounding by itself; kernels run wherever the tensors are."""
    from common.kernels import quantized_activations  # noqa: PLC0415

    if not GPU:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    calls, alone = [], quantized_activations.round_rows
    monkeypatch.setattr(
        quantized_activations, "round_rows", lambda x, *rest: calls.append(tuple(x.shape)) or alone(x, *rest)
    )
    return calls


def without_asking(layer: DecoderLayer) -> DecoderLayer:
    for one in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp.act):
        one.rounding = None
    return layer


@kernel
@pytest.mark.parametrize("scheme", [CHANNEL, STATIC, FP8_CHANNEL, pytest.param(FP8_BLOCK, id="fp8 block")], ids=str)
def test_of_a_layer_only_o_is_rounded_by_itself_and_not_a_bit_changes(scheme, roundings):
    layer = layer_of(RoundedActivations, scheme)
    got = run(layer, 3)
    assert roundings == [(3, layer.self_attn.o_proj.weight.shape[1])]
    roundings.clear()
    want = run(without_asking(layer), 3)
    assert len(roundings) == 4, "of qkv, o, gate_up and down"
    assert all(map(torch.equal, got, want))


@kernel
def test_one_row_and_weight_only_kernels_get_x_itself(roundings):
    for kind, count in ((RoundedActivations, 1), (WeightOnlyKernels, 3)):
        layer = layer_of(kind, CHANNEL)
        got = run(layer, count)
        assert not roundings
        assert all(map(torch.equal, got, run(without_asking(layer), count)))


@kernel
def test_blocks_of_many_rows_are_dequantised_and_get_x_itself():
    layer = layer_of(RoundedActivations, FP8_BLOCK)
    asked = layer.mlp.gate_up_proj.asks
    assert asked(128) == Rounding(FP8, grouped=True)
    assert asked(129) is None
    by_row = layer_of(RoundedActivations, FP8_CHANNEL).mlp.gate_up_proj.asks
    assert by_row(4096) == Rounding(FP8)
    assert by_row(1) is by_row(0) is None


@kernel
def test_columns_in_another_order_are_put_in_order_before_they_are_rounded():
    layer = layer_of(RoundedActivations, CHANNEL)
    layer.mlp.gate_up_proj.method.packed.order = torch.arange(4)
    assert layer.mlp.gate_up_proj.asks(3) is None
    assert layer.self_attn.qkv_proj.asks(3) == Rounding(INT8)


class Adapters:
    """What LoRA adds, in place of adapter_rows.py: the sum of what it reads, where there is room for an adapter."""

    def __init__(self):
        self.read = []

    def add(self, y, x, lora):
        if lora is not None:
            self.read.append(x)
            y = y + x.float().sum(1, keepdim=True).to(y.dtype) / 64
        return y


@kernel
@pytest.mark.parametrize("roomy", ["mlp.gate_up_proj", "self_attn.qkv_proj", "mlp.down_proj"])
def test_adapters_read_x_itself_where_they_have_room(roomy, roundings):
    layer, one, other = layer_of(RoundedActivations, CHANNEL), Adapters(), Adapters()
    give_slots({roomy: (layer.get_submodule(roomy), 0)}, 1, 4)
    got = run(layer, 3, one)
    assert len(roundings) == 1, "x is kept, and is rounded by who makes it"
    want = run(without_asking(layer), 3, other)
    assert all(map(torch.equal, got, want))
    assert len(one.read) == 1
    assert torch.equal(one.read[0], other.read[0])


@pytest.mark.parametrize("kind", [None, WeightOnlyKernels])
def test_nobody_asks_where_no_x_is_rounded(kind):
    layer = layer_of(kind, CHANNEL)
    assert layer.input_layernorm.rounding is layer.post_attention_layernorm.rounding is layer.mlp.act.rounding is None


@kernel
def test_nobody_asks_a_norm_whose_rows_travel():
    two = TPGroup(rank=0, size=2, device=DEVICE)
    config, methods = ModelConfig.from_folder(TINY_QWEN_PATH), LayerMethods(lambda name: RoundedActivations(CHANNEL))
    layer = DecoderLayer(config, LayerCommunicator(two, enable_layernorm_sp=True), 0, methods=methods)
    assert layer.input_layernorm.rounding is layer.post_attention_layernorm.rounding is None
    assert layer.mlp.act.rounding == layer.mlp.down_proj.rounding, "which stays on its rank"
    layer = DecoderLayer(config, LayerCommunicator(two, enable_all_reduce_fusion=True), 0, methods=methods)
    assert layer.input_layernorm.rounding == layer.self_attn.qkv_proj.rounding


@gpu
@pytest.mark.parametrize("rows", [2, 64, 200])
@pytest.mark.parametrize(("dtype", "grouped"), [(INT8, False), (FP8, False), (FP8, True)])
def test_real_sizes_in_a_graph(rows, dtype, grouped):
    from common.kernels import fused, rounded_rows  # noqa: PLC0415

    rounding = Rounding(dtype, grouped)
    x, residual, weight = (drawn(n, 3584, dtype=HALF) for n in (rows, rows, 2))
    weight, gate_up = weight[1], drawn(rows, 2 * 18_944, dtype=HALF)

    def both() -> tuple[RoundedRows, RoundedRows]:
        return (
            rounded_rows.add_rms_norm(x, residual, weight, 1e-6, rounding)[0],
            rounded_rows.silu_and_mul(gate_up, rounding),
        )

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normed, gated = both()
    for _ in range(2):
        for one in (x, residual, gate_up):
            one.normal_()
        graph.replay()
        assert_same(normed, fused.add_rms_norm(x, residual, weight, 1e-6)[0], rounding)
        assert_same(gated, fused.silu_and_mul(gate_up), rounding)
