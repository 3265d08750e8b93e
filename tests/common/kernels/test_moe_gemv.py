"""The mixture for one token against the loop over experts: all that is a row or a turn, and what must not be read."""

import pytest
import torch

from common.layers.activation import silu_and_mul
from common.layers.moe_runner import SharedMatrices, loop
from tests.common.kernels.test_moe import Shape, in_float64, operands
from tests.common.kernels.where import DEVICE, TOLERANCE, gpu, kernel, relative_error

pytestmark = kernel

# the interpreter multiplies bfloat16 only through a tensor core's dot, which these kernels do not use
DTYPES = {**TOLERANCE, torch.bfloat16: 1e-2}


def run(inputs, ways=None, **kwargs) -> torch.Tensor:
    """ways: rows, columns, warps of both launches."""
    from common.kernels import moe_gemv  # noqa: PLC0415

    gemvs = ways and moe_gemv.Gemvs(*(moe_gemv.Gemv(*gemv) for gemv in ways))
    return moe_gemv.run(*inputs, gemvs=gemvs, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 1, 3, 24, 16), Shape(1, 6, 9, 37, 19), Shape(3, 3, 5, 40, 12)],
    ids=["one choice", "six choices, odd widths", "three tokens"],
)
def test_a_row_is_the_loop_s(shape, dtype):
    inputs = operands(shape, dtype, seed=shape.top)
    y = run(inputs)
    assert y.dtype == dtype
    assert relative_error(y, in_float64(*inputs)) < DTYPES[dtype]
    assert torch.equal(run(inputs), y)


