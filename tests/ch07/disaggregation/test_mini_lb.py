"""The balancer in front of two halves: every route a client knows, and what it says when a half is missing or is none."""

import pytest

from ch07_sglang_radix import Engine
from tests.ch07.disaggregation.halves import a_front, settled, two_halves
from tests.ch07.serving.running import LEAN, ONE_PROCESS, a_server

TEXT = "What is a radix cache?"
FEW = [5, 6, 7, 8]  # tokens that the decode half takes over


@pytest.fixture(scope="module")
def halves():
    deflect = ("--disaggregation-deflect-tokens", str(len(FEW)))
    with two_halves("--disaggregation-transfer-backend", "shm", prefill=ONE_PROCESS, decode=deflect) as halves:
        yield halves


@pytest.fixture(scope="module")
def engine():
    with Engine(device="cpu") as engine:
        yield engine


def test_openai_s_routes_answer_what_one_server_answers(halves, engine):
    right = engine.generate(TEXT, {"max_new_tokens": 8})["text"]
    status, answer = halves.front.call("/v1/completions", {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "n": 2})
    assert status == 200
    assert [choice["text"] for choice in answer["choices"]] == [right, right]
    body = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 8, "temperature": 0, "logprobs": True}
    status, answer = halves.front.call("/v1/chat/completions", body)
    assert status == 200
    assert len(answer["choices"][0]["logprobs"]["content"]) == answer["usage"]["completion_tokens"] == 8
    status, text = halves.front.raw(
        "/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert status == 200
    assert text.endswith("data: [DONE]\n\n")
    assert '"usage":{' in text
    halves.at_rest()


def test_a_prompt_that_decode_takes_over_is_answered_alike(halves, engine):
    params = {"max_new_tokens": 8, "n": 2, "temperature": 0}
    right = [one["output_ids"] for one in engine.generate(input_ids=FEW, sampling_params=params)]
    before, moved = halves.decode.info()["disaggregation_queues"]["deflected"], halves.decode.info()["kv_bytes_moved"]
    assert [one["output_ids"] for one in halves.front.generate(input_ids=FEW, sampling_params=params)] == right
    assert halves.front.stream(input_ids=FEW, sampling_params={"max_new_tokens": 8})[-1]["output_ids"] == right[0]
    body = {"prompt": FEW, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    status, answer = halves.front.call("/v1/completions", body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
    halves.at_rest()
    info = halves.decode.info()
    assert info["disaggregation_queues"]["deflected"] - before == 4
    assert (info["kv_bytes_moved"], halves.prefill.info()["disaggregation_queues"]["failed"]) == (moved, 0)


def test_a_grammar_and_a_stop_text_hold_across_the_two(halves, engine):
    params = {"regex": "(yes|no), it is", "max_new_tokens": 20}
    assert halves.front.generate(text=TEXT, sampling_params=params)["text"] in ("yes, it is", "no, it is")
    params = {"stop": " tree", "max_new_tokens": 40}
    answer = halves.front.generate(text=TEXT, sampling_params=params)
    right = engine.generate(TEXT, params)
    assert (answer["text"], answer["meta_info"]["finish_reason"]) == (
        right["text"],
        right["meta_info"]["finish_reason"],
    )
    halves.at_rest()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text": TEXT, "sampling_params": {"temperature": -1}}, "temperature=-1"),
        ({"text": TEXT, "nonsense": 1}, "nonsense"),
        ({"text": TEXT, "session_params": {"id": "a"}}, "stay in one engine"),
        ([], "an object of JSON"),
    ],
)
def test_what_is_wrong_is_a_400_and_leaves_nothing(halves, body, said):
    status, answer = halves.front.call("/generate", body)
    assert status == 400
    assert said in answer["error"]["message"]
    halves.at_rest()


def test_health_and_models_and_both_halves_info(halves):
    assert halves.front.call("/health")[0] == 200
    assert halves.front.call("/v1/models")[1]["data"][0]["id"] == "tiny-qwen"
    status, info = halves.front.call("/server_info")
    assert status == 200
    assert [info[url]["disaggregation_mode"] for url in (halves.prefill.url, halves.decode.url)] == [
        "prefill",
        "decode",
    ]


def test_a_half_asked_without_a_room_says_whom_to_ask(halves):
    for half in (halves.prefill, halves.decode):
        status, answer = half.call("/generate", {"text": TEXT})
        assert status == 400
        assert "ask the balancer" in answer["error"]["message"]


def test_a_whole_engine_is_no_prefill_server_and_takes_no_room(halves):
    with a_server(*LEAN) as server:
        with a_front("--prefill", server.url, "--decode", halves.decode.url) as front:
            status, answer = front.call("/generate", {"input_ids": [5]})
            assert status == 503
            assert answer["error"]["message"] == f"{server.url} is no prefill server: disaggregation_mode=null"
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 9, "bootstrap_room": 1}
        status, answer = server.call("/generate", {"input_ids": [5]} | room)
        assert status == 400
        assert "this one does both" in answer["error"]["message"]
    settled(halves.decode)


def test_prefill_drains_and_the_client_hears_so(halves):
    """SIGTERM on one half: its refusal is the client's answer, and decode forgets the room at once."""
    halves.prefill.process.terminate()
    halves.prefill.process.wait(100)
    status, _ = halves.front.call("/generate", {"text": TEXT})
    assert status in (500, 503)
    settled(halves.decode)
