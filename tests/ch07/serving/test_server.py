"""launch_server as its user meets it: processes, sockets, HTTP. One server for most of it."""

import itertools
import json
import socket
import subprocess
import sys

import pytest

from ch07_sglang_radix import Engine
from tests.ch07.serving.calls import CALLS, engine_call, expected
from tests.ch07.serving.running import ONE_PROCESS, ROOT, RunningServer, a_server

FLAGS = ("--page-size", "4", "--random-seed", "3")
SETTINGS = {"device": "cpu", "page_size": 4, "random_seed": 3, "max_total_tokens": 4096}


@pytest.fixture(scope="module")
def server():
    with a_server(*FLAGS) as running:
        yield running


@pytest.mark.parametrize("size", [1, 2])
def test_every_call_answers_what_the_engine_answers(size):
    processes = () if size == 1 else ONE_PROCESS
    with a_server(*FLAGS, "--tp-size", str(size), *processes) as fresh, Engine(tp_size=size, **SETTINGS) as engine:
        for name, call in CALLS.items():
            known = engine.generate(**engine_call(call, name))
            given = fresh.generate(**call, rid=engine_call(call, name)["rid"])
            assert given == expected(known), name
        keys = ("prompt_tokens", "cached_tokens", "evictable_tokens", "tp_size")
        assert {key: fresh.at_rest()[key] for key in keys} == {key: engine.get_server_info()[key] for key in keys}


def test_a_stream_is_cumulative_and_its_end_is_the_answer(server):
    body = {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 20}}
    whole = server.generate(**body)
    chunks = server.stream(**body)
    assert len(chunks) > 3
    assert all(later["text"].startswith(chunk["text"]) for chunk, later in itertools.pairwise(chunks))
    assert {key: chunks[-1][key] for key in ("text", "output_ids")} == {
        key: whole[key] for key in ("text", "output_ids")
    }
    assert "index" not in chunks[0]
    several = server.stream(input_ids=[[5], [6]], sampling_params={"max_new_tokens": 3})
    assert {chunk["index"] for chunk in several} == {0, 1}


def test_what_is_refused_has_a_status_also_as_a_stream(server):
    for stream in (False, True):
        status, answer = server.call("/generate", {"text": "a", "stream": stream, "sampling_params": {"top_p": 3}})
        assert (status, list(answer)) == (400, ["error"])
        assert "top_p=3" in answer["error"]["message"]


def test_probes_answer_and_leave_no_trace(server):
    before = server.at_rest()
    assert server.raw("/health")[0] == server.raw("/health_generate")[0] == 200
    assert server.call("/ready") == (200, {"status": "ready"})
    after = server.at_rest()
    keys = ("prompt_tokens", "cached_tokens", "evictable_tokens", "free_tokens")
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}


def test_it_says_what_it_is(server):
    status, model = server.call("/model_info")
    assert (status, model["is_generation"], model["served_model_name"]) == (200, True, "tiny-qwen")
    assert server.call("/get_model_info") == (200, model)
    info = server.info()
    assert (info["page_size"], info["status"], info["port"]) == (4, "ready", 0)
    assert server.call("/get_server_info")[1].keys() == info.keys()
    assert "/generate" in server.call("/openapi.json")[1]["paths"]


def test_tokens_and_text(server):
    text = "What is a radix cache? 长城"
    status, told = server.call("/tokenize", {"prompt": text})
    assert (status, told["count"]) == (200, len(told["tokens"]))
    assert server.call("/detokenize", {"tokens": told["tokens"]})[1] == {"text": text}
    assert server.call("/v1/tokenize", {"prompt": [text, "a"]})[1]["tokens"][0] == told["tokens"]
    assert server.call("/detokenize", {"tokens": [told["tokens"], []]})[1] == {"text": [text, ""]}
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {"tokens": [10**9]}), ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": [1, [2]]}),
    ):  # fmt: skip
        assert server.call(path, body)[0] == 400, body


def test_operators_have_their_routes(server):
    server.generate(input_ids=[1] * 40, sampling_params={"max_new_tokens": 1})
    assert server.at_rest()["evictable_tokens"] > 0
    assert server.raw("/flush_cache", method="POST")[0] == server.raw("/flush_cache")[0] == 200
    assert server.at_rest()["evictable_tokens"] == 0
    assert server.call("/abort_request", {"rid": "nobody"}) == (200, {"aborted": 0})
    assert server.call("/abort_request", {"abort_all": True}) == (200, {"aborted": 0})
    assert server.call("/abort_request", {})[0] == 400
    assert server.call("/pause_generation", {"mode": "sideways"})[0] == 400
    assert server.call("/pause_generation", {"mode": "in_place"}) == (200, {"status": "paused", "requests": 0})
    assert server.call("/step_generation", {"steps": 1}) == (200, {"requests": 0})
    assert server.raw("/health")[0] == 200
    assert server.call("/continue_generation", {}) == (200, {"status": "running"})
    assert server.call("/step_generation", {"steps": 1})[0] == 400


