"""/v1/chat/completions through the official client."""

import json

import openai
import pytest
from pydantic import BaseModel

from common.teaching.scripted_checkpoint import CHAT_TEMPLATE
from tests.ch07.serving.fake_manager import FakeManager
from tests.ch07.serving.web import client_of, post

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Weather in Paris?"}]
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "What it is like outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture
def ask():
    """ask(text of the answer, body...) -> (the manager, the client's answer)"""
    opened = []

    def ask(text, *, args=None, finish=None, **body):
        manager = FakeManager(text, **{"chat_template": CHAT_TEMPLATE} | (args or {}))
        manager.finish = finish
        context = client_of(manager)
        client = context.__enter__()
        opened.append(context)
        answer = client.chat.completions.create(**{"model": "fake", "messages": MESSAGES} | body)
        return manager, list(answer) if body.get("stream") else answer

    yield ask
    for context in opened:
        context.__exit__(None, None, None)


def prompt_of(manager) -> str:
    return manager.tokenizer.decode(manager.asked.input_ids, skip_special_tokens=False)


def pieces(chunks, field: str) -> list[str]:
    found = [getattr(chunk.choices[0].delta, field, None) for chunk in chunks if chunk.choices]
    return [piece for piece in found if piece]


# --- words


def test_an_answer_is_a_chat_completion(ask):
    manager, answer = ask("It rains.")
    (choice,) = answer.choices
    assert (answer.object, answer.id[:9], choice.finish_reason) == ("chat.completion", "chatcmpl-", "stop")
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", "It rains.", None)
    assert choice.message.reasoning_content is None
    assert prompt_of(manager) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWeather in Paris?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(ask):
    manager, chunks = ask("It rains.", stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert all(delta.role is None for delta in deltas[1:])
    assert all("reasoning_content" in delta.model_extra for delta in deltas)
    assert "".join(pieces(chunks, "content")) == "It rains."
    assert len(pieces(chunks, "content")) > 2
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-2].choices[0].matched_stop == manager.tokenizer.hf.eos_token_id
    assert (chunks[-1].choices, chunks[-1].usage.prompt_tokens) == ([], len(manager.asked.input_ids))


def test_each_of_n_answers_has_a_role_and_an_end(ask):
    _, chunks = ask("It rains.", stream=True, n=2)
    for i in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "It rains."
        assert mine[-1].finish_reason == "stop"


def test_logprobs_tell_each_token_once_and_its_bytes(ask):
    for stream in (False, True):
        manager, answer = ask("长城 rains", logprobs=True, top_logprobs=2, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        ids = manager.tokenizer.encode("长城 rains")
        assert b"".join(bytes(token.bytes) for token in told) == "长城 rains<|im_end|>".encode()
        assert [token.logprob for token in told] == [-i / 8 for i in range(len(ids) + 1)]
        assert {len(token.top_logprobs) for token in told} == {2}


def test_contents_in_parts_and_developers_are_told_to_the_template(ask):
    manager, _ = ask(
        "Yes.",
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Paris?"}]},
        ],
    )
    assert "system\nBe short.<|im_end|>" in prompt_of(manager)
    assert "user\nWeather in Paris?<|im_end|>" in prompt_of(manager)


def test_a_last_message_may_go_on(ask):
    manager, _ = ask(
        "rains.",
        messages=[*MESSAGES, {"role": "assistant", "content": "It"}],
        extra_body={"continue_final_message": True},
    )
    assert prompt_of(manager).endswith("<|im_start|>assistant\nIt")


def test_a_chat_that_the_template_refuses_is_a_400(ask):
    with pytest.raises(openai.BadRequestError, match="refuses these messages: no") as raised:
        ask("x", args={"chat_template": "{{ raise_exception('no') }}"})
    assert raised.value.param == "messages"


def test_the_template_of_a_flag_is_a_file_or_a_template(ask, tmp_path):
    template = "I hear: {{ messages[0].content }}"
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    for given in (template, str(tmp_path / "chat.jinja")):
        assert prompt_of(ask("x", args={"chat_template": given})[0]) == f"I hear: {MESSAGES[0]['content']}"


# --- structure


class City(BaseModel):
    city: str


