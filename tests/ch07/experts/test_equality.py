"""Models with experts give transformers' own tokens in float32: both chapters, every layout that cuts or spreads their layers."""

from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ch06_tp_vllm import LLM, SamplingParams
from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.serving.http_args import parse_args
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from tests.ch06.test_equality import FEWER as OF_CHAPTER_6
from tests.ch06.test_equality import expect
from tests.ch06.test_equality import serve as serve_6
from tests.ch07.test_equality import FEWER, NEW_TOKENS, prompts_and_answers, serve
from tests.ch07.test_product import NEW_TOKENS as MOST
from tests.ch07.test_product import PROMPTS as TREE
from tests.ch07.test_product import cases
from tests.ch07.test_product import serve as serve_case
from tests.common.models.test_two_batch_overlap import FLAGS, PROMPTS, answers
from tests.common.models.test_two_batch_overlap import NEW as NEW_IN_HALVES
from tests.common.test_executor import prompts_of
from tests.common.test_pipeline import NEW, answer
from tests.common.test_rows_over_ranks import NEW as NEW_SPREAD
from tests.common.test_rows_over_ranks import PROMPTS as SPREAD
from tests.common.test_rows_over_ranks import serve as serve_spread
from tests.oracle import greedy

# 5 experts of width 37 and one shared; 7 of 41; 8 of 75; 60 of which each token has one
FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "one_of_60"]


@pytest.mark.parametrize(
    ("size", "name"), [*((size, name) for size in (1, 2) for name in FAMILIES), (3, "qwen2_moe"), (3, "qwen3_moe")]
)
def test_tokens_of_chapter_7_equal_transformers(size, name, checkpoint, ranks):
    """Radix cache on and off, prefill in chunks, pages of 4 and 16 tokens, a pool in which requests are retracted."""
    prompts, expected = prompts_and_answers(checkpoint(name))
    assert len({tuple(e) for e in expected}) == len(prompts) - 1, "the model must not say the same to everything"
    for told in ranks(size).run(serve, checkpoint(name), prompts, FEWER[1:3], NEW_TOKENS):
        assert all(rounds == [expected, expected] for rounds, _ in told)


@pytest.mark.parametrize(("size", "name"), [(1, "qwen2_moe"), (2, "qwen3_moe"), (2, "mixtral"), (3, "one_of_60")])
def test_tokens_of_chapter_6_equal_transformers(size, name, checkpoint, ranks):
    prompts, expected = prompts_and_answers(checkpoint(name))
    for told in ranks(size).run(serve_6, checkpoint(name), prompts, OF_CHAPTER_6[1:3], NEW_TOKENS):
        expect(told, OF_CHAPTER_6[1:3], expected)


@cache
def a_rank(folder, runner, page_size, pool):
    return TPRadixAttentionModelWrapper(str(folder), "cpu", page_size, max_total_tokens=pool, moe_runner=runner)


@settings(max_examples=max(settings().max_examples // 4, 10), deadline=None, derandomize=settings().max_examples <= 200,
          suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate))  # fmt: skip
@given(name=st.sampled_from(FAMILIES), runner=st.sampled_from(["loop", "grouped"]), case=cases)
def test_whatever_runs_beside_it_an_answer_stays(name, runner, case, checkpoint):
    """Policies, chunks, pages, retraction, overlap, abortion as drawn: who shares a step shares its experts' products."""
    folder = checkpoint(name)
    answers, _ = serve_case(case, lambda page, pool: a_rank(folder, runner, page, pool))
    for (tokens, ended), (_, prompt, new, *_) in zip(
        answers, sorted(case["requests"], key=lambda r: r[0]), strict=True
    ):
        expected = greedy(folder, TREE[prompt], MOST)[:new]
        assert tokens == (expected[: len(tokens)] if ended == "abort" else expected)


@pytest.mark.parametrize("runner", ["loop", "grouped"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_form_gives_these_tokens(name, runner, checkpoint):
    prompts, expected = prompts_and_answers(checkpoint(name))
    with Engine(str(checkpoint(name)), device="cpu", max_total_tokens=512, moe_runner=runner) as engine:
        assert engine.wrapper.model.model.layers[-1].mlp.runner.name == runner
        outputs = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": NEW_TOKENS, "ignore_eos": True})
    assert [output["output_ids"] for output in outputs] == expected


@pytest.mark.parametrize("runner", ["loop", "grouped"])
def test_chapter_6_takes_the_form_too(runner, checkpoint):
    prompts, expected = prompts_and_answers(checkpoint("mixtral"))
    llm = LLM(str(checkpoint("mixtral")), device="cpu", moe_runner=runner)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    assert llm.llm_engine.runner.model.model.layers[0].mlp.runner.name == runner
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected


def test_the_form_is_an_argument_everywhere_under_both_names():
    assert parse_args(["--moe-runner", "loop"]).engine.moe_runner == "loop"
    assert parse_args(["--moe-runner-backend", "grouped"]).engine.moe_runner == "grouped"  # SGLang's
    with pytest.raises(ValueError, match="moe_runner_backend is not here: it is moe_runner= here"):
        Engine(moe_runner_backend="triton")
    for make in (Engine, LLM):
        with pytest.raises(ValueError, match="moe_runner='fast' is unknown; use auto, loop, grouped or triton"):
            make(device="cpu", moe_runner="fast")


@pytest.mark.parametrize(("size", "layout"), [(2, (1, 2)), (3, (1, 3)), (4, (2, 2))], ids=str)
def test_stages_have_experts_too(size, layout, checkpoint, ranks):
    folder, prompts = checkpoint("qwen2_moe"), prompts_of(20, 41, 1)
    told = ranks(size).run(answer, *layout, folder, prompts, 7, 0, {})
    assert told[0][0] == [greedy(folder, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("flags", [{}, *FLAGS], ids=["plain", "two batches", "sums left to the norms"])
def test_sums_may_be_left_to_whoever_reads_them(flags, checkpoint, ranks):
    """One all-reduce a layer of experts, as for an MLP: routed and shared experts together."""
    folder = checkpoint("qwen2_moe")
    for told, sums in ranks(2).run(answers, folder, PROMPTS, 100, flags):
        assert told == [greedy(folder, prompt, NEW_IN_HALVES) for prompt in PROMPTS]
        halves = 2 if flags.get("enable_two_batch_overlap") else 1
        assert len(sums) == halves * (1 + 2 * 4)


@pytest.mark.parametrize(("size", "attn_dp", "where"), [(2, 1, [0, 0, 0]), (2, 2, [0, 1, 0]), (3, 3, [0, 2, 0])])
def test_rows_that_are_spread_come_together_before_the_experts(size, attn_dp, where, checkpoint, ranks):
    """Sequence parallelism and DP attention; in the last case one data rank has no request."""
    folder = checkpoint("qwen3_moe")
    for told, *_ in ranks(size).run(serve_spread, folder, attn_dp, where):
        assert told == [greedy(folder, prompt, NEW_SPREAD) for prompt in SPREAD]
