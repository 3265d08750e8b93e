"""What an adapter adds to a layer, cut over ranks as the layer is, against the layer with the adapter merged into W."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.layers.adapter_rows import Segments
from common.layers.cpu_linear import FORMS, packs, take_form
from common.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from common.layers.lora import EmbeddingSlots, LoRASlots, Thin, cut, give_slots
from common.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from common.parallel_state import TPGroup
from tests.common.in_memory import InMemory

T, D, V, RANK = 6, 12, 11, 3
CPU = torch.device("cpu")
# kind of layer: (made on a rank, [out, in] of each matrix by shard id)
LAYERS = {
    "column": (lambda tp: ColumnParallelLinear(D, 10, tp, bias=True), {None: (10, D)}),
    "gate and up": (lambda tp: MergedColumnParallelLinear(D, [9, 9], tp), {0: (9, D), 1: (9, D)}),
    # 6 query heads of 2: padded on 4 ranks, and every KV head lies on several
    "q, k, v": (lambda tp: QKVParallelLinear(D, 2, 6, 2, tp, bias=True), {"q": (12, D), "k": (4, D), "v": (4, D)}),
    "row": (lambda tp: RowParallelLinear(10, D, tp, bias=True, reduce_results=False), {None: (D, 10)}),
    "embedding": (lambda tp: VocabParallelEmbedding(V, D, tp, reduce_results=False), {None: (V, D)}),
    "head": (lambda tp: ParallelLMHead(V, D, tp), {None: (V, D)}),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(kind, seed=0):
    return {shard: random(*shape, seed=seed + i) for i, (shard, shape) in enumerate(LAYERS[kind][1].items())}


def adapter(kind, seed, rank=RANK, without=()):
    """{shard: Thin} of the whole matrices."""
    made = {}
    for i, (shard, (out, width)) in enumerate(LAYERS[kind][1].items()):
        out, width = (width, out) if kind == "embedding" else (out, width)  # noqa: PLW2901
        if shard not in without:
            made[shard] = Thin(random(rank, width, seed=seed + i), random(out, rank, seed=seed + 50 + i), 0.5 + i)
    return made


def layer_with(kind, tp, loaded, adapters=(), slots=4):
    layer = LAYERS[kind][0](tp)
    for shard, w in loaded.items():
        layer.weight.weight_loader(InMemory(w), shard)
    if getattr(layer, "bias", None) is not None:
        for shard, w in loaded.items():
            layer.bias.weight_loader(InMemory(w[:, 0].contiguous()), shard)
    shards = list(loaded)
    give_slots({str(shard): (layer, i) for i, shard in enumerate(shards)}, slots, 5)
    for slot, thins in enumerate(adapters, 1):
        layer.lora.put(
            slot, {shards.index(shard): cut(layer, shards.index(shard), thin) for shard, thin in thins.items()}
        )
    return layer


def merged(kind, loaded, thins):
    deltas = {shard: scale * b @ a for shard, (a, b, scale) in thins.items()}
    return {shard: w + (deltas[shard].t() if kind == "embedding" else deltas[shard]) if shard in deltas else w
            for shard, w in loaded.items()}  # fmt: skip


def inputs(kind, tp):
    if kind == "embedding":
        return torch.tensor([0, 10, 5, 5, 3, 7])
    width = LAYERS[kind][0](tp).weight.shape[1]
    return random(T, width, seed=9 + tp.rank * (kind == "row"))


def rows(slots):
    return Segments.of(np.array(slots), CPU)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_rank_computes_what_it_would_with_merged_weights(kind, ranks):
    """So what is joined over ranks as before, columns or sums, is the sum with the adapter."""
    loaded, adapters = (
        weights(kind),
        [adapter(kind, 100), adapter(kind, 200, rank=5), adapter(kind, 300, without=("k", 0))],
    )
    slots = [2, 0, 1, 3, 2, 0]
    for rank in range(ranks):
        tp = TPGroup(rank, ranks)
        x, layer = inputs(kind, tp), layer_with(kind, tp, loaded, adapters)
        got = layer(x, rows(slots))
        for slot in range(4):
            plain = merged(kind, loaded, adapters[slot - 1]) if slot else loaded
            bias_of = layer_with(kind, tp, loaded)  # biases were made from W
            want = layer_with(kind, tp, plain)
            if getattr(want, "bias", None) is not None:
                want.bias.copy_(bias_of.bias)
            mine = [i for i, one in enumerate(slots) if one == slot]
            torch.testing.assert_close(got[mine], want(x)[mine])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_rank_keeps_its_share_alone(ranks):
    """A of a column-parallel layer and B of a row-parallel one are whole, the others are cut."""
    column, row = (layer_with(kind, TPGroup(0, ranks), weights(kind)).lora for kind in ("column", "row"))
    assert column.a.shape == (4, 5, D)
    assert column.b.shape == (4, -(-10 // ranks), 5)
    assert row.a.shape == (4, 5, -(-10 // ranks))
    assert row.b.shape == (4, D, 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["column", "q, k, v", "gate and up", "row"])
def test_every_form_of_w_has_the_same_added(kind, form):
    if form == "packed" and not packs(torch.float32):
        pytest.skip("this torch does not pack")
    layer = layer_with(kind, TPGroup(), weights(kind), [adapter(kind, 100)])
    x = inputs(kind, TPGroup())
    want = layer(x, rows([1] * T))
    take_form(layer, form)
    torch.testing.assert_close(layer(x, rows([1] * T)), want)


def test_a_tied_head_that_multiplies_by_a_copy_has_it_added_too():
    embedding = VocabParallelEmbedding(V, D, TPGroup())
    embedding.weight.weight_loader(InMemory(random(V, D)))
    head = ParallelLMHead(V, D, TPGroup(), tied_to=embedding)
    give_slots({"lm_head": (head, 0)}, 1, 3)
    head.lora.put(1, {0: cut(head, 0, adapter("head", 100)[None])})
    x = random(T, D, seed=5)
    want = head(x, rows([1] * T))
    take_form(head, "column-major")
    assert head.copy is not None
    torch.testing.assert_close(head(x, rows([1] * T)), want)
    assert embedding.lora is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sampled_from(list(LAYERS)))
def test_rows_of_any_mix_are_as_each_row_alone(slots, kind):
    layer = layer_with(
        kind, TPGroup(), weights(kind), [adapter(kind, 100), adapter(kind, 200, rank=1)]
    )  # slot 3 is empty
    x = inputs(kind, TPGroup())[torch.arange(len(slots)) % T]
    together = layer(x, rows(slots))
    for i, slot in enumerate(slots):
        torch.testing.assert_close(together[i : i + 1], layer(x[i : i + 1], rows([slot])))


def test_each_adapter_has_one_segment():
    """Where its rows are neighbours, nothing is moved; else rows are put in the order of the slots."""
    apart = rows([0, 2, 2, 1, 0, 1])
    assert apart.segments == ((1, 0, 2), (2, 2, 4))
    assert apart.order.tolist() == [3, 5, 1, 2]
    assert rows([3, 3, 0, 0, 1, 0]) == Segments(((3, 0, 2), (1, 4, 5)), None)
    assert rows([2]) == Segments(((2, 0, 1),), None)
    assert rows([0, 0]) == Segments((), None)


def test_slots_are_written_in_place_and_nothing_of_the_last_adapter_is_left():
    """A graph that was captured before reads from the same memory."""
    kind = "q, k, v"
    layer = layer_with(kind, TPGroup(), weights(kind), [adapter(kind, 100, rank=5)])
    tensors = (layer.lora.a, layer.lora.b, layer.lora.starts, layer.lora.scales)
    before = [t.data_ptr() for t in tensors]
    x, plain = inputs(kind, TPGroup()), layer(inputs(kind, TPGroup()))
    layer.lora.put(1, {1: cut(layer, 1, adapter(kind, 200, rank=2)["k"])})
    other = layer_with(kind, TPGroup(), weights(kind), [{"k": adapter(kind, 200, rank=2)["k"]}])
    assert torch.equal(layer(x, rows([1] * T)), other(x, rows([1] * T)))
    assert layer.lora.starts[0].tolist() == [0, 0, 2, 2]
    layer.lora.clear(1)
    assert torch.equal(layer(x, rows([1] * T)), plain)
    assert [t.data_ptr() for t in (layer.lora.a, layer.lora.b, layer.lora.starts, layer.lora.scales)] == before


def test_a_layer_without_slots_and_a_step_without_adapters_change_nothing():
    layer = LAYERS["column"][0](TPGroup())
    layer.weight.weight_loader(InMemory(random(10, D)))
    x = inputs("column", TPGroup())
    assert layer.lora is None
    assert torch.equal(layer(x, rows([1] * T)), layer(x))
    with_slots = layer_with("column", TPGroup(), weights("column"), [adapter("column", 100)])
    assert torch.equal(with_slots(x, rows([0] * T)), with_slots(x))


def test_the_memory_of_slots_is_counted():
    layer = layer_with("column", TPGroup(), weights("column"))
    assert layer.lora.nbytes == 4 * 4 * 5 * (D + 10)
    assert isinstance(layer.lora, LoRASlots)
    assert isinstance(layer_with("embedding", TPGroup(), weights("embedding")).lora, EmbeddingSlots)
