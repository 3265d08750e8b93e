import pytest
import torch
import torch.nn.functional as F

from common.layers.heads import HeadLayout
from common.layers.linear import (
    Apart,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    multiply,
    multiply_apart,
)
from common.parallel_state import TPGroup, get_tensor_parallel
from tests.common.in_memory import InMemory

T, D = 5, 12


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(layer, weights, biases=None):
    """Load a layer from {shard id: tensor}; returns the sources, to see what was read."""
    sources = {("weight", key): InMemory(x) for key, x in weights.items()}
    sources |= {("bias", key): InMemory(x) for key, x in (biases or {}).items()}
    for (kind, key), source in sources.items():
        getattr(layer, kind).weight_loader(source, key)
    return sources


def every_rank(ranks, make):
    return [make(TPGroup(rank, ranks)) for rank in range(ranks)]


# --- column-parallel: cut the output


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_column_parallel_outputs_side_by_side_are_the_unsplit_output(ranks, bias):
    x, w, b = random(T, D), random(10, D, seed=1), random(10, seed=2) if bias else None
    layers = every_rank(ranks, lambda tp: ColumnParallelLinear(D, 10, tp, bias))
    for layer in layers:
        fill(layer, {None: w}, {None: b} if bias else None)
    y = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(y[:, :10], F.linear(x, w, b))
    assert not y[:, 10:].any(), "padding columns are zero"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_column_parallel_holds_equal_shares(ranks):
    sizes = [layer.weight.shape for layer in every_rank(ranks, lambda tp: ColumnParallelLinear(D, 10, tp))]
    assert sizes == [(-(-10 // ranks), D)] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_merged_column_parallel_cuts_each_part_on_its_own(ranks):
    x, gate, up = random(T, D), random(10, D, seed=1), random(7, D, seed=2)
    bias = {0: random(10, seed=3), 1: random(7, seed=4)}
    layers = every_rank(ranks, lambda tp: MergedColumnParallelLinear(D, [10, 7], tp, bias=True))
    for layer in layers:
        fill(layer, {0: gate, 1: up}, bias)
    local = -(-10 // ranks)
    outputs = [layer(x) for layer in layers]
    mine = torch.cat([y[:, :local] for y in outputs], dim=-1)[:, :10], torch.cat([y[:, local:] for y in outputs], -1)
    torch.testing.assert_close(mine[0], F.linear(x, gate, bias[0]))
    torch.testing.assert_close(mine[1][:, :7], F.linear(x, up, bias[1]))


HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 2), (8, 2), (4, 4), (7, 1), (16, 8)])


@HEADS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_qkv_gives_each_rank_the_outputs_of_its_heads(num_heads, num_kv_heads, ranks, bias):
    d, x = 4, random(T, D)
    rows = {"q": num_heads * d, "k": num_kv_heads * d, "v": num_kv_heads * d}
    weights = {key: random(n, D, seed=i) for i, (key, n) in enumerate(rows.items())}
    biases = {key: random(n, seed=9 + i) for i, (key, n) in enumerate(rows.items())} if bias else {}
    unsplit = {key: F.linear(x, weights[key], biases.get(key)).view(T, -1, d) for key in rows}
    for layer in every_rank(ranks, lambda tp: QKVParallelLinear(D, d, num_heads, num_kv_heads, tp, bias)):
        fill(layer, weights, biases)
        q, k, v = (part.view(T, -1, d) for part in layer.split(layer(x)))
        assert (q.shape[1], k.shape[1], v.shape[1]) == (layer.heads.num_q, layer.heads.num_kv, layer.heads.num_kv)
        assert layer.weight.shape == ((layer.heads.num_q + 2 * layer.heads.num_kv) * d, D)
        for i, head in enumerate(layer.heads.q_heads):
            want = torch.zeros(T, d) if head is None else unsplit["q"][:, head]
            torch.testing.assert_close(q[:, i], want)
        torch.testing.assert_close(k, unsplit["k"][:, list(layer.heads.kv_heads)])
        torch.testing.assert_close(v, unsplit["v"][:, list(layer.heads.kv_heads)])


@pytest.mark.parametrize("make", [
    lambda tp: ColumnParallelLinear(D, 10, tp, bias=True), lambda tp: RowParallelLinear(D, 10, tp, bias=True),
    lambda tp: ReplicatedLinear(D, 10, tp, bias=True),
], ids=["column", "row", "replicated"])  # fmt: skip
def test_loading_changes_the_parameter_itself(make):
    w, b = random(10, D, seed=1), random(10, seed=2)
    layer = make(TPGroup(0, 2))
    assert not layer.weight.any()
    fill(layer, {None: w}, {None: b})
    rows, columns = layer.weight.shape
    assert torch.equal(layer.weight, w[:rows, :columns])
    assert torch.equal(layer.bias, b[: len(layer.bias)])


def test_products_apart_are_the_merged_product():
    x, w, b = random(T, D), random(10, D, seed=1), random(10, seed=2)
    merged = multiply(x, w, b)
    torch.testing.assert_close(merged, F.linear(x, w, b))
    for bias in (b, None):
        torch.testing.assert_close(multiply_apart(x, w, bias, [3, 5, 2]), F.linear(x, w, bias))
    layer = QKVParallelLinear(D, 4, 14, 2, TPGroup(1, 2), bias=True)
    fill(layer, {"q": random(56, D), "k": random(8, D, seed=1), "v": random(8, D, seed=2)},
         {"q": random(56), "k": random(8, seed=1), "v": random(8, seed=2)})  # fmt: skip
    together, layer.method = layer(x), Apart()
    torch.testing.assert_close(layer(x), together)


def test_replicated_is_whole_on_every_rank():
    x, w, b = random(T, D), random(6, D, seed=1), random(6, seed=2)
    for layer in every_rank(3, lambda tp: ReplicatedLinear(D, 6, tp, bias=True)):
        fill(layer, {None: w}, {None: b})
        torch.testing.assert_close(layer(x), F.linear(x, w, b))


# --- row-parallel: cut the input, sum the outputs


def input_slice(x, tp):
    """This rank's columns of x, padded with zeros to an equal share."""
    local = -(-x.shape[-1] // tp.size)
    return F.pad(x, (0, local * tp.size - x.shape[-1]))[:, tp.rank * local : (tp.rank + 1) * local]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
def test_row_parallel_partial_sums_add_up_to_the_unsplit_output(ranks):
    x, w = random(T, D), random(10, D, seed=1)
    total = torch.zeros(T, 10)
    for layer in every_rank(ranks, lambda tp: RowParallelLinear(D, 10, tp, reduce_results=False)):
        fill(layer, {None: w})
        total += layer(input_slice(x, layer.tp))
    torch.testing.assert_close(total, F.linear(x, w))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_row_parallel_partial_sums_count_the_bias_once(ranks):
    x, w, b = random(T, D), random(10, D, seed=1), random(10, seed=2)
    total = torch.zeros(T, 10)
    for layer in every_rank(ranks, lambda tp: RowParallelLinear(D, 10, tp, bias=True, reduce_results=False)):
        fill(layer, {None: w}, {None: b})
        total += layer(input_slice(x, layer.tp))
    torch.testing.assert_close(total, F.linear(x, w, b))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_column_then_row_needs_nothing_in_between(ranks):
    x, up, down = random(T, D), random(10, D, seed=1), random(D, 10, seed=2)
    total = torch.zeros(T, D)
    for rank in range(ranks):
        tp = TPGroup(rank, ranks)
        first, second = ColumnParallelLinear(D, 10, tp), RowParallelLinear(10, D, tp, reduce_results=False)
        fill(first, {None: up})
        fill(second, {None: down})
        total += second(F.silu(first(x)))
    torch.testing.assert_close(total, F.silu(x @ up.T) @ down.T)


@HEADS
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_o_proj_takes_the_columns_of_this_ranks_heads_and_ignores_zero_heads(num_heads, num_kv_heads, ranks):
    d, w = 4, random(D, num_heads * 4, seed=1)
    o = random(T, num_heads, d)
    total = torch.zeros(T, D)
    for rank in range(ranks):
        tp, heads = TPGroup(rank, ranks), HeadLayout.of(num_heads, num_kv_heads, rank, ranks)
        pieces = (heads.num_q * d, heads.q_pieces(d))
        layer = RowParallelLinear(num_heads * d, D, tp, pieces=pieces, reduce_results=False)
        fill(layer, {None: w})
        garbage = torch.full((T, d), 1e3)
        mine = torch.stack([garbage if q is None else o[:, q] for q in heads.q_heads], dim=1)
        total += layer(mine.flatten(1))
    torch.testing.assert_close(total, o.flatten(1) @ w.T)


def row_parallel_with_bias(in_features):
    """On a real rank: (y, what the ledger saw)."""
    tp = get_tensor_parallel()
    x, w, b = random(T, in_features), random(10, in_features, seed=1), random(10, seed=2)
    layer = RowParallelLinear(in_features, 10, tp, bias=True, name="o_proj")
    fill(layer, {None: w}, {None: b})
    with tp.ledger.recording() as ledger:
        y = layer(input_slice(x, tp))
    return y.numpy(), [(e.op, e.label, e.shape) for e in ledger.entries]


@pytest.mark.parametrize("in_features", [12, 13])
def test_row_parallel_sums_over_ranks_and_adds_the_bias_once(ranks, in_features):
    want = F.linear(random(T, in_features), random(10, in_features, seed=1), random(10, seed=2))
    for y, _ in ranks(2).run(row_parallel_with_bias, in_features):
        torch.testing.assert_close(torch.from_numpy(y), want)


def test_row_parallel_talks_once_and_under_its_name(ranks):
    for _, seen in ranks(2).run(row_parallel_with_bias, 12):
        assert seen == [("all_reduce", "o_proj", (T, 10))]


def test_a_rank_without_peers_says_why_it_cannot_sum():
    layer = RowParallelLinear(D, 10, TPGroup(1, 2), name="layers.3.o_proj")
    with pytest.raises(ValueError, match=r"all_reduce 'layers.3.o_proj': rank 1 of 2 has no process group") as error:
        layer(random(T, D // 2))
    assert "reduce_results=False" in str(error.value)


def test_a_rank_alone_sums_without_a_process_group():
    layer = RowParallelLinear(D, 10, TPGroup())
    fill(layer, {None: random(10, D)})
    torch.testing.assert_close(layer(random(T, D)), random(T, D) @ random(10, D).T)


# --- what is read


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_together_the_ranks_read_every_row_once(ranks):
    w = InMemory(random(10, D))
    for layer in every_rank(ranks, lambda tp: ColumnParallelLinear(D, 10, tp)):
        layer.weight.weight_loader(w, None)
    assert w.times_read(0) == [1] * 10


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_together_the_ranks_read_every_column_once(ranks):
    w = InMemory(random(10, D))
    for layer in every_rank(ranks, lambda tp: RowParallelLinear(D, 10, tp)):
        layer.weight.weight_loader(w, None)
    assert w.times_read(1) == [1] * D


@HEADS
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_a_rank_reads_a_head_once_even_if_it_holds_it_twice(num_heads, num_kv_heads, ranks, kind):
    d = 4
    total = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
    weights = {key: random(n * d, D) for key, n in total.items()}
    for layer in every_rank(ranks, lambda tp: QKVParallelLinear(D, d, num_heads, num_kv_heads, tp, bias=True)):
        sources = fill(layer, weights, {key: w[:, 0] for key, w in weights.items()})
        held = {"q": layer.heads.q_heads, "k": layer.heads.kv_heads, "v": layer.heads.kv_heads}
        for key, n in total.items():
            want = [int(head in held[key]) for head in range(n) for _ in range(d)]
            assert sources[kind, key].times_read(0) == want


def test_three_ranks_do_hold_a_kv_head_twice():
    """The case that the test above is about: rank 0 of 3 has KV head 0 for two groups of query heads."""
    layer = QKVParallelLinear(D, 4, 14, 2, TPGroup(0, 3))
    assert layer.heads.kv_heads == (0, 0)


def test_parameters_name_the_full_shape_of_each_checkpoint_tensor():
    layer = QKVParallelLinear(D, 4, 14, 2, TPGroup(1, 3), bias=True)
    assert layer.weight.shard_shapes == {"q": (56, D), "k": (8, D), "v": (8, D)}
    assert layer.bias.shard_shapes == {"q": (56,), "k": (8,), "v": (8,)}
    assert RowParallelLinear(D, 10, TPGroup(1, 3)).weight.shard_shapes == {None: (10, D)}
    assert MergedColumnParallelLinear(D, [10, 7], TPGroup(1, 3)).weight.shard_shapes == {0: (10, D), 1: (7, D)}
