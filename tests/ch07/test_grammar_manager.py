"""Answers under a grammar, through the whole engine: valid, equal to a plain loop, and nobody else's business."""

import asyncio
import json
import random
from concurrent.futures import Future

import jsonschema
import pytest
import regex
import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import get_tensor_parallel
from common.sampling import grammar
from common.sampling.grammar import GrammarCompiler
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, greedy_under_grammar, reference_model

END = 3583
PERSON = json.dumps({
    "type": "object", "required": ["name", "ranks"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "ranks": {"type": "integer", "minimum": 1, "maximum": 64},
        "tags": {"type": "array", "items": {"enum": ["page", "tree"]}, "maxItems": 2},
    },
})  # fmt: skip
YES = r"(yes|no)(, because [a-z ]{3,20})?\."
LARK = 'start: (PAIR ", ")~1..3 PAIR\nPAIR: /[a-z]{1,5}/ "=" /[0-9]/\n'
GRAMMARS = [("json_schema", PERSON), ("regex", YES), ("ebnf", LARK)]
LARK_AS_REGEX = r"([a-z]{1,5}=[0-9], ){1,3}[a-z]{1,5}=[0-9]"


def valid(kind, text):
    if kind == "json_schema":
        return jsonschema.Draft202012Validator(json.loads(PERSON)).is_valid(json.loads(text))
    return regex.fullmatch(YES if kind == "regex" else LARK_AS_REGEX, text)


@pytest.fixture(scope="module")
def engine():
    with Engine(device="cpu", check=True, page_size=4, disable_overlap_schedule=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def question(engine):
    return engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": "What is a radix cache?"}])


@pytest.fixture(scope="module")
def plain_loop(engine):
    def run(prompt, kind, written, n):
        return greedy_under_grammar(TINY_QWEN_PATH, engine.wrapper.tokenizer.hf, prompt, kind, written, n)

    return run


# --- the answers


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [-1, 8])
def test_greedy_tokens_equal_a_plain_loop(plain_loop, question, overlap, chunk):
    """All three kinds side by side with a request that has none, page by page."""
    with Engine(
        device="cpu", check=True, page_size=4, chunked_prefill_size=chunk, disable_overlap_schedule=not overlap,
        gather_best=True,
    ) as engine:  # fmt: skip
        params = [{"max_new_tokens": 40, kind: written} for kind, written in GRAMMARS]
        answers = engine.generate(input_ids=[question] * 4, sampling_params=[*params, {"max_new_tokens": 12}])
    for (kind, written), answer in zip(GRAMMARS, answers, strict=False):
        assert answer["output_ids"] == plain_loop(question, kind, written, 40)
        assert valid(kind, answer["text"])
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": END}
    assert answers[3]["output_ids"] == greedy(TINY_QWEN_PATH, question, 12)


def on_each_rank(grammars, prompt):
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 4)
    answers = []
    for overlap in (False, True):
        scheduler = TPScheduler(wrapper, overlap=overlap, check=True)
        for one in grammars:
            scheduler.add_request(input_ids=prompt, sampling_params=SamplingParams(max_new_tokens=40, grammar=one))
        answers.append([output.output_ids for output in scheduler.process_requests().values()])
    return answers, get_tensor_parallel().rank


def test_two_ranks_answer_alike_and_rank_0_alone_masks(plain_loop, question, ranks):
    want = [plain_loop(question, kind, written, 40) for kind, written in GRAMMARS]
    assert [answers for answers, _ in ranks(2).run(on_each_rank, GRAMMARS, question)] == [[want, want]] * 2


def some_schema(rng, depth=0):
    """A schema whose every answer is short."""
    kinds = ["string", "integer", "boolean", "enum", "null", "number", "any"]
    kind = rng.choice(kinds if depth == 2 else [*kinds, "object", "object", "array", "array"]) if depth else "object"
    if kind == "object":
        names = rng.sample(["name", "page size", "größe", "k", "hit_rate"], rng.randint(2, 3) if depth else 4)
        return {
            "type": "object", "properties": {name: some_schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randint(1, len(names))), "additionalProperties": False,
        }  # fmt: skip
    if kind == "array":
        return {"type": "array", "items": some_schema(rng, depth + 1), "minItems": rng.randint(0, 1), "maxItems": 2}
    low = rng.randint(-50, 50)
    return {
        "string": {"type": "string", "minLength": 8, "maxLength": 24}, "boolean": {"type": "boolean"},
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)}, "null": {"type": "null"},
        "enum": {"enum": ["tree", 7, None, "ja, 是"]}, "number": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 9},
        "any": {"anyOf": [{"const": "rank"}, {"type": "string", "pattern": "^[a-f]{2,4}$"}]},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
