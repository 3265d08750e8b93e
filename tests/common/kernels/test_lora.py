"""What adapters add, in kernels, against the plain segments in float64; on a CPU in Triton's interpreter."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.engine import Engine
from common.layers.adapter_rows import AdapterBlocks, Segments
from common.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from common.layers.lora import EmbeddingSlots, LoRASlots, Thin, cut
from common.layers.vocab import VocabParallelEmbedding
from common.parallel_state import TPGroup
from tests.adapters import greedy_with, save_adapter
from tests.common.kernels.where import DEVICE, GPU, TOLERANCE, gpu, kernel, relative_error
from tests.oracle import greedy, save_random

pytestmark = kernel
SLOTS, RANKS = 3, (4, 1)  # of the adapters in slots 1 and 2; the third has all that there is room for


@dataclass(frozen=True)
class Shape:
    kind: str  # of the layer
    slots: tuple[int, ...]  # of each row
    max_rank: int = 9
    width: int = 56
    device: torch.device = DEVICE


SHAPES = {
    "one row": Shape("qkv", (2,)),
    "one row without an adapter": Shape("qkv", (0,)),
    "a decode step of everybody": Shape("qkv", (1, 3, 0, 2, 2, 1, 0, 3, 3)),
    "more rows of one adapter than a block": Shape("row", (2,) * 40 + (0,) * 3 + (1,) * 17),
    "a long prefill, in blocks of 64": Shape("gate_up", (1,) * 300 + (3,) * 200 + (0,) * 20, width=600),
    "in is cut into shares": Shape("row", (3, 0, 1), width=1100),
    "ranks of several tiles": Shape("gate_up", (2, 1, 1), max_rank=100),
}


def layer_of(shape: Shape, dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        tp = TPGroup(device=shape.device)
        made = {
            "qkv": lambda: QKVParallelLinear(shape.width, 8, 7, 1, tp),
            "gate_up": lambda: MergedColumnParallelLinear(shape.width, [37, 37], tp),
            "row": lambda: RowParallelLinear(shape.width, 70, tp),
            "embedding": lambda: VocabParallelEmbedding(90, 24, tp),
        }
        return made[shape.kind]()
    finally:
        torch.set_default_dtype(before)


def fill(lora: LoRASlots, max_rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Numbers of `dtype`; every adapter has another rank, and the second leaves out the first part, where there are several."""
    random = torch.Generator().manual_seed(seed)
    out, width = lora.layer.weight.shape
    if isinstance(lora, EmbeddingSlots):
        out, width = width, out
    for slot, rank in enumerate((min(RANKS[0], max_rank), min(RANKS[1], max_rank), max_rank), 1):
        parts = range(1 if slot == 2 and len(lora.sizes) > 1 else 0, len(lora.sizes))
        thins = {
            part: Thin(
                torch.randn(rank, width, generator=random).to(dtype),
                torch.randn(lora.sizes[part], rank, generator=random).to(dtype),
                0.5 + part,
            )
            for part in parts
        }
        lora.put(slot, {part: cut(lora.layer, part, thin) for part, thin in thins.items()})


