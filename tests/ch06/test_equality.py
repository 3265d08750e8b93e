"""The main test of chapter 6: in float32 the greedy tokens are transformers' own, whatever runs beside them."""

import itertools

import pytest

from ch06_tp_vllm import LLM, SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, some_prompts

NEW_TOKENS = 12
SMALL_POOL = 96  # tokens: one request comfortably, all of them by no means
VARIANTS = [
    # one half of the combinations with async scheduling, such that every pair of values occurs
    {"block_size": block, "budget": budget, "pool": pool, "cache": cache,
     "async": (block == 4) ^ (budget == 7) ^ bool(pool) ^ cache}
    for block, budget, pool, cache in itertools.product((1, 4, 16), (7, 40, 1024), (None, SMALL_POOL), (True, False))
]  # fmt: skip
# every value and most pairs, not the whole product
FEWER = [VARIANTS[i] for i in (2, 9, 19, 30)]


def prompts_and_answers(folder, count=7):
    prompts = some_prompts(1009, count, shared=24, longest=16)
    return prompts, [greedy(folder, p, NEW_TOKENS) for p in prompts]


def serve(folder, prompts, variants, new_tokens, n=1):
    """On each rank: every variant, the prompts twice (the second time they are in the prefix cache)."""
    answers = []
    for v in variants:
        llm = LLM(
            str(folder), device="cpu", block_size=v["block_size"], max_num_batched_tokens=v["budget"],
            num_gpu_blocks_override=v["pool"] and v["pool"] // v["block_size"], enable_prefix_caching=v["cache"],
            async_scheduling=v["async"], check=True,
        )  # fmt: skip
        params = SamplingParams(n=n, temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        rounds = [
            [[answer.token_ids for answer in output.outputs] for output in llm.generate(prompts, params)]
            for _ in range(2)
        ]
        answers.append((rounds, llm.llm_engine.scheduler.num_preemptions))
    return answers


def expect(answers, variants, expected, n=1):
    wanted = [[answer] * n for answer in expected]
    for variant, (rounds, _) in zip(variants, answers, strict=True):
        assert rounds == [wanted, wanted], variant


# three and four ranks on two cores are slow, and what they change (heads, padding) lies in common/: one model each
CASES = [*((size, name) for size in (1, 2) for name in ("qwen2", "qwen3", "llama")), (3, "qwen2"), (4, "qwen2")]


@pytest.mark.parametrize(("size", "name"), CASES)
def test_tokens_equal_transformers(size, name, checkpoint, ranks):
    # the whole product for one model on one rank
    folder, variants = checkpoint(name), VARIANTS if (size, name) == (1, "qwen2") else FEWER
    prompts, expected = prompts_and_answers(folder)
    for answers in ranks(size).run(serve, folder, prompts, variants, NEW_TOKENS):
        expect(answers, variants, expected)


def test_the_small_pool_did_preempt(checkpoint, ranks):
    """Otherwise the test above would say nothing about preemption."""
    prompts, _ = prompts_and_answers(checkpoint("qwen2"))
    variants = [v for v in VARIANTS if v["pool"]]
    answers = ranks(1).run(serve, checkpoint("qwen2"), prompts, variants, NEW_TOKENS)[0]
    assert all(preemptions > 0 for _, preemptions in answers)


@pytest.mark.parametrize("size", [1, 2])
def test_n_answers_are_n_times_the_same_when_greedy(size, checkpoint, ranks):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder, count=5)
    variants = [*FEWER, VARIANTS[14], VARIANTS[27]]
    for answers in ranks(size).run(serve, folder, prompts, variants, NEW_TOKENS, 3):
        expect(answers, variants, expected, n=3)


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_equal_transformers_on_the_bundled_model(size, ranks):
    prompts, expected = prompts_and_answers(TINY_QWEN_PATH)
    for answers in ranks(size).run(serve, TINY_QWEN_PATH, prompts, FEWER, NEW_TOKENS):
        expect(answers, FEWER, expected)
