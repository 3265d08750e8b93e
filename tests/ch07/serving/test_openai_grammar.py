"""Forms of answers, asked of a model that knows none of them, through the official client: what comes back is valid."""

import json
from typing import Annotated

import openai
import pytest
from jsonschema import validate
from pydantic import BaseModel, Field

from common.teaching.scripted_checkpoint import scripted_checkpoint
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.serving.web import client_of_an_engine

QUESTION = [{"role": "user", "content": "What is a radix cache?"}]
CITY = {
    "type": "object", "additionalProperties": False, "required": ["city", "unit", "days"],
    "properties": {
        "city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}, "days": {"$ref": "#/$defs/days"},
    },
    "$defs": {"days": {"type": "integer", "minimum": 0, "maximum": 9}},
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}


class City(BaseModel):
    name: str = Field(max_length=9)
    rivers: list[Annotated[str, Field(max_length=9)]] = Field(max_length=2)


@pytest.fixture(scope="module")
def ask():
    with client_of_an_engine(max_total_tokens=4096) as client:

        def ask(**body):
            return client.chat.completions.create(
                **{"model": "default", "messages": QUESTION, "max_tokens": 150, "temperature": 1, "seed": 0} | body
            )

        ask.client = client
        yield ask


def test_a_required_call_is_one_of_the_tools_with_arguments_that_are_valid(ask):
    answer = ask(tools=[WEATHER, NOW], tool_choice="required", parallel_tool_calls=False, n=6)
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        validate(
            json.loads(call.function.arguments), CITY if call.function.name == "get_weather" else {"maxProperties": 0}
        )
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_a_named_call_is_that_one_and_its_stream_the_same(ask):
    body = {"tools": [WEATHER, NOW], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    (call,) = ask(**body).choices[0].message.tool_calls
    validate(json.loads(call.function.arguments), CITY)
    pieces = [piece for chunk in ask(**body, stream=True) for piece in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0].function.name == call.function.name == "get_weather"
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert len(pieces) > 3


def test_parallel_calls_are_valid_each(ask):
    answer = ask(tools=[NOW], tool_choice="required", max_tokens=200)
    calls = answer.choices[0].message.tool_calls
    assert len(calls) > 1
    assert {(call.function.name, call.function.arguments) for call in calls} == {("now", "{}")}


def test_a_strict_tool_leaves_the_model_its_words(ask):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    plain = ask(temperature=0).choices[0].message.content
    assert ask(tools=[strict], temperature=0).choices[0].message.content == plain


def test_json_and_a_schema_are_obeyed_at_any_temperature(ask):
    assert isinstance(json.loads(ask(response_format={"type": "json_object"}).choices[0].message.content), dict)
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    for choice in ask(response_format=schema, n=5, temperature=2).choices:
        validate(json.loads(choice.message.content), CITY)


def test_the_client_s_parse_gets_its_object(ask):
    answer = ask.client.chat.completions.parse(
        model="default", messages=QUESTION, response_format=City, temperature=1, seed=0
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_regex_and_ebnf_are_obeyed(ask):
    assert ask(extra_body={"regex": "(ab){2,3}"}).choices[0].message.content in ("abab", "ababab")
    assert ask(extra_body={"ebnf": 'root ::= "yes" | "no"'}).choices[0].message.content in ("yes", "no")
    assert ask(extra_body={"ebnf": 'start: "yes" | "no"'}).choices[0].message.content in ("yes", "no")


UNKNOWN = {"type": "object", "if": {}}
REFUSED = {
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": UNKNOWN}}},
        'Unimplemented keys: ."if"',
    ),
    "regex": ({"extra_body": {"regex": "("}}, "regex cannot be compiled"),
    "ebnf": ({"extra_body": {"ebnf": "x"}}, "ebnf cannot be compiled"),
    "tool": (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": UNKNOWN}}], "tool_choice": "required"},
        'Unimplemented keys: ."if"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "said"), REFUSED.values(), ids=REFUSED)
def test_a_grammar_that_cannot_be_compiled_is_a_400_with_its_message(ask, body, said, stream):
    with pytest.raises(openai.BadRequestError, match=said):
        ask(**body, stream=stream)


def test_a_thought_is_free_and_the_answer_behind_it_is_not(tmp_path):
    """The script's thought comes as it is; its answer, which is no JSON, does not."""
    scripted_checkpoint(tmp_path, "Paris? I think so.\n</think>\n\nIt is Paris.", TINY_QWEN_PATH)
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    with client_of_an_engine(model_path=str(tmp_path), reasoning_parser="qwen3") as client:
        body = {"model": "default", "messages": QUESTION, "max_tokens": 100, "extra_body": thinks}
        free = client.chat.completions.create(**body).choices[0].message
        bound = client.chat.completions.create(**body, response_format={"type": "json_object"}).choices[0].message
    assert (free.reasoning_content, free.content) == ("Paris? I think so.", "It is Paris.")
    assert bound.reasoning_content == free.reasoning_content
    assert bound.content.startswith("{")