def test_twenty_of_twenty_random_schemas_are_obeyed_at_temperature_1(overlap):
    """In a pool so small that requests go back to the queue in the middle of their JSON."""
    rng = random.Random(15)
    schemas = [some_schema(rng) for _ in range(20)]
    with Engine(
        device="cpu", check=True, page_size=4, max_total_tokens=320, max_running_requests=16,
        disable_overlap_schedule=not overlap, chunked_prefill_size=64,
    ) as engine:  # fmt: skip
        engine.scheduler.new_token_ratio = engine.scheduler.init_new_token_ratio = 0.02  # admit too many
        params = [
            {"max_new_tokens": 170, "temperature": 1.0, "json_schema": json.dumps(schema, ensure_ascii=i % 2 == 0)}
            for i, schema in enumerate(schemas)
        ]
        answers = engine.generate([f"Page {i} as JSON: " for i in range(20)], params)
        assert engine.scheduler.retractions > 0
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": END}, answer["text"]
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer["text"]))


@pytest.mark.parametrize(("kind", "written"), GRAMMARS[1:])
def test_n_answers_each_obey_the_grammar_in_their_own_way(engine, question, kind, written):
    params = {"n": 8, "max_new_tokens": 60, "temperature": 1.5, "sampling_seed": 3, kind: written}
    answers = engine.generate(input_ids=question, sampling_params=params)
    assert all(valid(kind, answer["text"]) for answer in answers)
    assert len({answer["text"] for answer in answers}) > 4


def test_an_answer_may_be_cut_by_its_length(engine, question):
    answer = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 5, "json_schema": PERSON})
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
    assert answer["text"].startswith('{"name"')


def test_a_stop_text_ends_it_earlier(engine, question):
    params = {"max_new_tokens": 40, "json_schema": PERSON, "stop": "ranks"}
    assert (
        engine.generate(input_ids=question, sampling_params=params)["meta_info"]["finish_reason"]["matched"] == "ranks"
    )


def test_ignore_eos_does_not_go_on_behind_the_end(engine, question):
    params = {"max_new_tokens": 40, "regex": YES}
    answers = [engine.generate(input_ids=question, sampling_params=params | {"ignore_eos": i}) for i in (False, True)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert answers[1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": END}


def test_min_new_tokens_beyond_the_grammar_is_an_error_of_that_request(engine, question):
    params = [{"max_new_tokens": 40, "min_new_tokens": 30, "regex": "yes"}, {"max_new_tokens": 9}]
    bad, well = engine.generate(input_ids=[question] * 2, sampling_params=params)
    assert bad["meta_info"]["finish_reason"]["status_code"] == 500
    assert "min_new_tokens" in bad["meta_info"]["finish_reason"]["message"]
    assert well["output_ids"] == greedy(TINY_QWEN_PATH, question, 9)


def test_after_the_thought_the_grammar_holds(engine, question):
    """The model does not think; a first grammar makes it do so, and the second request goes on from there."""
    thought = engine.wrapper.tokenizer.encode_bare("<think>a tree</think>")
    forced = {"max_new_tokens": 60, "regex": regex.escape("<think>a tree</think>") + "(yes|no)"}
    free = {"max_new_tokens": 6, "regex": "(yes|no)"}
    assert engine.generate(input_ids=question, sampling_params=forced)["text"][-9:] in ("think>yes", "/think>no")
    whole = engine.generate(input_ids=question, sampling_params=free, require_reasoning=True)
    assert whole["output_ids"] == greedy(TINY_QWEN_PATH, question, 6), "it never closes a thought, so nothing holds"
    scheduler = engine.scheduler
    scheduler.add_request(
        input_ids=question,
        sampling_params=SamplingParams(max_new_tokens=60, grammar=("regex", "(yes|no)"), after_thinking=True),
    )
    req = scheduler.waiting[-1]
    for token in thought:  # as if it had been drawn
        req.take_token(token)
        req.wanted -= 1
    (output,) = scheduler.process_requests().values()
    assert output.text in ("<think>a tree</think>yes", "<think>a tree</think>no")


def test_a_stream_and_many_callers(question):
    with Engine(device="cpu", check=True, page_size=4) as engine:
        whole = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 40, "json_schema": PERSON})
        chunks = list(
            engine.generate(
                input_ids=question, sampling_params={"max_new_tokens": 40, "json_schema": PERSON}, stream=True
            )
        )
        assert chunks[-1]["output_ids"] == whole["output_ids"]

        async def callers():
            tasks = [
                engine.async_generate(input_ids=question, sampling_params={"max_new_tokens": 40, kind: written})
                for kind, written in [*GRAMMARS, ("regex", "(")]
            ]
            return await asyncio.gather(*tasks)

        answers = asyncio.run(callers())
    assert answers[0]["output_ids"] == whole["output_ids"]
    assert all(valid(kind, answer["text"]) for (kind, _), answer in zip(GRAMMARS, answers, strict=False))
    assert answers[3]["meta_info"]["finish_reason"]["status_code"] == 400


