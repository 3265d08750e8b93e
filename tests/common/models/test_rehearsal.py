"""What a rehearsal may leave out: layers that launch what another one launches, and none else."""

import numpy as np
import pytest
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.attention.torch_native import TorchNativeAttention
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


def test_a_rehearsal_runs_one_layer_and_a_recording_all(model, ran):
    graphs = graphs_of(model)
    graphs.rehearse()
    assert ran == [0] * len(graphs.shapes)
    ran.clear()
    with torch.inference_mode():
        graphs._step(graphs.shapes[0])
    assert ran == list(range(LAYERS))


def test_layers_that_read_other_pages_are_all_rehearsed(model, ran):
    graphs = graphs_of(model)
    graphs.cache.scales = [(1.0, 1.0)] * (LAYERS - 1) + [(0.5, 1.0)]
    graphs.rehearse()
    assert ran == list(range(LAYERS)) * len(graphs.shapes)


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
