"""Pictures over HTTP: a real server, its processes between the socket and the tower."""

import asyncio
import base64
import io

import pytest

from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.served import served
from common.tiny_qwen.tiny_vision import prompt_of, tiny_vision
from tests.ch07.images.test_sources import bomb
from tests.common.vision.checkpoints import picture


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def shown(seed: int) -> str:
    out = io.BytesIO()
    picture(84, 112, seed).save(out, "PNG")
    return data_url(out.getvalue())


def chat(*urls: str, **more):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [
        {"type": "text", "text": "What is it?"}
    ]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0} | more


async def every_call(url: str) -> list:
    async with Client(url) as client:
        model = (await client.call("GET", "/v1/models"))[1]["data"][0]["id"]
        params = {"max_new_tokens": 6}

        async def generate(**body):
            return await client.call("POST", "/generate", {"sampling_params": params} | body)

        async def completion(**body):
            return await client.call("POST", "/v1/chat/completions", {"model": model} | body)

        return [
            await generate(text=prompt_of("What is it?"), image_data=shown(1)),
            await generate(text=[prompt_of("What is it?"), prompt_of("Hello?", 0)], image_data=[[shown(1)], None]),
            await completion(**chat(shown(1), max_tokens=6)),
            await completion(**chat(shown(1), shown(2))),
            await generate(text=prompt_of("What is it?")),
            await generate(text=prompt_of("What is it?"), image_data="/etc/hostname"),
            await completion(**chat("http://127.0.0.1:1/a.png")),
            await completion(**chat(data_url(bomb(200_000, 200_000)))),
            await completion(**chat(*[shown(1)] * 65)),
            await completion(messages=[{"role": "user", "content": "<|image_pad|>"}]),
            await completion(messages=[{"role": "system", "content": chat(shown(1))["messages"][0]["content"]}]),
            await generate(text=prompt_of("Hello?", 0), image_data=shown(1), session_params={"id": "s"}),
        ]


@pytest.fixture(scope="module")
def answers():
    with served("--model-path", str(tiny_vision()), "--device", "cpu") as (url, _):
        return asyncio.run(every_call(url))


def test_a_picture_is_shown_in_every_dialect_and_found_in_the_tree(answers):
    (one, first), (two, batch), (three, said), (four, several) = answers[:4]
    assert [one, two, three, four] == [200] * 4
    assert (
        first["meta_info"]["prompt_tokens"] == batch[0]["meta_info"]["prompt_tokens"] == said["usage"]["prompt_tokens"]
    )
    assert first["text"] == batch[0]["text"] == said["choices"][0]["message"]["content"]
    assert batch[0]["meta_info"]["cached_tokens"] == first["meta_info"]["prompt_tokens"] - 1
    assert several["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"] + 12 + 2, (
        "12 rows and their two marks more"
    )


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (4, "1 place(s) for pictures"), (5, "no base64 of a picture"), (6, "--allow-image-urls"), (7, "make it smaller"),
        (8, "65 pictures of a request"), (9, "1 place(s) for pictures"), (10, "image_url"), (11, "a session keeps text alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_line(answers, number, words):
    status, body = answers[number]
    assert status == 400
    assert words in body["error"]["message"]
    assert "\n" not in body["error"]["message"]
