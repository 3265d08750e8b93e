"""The mixture for one token against the loop over experts: all that is a row or a turn, and what must not be read."""

import pytest
import torch

from common.layers.moe_runner import loop
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
@torch.inference_mode()
def test_rows_of_w2_are_those_of_this_layer_s_experts():
    """They are asked for before the wait; the experts of all layers of a graph lie at the same address, one after the other."""
    from common.kernels import moe_gemv, router  # noqa: PLC0415
    from common.layers.router import RouterRule  # noqa: PLC0415

    layers, rule = 6, RouterRule(top_k=8)
    x, _, _, w13, w2 = operands(Shape(1, 8, 64, 2048, 768), torch.bfloat16)
    logits = torch.randn(layers, 1, 64, dtype=torch.bfloat16, device=DEVICE)

    def step(between=lambda: None):
        ys = []
        for layer in logits:
            weights, experts = router.choose(layer, rule, None, torch.bfloat16)
            between()
            ys.append(moe_gemv.run(x, weights, experts, w13, w2))
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