# --- the others


def test_a_request_without_grammar_waits_for_nothing(engine, question, monkeypatch):
    """The next step is drawn before the last one's tokens are looked at, as ever, once no grammar is in the batch."""
    seen, scheduler = [], engine.scheduler
    sample, settle = scheduler.control.sample, scheduler._settle
    monkeypatch.setattr(scheduler.control, "sample", lambda *a: (seen.append(f"draw {len(a[1])}"), sample(*a))[1])
    monkeypatch.setattr(scheduler, "_settle", lambda: (seen.append("look") if scheduler._queued else None, settle())[1])
    params = [{"max_new_tokens": 6}, {"max_new_tokens": 3, "regex": "[a-z]+"}]
    answers = engine.generate(input_ids=[question, question], sampling_params=params)
    assert answers[0]["output_ids"] == greedy(TINY_QWEN_PATH, question, 6)
    drawn = [i for i, what in enumerate(seen) if what == "draw 2"]
    assert len(drawn) >= 2
    assert all(seen[i - 1] == "look" for i in drawn[1:]), "a mask needs the last token"
    assert (
        seen[drawn[-1] + 1 :]
        == ["draw 1", "look", "draw 1", "look", "draw 1", "look", "look"][-len(seen[drawn[-1] + 1 :]) :]
    )


def test_logprobs_are_those_of_the_model_itself(engine, question):
    one = engine.generate(
        input_ids=question, sampling_params={"max_new_tokens": 9, "json_schema": PERSON}, return_logprob=True,
        top_logprobs_num=1,
    )  # fmt: skip
    with torch.inference_mode():
        logits = reference_model(TINY_QWEN_PATH)(torch.tensor([question])).logits[0, -1]
    told = one["meta_info"]["output_token_logprobs"][0]
    assert told[0] == pytest.approx(logits.log_softmax(-1)[told[1]].item(), abs=1e-4)
    assert one["meta_info"]["output_top_logprobs"][0][0][1] == logits.argmax() != told[1]


# --- the gate


@pytest.fixture
def slow(engine, monkeypatch):
    """{text: future} of grammars that are compiled when the test says so."""
    futures, start = {}, engine.scheduler.grammars.compiler.start

    def started(kind, written):
        return futures.setdefault(written, Future()) if written.startswith("slow") else start(kind, written)

    monkeypatch.setattr(engine.scheduler.grammars.compiler, "start", started)
    return futures


def add(scheduler, grammar=None, n=4):
    return scheduler.add_request(input_ids=[5, 6, 7], sampling_params=SamplingParams(max_new_tokens=n, grammar=grammar))


