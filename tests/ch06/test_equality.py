"""The main test of chapter 6: in float32 the greedy tokens are transformers' own, whatever runs beside them."""

import itertools

import pytest

from ch06_tp_vllm import LLM, LLMEngine, SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, some_prompts

NEW_TOKENS = 12
# tokens: one request comfortably, all of them by no means. 96 was enough before a request had to fit in with its whole prompt
# (scheduler_reserve_full_isl): behind that gate one of the 18 variants (blocks of 1, 7 tokens a step, no cache) sends nobody
# back. The tokens are equal there too, and without the gate all 18 preempt.
SMALL_POOL, LARGER_POOL = 80, 96
VARIANTS = [
    # one half of the combinations with async scheduling, such that every pair of values occurs
    {"block_size": block, "budget": budget, "pool": pool, "cache": cache,
     "async": (block == 4) ^ (budget == 7) ^ bool(pool) ^ cache}
    for block, budget, pool, cache in itertools.product((1, 4, 16), (7, 40, 1024), (None, SMALL_POOL), (True, False))
]  # fmt: skip
# every two values of the five occur together, and three in four of the triples
PAIRWISE = [VARIANTS[i] for i in (0, 2, 4, 9, 11, 15, 19, 20, 25, 27, 30, 32)]
# every value and most pairs
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
    folder, variants = checkpoint(name), PAIRWISE if (size, name) == (1, "qwen2") else FEWER
    prompts, expected = prompts_and_answers(folder)
    on_ranks = ranks(size).run(serve, folder, prompts, variants, NEW_TOKENS)
    for answers in on_ranks:
        expect(answers, variants, expected)
    preempted = [count for v, (_, count) in zip(variants, on_ranks[0], strict=True) if v["pool"]]
    assert preempted, "one of the variants has the small pool"
    assert all(preempted), "and each of those preempts, or this would say nothing about preemption"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tokens_equal_transformers_under_the_priority_policy(checkpoint, asynchronous):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder)
    engine = LLMEngine(
        str(folder), device="cpu", block_size=4, num_gpu_blocks_override=SMALL_POOL // 4, max_num_batched_tokens=40,
        scheduling_policy="priority", async_scheduling=asynchronous, check=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    coming, done = list(enumerate(prompts)), {}
    while coming or engine.has_unfinished_requests():
        if coming:  # one a step, the late ones more urgent than the early ones
            i, prompt = coming.pop(0)
            engine.add_request(str(i), prompt, params, priority=-i)
        done |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
    assert [done[str(i)] for i in range(len(prompts))] == expected
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("at_allocation", [True, False])
@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("pool", [SMALL_POOL, LARGER_POOL])
def test_tokens_equal_transformers_however_blocks_are_named_and_requests_let_in(
    checkpoint, at_allocation, reserve, pool
):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder)
    llm = LLM(
        str(folder), device="cpu", block_size=4, num_gpu_blocks_override=pool // 4, max_num_batched_tokens=20,
        scheduler_reserve_full_isl=reserve, check=True,
    )  # fmt: skip
    llm.llm_engine.blocks.name_blocks_at_allocation = at_allocation
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for _ in range(2):
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
    assert llm.llm_engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_n_answers_are_n_times_the_same_when_greedy(size, checkpoint, ranks):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder, count=5)
    variants = {1: [*FEWER, VARIANTS[14], VARIANTS[27]], 2: FEWER, 3: FEWER[1:3]}[size]
    for answers in ranks(size).run(serve, folder, prompts, variants, NEW_TOKENS, 3):
        expect(answers, variants, expected, n=3)


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_equal_transformers_on_the_bundled_model(size, ranks):
    prompts, expected = prompts_and_answers(TINY_QWEN_PATH)
    for answers in ranks(size).run(serve, TINY_QWEN_PATH, prompts, FEWER, NEW_TOKENS):
        expect(answers, FEWER, expected)


def test_pairwise_is_pairwise():
    def pairs(variants):
        return {two for v in variants for two in itertools.combinations(v.items(), 2)}

    assert pairs(PAIRWISE) == pairs(VARIANTS)
    assert len(pairs(VARIANTS)) == 57
