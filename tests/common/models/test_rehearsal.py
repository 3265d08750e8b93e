"""What a rehearsal may leave out: layers that launch what another one launches, and none else."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.attention.torch_native import TorchNativeAttention
from common.kernels import linear_choice
from common.layers import linear
from common.models import graph_runner
from common.models.graph_runner import DecodeGraphs
from common.models.rehearsal import one_of_each_kind, some_layers
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.tiny_qwen import TINY_QWEN_PATH

LAYERS = 4


@pytest.fixture
def model():
    return load_model(TINY_QWEN_PATH, TPGroup())[0]


@pytest.fixture
def ran(model):
    """Numbers of the layers that ran."""
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    return ran


def test_layers_that_are_alike_are_one_kind(model):
    assert len(model.model.layers) == LAYERS
    assert one_of_each_kind(model) == {0}


def test_an_address_that_kernels_are_compiled_for_is_a_kind_of_its_own(model):
    norm = model.model.layers[2].input_layernorm
    room = torch.zeros(norm.weight.numel() + 1)
    norm.weight = torch.nn.Parameter(room[1:], requires_grad=False)
    assert one_of_each_kind(model) == {0, 2}


def test_a_shape_is_a_kind_of_its_own(model):
    layer = model.model.layers[3].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight[:, :-16].contiguous(), requires_grad=False)
    assert one_of_each_kind(model) == {0, 3}


def test_whoever_multiplies_otherwise_is_not_known(model):
    model.model.layers[1].mlp.down_proj.method = object()
    assert one_of_each_kind(model) is None


def test_experts_and_several_ranks_are_not_known(model):
    assert one_of_each_kind(load_model(TINY_QWEN_PATH / "mixture", TPGroup())[0]) is None
    model.tp = TPGroup(rank=0, size=2)
    assert one_of_each_kind(model) is None


def graphs_of(model, scales=None, max_loras=0):
    heads, config = model.heads, model.config
    cache = PagedKVCache(LAYERS, 8, 4, heads.num_kv, config.head_dim, scales=scales)
    return DecodeGraphs(
        model, TorchNativeAttention, cache, SequenceTable(2, 8, 4, torch.device("cpu")), 2, max_loras=max_loras
    )


def test_a_rehearsal_runs_all_layers_once_then_one_and_a_recording_all(model, ran):
    graphs = graphs_of(model)
    graphs.rehearse()
    assert ran == [*range(LAYERS), *[0] * (len(graphs.shapes) - 1)]
    ran.clear()
    with torch.inference_mode():
        graphs._step(graphs.shapes[0])
    assert ran == list(range(LAYERS))


def test_layers_that_read_other_pages_are_all_rehearsed(model, ran):
    graphs = graphs_of(model)
    graphs.cache.scales = [(1.0, 1.0)] * (LAYERS - 1) + [(0.5, 1.0)]
    graphs.rehearse()
    assert ran == list(range(LAYERS)) * len(graphs.shapes)


class NotesPages(TorchNativeAttention):
    """Notes, by shape, what Triton asks of a layer's pages: does each part begin at a multiple of 16 bytes?"""

    seen: ClassVar[set] = set()

    def __call__(self, layer, q, k, v):
        pages = self.cache.layer(layer)[:4]
        self.seen.add((len(q), *(x is not None and x.data_ptr() % 16 == 0 for x in pages)))
        return super().__call__(layer, q, k, v)


@pytest.mark.parametrize(("pages", "alike"), [(1001, False), (1000, True)])
def test_pages_that_begin_at_other_addresses_are_all_rehearsed(model, ran, monkeypatch, pages, alike):
    """int8 with pages of one token: a layer's scales lie 2 bytes a page and head behind the other's."""
    heads, config = model.heads, model.config
    cache = PagedKVCache(LAYERS, pages, 1, heads.num_kv, config.head_dim, torch.int8)
    graphs = DecodeGraphs(model, NotesPages, cache, SequenceTable(2, 8, 1, torch.device("cpu")), 2)
    monkeypatch.setattr(NotesPages, "seen", set())
    graphs.rehearse()
    rehearsed, NotesPages.seen = NotesPages.seen, set()
    with torch.inference_mode():
        for shape in graphs.shapes:
            graphs._step(shape)
    assert rehearsed == NotesPages.seen
    assert (len({one[1:] for one in rehearsed}) == 1) == alike
    assert (graphs._enough == {0}) == alike


@pytest.fixture
def multiplies_as_on_a_gpu(monkeypatch):
    """Asks who multiplies, and then does as on a CPU."""

    def multiply(x, weight, bias=None, dtype=None):
        linear_choice.wanted(x, weight, bias, dtype)
        return F.linear(x, weight, bias)

    monkeypatch.setattr(linear, "multiply", multiply)
    with linear_choice.forgotten():
        yield


def test_products_are_timed_with_the_weights_of_all_layers(model, multiplies_as_on_a_gpu):
    with linear_choice.noting() as met:
        graphs_of(model).rehearse()
    noted = {at for each in met.values() for at in each}
    for layer in model.model.layers:
        with_bias = [layer.self_attn.qkv_proj]
        for product in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            matrix = linear_choice.Matrix(*product.weight.shape, str(product.weight.dtype), product in with_bias)
            assert product.weight.data_ptr() in noted
            own = [x.data_ptr() for x in linear_choice.cold_matrices(matrix, met)][:LAYERS]
            assert len(set(own)) == LAYERS
            assert product.weight.data_ptr() in own


def test_memory_that_is_kept_is_given_back_around_the_first_recording(model, monkeypatch):
    """During a recording it is not, so what the largest step's rehearsal leaves could be missing there."""
    graphs, events = graphs_of(model), []

    def record(call, before, stream, pool):
        before()
        events.append("recorded")
        return SimpleNamespace(pool=lambda: "pool"), (None, [])

    monkeypatch.setattr(graph_runner, "record", record)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    monkeypatch.setattr(graphs, "_step", lambda *_: events.append("run"))
    graphs.capture()
    others = graphs.shapes[1:]
    assert events == ["given back", "run", "given back", "recorded", *["run", "recorded"] * len(others), "given back"]


def test_whoever_asks_what_enters_a_layer_gets_it(model, ran):
    """A drafter does, of layers that a rehearsal would leave out."""
    entering, page = {2: None}, np.zeros(1, dtype=np.int64)
    table = graphs_of(model).table
    step = table.prefill(np.arange(3), page, 0 * page, page + 3)
    attention = TorchNativeAttention(graphs_of(model).cache, step.meta)
    with torch.inference_mode(), some_layers(model, frozenset({0})):
        model(step.input_ids, step.positions, attention, entering=entering)
    assert ran == list(range(LAYERS))
    assert entering[2].shape == (3, model.config.hidden_size)
    assert model.model.some is None
