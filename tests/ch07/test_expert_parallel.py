"""Expert parallelism in the engine: the tokens of transformers, whatever may not change them.

pytest tests/ch07/test_expert_parallel.py
"""

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ch07_sglang_radix import Engine
from ch07_sglang_radix.experts.rebalancer import Rebalancer
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.replicas import answers_of_replicas
from tests.ch07.test_attention_data_parallel import give_back_all
from tests.ch07.test_product import CHUNKS, NEW_TOKENS, PROMPTS, cases
from tests.mixtures import save_mixture
from tests.oracle import SMALL, greedy, some_prompts
from tests.ranks import layout_of_the_pool

SMALL_POOL = 112
TRAVEL, COPIES = {"ep_dispatch": "all_to_all"}, {"ep_num_redundant_experts": 2}
EP2, EP3, EP4 = ({"expert_parallel_size": n} for n in (2, 3, 4))
DATA2, DATA3, DATA4 = ({"attention_data_parallel_size": n} for n in (2, 3, 4))
SEQUENCE = {"enable_layernorm_sp": True}
LAYOUTS = {  # ranks, sizes, options, model
    "ep2": (2, EP2, {}, "shared"),
    "ep2, copies": (2, EP2, COPIES | {"ep_dispatch_algorithm": "dynamic"}, "one each"),
    "ep2, attn-dp2": (2, EP2 | DATA2, COPIES, "wide"),
    "ep2, attn-dp2, rows travel": (2, EP2 | DATA2, TRAVEL | COPIES, "shared"),
    "ep2, sp, rows travel": (2, EP2, TRAVEL | SEQUENCE, "shared"),
    "ep3": (3, EP3, {}, "one each"),
    "ep3, sp, rows travel": (3, EP3, TRAVEL | SEQUENCE, "one each"),
    "ep2 x moe-tp2": (4, EP2, COPIES, "shared"),
    "ep2 x moe-tp2, attn-dp2, rows travel": (4, EP2 | DATA2, TRAVEL, "wide"),
    "ep4, attn-dp4, rows travel": (4, EP4 | DATA4, TRAVEL, "one each"),
    "pp2 x ep2": (4, EP2 | {"pipeline_parallel_size": 2}, COPIES, "shared"),
    "ep2, cp2": (2, EP2 | {"context_parallel_size": 2}, {}, "shared"),
    "ep2, copies, latent": (2, EP2, COPIES, "deepseek_v2"),
    "ep3, attn-dp3, rows travel, latent": (3, EP3 | DATA3, TRAVEL | COPIES, "deepseek_v3"),
    "ep4, attn-dp4, rows travel, latent": (4, EP4 | DATA4, TRAVEL | COPIES, "deepseek_v3"),
}


@cache
def wrapper(folder, page_size: int, pool: int, layout: str) -> TPRadixAttentionModelWrapper:
    _, sizes, options, _ = LAYOUTS[layout]
    parallel = layout_of_the_pool(None, **sizes)
    return TPRadixAttentionModelWrapper(folder, "cpu", page_size, max_total_tokens=pool, parallel=parallel, **options)


def serve(case: dict, folder, layout: str, every: int | None = None) -> list:
    """[(tokens, how it ended), ...] of the requests as they came; pages are checked every step.

    every: experts go to other places after so many steps, and stay there for the next case.
    """
    model = wrapper(folder, case["page_size"], SMALL_POOL if case["small_pool"] else 4096, layout)
    chunk = CHUNKS[case["chunk"]][case["page_size"]]
    scheduler = TPScheduler(model, chunked_prefill_size=chunk, check=True, **case["options"])
    if every:
        Rebalancer(scheduler, every)
    coming = sorted(case["requests"], key=lambda request: request[0])
    aborts: list[tuple[int, int]] = []

    def arrivals(step: int) -> bool:
        if case["small_pool"]:
            for rank in scheduler.data_ranks:
                rank.new_token_ratio = min(rank.new_token_ratio, 0.1)  # admit too many
        while coming and (coming[0][0] <= step or not scheduler.busy):
            _, prompt, new, priority, space, abort_at = coming.pop(0)
            params = SamplingParams(max_new_tokens=new, ignore_eos=True)
            rid = scheduler.enqueue(None, PROMPTS[prompt], params, priority=priority, extra_key=space)
            if abort_at is not None:
                aborts.append((abort_at, rid))
        for at, rid in aborts:
            if at == step:
                scheduler.abort(rid)
        return bool(coming)

    results = scheduler.process_requests(arrivals if scheduler.replica.rank == 0 else None)
    if scheduler.replica.rank == 0:
        give_back_all(scheduler)
    return [(r.output_ids, r.finish_reason["type"]) for r in results.values()]


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, checkpoint):
    """mixture(name) -> folder, of mixtures.MIXTURES or of oracle.SMALL."""
    made_at = lambda name: tmp_path_factory.getbasetemp() / f"mixture_{name.replace(' ', '_')}"  # noqa: E731
    return lambda name: checkpoint(name) if name in SMALL else save_mixture(name, made_at(name))