def test_a_request_waits_for_its_grammar_and_nobody_else_does(engine, slow):
    scheduler = engine.scheduler
    held = add(scheduler, ("regex", "slow|slowly"))
    other = add(scheduler)
    while other not in scheduler.results:
        assert scheduler.step()
    assert scheduler.results[other].output_ids == greedy(TINY_QWEN_PATH, [5, 6, 7], 4)
    assert scheduler.step(), "there is still something to do"
    assert [req.rid for req in scheduler.waiting] == [held]
    assert scheduler.held == {held: "held"}
    compiler = GrammarCompiler(engine.wrapper.tokenizer.hf, 3584, [END])
    slow["slow|slowly"].set_result(compiler.start("regex", "slow|slowly").result(30))
    results = scheduler.process_requests()
    assert results[held].text in ("slow", "slowly")


def test_a_request_that_waits_for_its_grammar_can_be_aborted(engine, slow):
    scheduler = engine.scheduler
    held = add(scheduler, ("regex", "slow abort"))
    scheduler.step()
    assert scheduler.abort(held) == 1
    assert scheduler.process_requests()[held].finish_reason == {"type": "abort"}
    slow["slow abort"].set_exception(ValueError("too late to matter"))
    assert not scheduler.step()
    assert not scheduler.grammars.compiling


def test_a_grammar_that_takes_too_long_ends_its_request(engine, slow, monkeypatch):
    monkeypatch.setattr(grammar, "SECONDS", 0.05)
    scheduler = engine.scheduler
    held, other = add(scheduler, ("regex", "slow forever")), add(scheduler)
    results = scheduler.process_requests()
    assert results[held].finish_reason["status_code"] == 400
    assert "not compiled after 0.05 s" in results[held].finish_reason["message"]
    assert len(results[other].output_ids) == 4


# --- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json_schema": "{", "max_new_tokens": 5}, "json_schema='{' is no JSON"),
        ({"json_schema": {"type": "object"}}, "must be a text"),
        ({"json_schema": "{}", "regex": "a"}, "json_schema and regex: an answer has one grammar"),
        ({"structural_tag": "{}"}, "write it as ebnf"),
        ({"json_schema": "[" * 60_000}, "nested too deeply"),
        ({"regex": "a" * (1 << 20)}, "1,048,576 bytes, and may have 65,536"),
    ],
)
def test_a_bad_grammar_is_a_value_error_before_anything_is_queued(engine, given, message):
    with pytest.raises(ValueError, match=message) as error:
        engine.generate(["What is a page?"] * 2, [{"max_new_tokens": 3}, given])
    assert str(error.value).isprintable()
    assert not engine.scheduler.busy


def test_what_only_compiling_finds_out_ends_its_own_request_with_400(engine, question):
    params = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 3, "json_schema": '{"if": {}}'},
        {"max_new_tokens": 3, "regex": "("},
    ]
    well, schema, pattern = engine.generate(input_ids=[question] * 3, sampling_params=params)
    assert well["output_ids"] == greedy(TINY_QWEN_PATH, question, 3)
    for answer, kind in ((schema, "json_schema"), (pattern, "regex")):
        reason = answer["meta_info"]["finish_reason"]
        assert reason["message"].startswith(f"{kind} cannot be compiled: ")
        assert (reason["type"], reason["status_code"], reason["err_type"]) == ("abort", 400, "BadRequestError")
        assert (answer["text"], answer["output_ids"]) == ("", [])


def test_a_dead_matcher_ends_its_own_request(engine, question):
    scheduler = engine.scheduler
    rids = [
        scheduler.add_request(
            input_ids=question, sampling_params=SamplingParams(max_new_tokens=8, grammar=("regex", "[a-z ]{50,}"))
        )
        for _ in range(2)
    ]

    def kill(step):
        if scheduler.running and len(scheduler.running[0].output_ids) == 2:
            scheduler.running[0].grammar.matcher.consume_token(END)
        return False

    results = scheduler.process_requests(kill)
    reason = results[rids[0]].finish_reason
    assert (reason["type"], reason["status_code"]) == ("abort", 500)
    assert "dead end" in reason["message"]
    assert reason["message"].isprintable()
    assert results[rids[1]].finish_reason == {"type": "length", "length": 8}


def test_token_ids_alone_have_no_text_to_hold_for():
    with (
        Engine(device="cpu", skip_tokenizer_init=True) as engine,
        pytest.raises(ValueError, match=r"no tokenizer .*, so no text for regex"),
    ):
        engine.generate(input_ids=[1, 2], sampling_params={"regex": "a"})