def test_a_session_over_http(server):
    status, name = server.call("/open_session", {"capacity_of_str_len": 1000})
    assert status == 200
    assert server.call("/open_session", {"capacity_of_str_len": 1, "session_id": name})[0] == 400
    for field, value in (("streaming", 1), ("timeout", 0), ("timeout", 1e9), ("capacity_of_str_len", -1)):
        status, answer = server.call("/open_session", {field: value})
        assert status == 400
        assert field in answer["error"]["message"]
    params = {"max_new_tokens": 4, "ignore_eos": True}
    first = server.generate(text="What is a page?", sampling_params=params, session_params={"id": name})
    second = server.generate(
        text=" And?", sampling_params=params, session_params={"id": name, "rid": first["meta_info"]["id"]}
    )
    longer = server.call("/tokenize", {"prompt": " And?"})[1]["count"]
    assert second["meta_info"]["prompt_tokens"] == first["meta_info"]["prompt_tokens"] + 4 + longer
    refused = server.call("/generate", {"text": "a", "session_params": {"id": name, "rid": "nobody"}})
    assert refused[0] == 400
    assert "Invalid request session id" in refused[1]["error"]["message"]
    status, small = server.call("/open_session", {"capacity_of_str_len": 2, "streaming": False})
    refused = server.call("/generate", {"input_ids": [1, 2, 3], "session_params": {"id": small}})
    assert refused[0] == 400
    assert "capacity_of_str_len=2" in refused[1]["error"]["message"]
    assert server.call("/close_session", {"session_id": name})[0] == 200
    assert server.call("/close_session", {"session_id": name})[0] == 400


def test_a_streaming_session_over_http(server):
    before = server.at_rest()
    assert server.call("/open_session", {"session_id": "line", "streaming": True, "timeout": 600}) == (200, "line")
    params, session = {"max_new_tokens": 5, "ignore_eos": True}, {"id": "line"}
    first = server.generate(text="What is a page?", sampling_params=params, session_params=session)
    second = server.generate(text=" And?", sampling_params=params, session_params=session)
    context = first["meta_info"]["prompt_tokens"] + 5
    assert second["meta_info"]["cached_tokens"] == context - 1
    assert server.call("/server_info")[1]["session_held_tokens"] > 0
    status, answer = server.call("/generate", {"text": "a", "session_params": {"id": "line", "replace": True}})
    assert (status, "only grows" in answer["error"]["message"]) == (400, True)
    assert server.call("/close_session", {"session_id": "line"})[0] == 200
    after = server.at_rest()
    assert (after["session_held_tokens"], after["held_tokens"]) == (0, 0)
    assert after["free_tokens"] + after["evictable_tokens"] == before["max_total_num_tokens"]


def test_the_log_says_who_and_how_many_and_not_what(server):
    server.generate(text="a very private question", sampling_params={"max_new_tokens": 2}, rid="my-request")
    line = server.said(r".*\[my-request\].*")
    assert "2 new ones" in line
    assert not any("private" in one for one in server.lines)


def test_a_profile_has_a_file_a_rank(tmp_path):
    with a_server("--tp-size", "2", "--profile-dir", str(tmp_path), "--log-format", "json") as server:
        name = server.call("/start_profile", {})[1]["profile"]
        assert server.call("/start_profile", {})[0] == 400
        server.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 3})
        assert server.call("/stop_profile", {})[1]["file"].startswith(str(tmp_path))
        assert server.call("/stop_profile", {})[0] == 400
        assert server.call("/start_profile", {"output_dir": "/"})[0] == 400, "no path comes from a request"
        assert server.call("/start_profile", {"num_steps": 0})[0] == 400
        server.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 3})  # the ranks have all written
        files = sorted(path.name for path in tmp_path.iterdir())
        assert files == [f"{name}-TP-{rank}.trace.json" for rank in range(2)]
        assert all("traceEvents" in json.loads((tmp_path / file).read_text()) for file in files)
        assert json.loads(server.said(r'.*"my.*|.*new ones.*'))["process"] == "main"


def test_everything_in_one_process():
    with a_server(*FLAGS, "--single-process") as server:
        answer = server.generate(text="What is a radix cache?", sampling_params={"max_new_tokens": 4})
        assert len(answer["output_ids"]) == 4
        assert (
            server.stream(text="What?", sampling_params={"max_new_tokens": 2})[-1]["meta_info"]["completion_tokens"]
            == 2
        )
        assert server.end() == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quantization", "awq"], "quantization='awq' needs a checkpoint that was made with it"),
        (["--load-format", "pt"], "flag --load-format is not here: "),
        (["--model-path", "/nowhere"], "/nowhere"),
        (["--port", "PORT"], "Address already in use"),
        (["--host", "192.0.2.1"], "cannot be served"),
    ],
)
def test_what_cannot_start_is_one_line(flags, said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = [str(taken.getsockname()[1]) if flag == "PORT" else flag for flag in flags]
        done = subprocess.run(
            [sys.executable, "-m", "ch07_sglang_radix.launch_server", "--device", "cpu", *flags],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    server = RunningServer("--model-path", str(tmp_path), wait=False)
    assert "scheduler" in server.said(r".*error main: .*")
    assert server.process.wait(200) == 1
    assert server.leftovers() == []
