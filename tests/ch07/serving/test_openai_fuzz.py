"""Bodies that are nearly right, or not at all: always an answer, a 400 that says something, or a 404; never a 5xx."""

import asyncio
import copy
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.serving.http_server import make_app
from tests.ch07.serving.running import InThisProcess

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "x", "strict": False, "parameters": {"type": "object", "properties": {}}},
}  # fmt: skip
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
SAMPLING = {
    "model": "default", "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a"], "seed": 1, "logit_bias": {"5": 1.5},
    "frequency_penalty": 0.1, "presence_penalty": -0.1, "stream": True, "stream_options": {"include_usage": True}, "user": "u",
    "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [3], "stop_regex": "a+",
    "ignore_eos": True, "skip_special_tokens": False, "no_stop_trim": True, "extra_key": "k", "cache_salt": "s", "priority": 1,
    "lora_path": None,
}  # fmt: skip
COMPLETION = SAMPLING | {
    "prompt": ["a b", "c"],
    "max_tokens": 3,
    "echo": True,
    "logprobs": 2,
    "best_of": 2,
    "suffix": None,
}
CHAT = SAMPLING | {
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "2"},
    ],
    "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "tools": [TOOL], "tool_choice": "auto",
    "parallel_tool_calls": False, "response_format": {"type": "text"}, "metadata": {"a": "b"}, "reasoning_effort": None,
    "chat_template_kwargs": {"enable_thinking": True}, "separate_reasoning": True, "continue_final_message": False,
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, -1, 1e999, 10**30, 2**63, "", "\ud800", "\0", "a\n", "type", [], {}, "json_object"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def post():
    server = InThisProcess({"max_total_tokens": 1024})
    app = make_app(server.manager)

    async def send(path: str, body: dict):
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            content = json.dumps(body).encode()
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    yield lambda path, body: server.run(asyncio.wait_for(send(path, body), 50))
    info = server.run(server.manager.server_info())
    assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"]
    assert info["running"] == info["waiting"] == 0
    server.end()


def places(value, path=()):
    """Where something could be changed in a body."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(body, path, what, value):
    body = copy.deepcopy(body)
    inside = body
    for key in path[:-1]:
        inside = inside[key]
    if what == "leave out":
        del inside[path[-1]]
    elif what == "add" and isinstance(inside[path[-1]], dict):
        inside[path[-1]]["other"] = value
    else:
        inside[path[-1]] = value
    return body


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_the_body_that_is_changed_below_is_answered(post, path, body):
    answer = post(path, body)
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(("path", "whole"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
@given(data=st.data())
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_body_with_something_changed_is_answered_or_refused(post, path, whole, data):
    body = whole
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([one for one in places(body) if one]))
        body = changed(body, place, data.draw(st.sampled_from(["leave out", "add", "set", "set"])), data.draw(VALUES))
        if not body:
            break
    answer = post(path, body)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].strip()
        assert "\n" not in error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