def both_ways(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the kernels, of the segments in float64), x and y random."""
    layers = layer_of(shape, dtype), layer_of(shape, torch.float64)
    kind = EmbeddingSlots if shape.kind == "embedding" else LoRASlots
    loras = [kind(layer, SLOTS, shape.max_rank) for layer in layers]
    for lora in loras:
        fill(lora, shape.max_rank, dtype)
    random = torch.Generator().manual_seed(seed)
    out = loras[0].b.shape[1]
    y = torch.randn(len(shape.slots), out, generator=random).to(DEVICE, dtype)
    slots = np.array(shape.slots)
    rows = AdapterBlocks.of(slots, DEVICE), Segments.of(slots, DEVICE)
    if shape.kind == "embedding":
        ids = torch.randint(90, (len(slots),), generator=random).to(DEVICE)
        return rows[0].add_embedding(y.clone(), ids, loras[0]), rows[1].add_embedding(y.double(), ids, loras[1])
    x = torch.randn(len(shape.slots), shape.width, generator=random).to(DEVICE, dtype)
    return rows[0].add(y.clone(), x, loras[0]), rows[1].add(y.double(), x.double(), loras[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels_add_what_the_segments_add_and_twice_the_same(name, dtype):
    got, want = both_ways(SHAPES[name], dtype)
    assert got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert torch.equal(both_ways(SHAPES[name], dtype)[0], got)


@settings(deadline=None, max_examples=40)
@given(
    st.builds(
        Shape, kind=st.sampled_from(["qkv", "gate_up", "row", "embedding"]),
        slots=st.lists(st.integers(0, SLOTS), min_size=1, max_size=40).map(tuple), max_rank=st.integers(1, 20),
        width=st.integers(1, 150),
    ),
    st.integers(0, 1000),
)  # fmt: skip
def test_any_mix_of_adapters_in_any_layer(shape, seed):
    got, want = both_ways(shape, torch.float32, seed)
    assert relative_error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("most_shares", [64, 2], ids=["a share is one tile", "a share is several"])
def test_a_row_gets_the_same_bits_whoever_else_is_in_a_short_step(dtype, most_shares, monkeypatch):
    from common.kernels.lora import CUTS, FEW  # noqa: PLC0415

    monkeypatch.setitem(CUTS, FEW, CUTS[FEW]._replace(most_shares=most_shares))
    width = 1300
    lora = LoRASlots(layer_of(Shape("row", (), width=width), dtype), SLOTS, 9)
    fill(lora, 9, dtype)
    slots = np.array([3, 0, 1] * 2 + [2] * 18)
    x, y = (torch.randn(len(slots), n, device=DEVICE).to(dtype) for n in (width, 70))
    together = AdapterBlocks.of(slots, DEVICE).add(y.clone(), x, lora)
    # the first ones of their blocks: to the interpreter, whose products are NumPy's, the place within a block matters
    firsts = (0, 2, 6, 22)
    for row in (*firsts, *(range(len(slots)) if GPU else ())):
        one = slice(row, row + 1)
        alone = AdapterBlocks.of(slots[one], DEVICE).add(y[one].clone(), x[one], lora)
        assert torch.equal(alone, together[one])


def test_numbers_that_no_adapter_has_are_not_read():
    """Rows of A and columns of B beyond an adapter's rank are NaN, as are slots that nobody uses and a row of x without adapter."""
    lora = LoRASlots(layer_of(SHAPES["one row"], torch.float32), SLOTS, 9)
    lora.a.fill_(torch.nan)
    lora.b.fill_(torch.nan)
    fill(lora, 9)
    lora.clear(3)
    slots = np.array([1, 0, 2, 3])
    x, y = torch.randn(4, 56, device=DEVICE), torch.zeros(4, lora.b.shape[1], device=DEVICE)
    x[1] = torch.nan
    AdapterBlocks.of(slots, DEVICE).add(y, x, lora)
    assert y.isfinite().all()
    assert not y[[1, 3]].any()
    assert y[[0, 2]].any()


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=700), st.integers(0, 6))
def test_every_row_of_an_adapter_is_in_one_block_of_that_adapter(slots, unused):
    from common.kernels.lora import adapter_blocks, most_blocks, rows_per_block  # noqa: PLC0415

    slots = np.array(slots)
    room, block = most_blocks(len(slots), 5) + unused, rows_per_block(len(slots))
    numbers = adapter_blocks(slots, room)
    rows, owner = numbers[: room * block].reshape(room, block), numbers[room * block :]
    for slot, mine in zip(owner, rows, strict=True):
        real = mine[mine < len(slots)]
        assert (slots[real] == slot).all()
        assert len(real) if slot else not len(real)
    assert sorted(rows[rows < len(slots)]) == np.flatnonzero(slots).tolist()
    exact = adapter_blocks(slots)
    n = len(exact) // (1 + block)
    assert exact[n * block :].tolist() == owner[owner > 0].tolist()
    assert exact[: n * block].tolist() == rows[:n].reshape(-1).tolist()


def test_tokens_of_an_engine_equal_transformers(tmp_path):
    """In float32, two adapters and none in a batch: prompts in one step, then decode steps."""
    folder = save_random("qwen2", tmp_path / "base")
    paths = {name: save_adapter(folder, tmp_path / name, seed, r=3) for seed, name in enumerate(("a", "b"))}
    engine = Engine(
        str(folder), device=DEVICE.type, dtype="float32", enable_lora=True, lora_backend="triton",
        lora_paths={name: str(path) for name, path in paths.items()},
    )  # fmt: skip
    prompts, names = [list(range(3, 21)), [5, 6], list(range(40, 47))], ["b", None, "a"]
    params = {"max_new_tokens": 3, "temperature": 0.0}
    got = engine.generate(input_ids=prompts, sampling_params=params, lora_path=names)
    assert [one["output_ids"] for one in got] == [
        greedy_with(folder, paths[name], prompt, 3) if name else greedy(folder, prompt, 3)
        for name, prompt in zip(names, prompts, strict=True)
    ]


@gpu
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_real_sizes_in_bfloat16(tokens):
    slots = np.random.default_rng(0).integers(0, SLOTS + 1, tokens)
    for kind in ("qkv", "gate_up", "row"):
        got, want = both_ways(Shape(kind, tuple(slots.tolist()), 64, 3584), torch.bfloat16)
        assert relative_error(got, want) < 1e-2


@gpu
def test_a_graph_follows_the_adapters_of_its_rows():
    """Captured once, replayed with other adapters for its rows, and with another one in a slot."""
    lora = LoRASlots(layer_of(SHAPES["one row"], torch.bfloat16), SLOTS, 9)
    fill(lora, 9)
    x = torch.randn(20, 56, device=DEVICE, dtype=torch.bfloat16)
    numbers = torch.from_numpy(AdapterBlocks.numbers(np.zeros(20, dtype=np.int64), SLOTS)).to(DEVICE)

    def run():
        y = torch.zeros(20, lora.b.shape[1], device=DEVICE, dtype=x.dtype)
        return AdapterBlocks.captured(numbers, 20, SLOTS).add(y, x, lora)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for seed in range(3):
        slots = np.random.default_rng(seed).integers(0, SLOTS + 1, 20)
        numbers.copy_(torch.from_numpy(AdapterBlocks.numbers(slots, SLOTS)))
        fill(lora, 9, seed=seed)
        graph.replay()
        want = Segments.of(slots, DEVICE).add(torch.zeros_like(y), x, lora)
        assert relative_error(y, want) < 1e-2
