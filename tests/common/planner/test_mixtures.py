"""The planner's numbers of mixtures of experts: weights against real ranks, messages against the ledger, experts that are read."""

import random
from collections import Counter
from itertools import combinations

import pytest
import torch

from common.attention.kv_cache import PagedKVCache
from common.distributed.layout import Layout
from common.layers.communicator import LayerCommunicator
from common.layers.moe import MoEOptions
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.published_configs import MIXTURES, model_shape
from common.models.stages import stage_layers
from common.parallel_state import TPGroup
from common.planner.holdings import holdings, page_bytes, parameters, stages
from common.planner.plan import Load, Way, ways
from common.planner.work import Step, messages, most_on_a_rank, read_share, touched, work
from tests.common.planner.test_work import CONTROL, FLOAT32, recorded
from tests.mixtures import save_mixture

LOAD = Load(context=1000, batch=6)


def real_bytes(config: ModelConfig, way: Way, rank: int, stage: int = 0) -> int:
    layout, everybody = way.layout, TPGroup(rank, way.layout.tp)
    place = layout.place(rank)
    options = MoEOptions(
        ep=TPGroup(place.ep, layout.ep), moe_tp=TPGroup(place.moe_tp, layout.moe_tp), dispatch=way.ep_dispatch
    )
    communicator = LayerCommunicator(everybody, TPGroup(place.attn_tp, layout.attn_tp), way.sp)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            layers = stage_layers(config.num_layers, layout.pp, stage)
            model = CausalLM(config, everybody, layers, communicator, options)
    finally:
        torch.set_default_dtype(torch.float32)
    return sum(p.numel() * p.element_size() for p in model.parameters())


CUTS = [
    Way(Layout()), Way(Layout(3)), Way(Layout(4, ep=4)), Way(Layout(4, ep=2)), Way(Layout(3, ep=3)),
    Way(Layout(4, attn_dp=2, ep=2)), Way(Layout(4, attn_dp=4, ep=4), ep_dispatch="all_to_all"),
    Way(Layout(2, ep=2), sp=True, ep_dispatch="all_to_all"),
]  # fmt: skip


@pytest.mark.parametrize("way", CUTS, ids=str)
@pytest.mark.parametrize(
    "name", ["Mixtral-8x7B", "Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "DeepSeek-V3"]
)
def test_the_weights_of_every_rank_are_those_of_the_model(name, way):
    config = model_shape(name)
    planned = holdings(config, way, LOAD).weights
    for rank in {0, way.layout.tp - 1}:
        assert real_bytes(config, way, rank) == planned


@pytest.mark.parametrize("name", ["DeepSeek-V2-Lite", "Qwen3-30B-A3B"])
def test_the_weights_of_every_stage_are_those_of_the_model_s(name):
    """The first layer of one of them is dense, and lies in the first stage."""
    config, way = model_shape(name), Way(Layout(2, pp=3, ep=2))
    for i, stage in enumerate(stages(config, 3)):
        assert parameters(config, way.layout, stage).nbytes(torch.bfloat16) == real_bytes(config, way, 1, i)


# as the model cards say, in billions, rounded by them
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Mixtral-8x7B", 46.7), ("Mixtral-8x22B", 141), ("Qwen1.5-MoE-A2.7B", 14.3), ("Qwen2-57B-A14B", 57.4),
        ("Qwen3-30B-A3B", 30.5), ("Qwen3-235B-A22B", 235), ("DeepSeek-V2-Lite", 15.7), ("DeepSeek-V2", 236),
        ("DeepSeek-V3", 671), ("DeepSeek-R1", 671),
    ],
)  # fmt: skip
def test_a_published_shape_has_as_many_parameters_as_published(name, billions):
    config = model_shape(name)
    assert parameters(config, Layout(), stages(config, 1)[0]).total / 1e9 == pytest.approx(billions, rel=0.015)


def test_every_published_shape_is_one_of_those():
    listed = test_a_published_shape_has_as_many_parameters_as_published.pytestmark[0].args[1]
    assert {name for name, _ in listed} == set(MIXTURES)


def test_the_pages_of_a_latent_model_are_one_row_a_token_whatever_the_ranks():
    config = model_shape("DeepSeek-V3")
    stage = stages(config, 1)[0]
    for ranks in (1, 4):
        held = page_bytes(config, Layout(ranks), stage, LOAD)
        assert held == 16 * 70_272 == PagedKVCache.bytes_per_page(61, 16, 1, 576, torch.bfloat16, planes=1)


WAYS = [
    Way(Layout(2, ep=2)), Way(Layout(3, ep=3)), Way(Layout(4, ep=2)), Way(Layout(2, 2, ep=2)), Way(Layout(2, attn_dp=2, ep=2)),
    Way(Layout(2, ep=2), sp=True, ep_dispatch="all_to_all"), Way(Layout(3, ep=3), sp=True, ep_dispatch="all_to_all"),
    Way(Layout(2, attn_dp=2, ep=2), ep_dispatch="all_to_all"), Way(Layout(4, attn_dp=2, ep=4), ep_dispatch="all_to_all"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "way"), [(way.layout.world, way) for way in WAYS], ids=str)