@pytest.mark.parametrize(("size", "layout"), [(LAYOUTS[name][0], name) for name in LAYOUTS], ids=str)
def test_nothing_changes_an_answer(size, layout, ranks, mixture):
    folder = mixture(LAYOUTS[layout][3])

    @seed(list(LAYOUTS).index(layout))  # or each layout would draw the same ones
    @settings(
        max_examples=max(settings().max_examples // 40, 2), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    @given(case=cases, every=st.sampled_from([2, 5, None]))
    def draw(case, every):
        wanted = sorted(case["requests"], key=lambda request: request[0])
        for answers in ranks(size).run(serve, case, folder, layout, every):
            assert len(answers) == len(wanted)
            for (tokens, ended), (_, prompt, new, _, _, abort_at) in zip(answers, wanted, strict=True):
                expected = greedy(folder, PROMPTS[prompt], NEW_TOKENS)[:new]
                assert tokens == (expected[: len(tokens)] if ended == "abort" else expected)
                assert ended != "abort" or abort_at is not None

    draw()


def test_an_engine_deals_out_its_experts_and_idle_ranks_take_part(mixture):
    """Two prompts for three data ranks, experts on all three; k = 1, so that most experts of a step are empty."""
    folder, prompts = mixture("one each"), [[5, 6, 7], [8] * 40]
    with Engine(str(folder), attn_dp_size=3, ep_size=3, ep_dispatch="all_to_all", device="cpu", check=True) as engine:
        answers = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 6, "ignore_eos": True})
        assert [answer["output_ids"] for answer in answers] == [greedy(folder, p, 6) for p in prompts]
        info = engine.get_server_info()
        assert (info["tp_size"], info["ep_size"], info["attn_dp_size"]) == (3, 3, 3)


def test_replicas_have_experts_of_their_own(mixture, tmp_path):
    """dp x ep under torchrun: two replicas of two ranks."""
    folder, prompts = mixture("one each"), some_prompts(1009, 5, shared=20, longest=12)
    flags = {"model_path": str(folder), "dp_size": 2, "tp_size": 2, "ep_size": 2}
    (told,) = answers_of_replicas(tmp_path, prompts, [flags])
    assert [ids for ids, _ in told] == [greedy(folder, prompt, 8) for prompt in prompts]
    assert {rank for _, rank in told} == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp_size": 4, "ep_size": 3}, r"ep_size=3 does not divide tp_size=4, inside which it is cut; use a product of 1, 2, 4"),
        ({"ep_size": 0}, "ep_size=0"),
        ({"tp_size": 2, "ep_size": 2, "ep_dispatch": "deepep"}, "ep_dispatch='deepep' is unknown; use replicated or all_to_all"),
        ({"tp_size": 2, "ep_size": 2, "ep_dispatch": "all_to_all"}, "rows that are spread, and here every rank has all of a"),
        ({"ep_num_redundant_experts": 2}, "ep_num_redundant_experts=2 with ep_size=1: copies share the load of several ranks"),
        ({"ep_size": 2, "ep_dispatch_algorithm": "fake"}, "ep_dispatch_algorithm='fake' is unknown; use static or dynamic"),
        ({"ep_size": 2, "moe_a2a_backend": "deepep"}, "moe_a2a_backend is not here: use ep_dispatch='all_to_all'"),
        ({"ep_size": 2, "model_path": str(TINY_QWEN_PATH)}, "Qwen2ForCausalLM has no experts to deal out over ep_size=2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Engine(device="cpu", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (None, {"ep_size": 2, "enable_eplb": True}, "Qwen2ForCausalLM has no experts to deal out over ep_size=2"),
        (None, {"attn_dp_size": 2, "ep_dispatch": "all_to_all"}, r"has no experts for rows to travel to \(ep_dispatch=all_to_all"),
        ("wide", {"ep_size": 5}, "ep_size=5 ranks for 4 experts: some would have none; use ep_size=4 or less"),
        ("wide", {"ep_size": 2, "ep_num_redundant_experts": 10**8}, "with 4 each of 2 ranks has all of 4 experts already"),
        ("deepseek_v3", {"cp_size": 2}, "cp_size=2: the ring sends K and V of heads round"),
    ],
)  # fmt: skip
def test_what_config_json_says_against_a_layout_is_said_before_a_rank_is_started(
    model, arguments, message, mixture, monkeypatch
):
    monkeypatch.setattr("ch07_sglang_radix.engine.ParallelState", None)
    folder = mixture(model) if model else TINY_QWEN_PATH
    with pytest.raises(ValueError, match=message) as error:
        Engine(str(folder), device="cpu", **arguments)
    assert "\n" not in str(error.value)


