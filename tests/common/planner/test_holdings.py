"""What the planner says a rank holds, against the real model and the real pages."""

import pytest
import torch

from common.attention.kv_cache import PagedKVCache
from common.distributed.layout import Layout
from common.layers.communicator import LayerCommunicator
from common.layers.heads import HeadLayout
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.published_configs import CONFIGS, model_shape
from common.models.stages import stage_layers
from common.parallel_state import TPGroup
from common.planner.holdings import activations, holdings, parameters, stages
from common.planner.plan import Load, Stage, Way
from common.tiny_qwen import TINY_QWEN_PATH

LOAD = Load(context=1000, batch=6)


def real_parameters(config: ModelConfig, rank: int, ranks: int, layers: range | None = None) -> int:
    with torch.device("meta"):
        model = CausalLM(config, TPGroup(rank, ranks), layers)
    return sum(p.numel() for p in model.parameters())


# padded heads, MLP and vocabulary (3), replicated K and V (Qwen2.5-0.5B and the bundled model on 4), tied and untied heads
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "name", ["bundled", "SmolLM2-135M", "Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-0.6B", "Llama-3.2-3B"]
)
def test_the_weights_of_every_rank_are_those_of_the_model(name, ranks):
    config = ModelConfig.from_folder(TINY_QWEN_PATH) if name == "bundled" else model_shape(name)
    planned = parameters(config, Layout(ranks), Stage(config.num_layers, True, True)).total
    for rank in range(ranks):
        assert real_parameters(config, rank, ranks) == planned
    assert holdings(config, Way(Layout(ranks)), LOAD).weights == planned * LOAD.dtype.itemsize


# as the model cards say, in billions, rounded by them
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("SmolLM2-135M", 0.135), ("SmolLM2-360M", 0.36), ("SmolLM2-1.7B", 1.71), ("Qwen2.5-0.5B", 0.49),
        ("Qwen2.5-1.5B", 1.54), ("Qwen2.5-3B", 3.09), ("Qwen2.5-7B", 7.61), ("Qwen2.5-14B", 14.7), ("Qwen2.5-32B", 32.5),
        ("Qwen2.5-72B", 72.7), ("Qwen3-0.6B", 0.6), ("Qwen3-1.7B", 1.7), ("Qwen3-4B", 4.0), ("Qwen3-8B", 8.2),
        ("Qwen3-14B", 14.8), ("Qwen3-32B", 32.8), ("Llama-3-8B", 8.03), ("Llama-3-70B", 70.6), ("Llama-3.1-8B", 8.03),
        ("Llama-3.1-70B", 70.6), ("Llama-3.1-405B", 405), ("Llama-3.2-1B", 1.23), ("Llama-3.2-3B", 3.21),
    ],
)  # fmt: skip
def test_a_published_shape_has_as_many_parameters_as_published(name, billions):
    config = model_shape(name)
    whole = parameters(config, Layout(1), Stage(config.num_layers, True, True)).total
    assert whole / 1e9 == pytest.approx(billions, rel=0.015)


def test_every_published_shape_is_one_of_those():
    listed = test_a_published_shape_has_as_many_parameters_as_published.pytestmark[0].args[1]
    assert {name for name, _ in listed} == set(CONFIGS)


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["bundled", "Qwen2.5-7B", "Qwen3-0.6B"])
def test_the_weights_of_every_stage_are_those_of_the_model_s(name, ranks, pp):
    config = ModelConfig.from_folder(TINY_QWEN_PATH) if name == "bundled" else model_shape(name)
    planned = [parameters(config, Layout(ranks, pp), stage).total for stage in stages(config, pp)]
    real = [real_parameters(config, ranks - 1, ranks, stage_layers(config.num_layers, pp, i)) for i in range(pp)]
    assert planned == real


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen2.5-1.5B"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_stages_together_hold_the_model_and_a_tied_embedding_twice(name, ranks):
    config = model_shape(name)
    together = sum(parameters(config, Layout(ranks, 4), stage).total for stage in stages(config, 4))
    whole = parameters(config, Layout(ranks), Stage(config.num_layers, True, True))
    assert together - whole.total == (whole.embedding if config.tie_word_embeddings else 0)


@pytest.mark.parametrize("cut", [{"attn_dp": 2}, {"cp": 2}, {"attn_dp": 4}, {"cp": 4}], ids=str)
@pytest.mark.parametrize("name", ["bundled", "Qwen2.5-7B", "Llama-3.2-3B"])
def test_where_attention_is_cut_over_fewer_ranks_the_weights_are_those_of_the_model(name, cut):
    """The embedding goes with attention, the head with the MLP, and a tied one is held twice."""
    config = ModelConfig.from_folder(TINY_QWEN_PATH) if name == "bundled" else model_shape(name)
    layout = Layout(4, **cut)
    planned = parameters(config, layout, stages(config, 1)[0]).total
    for rank in range(4):
        everybody = TPGroup(rank, 4)
        communicator = LayerCommunicator(everybody, TPGroup(rank % layout.attn_tp, layout.attn_tp))
        with torch.device("meta"):
            model = CausalLM(config, everybody, communicator=communicator)
        assert sum(p.numel() for p in model.parameters()) == planned


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_pages_of_a_rank_are_those_of_the_cache(ranks):
    config = model_shape("Qwen2.5-0.5B")
    load = Load(context=100, batch=3, kv_dtype=torch.float16)
    pages = 3 * 7  # of 16 tokens
    heads = HeadLayout.of(config.num_heads, config.num_kv_heads, 0, ranks).num_kv
    cache = PagedKVCache(config.num_layers, pages, 16, heads, config.head_dim, torch.float16, "meta")
    assert holdings(config, Way(Layout(ranks)), load).kv == cache.kv.nbytes


def test_what_requests_and_contexts_are_shared_out_over():
    config, load = model_shape("Qwen2.5-7B"), Load(context=1600, batch=8)
    whole = holdings(config, Way(Layout(1)), load).kv
    assert holdings(config, Way(Layout(dp=4)), load).kv == whole // 4
    assert holdings(config, Way(Layout(pp=4)), load).kv == whole // 4
    assert holdings(config, Way(Layout(4)), load).kv == whole // 4, "4 KV heads"
    assert holdings(config, Way(Layout(8)), load).kv == whole // 4, "and each held twice"
    assert holdings(config, Way(Layout(8, attn_dp=8)), load).kv == whole // 8
    assert holdings(config, Way(Layout(8, cp=2)), load).kv == whole // 8
    assert holdings(config, Way(Layout(dp=3)), load).kv == whole * 3 // 8, "the fullest of three has three"


def test_sequence_parallelism_saves_the_residual_of_the_other_ranks_rows():
    config, load = model_shape("Qwen2.5-7B"), Load(context=8192, batch=1)
    stage = stages(config, 1)[0]
    plain, cut = (activations(config, Way(Layout(4), sp), stage, load) for sp in (False, True))
    assert plain - cut == 8192 * config.hidden_size * 2 * 3 // 4
