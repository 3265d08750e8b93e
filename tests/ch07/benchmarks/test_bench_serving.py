"""The benchmark against a server that answers when it is told to."""

import asyncio
import csv
import json
import math
import random
import sys
import time
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from ch07_sglang_radix.benchmarks import bench_serving
from ch07_sglang_radix.benchmarks.bench_serving import BACKENDS, Bench, arrivals
from ch07_sglang_radix.benchmarks.serving_data import Conversation, Turn, Words, multi_turn
from ch07_sglang_radix.serving.http_client import Client
from tests.ch07.serving.fake_openai import FakeServer

# ids are words, so that texts and ids have the same lengths at the fake server
TOKENIZER = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), encode_bare=lambda text: text.split())
FIRST, GAP = 0.1, 0.02


def run(conversations, backend="sglang", rate=math.inf, at_once=None, **settings):
    """(records, seconds, server)."""

    async def bench():
        async with FakeServer(**settings) as server, Client(server.url) as client:
            bench = Bench(client, BACKENDS[backend], "fake", TOKENIZER, {"ignore_eos": True})
            records, seconds = await bench.run(conversations, rate, at_once, 0, tqdm(disable=True))
            return records, seconds, server

    return asyncio.run(bench())


def prompts(count, input_len=6, output_len=5, turns=1):
    return multi_turn(Words(range(10), 1), count, turns, input_len, output_len, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_delays_and_tokens_of_the_server_are_found(backend):
    records, seconds, server = run(prompts(3), backend, first_s=FIRST, gap_s=GAP, cached=2)
    assert [record.error for record in records] == [None] * 3
    for record in records:
        assert record.ttft >= FIRST
        assert len(record.gaps) == 4
        assert sum(record.gaps) >= 4 * GAP * 0.9
        assert record.e2e >= record.ttft + sum(record.gaps)
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (6, 5, 2)
    assert seconds >= FIRST + 4 * GAP
    for _, body in server.asked:
        assert body.get("sampling_params", body)["ignore_eos"] is True


def test_as_many_at_once_as_allowed():
    *_, server = run(prompts(9), at_once=3, first_s=0.1)
    assert server.most_at_once == 3
    *_, server = run(prompts(9), first_s=2.0)
    assert server.most_at_once == 9


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
def test_a_turn_s_prompt_holds_the_turns_and_answers_before(backend):
    records, _, server = run(prompts(1, turns=3), backend)
    bodies = [body for _, body in server.asked]
    if backend == "sglang-oai-chat":
        assert [len(body["messages"]) for body in bodies] == [1, 3, 5]
        assert bodies[2]["messages"][:3] == bodies[1]["messages"]
        assert bodies[1]["messages"][1] == {"role": "assistant", "content": " one two three four five"}
    else:
        name = "input_ids" if backend == "sglang" else "prompt"
        assert [len(body[name]) for body in bodies] == [6, 17, 28]
        assert bodies[2][name][:11] == bodies[0][name] + bodies[1][name][6:11]
    assert [record.prompt_tokens for record in records] == [6, 17, 28]


def test_a_turn_that_fails_is_the_last_of_its_conversation_and_of_no_other():
    records, *_ = run(prompts(2, turns=3), break_after=2)
    assert [record.error for record in records] == ["out of luck"] * 2
    records, *_ = run(prompts(2), refuse=(503, {"error": {"message": "The request queue is full."}}))
    assert {record.error for record in records} == {"503: The request queue is full."}


def test_an_answer_without_tokens_is_no_success():
    records, *_ = run(prompts(1), words=("",), backend="vllm")
    assert records[0].ttft == 0
    records, *_ = run([Conversation([Turn([1], 3)])], break_after=0)
    assert records[0].error == "out of luck"


def starts(conversations, rate, seed=0):
    async def times():
        began, seen = time.perf_counter(), []
        async for _ in arrivals(conversations, rate, random.Random(seed)):
            seen.append(time.perf_counter() - began)
        return seen

    return asyncio.run(times())


def test_conversations_come_at_random_times_or_at_their_own():
    rng, due, planned = random.Random(5), 0.0, []
    for _ in range(30):
        due += rng.expovariate(200)
        planned.append(due)
    seen = starts(prompts(30), 200, seed=5)
    assert all(at >= wanted for at, wanted in zip(seen, planned, strict=True))
    own = [Conversation([], at_s) for at_s in (0.0, 0.05, 0.05, 0.2)]
    assert all(at >= one.at_s for at, one in zip(starts(own, 1000), own, strict=True))


def command(monkeypatch, server, *flags):
    monkeypatch.setattr(sys, "argv", ["bench_serving", "--base-url", server.url, *map(str, flags)])


def with_command(monkeypatch, *flags, **settings):
    """main() of the benchmark in a thread, against a fake server; returns the server."""

    async def go():
        async with FakeServer(**settings) as server:
            command(monkeypatch, server, *flags)
            await asyncio.to_thread(bench_serving.main)
            return server

    return asyncio.run(go())


def test_the_command_writes_a_row_for_each_load_and_draws_them(monkeypatch, tmp_path, capsys):
    table, figure = tmp_path / "out.csv", tmp_path / "new" / "out.svg"
    flags = ("--num-prompts", 4, "--random-input-len", 8, "--random-output-len", 3, "--csv", table, "--figure", figure)
    server = with_command(monkeypatch, *flags, "--max-concurrency", 1, 2, "--backend", "vllm", cached=4)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["max_concurrency"] for row in rows] == ["1", "2"]
    assert {(row["completed"], row["input_tokens"], row["output_tokens"], row["model"]) for row in rows} == {
        ("4", "32", "12", "fake")
    }
    assert {row["cache_hit_rate"] for row in rows} == {"0.5"}
    assert b"<svg" in figure.read_bytes()
    assert capsys.readouterr().out.count("4 requests in") == 2
    asked = [tuple(body["prompt"]) for path, body in server.asked if path == "/v1/completions"]
    assert len(asked) == len(set(asked)) == 1 + 4 + 4, "a warm-up, and texts of their own for each load"


