"""The official client, a real server, one rank and two: what comes out is what `Engine` and transformers say."""

import json

import openai
import pytest

from ch07_sglang_radix import Engine
from common.teaching.scripted_checkpoint import scripted_checkpoint
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.serving.running import ONE_PROCESS, a_server
from tests.ch07.serving.web import client_of_an_engine, openai_client
from tests.oracle import greedy

QUESTION = [{"role": "user", "content": "What is a radix cache?"}]
PROMPTS = ["What is a radix cache?", "KV cache", "张量并行"]
SCRIPT = (
    "<think>\nParis 长城 😀? I look it up.\n</think>\n\nOne moment.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "长城", "unit": "C"}}\n</tool_call>'
)
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client():
    with a_server() as server, openai_client(server.url) as client:
        yield client


@pytest.fixture(scope="module", params=[1, 2])
def scripted(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("scripted")
    scripted_checkpoint(folder, SCRIPT, TINY_QWEN_PATH)
    if request.param == 1:
        with client_of_an_engine(model_path=str(folder), reasoning_parser="qwen3") as client:
            yield client
    else:
        with (
            a_server(
                "--model-path", str(folder), "--reasoning-parser", "qwen3", "--tp-size", "2", *ONE_PROCESS
            ) as server,
            openai_client(server.url) as client,
        ):
            yield client


@pytest.fixture(scope="module")
def engine():
    with Engine(device="cpu") as engine:
        yield engine


@pytest.mark.parametrize("token", [-1, 5_000_000, 1 << 70])
def test_ids_that_are_no_tokens_are_refused_also_if_they_are_to_be_echoed(client, token):
    with pytest.raises(openai.BadRequestError, match=r"token id|token ids"):
        client.completions.create(model="default", prompt=[5, token], echo=True)


def test_greedy_completions_are_the_engine_s_and_transformers_(client, engine):
    answer = client.completions.create(model="default", prompt=PROMPTS, max_tokens=24, temperature=0)
    ours = engine.generate(PROMPTS, {"max_new_tokens": 24})
    assert [choice.text for choice in answer.choices] == [one["text"] for one in ours]
    tokenizer = Tokenizer(TINY_QWEN_PATH)
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        theirs = tokenizer.decode(greedy(TINY_QWEN_PATH, tokenizer.encode(prompt), 24))
        assert theirs.startswith(choice.text)
    assert answer.usage.completion_tokens == sum(one["meta_info"]["completion_tokens"] for one in ours)


def test_a_stream_is_the_same_text(client):
    body = {"model": "default", "prompt": PROMPTS, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**body)
    texts = [""] * len(PROMPTS)
    for chunk in client.completions.create(**body, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_a_chat_is_the_engine_s_answer_to_the_rendered_prompt(client, engine):
    answer = client.chat.completions.create(model="default", messages=QUESTION, temperature=0)
    ids = engine.wrapper.tokenizer.encode_chat(QUESTION)
    ours = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 500})
    assert answer.choices[0].message.content == ours["text"]
    assert (answer.usage.prompt_tokens, answer.choices[0].finish_reason) == (len(ids), "stop")


def test_a_chat_in_a_session_may_be_as_long_as_its_context_leaves_room(client):
    """Without a limit of its own an answer has the rest of the model's context: behind the session, too."""
    url = str(client.base_url).replace("/v1/", "/")
    name = client._client.post(url + "open_session", json={}).json()
    body = {"model": "default", "messages": QUESTION, "temperature": 0}
    first = client.chat.completions.create(**body, extra_body={"session_params": {"id": name}})
    params = {"id": name, "rid": first.id}
    second = client.chat.completions.create(**body, extra_body={"session_params": params})
    assert second.usage.prompt_tokens == first.usage.total_tokens + first.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="nobody"):
        client.chat.completions.create(**body, extra_body={"session_params": params | {"rid": "nobody"}})


