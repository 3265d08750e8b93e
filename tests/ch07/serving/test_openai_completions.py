"""/v1/completions and /v1/models through the official client."""

import openai
import pytest

from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.openai.answering import token_name
from common.text.tokenizer import Tokenizer
from tests.ch07.serving.fake_manager import FakeManager
from tests.ch07.serving.web import client_of, post, wait_until
from tests.common.text import kinds

TEXTS = ("One answer.", "Another: 长城.", "And a third")


@pytest.fixture
def manager():
    return FakeManager(*TEXTS)


@pytest.fixture
def client(manager):
    with client_of(manager) as client:
        yield client


# --- whole


def test_an_answer_is_a_completion(manager, client):
    answer = client.completions.create(model="fake", prompt="Say one.", max_tokens=30)
    (choice,) = answer.choices
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "fake", "cmpl-")
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, TEXTS[0], "stop", None)
    assert choice.matched_stop == manager.tokenizer.hf.eos_token_id
    prompt, completion = (len(manager.tokenizer.encode(text)) for text in ("Say one.", TEXTS[0]))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, completion + 1)
    assert answer.usage.total_tokens == prompt + completion + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == prompt // 2


def test_several_prompts_with_n_answers_each_are_in_order_and_each_prompt_counts_once(manager, client):
    answer = client.completions.create(model="fake", prompt=["Say one.", "Say two."], n=3, echo=True)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [
        prompt + text for prompt in ("Say one.", "Say two.") for text in TEXTS
    ]
    assert manager.asked.rid == [f"{answer.id}_0", f"{answer.id}_1"]
    assert answer.usage.prompt_tokens == sum(len(manager.tokenizer.encode(p)) for p in ("Say one.", "Say two."))


def test_token_ids_are_a_prompt_or_several(manager, client):
    ids = manager.tokenizer.encode("Say one.")
    assert client.completions.create(model="fake", prompt=ids, echo=True).choices[0].text == "Say one." + TEXTS[0]
    assert manager.asked.input_ids == ids
    answer = client.completions.create(model="fake", prompt=[ids, ids[:2]])
    assert [choice.text for choice in answer.choices] == list(TEXTS[:2])
    assert manager.asked.input_ids == [ids, ids[:2]]


def test_logprobs_name_every_token_and_say_where_it_stands(manager, client):
    answer = client.completions.create(model="fake", prompt="Say", logprobs=2)
    told = answer.choices[0].logprobs
    assert "".join(told.tokens) == TEXTS[0] + "<|im_end|>"
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    assert told.token_logprobs == [-i / 8 for i in range(len(told.tokens))]
    assert [len(top) for top in told.top_logprobs] == [2] * len(told.tokens)


def test_with_echo_the_prompt_s_tokens_come_first_and_the_very_first_has_no_logprob(manager, client):
    answer = client.completions.create(model="fake", prompt="Say one.", logprobs=1, echo=True)
    told = answer.choices[0].logprobs
    assert "".join(told.tokens) == "Say one." + TEXTS[0] + "<|im_end|>"
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    assert answer.choices[0].text.startswith("".join(told.tokens[:2]))
    assert manager.asked.logprob_start_len == 0


def test_the_bytes_of_half_a_character_are_its_name(tmp_path):
    tokenizer = Tokenizer(kinds.byte_level(tmp_path))
    half, letter = (tokenizer.hf.convert_tokens_to_ids(one) for one in ("é", "t"))
    assert (token_name(tokenizer, half), token_name(tokenizer, letter)) == ("bytes:\\xe9", "t")


# --- in a stream