def answers(folder, sizes: dict, options: dict, prompts: list[list[int]], moves: bool = False) -> list:
    """Twice, so that the second time hits; in chunks. moves: every third step, in the middle of requests; pages stay."""
    parallel = layout_of_the_pool(None, **sizes)
    model = TPRadixAttentionModelWrapper(folder, "cpu", 4, max_total_tokens=1024, parallel=parallel, **options)
    scheduler = TPScheduler(model, check=True, chunked_prefill_size=16)
    moved = move_every_third_step(scheduler) if moves else []
    said: list = []
    for _ in range(2):
        for prompt in prompts:
            scheduler.add_request(input_ids=prompt, max_new_tokens=6)
        said += [out.output_ids for out in scheduler.process_requests().values()]
    assert len(moved) > 1 or not moves
    return said


def move_every_third_step(scheduler: TPScheduler) -> list[int]:
    """All experts, to anywhere: a rebalancer leaves them where they are if that is good. The list grows with each move."""
    model, control, rng = scheduler.wrapper, scheduler.control, random.Random(3)
    experts, copies = range(model.placement.num_experts), model.placement.redundant
    moved: list[int] = []

    def move() -> None:
        assert model.expert_load().sum() > 0
        layers = range(model.config.num_layers)
        new = [rng.sample([*experts, *rng.choices(experts, k=copies)], len(experts) + copies) for _ in layers]
        model.move_experts(torch.tensor(new))
        assert model.expert_load().sum() == 0
        moved.append(len(moved))

    def after_step() -> None:
        if scheduler.step_number % 3 == 0:
            scheduler.settle_all()
            control.together("move")

    control.notes["move"] = move
    if scheduler.replica.rank == 0:
        scheduler.after_step.insert(0, after_step)  # pages are checked behind it
    return moved


@pytest.mark.parametrize(
    ("size", "sizes", "options"),
    [(2, EP2, COPIES), (3, EP3, COPIES), (4, EP2 | {"pipeline_parallel_size": 2}, COPIES),
     (4, EP2 | DATA2, TRAVEL | COPIES), (4, EP4 | DATA4, TRAVEL)],
    ids=["ep2", "ep3", "pp2 x ep2", "ep2 x moe-tp2, attn-dp2, rows travel", "ep4, attn-dp4, rows travel"],
)  # fmt: skip
def test_pages_written_before_experts_moved_are_right_afterwards(size, sizes, options, mixture, ranks):
    folder = mixture("one each" if sizes == EP4 | DATA4 else "shared")
    prompts = some_prompts(1009, 5, shared=20, longest=12)
    expected = [greedy(folder, prompt, 6) for prompt in prompts] * 2
    for said in ranks(size).run(answers, folder, sizes, options, prompts, True):
        assert said == expected


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    ("size", "sizes", "options"),
    [(2, EP2, {"enable_two_batch_overlap": True}), (2, EP2 | DATA2, TRAVEL), (2, EP2, TRAVEL | SEQUENCE),
     (4, EP4 | DATA4, TRAVEL | COPIES)],
    ids=["ep2, two halves", "ep2, attn-dp2, rows travel", "ep2, sp, rows travel", "ep4, attn-dp4, rows travel, copies"],
)  # fmt: skip
def test_every_family_of_mixtures(size, sizes, options, family, checkpoint, ranks):
    """Dense first layers, shared experts, groups and biases of routers, latent attention: tokens of transformers, while experts
    move."""
    folder, prompts = checkpoint(family), some_prompts(1009, 5, shared=20, longest=12)
    expected = [greedy(folder, prompt, 6) for prompt in prompts] * 2
    for said in ranks(size).run(answers, folder, sizes, options, prompts, True):
        assert said == expected


@pytest.mark.parametrize(
    ("size", "family"),
    [(3, "mixtral"), (3, "one_of_60"), *((4, name) for name in ("qwen2_moe", "qwen3_moe", "mixtral"))],
)
def test_columns_of_every_expert_on_three_and_four_ranks(size, family, checkpoint, ranks):
    """Tensor parallelism alone; widths of 75, 24, 37 and 41, of which most ranks get a column of padding."""
    folder, prompts = checkpoint(family), some_prompts(1009, 5, shared=20, longest=12)
    expected = [greedy(folder, prompt, 6) for prompt in prompts] * 2
    for said in ranks(size).run(answers, folder, {}, {}, prompts):
        assert said == expected