def test_logprobs_are_the_engine_s(client, engine):
    answer = client.completions.create(
        model="default", prompt=PROMPTS[0], max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    ours = engine.generate(
        PROMPTS[0], {"max_new_tokens": 5}, return_logprob=True, top_logprobs_num=2, logprob_start_len=0
    )["meta_info"]
    expected = ours["input_token_logprobs"] + ours["output_token_logprobs"]
    told = answer.choices[0].logprobs
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx([p for p, _, _ in expected[1:]], abs=1e-4)


def test_a_seed_makes_the_draw_repeat_itself(client):
    body = {"model": "default", "messages": QUESTION, "temperature": 1.5, "max_tokens": 20, "n": 3}
    texts = [
        [choice.message.content for choice in client.chat.completions.create(**body, seed=seed).choices]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1


def test_stops_end_an_answer_and_are_told(client):
    body = {"model": "default", "messages": QUESTION, "temperature": 0}
    text = client.chat.completions.create(**body).choices[0].message.content
    stop = text[10:14]
    choice = client.chat.completions.create(**body, stop=[stop]).choices[0]
    assert (choice.message.content, choice.matched_stop) == (text[: text.index(stop)], stop)


def test_a_prompt_that_was_there_before_is_told_as_cached(client):
    body = {"model": "default", "messages": QUESTION, "max_tokens": 2, "extra_body": {"extra_key": "cached"}}
    first, second = (client.chat.completions.create(**body).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens > 0


def test_what_does_not_fit_is_a_400_in_this_api_s_words(client):
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens 9999") as raised:
        client.chat.completions.create(model="default", messages=QUESTION, max_completion_tokens=9999)
    assert raised.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="stop_token_ids: token id 99999 is outside") as raised:
        client.completions.create(model="default", prompt="x", extra_body={"stop_token_ids": [99999]})
    assert raised.value.param == "stop_token_ids"


# --- a model that thinks and calls


def test_a_model_that_thinks_and_calls_by_itself(scripted):
    answer = scripted.chat.completions.create(model="default", messages=QUESTION, tools=[WEATHER], temperature=0)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Paris 长城 😀? I look it up.", "One moment.")
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "长城", "unit": "C"})
    assert answer.choices[0].finish_reason == "tool_calls"


def test_tokens_of_the_thought_are_counted(scripted):
    body = {"model": "default", "messages": QUESTION, "temperature": 0}
    usage = scripted.chat.completions.create(**body).usage
    told = usage.completion_tokens_details.reasoning_tokens
    *_, last = scripted.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens_details.reasoning_tokens == told
    native = {
        "text": "Say it.",
        "sampling_params": {"max_new_tokens": 200},
        "return_logprob": True,
        "return_text_in_logprobs": True,
    }
    answer = scripted._client.post(str(scripted.base_url).replace("/v1/", "/generate"), json=native).json()["meta_info"]
    behind = 1 + next(i for i, (_, _, text) in enumerate(answer["output_token_logprobs"]) if "/think>" in text)
    assert answer["reasoning_tokens"] == told == behind < usage.completion_tokens


def test_a_server_without_the_parser_counts_no_thoughts(client):
    usage = client.completions.create(model="default", prompt="<think>", max_tokens=2).usage
    assert usage.completion_tokens_details is None


def test_the_same_in_a_stream_where_nothing_is_taken_back(scripted):
    thought = words = arguments = ""
    for chunk in scripted.chat.completions.create(model="default", messages=QUESTION, tools=[WEATHER], stream=True):
        delta = chunk.choices[0].delta
        thought += delta.reasoning_content or ""
        words += delta.content or ""
        arguments += "".join(call.function.arguments for call in delta.tool_calls or ())
    assert (thought, words) == ("Paris 长城 😀? I look it up.", "One moment.")
    assert arguments == '{"city": "长城", "unit": "C"}'


def test_the_whole_text_is_what_transformers_says(scripted):
    answer = scripted.completions.create(model="default", prompt="Say it.", max_tokens=200)
    assert answer.choices[0].text == SCRIPT
