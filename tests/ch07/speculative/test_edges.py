"""Where room ends: of the context, of the pool, of the model's positions; and what ends inside a run."""

from types import SimpleNamespace

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.replicated import ReplicatedScheduler
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.attention.torch_native import TorchNativeAttention
from common.sampling.params import SamplingParams
from common.sampling.sampler import ALL_FORBIDDEN
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.speculative.adversaries import Adversary, options

NGRAM = {"speculative_algorithm": "NGRAM", "speculative_stand_down": False}


def answers(prompts, new, guessing=None, **more):
    """The tokens of each prompt, and the engine's steps."""
    with Engine(device="cpu", random_seed=1, check=True, **more) as engine:
        if guessing:
            engine.scheduler.speculation.guesser = guessing
        out = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": new, "ignore_eos": True})
        return [one["output_ids"] for one in out], engine.scheduler


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("room", [{"context_length": 64}, {"max_total_tokens": 64}])
def test_a_request_may_fill_its_context_or_the_whole_pool_to_the_last_token(room, page_size):
    """Nodes beyond the end have places in the page table, but a pool may have no pages for them: then steps are plain."""
    prompts = [list(range(40, 60)), list(range(80, 100))]
    plain, _ = answers(prompts, 44, page_size=page_size, **room)
    guesses = Adversary("right", {tuple(p): a for p, a in zip(prompts, plain, strict=True)}, True)
    found, scheduler = answers(
        prompts, 44, guesses, page_size=page_size, speculative_num_draft_tokens=12, **room, **NGRAM
    )
    assert found == plain
    if "max_total_tokens" in room:
        assert scheduler.steps["decode"] > scheduler.speculation.steps > 0


@pytest.mark.parametrize("tokens", [2, 3, 6, 9])
def test_who_waits_for_pages_gets_them_where_planning_a_step_ends_the_only_one_that_runs(tokens):
    """With overlap a guesser looks at the last step's tokens before it guesses: a stop token is found while a step is planned."""
    first, second = list(range(40, 60)), list(range(90, 110))
    (plain,), _ = answers([first], 20)
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 4, max_total_tokens=40, speculative=options("NGRAM", 4, False))
    scheduler = TPScheduler(wrapper, check=True, overlap=True)
    scheduler.speculation.guesser = Adversary("wrong", {tuple(first): plain, tuple(second): plain}, False)
    for prompt, stops in ((first, (plain[tokens - 1],)), (second, ())):
        params = SamplingParams(max_new_tokens=20, ignore_eos=True, stop_token_ids=stops)
        scheduler.add_request(input_ids=prompt, sampling_params=params)
    told = scheduler.process_requests()
    assert [len(one.output_ids) for one in told.values()] == [tokens, 20]


def test_where_guesses_do_not_pay_nobody_waits_for_the_pages_that_were_kept_for_them():
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 1, max_total_tokens=60, speculative=options("NGRAM", 32, False))
    scheduler = TPScheduler(wrapper, check=True, schedule_conservativeness=0.01)
    scheduler.speculation.guesser = Adversary("wrong", {(1, 2, 3, 4): [1], (5, 6, 7, 8): [1]}, False)
    scheduler.speculation.rule = SimpleNamespace(verifies=lambda batch: scheduler.speculation.steps == 0, rates={})
    for prompt, new in (([1, 2, 3, 4], 50), ([5, 6, 7, 8], 24)):
        scheduler.add_request(input_ids=prompt, sampling_params=SamplingParams(max_new_tokens=new, ignore_eos=True))
        for _ in range(2):  # the first request's prompt, and a verify step with pages for 32 nodes
            scheduler.step()
    told = scheduler.process_requests()
    assert [len(one.output_ids) for one in told.values()] == [50, 24]
    assert (scheduler.speculation.steps, scheduler.retractions) == (1, 0)
    assert scheduler.steps["decode"] == 49, "the second ran beside the first"


def test_a_guess_beyond_the_model_s_last_position_stands_at_it():
    prompt = [[(7 * i) % 900 for i in range(2036)]]
    plain, _ = answers(prompt, 12, context_length=2048)
    guesses = Adversary("right", {tuple(prompt[0]): plain[0]}, True)
    found, scheduler = answers(prompt, 12, guesses, context_length=2048, speculative_num_draft_tokens=9, **NGRAM)
    assert found == plain
    assert scheduler.speculation.correct > 0


def test_a_row_without_a_token_inside_a_run_ends_its_request_there_and_nobody_else_s():
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 4, max_total_tokens=256, speculative=options("NGRAM", 4, False))
    scheduler = TPScheduler(wrapper, check=True)
    for start in (1, 2):
        scheduler.add_request(
            input_ids=[start, 5, 6], sampling_params=SamplingParams(max_new_tokens=9, ignore_eos=True)
        )
    scheduler.speculation.plan = lambda best, *_: None  # plain steps
    for _ in range(3):
        scheduler.step()
    bad, good = sorted(scheduler.running, key=lambda req: req.rid)
    before = len(bad.output_ids)
    scheduler.outcome.take([(bad, 8, None), (bad, ALL_FORBIDDEN, None), (bad, 9, None), (good, 8, None)])
    assert bad.output_ids[before:] == [8]
    assert bad.finish_reason["type"] == "abort"
    assert "no token may follow" in bad.finish_reason["message"]
    assert scheduler.running == [good]


def test_what_stands_behind_a_stop_in_a_run_is_thrown_away():
    prompts = [list(range(40, 60))]
    plain, _ = answers(prompts, 30)
    stop = plain[0][11]
    end = plain[0].index(stop) + 1
    with Engine(device="cpu", check=True, page_size=4, **NGRAM, speculative_num_draft_tokens=16) as engine:
        engine.scheduler.speculation.guesser = Adversary("right", {tuple(prompts[0]): plain[0]}, False)
        out = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 30, "stop_token_ids": [stop]})[0]
        tree = engine.scheduler.tree
        assert out["output_ids"] == plain[0][:end]
        assert out["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        known = len(prompts[0]) + end - 1  # the last token was not fed in
        assert tree.evictable_size == known // 4 * 4
        matched = tree.match_prefix(prompts[0] + plain[0])
        assert len(matched.slots) == known // 4 * 4


def test_a_backend_that_sees_no_trees_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(TorchNativeAttention, "windows", False)
    with pytest.raises(ValueError, match=r"^attention_backend=auto: it attends without a tree's mask, .*use another"):
        Engine(device="cpu", **NGRAM)


def test_the_design_in_which_every_rank_schedules_does_not_verify():
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 4, max_total_tokens=64, speculative=options("NGRAM", 4, False))
    with pytest.raises(ValueError, match=r"^guesses are not verified by this design: .*use TPScheduler$"):
        ReplicatedScheduler(wrapper)


@pytest.mark.parametrize(
    "layout",
    [{"tp_size": 3}, {"model_path": str(TINY_QWEN_PATH / "mixture"), "tp_size": 2, "ep_size": 2}, {"dp_size": 2}],
)
def test_guesses_change_nothing_over_ranks_experts_and_replicas(layout):
    prompts = [list(range(40, 60)), [5, 6, 7] * 8]
    plain, found = [], []
    for out, more in ((plain, {}), (found, NGRAM)):
        with Engine(device="cpu", random_seed=1, **layout, **more) as engine:
            answers = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 24, "ignore_eos": True})
            out += [one["output_ids"] for one in answers]
            told = [one["meta_info"].get("spec_verify_ct", 0) for one in answers]
    assert found == plain
    assert min(told) > 0