def test_response_formats_become_the_engine_s_json_schema(ask):
    manager, _ = ask("{}", response_format={"type": "json_object"})
    assert json.loads(manager.asked.sampling_params["json_schema"]) == {"type": "object"}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "null"}}}
    manager, _ = ask("{}", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert json.loads(manager.asked.sampling_params["json_schema"]) == schema
    manager, _ = ask("{}", response_format={"type": "text"})
    assert "json_schema" not in manager.asked.sampling_params


def test_the_client_s_parse_gets_its_object():
    manager = FakeManager(PARIS)
    with client_of(manager) as client:
        answer = client.chat.completions.parse(model="fake", messages=MESSAGES, response_format=City)
    assert answer.choices[0].message.parsed == City(city="Paris")
    assert json.loads(manager.asked.sampling_params["json_schema"])["required"] == ["city"]


# --- tools


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_told_apart_from_the_words_before_it(ask, stream):
    _, answer = ask("I look.\n" + CALL, tools=[WEATHER], stream=stream)
    if stream:
        assert "".join(pieces(answer, "content")) == "I look."
        calls = [call for piece in pieces(answer, "tool_calls") for call in piece]
        assert (calls[0].function.name, calls[0].function.arguments, calls[0].type) == ("get_weather", "", "function")
        assert (calls[0].id[:5], len(calls[0].id), calls[1].id) == ("call_", 29, None)
        assert "".join(call.function.arguments for call in calls) == PARIS
        assert len(calls) > 2
        assert answer[-1].choices[0].finish_reason == "tool_calls"
    else:
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        assert (call.function.name, call.function.arguments) == ("get_weather", PARIS)


def test_parallel_calls_have_an_index_each(ask):
    text = CALL + "\n" + CALL.replace("Paris", "Rome")
    _, answer = ask(text, tools=[WEATHER])
    assert answer.choices[0].message.content is None
    assert [json.loads(call.function.arguments)["city"] for call in answer.choices[0].message.tool_calls] == [
        "Paris",
        "Rome",
    ]
    assert len({call.id for call in answer.choices[0].message.tool_calls}) == 2
    _, chunks = ask(text, tools=[WEATHER], stream=True)
    calls = [call for piece in pieces(chunks, "tool_calls") for call in piece]
    assert [call.index for call in calls if call.id] == [0, 1]
    assert "".join(call.function.arguments for call in calls if call.index == 1) == '{"city": "Rome"}'


def test_without_parallel_calls_the_first_is_the_only_one(ask):
    _, answer = ask(CALL + "\n" + CALL, tools=[WEATHER], parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1


def test_the_client_s_helper_puts_a_streamed_call_together():
    with client_of(FakeManager(CALL)) as client:
        tool = openai.pydantic_function_tool(City, name="get_weather")
        with client.chat.completions.stream(model="fake", messages=MESSAGES, tools=[tool]) as stream:
            answer = stream.get_final_completion()
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == City(city="Paris")


def test_tools_are_shown_to_the_model_unless_it_may_call_none(ask):
    manager, _ = ask("x", tools=[WEATHER])
    assert json.dumps(WEATHER) in prompt_of(manager)
    assert "ebnf" not in manager.asked.sampling_params
    manager, answer = ask(CALL, tools=[WEATHER], tool_choice="none")
    assert "get_weather" not in prompt_of(manager)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (CALL, "stop")


@pytest.mark.parametrize(
    ("choice", "callable_", "words", "several"),
    [
        ("required", ["get_weather", "now"], False, True),
        ({"type": "function", "function": {"name": "now"}}, ["now"], False, False),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}, ["now"], False, True),
    ],
)
def test_a_call_that_is_required_is_a_grammar(ask, choice, callable_, words, several):
    manager, _ = ask(CALL, tools=[WEATHER, NOW], tool_choice=choice)
    grammar = manager.asked.sampling_params["ebnf"]
    assert [name for name in ("get_weather", "now") if f'\\"{name}\\"' in grammar] == callable_
    assert ("WORDS" in grammar, "block)*" in grammar) == (words, several)
    assert "get_weather" in prompt_of(manager)  # all are shown


def test_strict_tools_are_a_grammar_that_leaves_room_for_words(ask):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    manager, _ = ask(CALL, tools=[strict])
    assert "WORDS" in manager.asked.sampling_params["ebnf"]


def test_a_tool_that_is_not_allowed_is_not_called(ask):
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NOW]}}
    _, answer = ask(CALL, tools=[WEATHER, NOW], tool_choice=allowed)
    assert (answer.choices[0].message.tool_calls, answer.choices[0].finish_reason) == (None, "stop")


