"""A draft model that is the target itself is always right; one that is not changes no token."""

import json
from types import SimpleNamespace

import pytest

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.models.drafters.contract import DraftOptions
from common.models.drafters.standalone import StandaloneDrafter
from common.sampling.acceptance import zero_and_renormalise
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, some_prompts

NEW = 13
# steps, topk, nodes; of trees all nodes that a drafter looks at, so that the likeliest path is among them
SHAPES = [(4, 1, 5), (1, 1, 2), (2, 2, 7), (2, 3, 13)]


def serve(folder, draft, shape, page_size, pool, prompts, chunk, stands_down, new=NEW):
    """On each rank: the prompts twice -> answers, and what the verify steps brought."""
    wrapper = TPRadixAttentionModelWrapper(
        str(folder), "cpu", page_size, max_total_tokens=pool, speculative=DraftOptions("STANDALONE", str(draft), *shape)
    )
    scheduler = TPScheduler(wrapper, chunked_prefill_size=chunk, check=True)
    speculation = scheduler.speculation  # rank 0's
    if stands_down and speculation:  # every other step is a plain one
        steps = iter(range(10_000))
        speculation.rule = SimpleNamespace(verifies=lambda batch: next(steps) % 2 == 0)
    params, rounds = SamplingParams(max_new_tokens=new, ignore_eos=True), []
    for _ in range(2):
        ids = [scheduler.add_request(input_ids=prompt, sampling_params=params) for prompt in prompts]
        results = scheduler.process_requests()
        rounds.append([results[i].output_ids for i in ids])
    counts = (speculation.sequences, speculation.correct, speculation.tokens) if speculation else None
    return rounds, counts, scheduler.retractions


def prompts_and_answers(folder, new=NEW):
    prompts = some_prompts(1009, 6, shared=20, longest=12)
    return prompts, [greedy(folder, prompt, new) for prompt in prompts]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_target_as_its_own_draft_is_always_right(checkpoint, ranks, size, shape):
    """So every page, position and pending token of the draft is right, after hits in the tree and chunks too."""
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder)
    steps = shape[0]
    for rounds, (sequences, correct, _), _ in ranks(size).run(
        serve, folder, folder, shape, 4, 600, prompts, 8, False
    )[:1]:  # fmt: skip
        assert rounds == [expected, expected]
        whole, rest = divmod(NEW - 1, steps + 1)  # the prompt's step draws the first token
        assert sequences == 2 * len(prompts) * (whole + bool(rest))
        assert correct == 2 * len(prompts) * (whole * steps + max(rest - 1, 0))


@pytest.mark.parametrize(("size", "page_size"), [(1, 1), (2, 4), (3, 16)])
@pytest.mark.parametrize("shape", [(4, 1, 5), (3, 2, 8)])
def test_another_model_changes_no_token_and_is_told_what_plain_steps_drew(checkpoint, ranks, size, page_size, shape):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder)
    for rounds, (_, _, tokens), _ in ranks(size).run(
        serve, folder, checkpoint("llama"), shape, page_size, 120, prompts, 16, True
    )[:1]:  # fmt: skip
        assert rounds == [expected, expected]
        assert tokens


def test_a_draft_that_follows_in_plain_steps_is_right_afterwards(checkpoint, ranks):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder)
    ((rounds, (sequences, correct, tokens), _),) = ranks(1).run(
        serve, folder, folder, (2, 1, 3), 4, 600, prompts, -1, True
    )
    assert rounds == [expected, expected]
    assert tokens == sequences + correct
    assert correct >= 1.8 * sequences  # but for the last step of an answer, which may lack room


def test_a_small_pool_retracts_and_the_draft_s_pages_are_the_next_owner_s(checkpoint, ranks):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder, 50)
    ((rounds, _, retractions),) = ranks(1).run(serve, folder, folder, (3, 2, 8), 4, 128, prompts, 8, False, 50)
    assert rounds == [expected, expected]
    assert retractions


def serve_sampled(folder, draft, prompts, temperatures, page_size):
    """On each rank: sampled answers, guesses drawn from the draft's distribution; rank 0 tells what the verify steps brought."""
    wrapper = TPRadixAttentionModelWrapper(
        str(folder), "cpu", page_size, max_total_tokens=600, speculative=DraftOptions("STANDALONE", str(draft), 3, 1, 4)
    )
    scheduler = TPScheduler(wrapper, check=True)
    speculation = scheduler.speculation
    if speculation:
        speculation.acceptance, speculation.draws = zero_and_renormalise, True
    for seed, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True)):
        params = SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=temperature, seed=seed)
        scheduler.add_request(input_ids=prompt, sampling_params=params)
    answers = [one.output_ids for one in scheduler.process_requests().values()]
    return answers, speculation and (speculation.sequences, speculation.correct)


@pytest.mark.parametrize("size", [1, 3])
def test_guesses_that_the_target_itself_has_drawn_are_all_kept_at_any_temperature(checkpoint, ranks, size):
    """p = q, so min(1, p/q) is 1: another temperature in the draft's q than in the target's p, a q of another place in the text, or
    ranks that have drawn different guesses, and some would be refused."""
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder)
    heat = [0.0, 0.5, 1.0, 1.3, 2.0, 0.0]
    by_rank = ranks(size).run(serve_sampled, folder, folder, prompts, heat, 4)
    answers, (sequences, correct) = by_rank[0]
    assert (sequences, correct) == (6 * 3, 6 * 9)  # 12 tokens behind the first: 4 a step
    assert (answers[0], answers[5]) == (expected[0], expected[5]), "greedy ones are greedy"
    assert all(told != greedy for told, greedy in zip(answers[2:5], expected[2:5], strict=True))


def test_a_draft_of_another_opinion_is_refused_now_and_then(checkpoint, ranks):
    folder = checkpoint("qwen2")
    prompts, expected = prompts_and_answers(folder)
    ((answers, (sequences, correct)),) = ranks(1).run(
        serve_sampled, folder, checkpoint("llama"), prompts, [0.0, *[5.0] * 5], 1
    )
    assert answers[0] == expected[0]
    assert 0 < correct < 2 * sequences


def drafter(folder, steps=4, topk=1, nodes=5):
    config = SimpleNamespace(vocab_size=json.loads((TINY_QWEN_PATH / "config.json").read_text("utf-8"))["vocab_size"])
    target = SimpleNamespace(tp=SimpleNamespace(device="cpu"), model=SimpleNamespace(config=config))
    return StandaloneDrafter(DraftOptions("STANDALONE", str(folder), steps, topk, nodes), target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5, "topk": 3, "nodes": 12}, "=12 reserves no room for the 12 nodes .* use 13 or more"),
        ({}, "vocab_size=1009, but the target's is 3584"),
    ],
)  # fmt: skip
def test_what_cannot_draft_is_one_line(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        drafter(checkpoint("qwen2"), **arguments)
    assert "\n" not in str(error.value)
