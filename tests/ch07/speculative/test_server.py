"""Guesses under a server: what comes over HTTP, as text, streams, numbers and sessions, is what the plain server says."""

import pytest

from tests.ch07.serving.running import ONE_PROCESS, RunningServer

QUESTION = "What is a radix cache? A radix cache is a tree of prefixes. Say it again: a radix cache"
PARAMS = {"max_new_tokens": 40, "ignore_eos": True}
FLAGS = (
    "--speculative-algorithm",
    "NGRAM",
    "--speculative-num-draft-tokens",
    "6",
    "--no-speculative-stand-down",
    "--enable-metrics",
)


@pytest.fixture(scope="module")
def servers():
    plain, guessing = RunningServer(*ONE_PROCESS), RunningServer(*FLAGS)
    yield plain, guessing
    plain.end()
    guessing.end()


def test_answers_are_the_plain_server_s_and_tell_what_became_of_guesses(servers):
    (_, a), (_, b) = (server.call("/generate", {"text": QUESTION, "sampling_params": PARAMS}) for server in servers)
    assert (a["text"], a["output_ids"]) == (b["text"], b["output_ids"])
    assert "spec_verify_ct" not in a["meta_info"]
    meta = b["meta_info"]
    assert meta["spec_num_proposed_drafts"] == 5 * meta["spec_verify_ct"]
    assert meta["spec_accept_rate"] == meta["spec_num_correct_drafts"] / meta["spec_num_proposed_drafts"]
    assert meta["spec_verify_ct"] + meta["spec_num_correct_drafts"] == 40 - 1  # the first token came with the prompt
    # the same question again is known: its answer is guessed from the last one
    again = servers[1].call("/generate", {"text": QUESTION, "sampling_params": PARAMS})[1]
    assert again["text"] == a["text"]
    assert again["meta_info"]["spec_verify_ct"] < meta["spec_verify_ct"]
    assert again["meta_info"]["spec_accept_length"] > 3


def test_numbers_are_told_under_sglang_s_names(servers):
    servers[1].call("/generate", {"text": QUESTION, "sampling_params": PARAMS})
    text = servers[1].raw("/metrics")[1]
    values = {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("sglang:spec")
    }
    assert values["sglang:spec_accept_length"] >= 1
    assert 0 <= values["sglang:spec_accept_rate"] <= 1
    info = servers[1].call("/server_info")[1]
    assert "spec_verify_steps" in str(info)


def test_a_chat_s_next_turn_finds_the_last_one_s_answer_in_the_tree(servers):
    def chat(server):
        messages, seen = [], []
        for said in ("What is a page?", "And a slot?", "What is a page?"):
            messages.append({"role": "user", "content": said})
            body = {"model": "tiny-qwen", "messages": messages, "max_tokens": 30, "temperature": 0}
            status, answer = server.call("/v1/chat/completions", body)
            assert status == 200, answer
            messages.append(answer["choices"][0]["message"])
            seen.append(answer["usage"]["prompt_tokens_details"])
        return [one["content"] for one in messages], seen

    (a, cached_a), (b, cached_b) = map(chat, servers)
    assert a == b
    assert cached_a == cached_b
