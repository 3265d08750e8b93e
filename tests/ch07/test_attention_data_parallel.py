"""Attention data parallelism, and rows cut over ranks: the tokens of transformers, whatever may not change them.

pytest tests/ch07/test_attention_data_parallel.py
"""

import json
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from ch07_sglang_radix import Engine
from ch07_sglang_radix.data_rank import pick_data_rank
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.test_product import CHUNKS, NEW_TOKENS, PROMPTS, cases
from tests.oracle import greedy
from tests.ranks import layout_of_the_pool

SMALL_POOL = 112
LAYOUTS = {  # ranks, data ranks among them, sequence parallelism; one of so many draws: fewer where a message takes longest
    "attn_dp2": (2, 2, False, 10),
    "attn_dp3": (3, 3, False, 20),
    "tp4_attn_dp2": (4, 2, False, 25),
    "sp2": (2, 1, True, 16),
    "sp3": (3, 1, True, 25),
}


@cache
def wrapper(folder, page_size: int, pool: int, attn_dp: int, sp: bool) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(
        folder, "cpu", page_size, max_total_tokens=pool, enable_layernorm_sp=sp,
        parallel=layout_of_the_pool(attention_data_parallel_size=attn_dp),
    )  # fmt: skip


def give_back_all(scheduler: TPScheduler) -> None:
    for rank in scheduler.data_ranks:
        assert rank.pool.free_slots + rank.tree.evictable_size == rank.pool.size
        assert rank.tree.protected_size == 0
        assert rank.req_to_token.num_free == scheduler.wrapper.max_running_requests


def serve(case: dict, attn_dp: int, sp: bool) -> tuple[list, int]:
    """[(tokens, how it ended), ...] of the requests as they came, and how many were retracted; pages are checked every step."""
    pool = SMALL_POOL if case["small_pool"] else 4096
    model = wrapper(TINY_QWEN_PATH, case["page_size"], pool, attn_dp, sp)
    chunk = CHUNKS[case["chunk"]][case["page_size"]]
    scheduler = TPScheduler(model, chunked_prefill_size=chunk, check=True, **case["options"])
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

    results = scheduler.process_requests(arrivals if scheduler.tp.rank == 0 else None)
    if scheduler.tp.rank == 0:
        give_back_all(scheduler)
        return [(r.output_ids, r.finish_reason["type"]) for r in results.values()], scheduler.totals()["retractions"]
    return [(r.output_ids, r.finish_reason["type"]) for r in results.values()], 0


def assert_right(case: dict, by_rank: list) -> None:
    wanted = sorted(case["requests"], key=lambda request: request[0])
    for answers, _ in by_rank:
        assert len(answers) == len(wanted)
        for (tokens, ended), (_, prompt, new, _, _, abort_at) in zip(answers, wanted, strict=True):
            expected = greedy(TINY_QWEN_PATH, PROMPTS[prompt], NEW_TOKENS)[:new]
            assert tokens == (expected[: len(tokens)] if ended == "abort" else expected)
            assert ended != "abort" or abort_at is not None


@pytest.mark.parametrize(("size", "layout"), [(LAYOUTS[name][0], name) for name in LAYOUTS], ids=str)
def test_nothing_changes_an_answer(size, layout, ranks):
    _, attn_dp, sp, one_of = LAYOUTS[layout]

    @seed(list(LAYOUTS).index(layout))  # or each layout would draw the same ones
    @settings(
        max_examples=max(settings().max_examples // one_of, 3), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    @given(case=cases)
    def draw(case):
        assert_right(case, ranks(size).run(serve, case, attn_dp, sp))

    draw()


def test_data_ranks_retract_and_abort_on_their_own(ranks):
    busy = [(0, i, NEW_TOKENS, 0, None, 4 if i == 7 else None) for i in (0, 3, 6, 1, 4, 7, 2, 5, 8, 0, 3, 6, 1, 4)]
    case = {
        "page_size": 1, "chunk": 64, "small_pool": True, "requests": busy,
        "options": {"schedule_policy": "fcfs", "overlap": True},
    }  # fmt: skip
    by_rank = ranks(2).run(serve, case, 2, False)
    assert_right(case, by_rank)
    assert by_rank[0][1] > 0
    assert sum(ended == "abort" for _, ended in by_rank[0][0]) == 1


def test_an_engine_starts_its_data_ranks_and_says_what_each_did(tmp_path):
    """Two prompts at once for three data ranks: one has no work, and is told so. Then log-probabilities over all of them."""
    prompts, trace = [[5, 6, 7], [8] * 40], tmp_path / "steps.jsonl"
    with Engine(tp_size=3, attn_dp_size=3, device="cpu", check=True, trace=trace) as engine:
        answers = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 6, "ignore_eos": True})
        assert [answer["output_ids"] for answer in answers] == [greedy(TINY_QWEN_PATH, p, 6) for p in prompts]
        told = engine.generate(
            input_ids=prompts[::-1], sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
        )
        for answer, prompt in zip(told, prompts[::-1], strict=True):
            assert [token for _, token, _ in answer["meta_info"]["input_token_logprobs"]] == prompt
        info = engine.get_server_info()
        assert (info["tp_size"], info["attn_dp_size"]) == (3, 3)
        assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"]
        assert info["max_total_num_tokens"] == 3 * engine.scheduler.pool.size
        assert engine.flush_cache()
        assert engine.get_server_info()["evictable_tokens"] == 0
    first = json.loads(trace.read_text(encoding="utf-8").splitlines()[0])
    assert first["kind"] == "parallel"
    assert [part and part["kind"] for part in first["parts"]] == ["prefill", "prefill", None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp_size": 2, "attn_dp_size": 3}, "attn_dp_size=3 does not divide tp_size=2, inside which it is cut"),
        ({"tp_size": 2, "attn_dp_size": 2, "enable_layernorm_sp": True}, "enable_layernorm_sp with attn_dp_size=2, which"),
        ({"tp_size": 2, "enable_dp_attention": True}, "enable_dp_attention is not here: SGLang's old spelling; use attn_dp_size="),
        ({"attn_dp_size": 0}, "attn_dp_size=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Engine(device="cpu", **arguments)
    assert "\n" not in str(error.value)


class Loaded:
    def __init__(self, *load):
        self.load = load
        self.memory = type("", (), {"sessions": type("", (), {"slots": {}})()})()


def test_a_request_goes_where_least_is_to_be_done_and_a_session_stays():
    ranks = [Loaded(90, 1), Loaded(40, 2), Loaded(40, 2)]
    assert pick_data_rank(ranks, "total_tokens", 0) is ranks[1]
    assert pick_data_rank(ranks, "total_requests", 0) is ranks[0]
    assert [pick_data_rank(ranks, "round_robin", turn) for turn in range(4)] == [*ranks, ranks[0]]
    ranks[2].memory.sessions.slots["chat"] = None
    assert pick_data_rank(ranks, "total_tokens", 0, "chat") is ranks[2]
    assert pick_data_rank(ranks, "total_tokens", 0, "another") is ranks[1]