def test_a_stream_is_the_same_answer_in_pieces(manager, client):
    chunks = list(client.completions.create(model="fake", prompt="Say", n=3, stream=True, logprobs=1, echo=True))
    for i, text in enumerate(TEXTS):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert "".join(choice.text for choice in mine) == "Say" + text
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert len(mine) > 3
        tokens = [token for choice in mine if choice.logprobs for token in choice.logprobs.tokens]
        assert tokens == [
            token_name(manager.tokenizer, token)
            for part in ("Say", text) for token in manager.tokenizer.encode(part)
        ] + ["<|im_end|>"]  # fmt: skip
        offsets = [at for choice in mine if choice.logprobs for at in choice.logprobs.text_offset]
        assert offsets == sorted(offsets)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_if_it_is_asked_for(client):
    chunks = list(
        client.completions.create(model="fake", prompt="Say", stream=True, stream_options={"include_usage": True})
    )
    whole = client.completions.create(model="fake", prompt="Say")
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])


def test_the_stream_is_server_sent_events_that_end_in_done(client):
    with client.completions.with_streaming_response.create(model="fake", prompt="Say", stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


def test_a_client_that_leaves_has_its_answer_closed(manager, client):
    manager.texts, manager.pause = ("word " * 300,), 0.01
    stream = client.completions.create(model="fake", prompt="Say", stream=True)
    next(stream)
    assert manager.running == 1
    stream.close()
    wait_until(lambda: manager.running == 0, 100)


# --- errors


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_an_http_error_even_in_a_stream(manager, client, stream):
    manager.refusal = RequestError(400, "max_new_tokens=99 must be at most 50")
    with pytest.raises(openai.BadRequestError, match="max_tokens=99 must be at most 50") as raised:
        client.completions.create(model="fake", prompt="Say", stream=stream)
    assert (raised.value.param, raised.value.type) == ("max_tokens", "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_503(manager, client, stream):
    manager.refusal = RequestError(503, "The request queue is full.", "service_unavailable")
    with pytest.raises(openai.InternalServerError, match="queue is full") as raised:
        client.completions.create(model="fake", prompt="Say", stream=stream)
    assert (raised.value.status_code, raised.value.type, raised.value.param) == (503, "service_unavailable", None)


ABORT = {"type": "abort", "message": "the grammar is none", "status_code": 400, "err_type": "BadRequestError"}


def test_an_answer_that_ends_in_an_error_is_that_error(manager, client):
    manager.finish = ABORT
    with pytest.raises(openai.BadRequestError, match="the grammar is none"):
        client.completions.create(model="fake", prompt="Say")
    assert manager.running == 0


def test_an_error_at_once_is_an_http_error_in_a_stream_too(manager, client):
    manager.texts, manager.finish = ("",), ABORT
    with pytest.raises(openai.BadRequestError, match="the grammar is none"):
        client.completions.create(model="fake", prompt="Say", stream=True)
    wait_until(lambda: manager.running == 0)


def test_a_later_error_is_an_event_and_the_end(manager, client):
    manager.finish = ABORT
    stream = client.completions.create(model="fake", prompt="Say", stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="the grammar is none"):
        seen.extend(chunk.choices[0].text for chunk in stream)
    wait_until(lambda: manager.running == 0)


def test_an_abort_that_was_asked_for_is_no_error(manager, client):
    manager.finish = {"type": "abort", "message": "aborted"}
    assert client.completions.create(model="fake", prompt="Say").choices[0].finish_reason == "abort"


def test_another_model_is_not_found(client):
    for ask in (
        lambda: client.completions.create(model="gpt-4", prompt="Say"), lambda: client.models.retrieve("gpt-4"),
        lambda: client.chat.completions.create(model="fake:lora", messages=[{"role": "user", "content": "Hi"}]),
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as raised:
            ask()
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_without_a_tokenizer_there_is_no_text(manager, client):
    manager.tokenizer = None
    status, answer = post(client, "completions", {"prompt": "Say"})
    assert (status, answer["error"]["message"]) == (
        400, "this server has no tokenizer, so no text; use /generate with input_ids",
    )  # fmt: skip
    manager.state = "starting"
    assert post(client, "completions", {"prompt": "Say"})[0] == 503


# --- models


def test_the_list_of_models_has_the_served_one(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by, model.max_model_len) == ("fake", "model", "sglang", 100)
    assert client.models.retrieve("fake") == model