def test_a_call_that_breaks_off_is_none(ask):
    finish = {"type": "length", "length": 9}
    _, answer = ask(CALL[:-20], tools=[WEATHER], finish=finish)
    assert (answer.choices[0].message.tool_calls, answer.choices[0].finish_reason) == (None, "length")
    _, chunks = ask(CALL[:-20], tools=[WEATHER], finish=finish, stream=True)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_round_trip_tells_the_model_its_call_and_the_result(ask):
    """The client sends back what it got, fields that are null and all."""
    _, answer = ask(CALL, tools=[WEATHER])
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    for sent in (message, message.model_dump()):
        manager, _ = ask("It rains.", tools=[WEATHER], messages=[*MESSAGES, sent, result])
        assert CALL in prompt_of(manager)
        assert "<tool_response>\nrain\n</tool_response>" in prompt_of(manager)


# --- thoughts

THOUGHT = "<think>\nHm, rain?\n</think>\n\nIt rains."
QWEN3 = {"reasoning_parser": "qwen3"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_is_told_apart(ask, stream):
    _, answer = ask(THOUGHT, args=QWEN3, stream=stream)
    if stream:
        assert "".join(pieces(answer, "reasoning_content")) == "Hm, rain?"
        assert len(pieces(answer, "reasoning_content")) > 2
        assert "".join(pieces(answer, "content")) == "It rains."
    else:
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm, rain?", "It rains.")


def test_a_thought_that_the_template_opens_is_one_from_the_first_token(ask):
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    manager, answer = ask("Hm.\n</think>\n\nYes.", args=QWEN3, extra_body=kwargs)
    assert prompt_of(manager).endswith("assistant\n<think>\n")
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")


@pytest.mark.parametrize("parser", ["qwen3-thinking", "deepseek-r1"])
def test_a_model_that_always_thinks_begins_inside_the_thought(ask, parser):
    _, answer = ask("Hm.\n</think>\n\nYes.", args={"reasoning_parser": parser})
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
    closed = {"chat_template_kwargs": {"enable_thinking": False}}
    _, answer = ask("Yes.", args={"reasoning_parser": parser}, extra_body=closed)
    assert answer.choices[0].message.content == "Yes.", "unless the prompt has closed it"


def test_reasoning_effort_is_told_to_a_template_that_knows_it(ask):
    manager, answer = ask("Yes.", args=QWEN3, reasoning_effort="none")
    assert prompt_of(manager).endswith("<think>\n\n</think>\n\n")
    assert answer.choices[0].message.content == "Yes."
    template = "{{ messages[0].content }} effort={{ reasoning_effort }}"
    manager, _ = ask("Yes.", args={"chat_template": template}, reasoning_effort="high")
    assert prompt_of(manager).endswith("effort=high")
    with pytest.raises(openai.BadRequestError, match="no reasoning_effort"):
        ask("Yes.", reasoning_effort="high")


def test_a_thought_may_stay_in_the_text_or_come_in_one_piece(ask):
    _, answer = ask(THOUGHT, args=QWEN3, extra_body={"separate_reasoning": False})
    assert (answer.choices[0].message.reasoning_content, answer.choices[0].message.content) == (None, THOUGHT)
    _, chunks = ask(THOUGHT, args=QWEN3, stream=True, extra_body={"stream_reasoning": False})
    assert pieces(chunks, "reasoning_content") == ["Hm, rain?"]
    _, answer = ask(THOUGHT)  # a server that looks for no thoughts
    assert answer.choices[0].message.content == THOUGHT


def test_a_call_closes_the_thought(ask):
    _, answer = ask("<think>\nI look.\n" + CALL, args=QWEN3, tools=[WEATHER])
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("I look.", None)
    assert message.tool_calls[0].function.arguments == PARIS


def test_a_grammar_holds_behind_a_thought_that_is_open(ask):
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    schema = {"response_format": {"type": "json_object"}}
    assert ask("{}", args=QWEN3, extra_body=thinks, **schema)[0].asked.require_reasoning
    assert not ask("{}", args=QWEN3, **schema)[0].asked.require_reasoning
    assert not ask("{}", extra_body=thinks, **schema)[0].asked.require_reasoning


def test_a_chat_with_bad_unicode_is_a_400(ask):
    with client_of(FakeManager()) as client:
        body = b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'
        status, answer = post(client, "chat/completions", body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