def test_a_trace_is_sent_as_it_is_written(monkeypatch, tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 1024, "output_length": 64, "hash_ids": [1, 2]},
        {"timestamp": 9, "input_length": 1000, "output_length": 32, "hash_ids": [1, 3]},
    ]  # fmt: skip
    trace.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    flags = ("--dataset-name", "mooncake", "--dataset-path", trace, "--tokens-per-block", 16, "--use-trace-timestamps")
    server = with_command(monkeypatch, *flags, "--warmup-requests", 0)
    first, second = (body for path, body in server.asked if path == "/generate")
    assert (len(first["input_ids"]), len(second["input_ids"])) == (32, 31)
    assert first["input_ids"][:16] == second["input_ids"][:16]
    assert first["sampling_params"]["max_new_tokens"] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset-name", "mooncake"], "needs --dataset-path FILE"),
        (["--request-rate", 0], "--request-rate 0.0 must be positive"),
        (["--max-concurrency", 4, -1], "--max-concurrency -1 must be positive"),
        (["--random-range-ratio", 2], "must be in [0, 1]"), (["--num-prompts", 0], "--num-prompts 0 must be positive"),
    ],
)  # fmt: skip
def test_a_bad_flag_is_one_line(monkeypatch, flags, said):
    monkeypatch.setattr(sys, "argv", ["bench_serving", *map(str, flags)])
    with pytest.raises(ValueError, match=r"--") as caught:
        bench_serving.main()
    assert said in str(caught.value)


def test_if_nothing_was_answered_the_command_fails(monkeypatch, capsys):
    with pytest.raises(ValueError, match="no request was answered"):
        with_command(monkeypatch, "--num-prompts", 2, "--model", "m", refuse=(401, {"error": "Unauthorized"}))
    assert "the first that failed: 401: Unauthorized" in capsys.readouterr().out
    with pytest.raises(ValueError, match="answers 401 and no model; give --model NAME"):
        with_command(monkeypatch, refuse=(401, {"error": "Unauthorized"}))
