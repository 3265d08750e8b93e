"""What a request asks for holds inside runs of tokens as it does token by token: the plain engine says what must come out."""

import json
from itertools import pairwise

import pytest

from ch07_sglang_radix import Engine
from tests.ch07.speculative.adversaries import Adversary

MORE = {"max_new_tokens": 24, "ignore_eos": True}
# every request has a prompt of its own, by which the adversary knows what is right for it
CALLS = [
    ("What is a page?", MORE),
    ("What is a slot?", MORE | {"temperature": 0.9, "sampling_seed": 5}),
    ("What is a node?", MORE | {"temperature": 1.3, "sampling_seed": 7, "top_k": 12, "top_p": 0.9, "min_p": 0.02}),
    ("What is a lock?", MORE | {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}),
    ("What is a leaf?", MORE | {"temperature": 0.7, "sampling_seed": 1, "frequency_penalty": 0.5}),
    ("What is eviction?", {"max_new_tokens": 7}),
    ("What is a step?", {"max_new_tokens": 40, "min_new_tokens": 25}),
    ("What is a radix cache?", {"max_new_tokens": 40, "stop": ["tree"]}),
    ("What is a token?", {"max_new_tokens": 40, "stop_regex": ["[a-z]ing"]}),
    ("Is it so?", {"max_new_tokens": 40, "regex": "(yes|no), because of [a-z]{3,9} and [0-9]{4}"}),
    ("Say it in JSON.", {"max_new_tokens": 60, "temperature": 0.8, "sampling_seed": 2, "json_schema": json.dumps({
        "type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer"}}, "required": ["ok", "n"]})}),
    ("What is a rank?", MORE | {"logit_bias": {"17": 3.0}, "stop_token_ids": [11]}),
]  # fmt: skip
PROMPTS, PARAMS = [prompt for prompt, _ in CALLS], [params for _, params in CALLS]


def ask(engine):
    return engine.generate(PROMPTS, PARAMS, return_logprob=True, top_logprobs_num=2)


@pytest.fixture(scope="module")
def plain():
    with Engine(device="cpu", random_seed=3) as engine:
        answers = ask(engine)
        known = {tuple(engine.scheduler.intake.ids(p)): a["output_ids"] for p, a in zip(PROMPTS, answers, strict=True)}
        n = engine.generate("Hello", MORE | {"temperature": 1.0, "n": 3})
    return answers, known, n


@pytest.mark.parametrize("kind", ["right", "random"])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_everything_a_request_may_ask_for_holds_inside_runs(kind, tree, overlap, plain):
    answers, known, n = plain
    with Engine(
        device="cpu", random_seed=3, check=True, speculative_algorithm="NGRAM", speculative_num_draft_tokens=6, page_size=4,
        speculative_stand_down=False, disable_overlap_schedule=not overlap,
    ) as engine:  # fmt: skip
        guesses = engine.scheduler.speculation
        guesses.guesser = Adversary(kind, known, tree)
        found = ask(engine)
        assert guesses.correct > guesses.sequences / 2
        engine.scheduler.speculation.guesser = Adversary(
            "wrong", {tuple(engine.scheduler.intake.ids("Hello")): [1]}, tree
        )
        assert [one["output_ids"] for one in engine.generate("Hello", MORE | {"temperature": 1.0, "n": 3})] == [
            one["output_ids"]
            for one in n  # their seeds are made of the request's number: the next after those above
        ]
        guesses.guesser, before = Adversary(kind, known, tree), guesses.correct
        simple = engine.generate(PROMPTS[:3], PARAMS[:3])  # no row has an edit: the batch is made of numbers alone
        assert [one["output_ids"] for one in simple] == [one["output_ids"] for one in answers[:3]]
        assert guesses.correct > before
    for a, b, params in zip(answers, found, PARAMS, strict=True):
        assert (b["text"], b["output_ids"]) == (a["text"], a["output_ids"]), params
        assert b["meta_info"]["finish_reason"] == a["meta_info"]["finish_reason"], params
        for name in ("output_token_logprobs", "output_top_logprobs"):
            flat = [x for one in (a, b) for x in [_numbers(one["meta_info"][name])]]
            assert flat[1] == pytest.approx(flat[0], abs=1e-3), (name, params)


def _numbers(told):
    return [x for one in told for pair in (one if isinstance(one, list) else [one]) for x in pair[:2]]


def test_what_became_of_guesses_is_told_under_sglang_s_names(plain):
    _, known, _ = plain
    options = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 5, "speculative_stand_down": False}
    with Engine(device="cpu", check=True, **options) as engine:
        engine.scheduler.speculation.guesser = Adversary("right", known, False)
        meta = engine.generate("What is a page?", MORE)["meta_info"]
        info = engine.get_server_info()
    # 24 tokens: the first by the prefill, then 5 a step, the last step's run cut to 3
    assert meta["spec_verify_ct"] == 5
    assert meta["spec_num_correct_drafts"] == 4 * 4 + 2
    assert meta["spec_num_proposed_drafts"] == 5 * 4
    assert meta["spec_accept_rate"] == 18 / 20
    assert meta["spec_accept_length"] == 24 / 5
    assert (info["spec_verify_steps"], info["avg_spec_accept_length"]) == (5, 23 / 5)


def test_a_stream_tells_whole_runs_and_the_same_text(plain):
    answers, known, _ = plain
    with Engine(device="cpu", check=True, speculative_algorithm="NGRAM", speculative_stand_down=False) as engine:
        engine.scheduler.speculation.guesser = Adversary("right", known, False)
        chunks = list(engine.generate("What is a page?", MORE, stream=True))
    assert chunks[-1]["output_ids"] == answers[0]["output_ids"]
    assert max(len(b["output_ids"]) - len(a["output_ids"]) for a, b in pairwise(chunks)) == 8


def test_an_abort_between_two_runs_gives_every_page_back(plain):
    _, known, _ = plain
    with Engine(
        device="cpu", check=True, page_size=4, speculative_algorithm="NGRAM", disable_overlap_schedule=False
    ) as engine:
        engine.scheduler.speculation.guesser = Adversary("random", known, True)
        stream = engine.generate("What is a page?", MORE | {"max_new_tokens": 60}, stream=True)
        next(stream), next(stream)
        stream.close()
        s = engine.scheduler
        assert s.pool.free_slots + s.tree.evictable_size == s.pool.size
        assert s.tree.protected_size == 0


def test_the_trace_has_the_tree_of_each_step(tmp_path, plain):
    _, known, _ = plain
    file = tmp_path / "steps.jsonl"
    options = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4, "speculative_stand_down": False}
    with Engine(device="cpu", trace=file, **options) as engine:
        engine.scheduler.speculation.guesser = Adversary("right", known, False)
        out = engine.generate("What is a page?", MORE)["output_ids"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    trees = [one for line in lines if line["kind"] == "verify" for one in line["verified"]]
    assert len(trees) == 6
    assert [tree["path"] for tree in trees] == [[0, 1, 2, 3]] * 5 + [[0, 1, 2]]
    assert [token for tree in trees for token in tree["tokens"]] == out[:24]  # each root is the last bonus token
    assert trees[0]["parents"] == [-1, 0, 1, 2]
