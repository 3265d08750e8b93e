"""The fused mixture against the loop over experts, and its sorting against plain PyTorch's."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.engine import Engine
from common.kernels.expert_blocks import expert_blocks
from common.layers.moe_runner import loop, pick_runner
from tests.common.kernels.where import DEVICE, TOLERANCE, gpu, kernel, relative_error
from tests.oracle import greedy, save_random

pytestmark = kernel


@dataclass(frozen=True)
class Shape:
    tokens: int
    top: int
    experts: int
    hidden: int
    width: int


SHAPES = {
    "a decode step of one request": Shape(1, 4, 11, 40, 24),
    "few rows, many experts": Shape(6, 3, 40, 32, 16),
    "more rows than a block": Shape(40, 2, 3, 32, 16),
    "one choice a token": Shape(9, 1, 5, 24, 16),
    "one expert": Shape(5, 1, 1, 16, 8),
    "every expert": Shape(7, 4, 4, 16, 8),
    "odd widths": Shape(10, 3, 6, 37, 19),
    "widths of several blocks": Shape(3, 2, 4, 200, 150),
}


def operands(shape: Shape, dtype: torch.dtype, foreign: float = 0.0, seed: int = 0) -> list[torch.Tensor]:
    """x, weights, experts (a share of them foreign), w13, w2."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.tokens, shape.hidden, generator=random)
    experts = torch.rand(shape.tokens, shape.experts, generator=random).argsort(1)[:, : shape.top].contiguous()
    experts[torch.rand(experts.shape, generator=random) < foreign] = -1
    weights = torch.rand(shape.tokens, shape.top, generator=random)
    w13 = torch.randn(shape.experts, 2 * shape.width, shape.hidden, generator=random) * shape.hidden**-0.5
    w2 = torch.randn(shape.experts, shape.hidden, shape.width, generator=random) * shape.width**-0.5
    return [t.to(DEVICE, None if t is experts else dtype) for t in (x, weights, experts, w13, w2)]


