"""The three dialects: the same answer, in the words of each."""

import asyncio

import pytest

from ch07_sglang_radix.serving.ask import CHAT, COMPLETIONS, GENERATE, Answer, stream
from ch07_sglang_radix.serving.http_client import Client
from tests.ch07.serving.fake_openai import FakeServer

PROMPTS = {GENERATE: [1, 2, 3], COMPLETIONS: [1, 2, 3], CHAT: [{"role": "user", "content": "a b c"}]}


def ask(dialect, prompt=None, **settings):
    async def run():
        async with FakeServer(**settings) as server, Client(server.url) as client:
            answer = Answer()
            new = [
                n async for n in stream(client, dialect, dialect.body("fake", prompt or PROMPTS[dialect], 5), answer)
            ]
            return answer, new, server.asked

    return asyncio.run(run())


@pytest.mark.parametrize("dialect", PROMPTS, ids=lambda d: d.path)
@pytest.mark.parametrize("cached", [None, 0, 2])
def test_each_dialect_gives_the_same_answer(dialect, cached):
    answer, new, ((path, body),) = ask(dialect, cached=cached)
    assert (answer.text, answer.finish_reason) == (" one two three four five", "length")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (3, 5, cached)
    assert new == [1] * 5
    assert path == dialect.path
    assert body["stream"] is True


def test_a_text_is_a_text_to_generate():
    _, _, ((_, body),) = ask(GENERATE, "three little words")
    assert body["text"] == "three little words"
    assert "input_ids" not in body


def test_tokens_that_come_together_are_told_together():
    answer = Answer()
    meta = {"prompt_tokens": 3, "cached_tokens": 0, "finish_reason": None}
    for total, new in ((1, 1), (4, 3), (4, 0)):
        event = {"text": "x" * total, "output_ids": [0] * total, "meta_info": meta | {"completion_tokens": total}}
        assert GENERATE.take(answer, event) == new


def test_a_thought_is_part_of_what_is_streamed():
    answer = Answer()
    for delta in ({"reasoning_content": "hm", "content": None}, {"content": "yes", "reasoning_content": None}, {}):
        CHAT.take(answer, {"choices": [{"delta": delta}]})
    assert answer.text == "hmyes"
