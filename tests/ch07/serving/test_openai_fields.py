"""No field that the official client can send is ignored: each is found in what the engine is asked or in the answer, or it
is refused by name. The list of fields is the client's own (openai.types).
"""

import inspect
import re
from pathlib import Path

import pytest
from openai.resources.chat.completions import Completions as ChatResource
from openai.resources.completions import Completions as CompletionResource
from openai.types import chat as chat_types
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsStreaming

from ch07_sglang_radix.serving import openai as openai_package
from ch07_sglang_radix.serving.openai import protocol
from tests.ch07.serving.fake_manager import ROOM, FakeManager
from tests.ch07.serving.web import client_of, post

MESSAGES = [{"role": "user", "content": "Hello?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def manager():
    return FakeManager("Hello there.")


@pytest.fixture(scope="module")
def client(manager):
    with client_of(manager) as client:
        yield client


def params(name):
    return lambda asked, answer: asked.sampling_params.get(name)


def asked(name):
    return lambda asked, answer: getattr(asked, name)


def first(answer):
    return answer["choices"][0]


# field: (value, where its effect is, what is there)
BOTH = {
    "model": ("fake", lambda asked, answer: answer["model"], "fake"),
    "frequency_penalty": (0.5, params("frequency_penalty"), 0.5),
    "logit_bias": ({"7": -100}, params("logit_bias"), {"7": -100}),
    "n": (2, lambda asked, answer: len(answer["choices"]), 2),
    "presence_penalty": (-1, params("presence_penalty"), -1),
    "seed": (5, params("sampling_seed"), 5),
    "stop": (["a", "b"], params("stop"), ["a", "b"]),
    "temperature": (0.3, params("temperature"), 0.3),
    "top_p": (0.9, params("top_p"), 0.9),
    "user": ("ann", asked("routing_key"), "ann"),
}
COMPLETION = BOTH | {
    "prompt": ("Hello?", asked("text"), "Hello?"),
    "best_of": (1, params("n"), None),
    "echo": (True, lambda asked, answer: first(answer)["text"], "Hello?Hello there."),
    "logprobs": (3, lambda asked, answer: len(first(answer)["logprobs"]["top_logprobs"][1]), 3),
    "max_tokens": (9, params("max_new_tokens"), 9),
}
CHAT = BOTH | {
    "messages": (MESSAGES, lambda asked, answer: len(asked.input_ids) > 3, True),
    "logprobs": (True, lambda asked, answer: first(answer)["logprobs"]["content"][0]["token"], "H"),
    "max_completion_tokens": (9, params("max_new_tokens"), 9),
    "max_tokens": (9, params("max_new_tokens"), 9),
    "metadata": ({"a": "b"}, lambda asked, answer: answer["metadata"], {"a": "b"}),
    "parallel_tool_calls": (False, lambda asked, answer: '")*' in asked.sampling_params["ebnf"], False),
    "prompt_cache_key": ("key", asked("routing_key"), "key"),
    "reasoning_effort": (None, asked("stream"), False),  # a test of its own: it needs a template that knows it
    "response_format": ({"type": "json_object"}, params("json_schema"), '{"type": "object"}'),
    "service_tier": ("auto", lambda asked, answer: answer["service_tier"], "default"),
    "tool_choice": ("required", lambda asked, answer: "call_0" in asked.sampling_params["ebnf"], True),
    "tools": (
        [TOOL],
        lambda asked, answer: first(answer)["message"]["content"],
        "Hello there.",
    ),  # and tests of its own
    "top_logprobs": (2, lambda asked, answer: len(first(answer)["logprobs"]["content"][0]["top_logprobs"]), 2),
}
NEEDS = {
    "parallel_tool_calls": {"tools": [TOOL], "tool_choice": "required"}, "tool_choice": {"tools": [TOOL]},
    "top_logprobs": {"logprobs": True},
}  # fmt: skip
STREAM = {"stream", "stream_options"}  # in test_openai_completions.py and test_openai_chat.py
HARMLESS = {  # values of refused fields that ask for nothing
    "modalities": ["text"], "prompt_cache_retention": "in_memory", "store": False, "verbosity": "medium",
    "service_tier": "default",
}  # fmt: skip

COMPLETION_FIELDS = sorted(CompletionCreateParamsStreaming.__annotations__)
CHAT_FIELDS = sorted(chat_params.CompletionCreateParamsStreaming.__annotations__)


@pytest.mark.parametrize(("resource", "fields"), [(CompletionResource, COMPLETION_FIELDS), (ChatResource, CHAT_FIELDS)])
def test_the_list_is_what_the_client_s_method_takes(resource, fields):
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert set(inspect.signature(resource.create).parameters) - transport == set(fields)


def body_of(table, name):
    needed = {key: table[key][0] for key in ("prompt", "messages") if key in table}
    return needed | NEEDS.get(name, {}) | {name: table[name][0]}


def check(manager, client, path, table, name):
    if name in STREAM:
        return
    if name in table:
        value, where, expected = table[name]
        status, answer = post(client, path, body_of(table, name))
        assert status == 200, answer
        assert where(manager.asked, answer) == expected
    else:
        body = {key: table[key][0] for key in ("prompt", "messages") if key in table}
        for value in ("x", {"a": 1}, [1], True, 5):
            status, answer = post(client, path, body | {name: value})
            assert (status, answer["error"]["param"]) == (400, name), (value, answer)
            assert answer["error"]["message"].startswith(name)
        for value in (None, *([HARMLESS[name]] if name in HARMLESS else ())):
            status, answer = post(client, path, body | {name: value})
            assert status == 200, (value, answer)


@pytest.mark.parametrize("name", COMPLETION_FIELDS)
def test_a_completion_s_field_has_its_effect_or_is_refused_by_name(manager, client, name):
    check(manager, client, "completions", COMPLETION, name)


@pytest.mark.parametrize("name", CHAT_FIELDS)
def test_a_chat_s_field_has_its_effect_or_is_refused_by_name(manager, client, name):
    check(manager, client, "chat/completions", CHAT, name)


@pytest.mark.parametrize("name", sorted(protocol.CompletionBody.__struct_fields__))
def test_a_completion_s_field_is_no_field_of_an_unknown_kind(client, name):
    """A value of no sensible kind is a 400, whatever the field, and null is as good as nothing."""
    status, answer = post(client, "completions", {"prompt": "Hello?", name: [[{"?": None}]]})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["param"].startswith(name)


@pytest.mark.parametrize("name", sorted(protocol.ChatBody.__struct_fields__))
def test_a_chat_s_field_is_no_field_of_an_unknown_kind(client, name):
    status, answer = post(client, "chat/completions", {"messages": MESSAGES, name: [[{"?": None}]]})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["param"].startswith(name)


MESSAGE_TYPES = {
    "system": (chat_types.ChatCompletionSystemMessageParam, protocol.System),
    "developer": (chat_types.ChatCompletionDeveloperMessageParam, protocol.Developer),
    "user": (chat_types.ChatCompletionUserMessageParam, protocol.User),
    "assistant": (chat_types.ChatCompletionAssistantMessageParam, protocol.Assistant),
    "tool": (chat_types.ChatCompletionToolMessageParam, protocol.ToolResult),
}


@pytest.mark.parametrize("role", MESSAGE_TYPES)
def test_every_field_of_a_message_is_known(role):
    theirs, ours = MESSAGE_TYPES[role]
    assert set(theirs.__annotations__) <= {*ours.__struct_fields__, "role"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
        ({"role": "assistant", "content": "x", "audio": {"id": "x"}}, "messages[0].audio"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages[0].refusal"),
        (
            {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}},
            "messages[0].function_call",
        ),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        ({"role": "assistant"}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages[0].content[0].type"),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}],
            },
            "messages[0].content[0].prompt_cache_breakpoint",
        ),
        ({"role": "user", "content": "x", "colour": 1}, "messages[0].colour"),
        (
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {}}]},
            "messages[0].tool_calls[0].type",
        ),
    ],
)
def test_what_a_message_may_not_hold_is_named(client, message, param):
    status, answer = post(client, "chat/completions", {"messages": [message]})
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "add"}}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
         "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}, "ebnf": "a"}, "ebnf"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": True}, "n"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"models": "x"}, "models"),
    ],
)  # fmt: skip
def test_what_a_chat_may_not_ask_for_is_named(client, body, param):
    status, answer = post(client, "chat/completions", {"messages": MESSAGES} | body)
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], 1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"json_schema": "{}", "regex": "a"}, "regex"),
        ({"logprobs": -1}, "logprobs"),
        ({"session_params": {"rid": "a"}}, "session_params.id"),
    ],
)
def test_what_a_completion_may_not_ask_for_is_named(client, body, param):
    status, answer = post(client, "completions", {"prompt": "Hello?"} | body)
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"\xff", b"[" * 100_000,
             b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "temperature": 1e999}'],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_a_400(client, body):
    for path in ("completions", "chat/completions"):
        status, answer = post(client, path, body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "\n" not in answer["error"]["message"]


SGLANG = {
    "top_k": (5, params("top_k"), 5),
    "min_p": (0.1, params("min_p"), 0.1),
    "repetition_penalty": (1.1, params("repetition_penalty"), 1.1),
    "min_tokens": (2, params("min_new_tokens"), 2),
    "stop_token_ids": ([1], params("stop_token_ids"), [1]),
    "stop_regex": ("a+", params("stop_regex"), "a+"),
    "ignore_eos": (True, params("ignore_eos"), True),
    "skip_special_tokens": (False, params("skip_special_tokens"), False),
    "no_stop_trim": (True, params("no_stop_trim"), True),
    "regex": ("a", params("regex"), "a"),
    "ebnf": ("start: /a/", params("ebnf"), "start: /a/"),
    "rid": ("mine", lambda asked, answer: (asked.rid, answer["id"]), ("mine", "mine")),
    "extra_key": ("k", asked("extra_key"), "k"),
    "lora_path": ("a", asked("lora_path"), "a"),
    "cache_salt": ("s", asked("extra_key"), "salt 1:s:"),
    "priority": (3, asked("priority"), 3),
    "bootstrap_host": ("127.0.0.1", asked("bootstrap_host"), "127.0.0.1"),
    "bootstrap_port": (8998, asked("bootstrap_port"), 8998),
    "bootstrap_room": (7, asked("bootstrap_room"), 7),
    "session_params": ({"id": "s", "rid": "r"}, lambda asked, answer: asked.session_params.rid, "r"),
}


@pytest.mark.parametrize("name", SGLANG)
@pytest.mark.parametrize(
    ("path", "needed"), [("completions", {"prompt": "Hi"}), ("chat/completions", {"messages": MESSAGES})]
)
def test_a_field_that_sglang_adds_has_its_effect(manager, client, path, needed, name):
    value, where, expected = SGLANG[name]
    status, answer = post(client, path, needed | {name: value})
    assert status == 200, answer
    assert where(manager.asked, answer) == expected


def test_every_declared_field_is_tested_here():
    of_chat = {
        "chat_template_kwargs",
        "continue_final_message",
        "separate_reasoning",
        "stream_reasoning",
    }  # test_openai_chat.py
    tested = STREAM | set(SGLANG) | set(protocol.REFUSED)
    assert set(protocol.CompletionBody.__struct_fields__) - tested - set(COMPLETION) == {"json_schema"}
    assert set(protocol.ChatBody.__struct_fields__) - tested - set(CHAT) == of_chat


def test_two_salts_never_make_one_key():
    keys = {
        protocol.namespace(protocol.CompletionBody(prompt="", cache_salt=salt, extra_key=key))
        for salt in (None, "a", "a:b", "ab", "") for key in (None, "b", "b:", ":b")
    }  # fmt: skip
    assert len(keys) == 20


def test_without_a_limit_a_chat_may_be_as_long_as_there_is_room(manager, client):
    client.chat.completions.create(model="fake", messages=MESSAGES)
    assert manager.asked.sampling_params["max_new_tokens"] == ROOM
    client.completions.create(model="fake", prompt="Hi")
    assert manager.asked.sampling_params["max_new_tokens"] == 16
    assert manager.asked.sampling_params["temperature"] == 1


def test_the_readme_lists_the_fields():
    readme = (Path(openai_package.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- fields -->(.*)<!-- /fields -->", readme, re.DOTALL)[1]
    rows = [[re.findall(r"`(\w+)`", cell) for cell in line.split("|")[2:4]] for line in table.splitlines()[3:5]]
    for column, fields in enumerate((COMPLETION_FIELDS, CHAT_FIELDS)):
        assert rows[0][column] == [name for name in fields if name not in protocol.REFUSED]
        assert rows[1][column] == [name for name in fields if name in protocol.REFUSED]
