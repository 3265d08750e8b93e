"""What a trace tells is what happened: from its lines alone the blocks add up, and so do tokens and messages."""

import json

import pytest
import torch

from ch06_tp_vllm import LLM, LLMEngine, SamplingParams

BLOCKS, SIZE = 14, 4


def params(tokens, **more):
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_trace_tells_every_step(checkpoint, tmp_path, asynchronous):
    engine = LLMEngine(
        str(checkpoint("qwen2")), device="cpu", block_size=SIZE, num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=16,
        async_scheduling=asynchronous, check=True, trace=tmp_path / "steps.jsonl",
    )  # fmt: skip
    prompts = {"a": list(range(20)), "b": [*range(12), 50, 51], "c": [7] * 9, "gone": [9] * 5}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params(18, n=2 if name == "c" else 1))
    while engine.has_unfinished_requests():
        engine.step()
        if engine.num_steps == 3:
            engine.abort_request("gone")
            engine.add_request("gone", [9] * 6, params(4))  # the name is free again
    lines = read(tmp_path / "steps.jsonl")  # although nobody closed it
    assert max(line["step"] for line in lines) == engine.num_steps
    assert sum(len(line["preempted"]) for line in lines) == engine.scheduler.num_preemptions > 0
    assert sorted(name for line in lines for name in line["finished"]) == ["a/0", "b/0", "c/0", "c/1", "gone/0"]
    assert [name for line in lines for name in line["aborted"]] == ["gone/0"]

    tables, computed = {}, {}
    for line in lines:
        for request in line["aborted"]:
            tables.pop(request, None), computed.pop(request, None)  # it may have waited all the time
        for request in line["preempted"]:
            del tables[request], computed[request]
        for request, blocks in line["blocks"].items():
            tables.setdefault(request, []).extend(blocks)
        for request, before, new, kind in line["scheduled"]:
            assert before == computed.get(request, before), "a request goes on where it was"
            computed[request] = before + new
            assert len(tables[request]) * SIZE >= before + new
            assert kind == "prefill" or new == 1
        for request in line["finished"]:
            del tables[request], computed[request]
        assert line["free"] == BLOCKS - len({block for table in tables.values() for block in table})
        assert line["running"] == len(tables)
        assert line["ms"]["total"] >= line["ms"]["settle"]
    assert not tables


def test_a_prefix_hit_shows_where_a_request_begins(tmp_path):
    with LLM(device="cpu", num_gpu_blocks_override=16, trace=tmp_path / "steps.jsonl") as llm:
        llm.generate([list(range(40))], params(2), use_tqdm=False)
        llm.generate([list(range(40))], params(2), use_tqdm=False)
    first, again = (line for line in read(tmp_path / "steps.jsonl") if line["scheduled"][0][3] == "prefill")
    assert first["scheduled"] == [["0/0", 0, 40, "prefill"]]
    assert again["scheduled"] == [["1/0", 32, 8, "prefill"]]
    assert again["blocks"]["1/0"][:2] == first["blocks"]["0/0"][:2]


def test_a_recording_beside_a_trace_misses_nothing_and_ends_nothing(tmp_path):
    engine = LLMEngine(device="cpu", num_gpu_blocks_override=16, trace=tmp_path / "steps.jsonl")
    ledger = engine.tp.ledger
    with ledger.recording():
        ledger.record("all_reduce", "before", torch.zeros(1))
        engine.trace.begin()
        ledger.record("all_reduce", "a step", torch.zeros(2))
        engine.trace.queued()
        engine.trace.write({"waiting": 0, "running": 0})
        assert [entry.label for entry in ledger.entries] == ["before", "a step"]
    assert ledger.enabled, "the trace goes on"
    engine.trace.begin()
    engine.trace.queued()
    engine.trace.write({"waiting": 0, "running": 0})
    engine.trace.close()
    assert [line["ledger"] for line in read(tmp_path / "steps.jsonl")] == [{"all_reduce": [1, 8]}, {}]
    assert not ledger.enabled


def traced_messages(folder, path):
    with_trace = LLMEngine(folder, device="cpu", num_gpu_blocks_override=16, trace=path)
    with_trace.add_request("a", [1, 2, 3], params(4))
    while with_trace.has_unfinished_requests():
        with_trace.step()
    if with_trace.trace:
        with_trace.trace.close()
    return with_trace.trace is None, with_trace.runner.config.num_layers


def test_rank_0_alone_writes_and_counts_the_messages(checkpoint, ranks, tmp_path):
    path = tmp_path / "steps.jsonl"
    said = ranks(2).run(traced_messages, str(checkpoint("qwen2")), str(path))
    assert [silent for silent, _ in said] == [False, True]
    lines = read(path)
    assert len(lines) == 4
    for line in lines:
        assert line["ledger"]["all_reduce"][0] == 1 + 2 * said[0][1]
        assert line["ledger"]["gather"][0] == 1