@pytest.mark.parametrize(
    "ways",
    [((4, 64, 4), (4, 32, 4)), ((4, 8, 2), (4, 8, 2)), ((32, 16, 8), (64, 16, 4))],
    ids=["a turn", "six and three turns", "one program, rows beyond the last"],
)
def test_rows_and_turns_change_nothing(ways):
    inputs = operands(Shape(1, 3, 5, 44, 22), torch.float32)
    assert relative_error(run(inputs, ways), in_float64(*inputs)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("choices", [[-1, 2, -1], [4, -1, 0], [-1, -1, -1]])
def test_what_is_not_here_adds_nothing_and_is_not_read(choices):
    """Weights of experts that nobody chose are NaN, and so is the router's weight of a choice that is not here."""
    x, weights, experts, w13, w2 = operands(Shape(1, 3, 6, 24, 20), torch.float32)
    experts.copy_(torch.tensor([choices]))
    for w in (w13, w2):
        w[[e for e in range(6) if e not in choices]] = torch.nan
    weights[experts < 0] = torch.nan
    want = loop(x.double(), weights.double(), experts, w13.double(), w2.double())
    assert relative_error(run((x, weights, experts, w13, w2)), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_added_is_rounded_with_the_sum(tokens):
    from common.kernels import moe  # noqa: PLC0415

    inputs = operands(Shape(tokens, 2, 4, 24, 20), torch.float16, 0.2)
    added = 64 * torch.randn(tokens, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.float16)
    want = in_float64(*inputs) + added.double()
    y = moe.run(*inputs, added)
    assert relative_error(y, want) < TOLERANCE.get(torch.float16, 1e-3)
    spacing = torch.finfo(torch.float16).eps * want.abs()
    assert ((y.double() - want).abs() <= 0.55 * spacing + 4e-3).all()


def shared_operands(shape: Shape, of_others: int, dtype: torch.dtype, gated: bool) -> SharedMatrices:
    """As wide as so many of the others."""
    random, width = torch.Generator().manual_seed(7), of_others * shape.width
    w13 = torch.randn(2 * width, shape.hidden, generator=random) * shape.hidden**-0.5
    w2 = torch.randn(shape.hidden, width, generator=random) * width**-0.5
    factor = torch.rand(shape.tokens, 1, generator=random) if gated else None
    return SharedMatrices(*(None if one is None else one.to(DEVICE, dtype) for one in (w13, w2, factor)))


def with_shared_in_float64(inputs, shared: SharedMatrices) -> torch.Tensor:
    x = inputs[0].double()
    y = silu_and_mul(x @ shared.w13.double().t()) @ shared.w2.double().t()
    return in_float64(*inputs) + (y if shared.factor is None else shared.factor.double() * y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "of_others", "gated"),
    [
        (Shape(1, 1, 3, 24, 16), 1, True),
        (Shape(1, 6, 9, 37, 19), 2, False),
        (Shape(2, 3, 5, 40, 12), 3, True),
        (Shape(3, 4, 6, 29, 10), 4, True),
    ],
    ids=[
        "one choice, one more",
        "six choices and two, odd widths",
        "two tokens, three choices and three",
        "three tokens, four choices and four",
    ],
)
def test_the_shared_expert_goes_along(shape, of_others, gated, dtype):
    """Its programs and those of the k choices have rows beyond the last; several turns."""
    inputs, shared = operands(shape, dtype, seed=shape.top), shared_operands(shape, of_others, dtype, gated)
    ways = (8, 16, 4), (16, 8, 4)
    y = run(inputs, ways, shared=shared)
    assert y.dtype == dtype
    assert relative_error(y, with_shared_in_float64(inputs, shared)) < DTYPES[dtype]
    assert torch.equal(run(inputs, ways, shared=shared), y)


@pytest.mark.parametrize(
    ("choices", "ways"),
    [([4, 0, 2], ((8, 64, 4), (16, 32, 4))), ([-1, 2, -1], None), ([-1, -1, -1], ((32, 16, 8), (64, 16, 4)))],
    ids=["all here, a turn", "one here, as real sizes choose", "none here, a program each"],
)
def test_it_does_so_in_any_turns_and_whoever_is_here(choices, ways):
    """Weights of experts that nobody chose are NaN, and so is the router's weight of a choice that is not here."""
    shape = Shape(1, 3, 6, 44, 22)
    inputs, shared = operands(shape, torch.float32), shared_operands(shape, 2, torch.float32, gated=True)
    _, weights, experts, w13, w2 = inputs
    experts.copy_(torch.tensor([choices]))
    want = with_shared_in_float64(inputs, shared)
    for w in (w13, w2):
        w[[e for e in range(6) if e not in choices]] = torch.nan
    weights[experts < 0] = torch.nan
    assert relative_error(run(inputs, ways, shared=shared), want) < TOLERANCE[torch.float32]


def test_what_goes_along():
    from common.kernels.moe_gemv import ALONG, SLOTS, goes_along  # noqa: PLC0415

    w2, w13, down = torch.zeros(4, 24, 10), torch.zeros(60, 24), torch.zeros(24, 30)  # three more slots
    assert goes_along(ALONG, 2, w2, w13, down)
    assert not goes_along(ALONG + 1, 2, w2, w13, down)
    assert goes_along(1, SLOTS - 3, w2, w13, down)
    assert not goes_along(1, SLOTS - 2, w2, w13, down)
    assert not goes_along(1, 2, w2, torch.zeros(50, 24), torch.zeros(24, 25))  # two and a half
    assert not goes_along(1, 2, w2, w13, torch.zeros(30, 24).t())  # as cpu_linear.py may keep it
    assert not goes_along(1, 2, w2, w13.to_mkldnn(), down)


def test_columns_of_ranks_add_up():
    """F cut into three: the parts are those of the whole."""
    x, weights, experts, w13, w2 = operands(Shape(1, 4, 6, 40, 36), torch.float32)
    gate, up = w13.chunk(2, 1)
    parts = (
        run((x, weights, experts, torch.cat((gate[:, cut], up[:, cut]), 1), w2[:, :, cut].contiguous()))
        for cut in (slice(0, 12), slice(12, 24), slice(24, 36))
    )
    assert relative_error(sum(parts), in_float64(x, weights, experts, w13, w2)) < TOLERANCE[torch.float32]


def test_programs_are_small():
    """W of a turn at real sizes: so many numbers a thread that its registers hold two turns."""
    from common.kernels.moe_gemv import gemvs_for  # noqa: PLC0415

    for hidden, width, top in ((2048, 768, 8), (2048, 1408, 6), (4096, 14_336, 2), (7168, 2048, 8), (64, 16, 1)):
        for itemsize in (2, 4):
            gate_up, down = gemvs_for(hidden, width, top, itemsize)
            assert itemsize * 2 * gate_up.rows * gate_up.columns <= 128 * 32 * gate_up.warps
            assert itemsize * top * down.rows * down.columns <= 256 * 32 * down.warps


@gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("experts", "top", "of_others"), [(64, 6, 2), (60, 4, 4)], ids=["DeepSeek-V2-Lite", "Qwen1.5-MoE"]
)
def test_the_shared_expert_at_real_sizes_in_bfloat16(experts, top, of_others, gated):
    shape = Shape(1, top, experts, 2048, 1408)
    inputs, shared = operands(shape, torch.bfloat16), shared_operands(shape, of_others, torch.bfloat16, gated)
    y = run(inputs, shared=shared)
    assert relative_error(y, with_shared_in_float64(inputs, shared)) < 1e-2
    assert torch.equal(run(inputs, shared=shared), y)


@gpu
@pytest.mark.parametrize("of_others", [0, 2], ids=["no shared expert", "a shared expert along"])
@torch.inference_mode()
def test_rows_of_w2_are_those_of_this_layer_s_experts(of_others):
    """They are asked for before the wait; the experts of all layers of a graph lie at the same address, one after the other."""
    from common.kernels import moe_gemv, router  # noqa: PLC0415
    from common.layers.router import RouterRule  # noqa: PLC0415

    layers, rule, shape = 6, RouterRule(top_k=8), Shape(1, 8, 64, 2048, 768)
    x, _, _, w13, w2 = operands(shape, torch.bfloat16)
    shared = shared_operands(shape, of_others, torch.bfloat16, gated=False) if of_others else None
    logits = torch.randn(layers, 1, 64, dtype=torch.bfloat16, device=DEVICE)

    def step(between=lambda: None):
        ys = []
        for layer in logits:
            weights, experts = router.choose(layer, rule, None, torch.bfloat16)
            between()
            ys.append(moe_gemv.run(x, weights, experts, w13, w2, shared=shared))
            between()
        return torch.cat(ys)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(20):
        logits.normal_()
        graph.replay()
        assert torch.equal(y, step(torch.cuda.synchronize))
