"""DeepSeek's latent attention and experts: the tokens of transformers, whatever may not change them, in every layout.

pytest tests/ch07/test_latent_attention.py
"""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from ch06_tp_vllm import LLM
from ch06_tp_vllm.sampling_params import SamplingParams as VLLMParams
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from tests.ch07.test_product import PROMPTS, cases
from tests.ch07.test_product import serve as serve_case
from tests.oracle import greedy, some_prompts
from tests.ranks import layout_of_the_pool

NEW_TOKENS, SMALL_POOL = 10, 96
FAMILIES = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3")
CHUNK = {1: 7, 4: 8, 16: 16}
VARIANTS = [
    {"page_size": page, "chunk": chunk, "pool": pool, "overlap": (page == 4) ^ chunk, "mixed": (page == 1) ^ bool(pool)}
    for page, chunk, pool in itertools.product((1, 4, 16), (True, False), (SMALL_POOL, None))
]
SOME = [VARIANTS[i] for i in (0, 3, 5, 6, 8, 11)]  # every pair of values
FEW = [VARIANTS[0], VARIANTS[5]]
LAYOUTS = {  # ranks, layout, flags
    "attn_dp2": (2, {"attention_data_parallel_size": 2}, {}),
    "sp2": (2, {}, {"enable_layernorm_sp": True}),
    "pp2": (2, {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}, {}),
    "halves2": (2, {}, {"enable_two_batch_overlap": True}),
    "ep2": (2, {"expert_parallel_size": 2}, {}),
    "attn_dp2_ep2_travelling": (
        2,
        {"attention_data_parallel_size": 2, "expert_parallel_size": 2},
        {"ep_dispatch": "all_to_all"},
    ),
    "sp3_ep3_travelling": (
        3,
        {"expert_parallel_size": 3},
        {"enable_layernorm_sp": True, "ep_dispatch": "all_to_all", "ep_num_redundant_experts": 2},
    ),
    "tp4_attn_dp2": (4, {"attention_data_parallel_size": 2}, {}),
    "sp3": (3, {}, {"enable_layernorm_sp": True}),
}


def prompts_and_answers(folder):
    prompts = some_prompts(1009, 7, shared=24, longest=16)
    return prompts, [greedy(folder, p, NEW_TOKENS) for p in prompts]


def serve(folder, prompts, variants, layout, flags):
    """Of every variant: answers to the prompts, twice (the second time they are in the tree), and how many were retracted."""
    return [serve_one(folder, prompts, variant, layout, flags) for variant in variants]


def serve_one(folder, prompts, variant, layout, flags):
    page_size, pool = variant["page_size"], variant["pool"]
    wrapper = TPRadixAttentionModelWrapper(
        str(folder), "cpu", page_size, max_total_tokens=pool, parallel=layout_of_the_pool(**layout) if layout else None,
        **flags,
    )  # fmt: skip
    scheduler = TPScheduler(
        wrapper, chunked_prefill_size=CHUNK[page_size] if variant["chunk"] else -1, overlap=variant["overlap"],
        enable_mixed_chunk=variant["mixed"], check=True,
    )  # fmt: skip
    decides = scheduler.tp.world_rank == 0

    def admit_too_many(step):
        for rank in scheduler.data_ranks if pool else ():
            rank.new_token_ratio = min(rank.new_token_ratio, 0.1)
        return False

    params, rounds = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True), []
    for _ in range(2):
        ids = [scheduler.add_request(input_ids=p, sampling_params=params) for p in prompts]
        results = scheduler.process_requests(admit_too_many if decides else None)
        rounds.append([results[i].output_ids for i in ids])
    return rounds, scheduler.totals()["retractions"] if decides else 0


def assert_right(by_rank, expected):
    for answers in by_rank:
        assert all(rounds == [expected, expected] for rounds, _ in answers)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_transformers(name, size, checkpoint, ranks):
    prompts, expected = prompts_and_answers(checkpoint(name))
    assert len({tuple(e) for e in expected}) == len(prompts) - 1, "the model must not say the same to everything"
    variants = SOME if (size, name) == (1, FAMILIES[0]) else FEW
    by_rank = ranks(size).run(serve, checkpoint(name), prompts, variants, {}, {})
    assert_right(by_rank, expected)
    assert by_rank[0][0][1] > 0, "the small pool must have retracted"


@pytest.mark.parametrize(("size", "layout"), [(LAYOUTS[name][0], name) for name in LAYOUTS], ids=str)
def test_tokens_equal_transformers_in_every_layout(size, layout, checkpoint, ranks):
    name = {"attn_dp2": "deepseek_v3", "pp2": "deepseek_v2_lite", "ep2": "deepseek_v2"}.get(layout, "deepseek_v3")
    prompts, expected = prompts_and_answers(checkpoint(name))
    assert_right(ranks(size).run(serve, checkpoint(name), prompts, FEW, *LAYOUTS[layout][1:]), expected)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16"])
def test_chapter_6_says_the_same(kv_cache_dtype, checkpoint):
    """Rows that are rounded when they are written change answers, but not with whom they are computed."""
    folder = checkpoint("deepseek_v2_lite")
    prompts, expected = prompts_and_answers(folder)
    params = VLLMParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)

    def answers(block_size):
        llm = LLM(
            str(folder), device="cpu", block_size=block_size, kv_cache_dtype=kv_cache_dtype, skip_tokenizer_init=True
        )
        cache = llm.llm_engine.runner.kv_cache
        assert cache.kv.shape[1] == 1
        assert cache.kv.dtype == (torch.float32 if kv_cache_dtype == "auto" else torch.bfloat16)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
        return [list(o.outputs[0].token_ids) for o in outputs]

    assert (answers(4) == expected) == (kv_cache_dtype == "auto")
    assert answers(16) == answers(4)


@settings(
    max_examples=max(settings().max_examples // 4, 5), deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
@given(case=cases)
def test_nothing_changes_an_answer(case, checkpoint):
    folder = checkpoint("deepseek_v3")
    answers, _ = serve_case(case, lambda page_size, pool: wrapper_of(folder, page_size, pool))
    wanted = sorted(case["requests"], key=lambda request: request[0])
    for (tokens, ended), (_, prompt, new, _, _, abort_at) in zip(answers, wanted, strict=True):
        expected = greedy(folder, PROMPTS[prompt], NEW_TOKENS)[:new]
        assert tokens == (expected[: len(tokens)] if ended == "abort" else expected)
        assert ended != "abort" or abort_at is not None


@cache
def wrapper_of(folder, page_size: int, pool: int) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(str(folder), "cpu", page_size, max_total_tokens=pool)