def test_a_step_sends_what_the_ledger_records(ranks, size, way, tmp_path_factory):
    """What goes home again in a prefill step depends on the router: of all ranks together it is what was sent, and planned."""
    folder = save_mixture("shared", tmp_path_factory.getbasetemp() / "mixture_shared")
    config = ModelConfig.from_folder(folder)
    steps = [Step(rows=4, known=64, emits=4, decode=True), Step(rows=10, known=10, emits=1, decode=False)]
    everyone = ranks(size).run(recorded, way, folder)
    for number, step in enumerate(steps):
        home = sum(nbytes for told in everyone for _, label, nbytes in told[number] if label == "combine")
        for rank, told in enumerate(everyone):
            place = way.layout.place(rank)
            want = Counter()
            for message in messages(config, way, stages(config, way.layout.pp)[place.pp], FLOAT32, step):
                if message.label not in CONTROL:
                    want[message.op, message.label, message.nbytes] += message.times
            mine = Counter(told[number])
            left_out = {("receive", "logits")}
            if not step.decode and way.spreads:
                left_out |= {("all_to_all", "hidden"), ("all_to_all", "combine"), ("all_to_all", "dispatch")}
                if place.attn_dp > 0:  # without the prompt it hands in nothing
                    left_out |= {("all_to_all", "gate_up_proj"), ("all_to_all", "down_proj")}
            mine, want = ({m: n for m, n in said.items() if m[:2] not in left_out} for said in (mine, want))
            if place.attn_dp == 0 or step.decode:
                assert mine == want, (rank, step)
        if way.travels and not step.decode:
            layers, row = stages(config, 1)[0].sparse, config.hidden_size * 4
            sent = sum(nbytes for told in everyone for _, label, nbytes in told[number] if label == "dispatch")
            assert sent == home == layers * step.rows * config.mixture.router.top_k * way.layout.moe_tp * row


def test_the_experts_that_a_step_reads_are_those_that_somebody_has_chosen():
    """By hand for one row; against draws for more."""
    config, draw = model_shape("Qwen3-30B-A3B"), random.Random(0)
    assert touched(config.mixture, 1) == pytest.approx(8 / 128)
    for rows in (4, 32):
        drawn = [len({e for _ in range(rows) for e in draw.sample(range(128), 8)}) for _ in range(400)]
        assert touched(config.mixture, rows) == pytest.approx(sum(drawn) / len(drawn) / 128, rel=0.02)
    stage, load = stages(config, 1)[0], Load(1, 1)
    one, all_of_it = (work(config, Way(Layout()), stage, load, Step(rows, 1, 1, decode=True)) for rows in (1, 10_000))
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    assert all_of_it.weights - one.weights == pytest.approx(experts * (1 - 8 / 128), rel=1e-6)
    active = 3.35e9  # as the card says, of which the embedding is not read
    assert one.weights / 2 == pytest.approx(active - 151_936 * 2048, rel=0.02)


@pytest.mark.parametrize(("experts", "ranks"), [(8, 1), (8, 2), (8, 4), (9, 3), (7, 3), (5, 4), (6, 6)])
def test_the_rank_with_most_of_the_experts_is_the_average_over_all_sets_of_them(experts, ranks):
    """Also where they do not divide: the last ranks have fewer, or none."""
    slots = -(-experts // ranks)
    for drawn in range(experts + 1):
        most = [
            max(Counter(e // slots for e in chosen).values(), default=0)
            for chosen in combinations(range(experts), drawn)
        ]
        assert most_on_a_rank(experts, ranks, drawn) == pytest.approx(sum(most) / len(most), rel=1e-12)


def test_a_step_waits_for_the_rank_that_has_most_of_the_experts():
    """Of whole experts one rank reads more than its share, until all are read; columns are read alike."""
    mixture, draw = model_shape("Qwen3-30B-A3B").mixture, random.Random(0)
    drawn = [max(Counter(e // 32 for e in draw.sample(range(128), 8)).values()) for _ in range(20_000)]
    assert 32 * read_share(mixture, 4, 1) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    for rows in range(1, 200):
        assert touched(mixture, rows) == read_share(mixture, 1, rows) < read_share(mixture, 2, rows) <= 1
        assert read_share(mixture, 2, rows) <= read_share(mixture, 4, rows) <= 1
    assert read_share(mixture, 4, 200) == 1


def test_the_bytes_of_a_step_are_those_of_the_rank_with_most_experts():
    config, load, step = model_shape("Qwen3-30B-A3B"), Load(1, 1), Step(1, 1, 1, decode=True)
    stage = stages(config, 1)[0]
    dealt, cut = (work(config, Way(layout), stage, load, step) for layout in (Layout(4, ep=4), Layout(4)))
    an_expert = 48 * 3 * 2048 * 768 * 2
    assert dealt.weights - cut.weights == pytest.approx(an_expert * (most_on_a_rank(128, 4, 8) - 8 / 4), abs=1)
    assert (dealt.flops, dealt.kv, dealt.messages) == (cut.flops, cut.kv, cut.messages)


def test_experts_are_dealt_out_over_all_parts_of_the_ranks_and_travel_where_rows_are_spread():
    found = [way for way in ways(4, model_shape("Mixtral-8x7B"), LOAD, 8) if way.layout.ep > 1]
    assert {way.layout.ep for way in found if way.layout.tp == 4 and not way.spreads} == {2, 4}
    assert {way.layout.ep for way in found if way.layout.tp == 4 and way.spreads} == {4}
    assert all(way.spreads for way in found if way.travels)
    assert {way.layout.attn_dp for way in found if way.travels} == {1, 2, 4}
    assert not [way for way in ways(4, model_shape("Qwen3-8B"), LOAD, 8) if way.layout.ep > 1]