def in_float64(x, weights, experts, w13, w2) -> torch.Tensor:
    return loop(x.double(), weights.double(), experts, w13.double(), w2.double())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("foreign", [0.0, 0.3], ids=["all here", "some on other ranks"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_loop_s_sum_and_twice_the_same(name, foreign, dtype):
    inputs = operands(SHAPES[name], dtype, foreign)
    run = pick_runner("triton", DEVICE).run
    y = run(*inputs)
    assert y.dtype == dtype
    assert relative_error(y, in_float64(*inputs)) < TOLERANCE[dtype]
    assert torch.equal(run(*inputs), y)


@settings(deadline=None)
@given(
    st.builds(
        Shape, tokens=st.integers(0, 12), top=st.integers(1, 4), experts=st.integers(4, 7), hidden=st.integers(1, 40),
        width=st.integers(1, 40),
    ),
    st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 1000),
)  # fmt: skip
def test_any_size_and_any_share_of_foreign_experts(shape, foreign, seed):
    from common.kernels import moe  # noqa: PLC0415

    inputs = operands(shape, torch.float32, foreign, seed)
    y = moe.run(*inputs)
    assert y.shape == inputs[0].shape
    assert relative_error(y, in_float64(*inputs)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_every_block_size_gives_the_same_sums(block):
    from common.kernels.moe import Gemm, Tiles, run  # noqa: PLC0415

    inputs = operands(Shape(50, 3, 4, 40, 24), torch.float16, 0.2)
    tiles = Tiles(block, Gemm(16, 32, 4, 2), Gemm(32, 16, 4, 2))
    assert relative_error(run(*inputs, tiles=tiles), in_float64(*inputs)) < 1e-3


@pytest.mark.parametrize("tokens", [1, 12])
def test_experts_that_nobody_chose_are_not_read(tokens):
    """Their weights are NaN, and so are those of choices that are not here."""
    x, weights, experts, w13, w2 = operands(Shape(tokens, 2, 30, 24, 16), torch.float32, 0.2)
    experts[0, 0] = 3
    chosen = experts.unique()
    untouched = [e for e in range(30) if e not in chosen]
    w13[untouched] = torch.nan
    w2[untouched] = torch.nan
    weights[experts < 0] = torch.nan
    assert pick_runner("triton", DEVICE).run(x, weights, experts, w13, w2).isfinite().all()


def test_a_row_of_x_may_lie_anywhere():
    """x as a view into wider rows."""
    x, *rest = operands(SHAPES["odd widths"], torch.float32)
    run = pick_runner("triton", DEVICE).run
    assert torch.equal(run(torch.cat((x, x), 1)[:, : x.shape[1]], *rest), run(x, *rest))


@settings(deadline=None)
@given(
    st.integers(1, 9), st.sampled_from([16, 64]),
    st.lists(st.integers(-1, 8), min_size=1, max_size=400), st.integers(1, 4),
)  # fmt: skip
def test_the_kernel_sorts_as_plain_pytorch(num_experts, block, ids, top):
    from common.kernels.moe import sort_by_expert  # noqa: PLC0415

    ids = [e if e < num_experts else -1 for e in ids]
    ids = ids[: len(ids) // top * top] or [0] * top
    experts = torch.tensor(ids).view(-1, top)
    got, want = sort_by_expert(experts.to(DEVICE), num_experts, block), expert_blocks(experts, num_experts, block)
    count = int(got.count)
    assert count == int(want.count) <= len(got.experts)
    assert got.experts[:count].tolist() == want.experts.tolist()
    assert got.pairs[: count * block].tolist() == want.pairs.tolist()


def test_more_pairs_than_are_looked_at_in_one_go():
    from common.kernels.moe import CHUNK, sort_by_expert  # noqa: PLC0415

    experts = torch.randint(-1, 5, (CHUNK + 100, 2), generator=torch.Generator().manual_seed(0))
    got, want = sort_by_expert(experts.to(DEVICE), 5, 64), expert_blocks(experts, 5, 64)
    count = int(got.count)
    assert got.experts[:count].tolist() == want.experts.tolist()
    assert got.pairs[: count * 64].tolist() == want.pairs.tolist()


@pytest.mark.parametrize(
    ("pairs", "experts"), [(8, 128), (128, 128), (1024, 128), (65_536, 128), (12_288, 64), (16, 8)]
)
def test_tiles_fit_a_gpu(pairs, experts):
    """The turns on their way, and what tensor cores need at least."""
    from common.kernels.moe import tiles_for  # noqa: PLC0415

    tiles = tiles_for(pairs, experts, 768, 2048, torch.bfloat16, 132)
    for gemm, matrices in ((tiles.gate_up, 2), (tiles.down, 1)):
        assert 2 * gemm.stages * gemm.columns * (matrices * gemm.rows + tiles.block) <= 227 << 10
        assert min(gemm.rows, gemm.columns, tiles.block) >= 16


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("deepseek_v3", marks=gpu)])
def test_tokens_of_an_engine_equal_transformers(name, tmp_path):
    """In float32, a prompt with many rows an expert and decode steps of one row; DeepSeek's with the shared expert along."""
    prompt = list(range(3, 21))
    folder = save_random(name, tmp_path)
    engine = Engine(str(folder), device=DEVICE.type, dtype="float32", moe_runner="triton")
    (answer,) = engine.generate(input_ids=[prompt], sampling_params={"max_new_tokens": 4, "temperature": 0.0})
    assert answer["output_ids"] == greedy(folder, prompt, 4)


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 128, 2048])
@pytest.mark.parametrize(("experts", "top", "hidden", "width"), [(128, 8, 2048, 768), (64, 6, 2048, 1408)])
def test_real_sizes_in_bfloat16(tokens, experts, top, hidden, width):
    inputs = operands(Shape(tokens, top, experts, hidden, width), torch.bfloat16)
    run = pick_runner("triton", DEVICE).run
    y = run(*inputs)
    assert (
        relative_error(y, loop(inputs[0].float(), inputs[1].float(), inputs[2], *(w.float() for w in inputs[3:])))
        < 1e-2
    )
    assert torch.equal(run(*inputs), y)


@gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_graph_follows_the_router(tokens):
    """Captured once, replayed with other experts chosen."""
    x, weights, experts, w13, w2 = operands(Shape(tokens, 2, 9, 64, 32), torch.bfloat16)
    run = pick_runner("triton", DEVICE).run
    run(x, weights, experts, w13, w2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, weights, experts, w13, w2)
    for shift in range(3):
        experts.copy_((experts + shift) % 9)
        graph.replay()
        assert torch.equal(y, run(x, weights, experts, w13, w2))
