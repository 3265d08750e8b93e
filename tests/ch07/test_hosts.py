"""An engine on two hosts: the same tokens; who differs is refused, who dies is named, by all, in time."""

import json
import os
import re
import signal
import time
from functools import cache

import psutil
import pytest

from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH
from tests import warm
from tests.hosts import TwoHosts
from tests.oracle import greedy

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")
IN_TIME_S = 100  # a death is seen at once; the rest is for processes to end on a busy machine
ENGINE = """
import sys
from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
def main():
    rank, address, size, prompt, tokens, *model = sys.argv[1:]
    engine = Engine(*model, tp_size=int(size), nnodes=2, node_rank=int(rank), dist_init_addr=address, device="cpu",
                    dist_timeout=120)
    print("ready", [pid for _, pid in engine.scheduler.tp.peers], flush=True)
    if rank == "0":
        params = {"max_new_tokens": int(tokens), "ignore_eos": True}
        print(engine.generate(prompt, params)["output_ids"], flush=True)
    else:
        engine.follow()
        print("followed", flush=True)
    engine.shutdown()
run_main(main)
"""
PROMPT = "What is a radix cache?"


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    two = TwoHosts(tmp_path_factory.mktemp("hosts"))
    (two.folder / "engine.py").write_text(ENGINE, encoding="utf-8")
    yield two
    two.close()


@pytest.fixture
def hosts(two_hosts, record_property):
    record_property("hosts", two_hosts.kind)
    print(f"on {two_hosts.kind}")
    yield two_hosts
    two_hosts.end_all()


@pytest.fixture
def engines(hosts):
    """engines(size, tokens, model_of_b) -> the two processes; what they print is read by the test."""

    def start(size: int = 2, tokens: int = 12, model_of_b: str | None = None, size_of_b: int | None = None):
        address = f"{hosts.address}:{hosts.free_port()}"
        common = [address, str(size), PROMPT, str(tokens)]
        other = [address, str(size_of_b or size), PROMPT, str(tokens), *([model_of_b] if model_of_b else [])]
        script = str(hosts.folder / "engine.py")
        return [hosts.start(0, script, "0", *common), hosts.start(1, script, "1", *other)]

    return start


def ends(process: warm.Popen, within_s: float = 250) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the lines of standard error that are ours."""
    out, err = process.communicate(timeout=within_s)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith(("error", "stopped"))]


@cache
def encoded(prompt: str) -> list[int]:
    return Tokenizer(TINY_QWEN_PATH).encode(prompt)


def expected(tokens: int) -> list[int]:
    return greedy(TINY_QWEN_PATH, encoded(PROMPT), tokens)


def ready(process: warm.Popen) -> list[int]:
    """The pids of all ranks, once the engine is there."""
    line = process.stdout.readline()
    assert line.startswith("ready "), process.communicate()
    return json.loads(line.removeprefix("ready "))


def test_tokens_of_an_engine_on_two_hosts_equal_transformers(engines):
    """Two ranks on each; one on each has the server below."""
    a, b = map(ends, engines(4))
    assert (a[0], a[2]) == (0, []), a
    assert (b[0], b[2]) == (0, []), b
    assert json.loads(a[1].splitlines()[1]) == expected(12)
    assert b[1].splitlines()[1] == "followed"


@pytest.mark.parametrize("who", ["node 1", "node 0", "a rank of node 1"])
def test_when_one_is_killed_the_other_host_ends_and_names_it(hosts, engines, who):
    """And of neither host anybody is left."""
    processes = engines(2 if who == "node 0" else 4, 1900)
    pids = ready(processes[0])
    ready(processes[1])
    time.sleep(0.5)  # in the middle of the answer
    began = time.monotonic()
    if who == "a rank of node 1":
        os.kill(pids[3], signal.SIGKILL)
    else:
        processes[int(who[-1])].kill()
    code, _, said = ends(processes[0 if who != "node 0" else 1], IN_TIME_S)
    assert code == 1
    assert time.monotonic() < began + IN_TIME_S
    number = 0 if who == "node 0" else 1
    name = rf"node {number} \(host {re.escape(hosts.names[number])}\)"
    if who == "a rank of node 1":
        name = rf"rank 3 \(pid {pids[3]}\) on {name}"
    assert len(said) == 1
    assert re.search(rf"{name} has died", said[0]), said
    deadline = time.monotonic() + IN_TIME_S
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if runs(pid)]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_another_tp_size_is_refused_on_both_before_anything_is_loaded(engines):
    a, b = map(ends, engines(2, size_of_b=4))
    assert (a[0], b[0]) == (1, 1)
    assert (a[1], b[1]) == ("", "")
    assert len(a[2]) == 1
    assert a[2] == b[2]
    assert re.match(
        r"error: tp_size is 2 on node 0 \(host .*\), but 4 on node 1 \(host .*\); give every node the same", a[2][0]
    )


def test_another_model_under_the_same_name_is_refused_on_both(hosts, engines, tmp_path):
    other = tmp_path / "model"
    other.mkdir()
    for path in TINY_QWEN_PATH.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (other / path.name).write_bytes(path.read_bytes())
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    a, b = map(ends, engines(model_of_b=str(other)))
    assert (a[0], b[0], a[1], b[1]) == (1, 1, "", "")
    assert a[2] == b[2]
    assert re.match(
        r"error: model.safetensors is of another content \(\w+\) on node 0 \(.*\) on node 1 \(.*one folder", a[2][0]
    )


def test_other_code_is_refused_on_both_by_its_file(hosts, engines):
    path = hosts.code[1] / "common" / "executor.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(f"{text}# one line more\n", encoding="utf-8")
    try:
        a, b = map(ends, engines())
    finally:
        path.write_text(text, encoding="utf-8")
    assert (a[0], b[0], a[1], b[1]) == (1, 1, "", "")
    assert a[2] == b[2]
    assert re.match(
        r"error: common/executor.py is of another content .*; bring every node to the same commit$", a[2][0]
    )


# --- the server


def server(hosts: TwoHosts, *flags: str) -> tuple[list[warm.Popen], int]:
    address, port = f"{hosts.address}:{hosts.free_port()}", hosts.free_port()
    argv = ["-m", "ch07_sglang_radix.launch_server", "--tp-size", "2", "--nnodes", "2", "--dist-init-addr", address,
            "--device", "cpu", "--port", str(port), "--dist-timeout", "120", *flags]  # fmt: skip
    return [hosts.start(i, *argv, "--node-rank", str(i)) for i in range(2)], port


def said(process: warm.Popen, words: str) -> str:
    """The line of the log that has them."""
    log = []
    for line in process.stderr:
        if words in line:
            return line
        log.append(line)
    raise AssertionError(f"the log ends without {words!r}:\n{''.join(log)}")


@pytest.mark.parametrize("end", ["SIGTERM to node 0", "SIGTERM to both", "node 1 is killed", "node 0 is killed"])
def test_a_server_on_two_hosts_answers_and_ends_as_one(hosts, end):
    """A detokenizer, one process more to start, is there once."""
    speaks = end == "SIGTERM to both"
    (a, b), port = server(hosts, *([] if speaks else ["--skip-tokenizer-init"]))
    said(a, "ready after")
    said(b, "ready: rank(s) 1 of 2")
    prompt = {"text": PROMPT} if speaks else {"input_ids": encoded(PROMPT)}
    body = prompt | {"sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    answer = json.loads(hosts.curl("/generate", json.dumps(body), port))
    assert answer["output_ids"] == expected(8)
    if speaks:
        assert answer["text"] == Tokenizer(TINY_QWEN_PATH).decode(expected(8))
        b.terminate()
        assert "goes on until node 0 leaves" in said(b, "SIGTERM")
        assert json.loads(hosts.curl("/generate", json.dumps(body), port))["output_ids"] == expected(8)
    if end.startswith("SIGTERM"):
        a.terminate()
        assert said(b, "node 0 has left")
        assert (a.wait(IN_TIME_S), b.wait(IN_TIME_S)) == (0, 0)
    else:
        dead, other, number = (b, a, 1) if end.startswith("node 1") else (a, b, 0)
        dead.kill()
        line = said(other, "has died")
        assert f"node {number} (host {hosts.names[number]})" in line
        assert other.wait(IN_TIME_S) == 1


def test_a_node_that_never_comes_is_named_and_the_server_ends(hosts):
    address = f"{hosts.address}:{hosts.free_port()}"
    a = hosts.start(0, "-m", "ch07_sglang_radix.launch_server", "--tp-size", "2", "--nnodes", "2", "--node-rank", "0",
                    "--dist-init-addr", address, "--device", "cpu", "--port", "0", "--dist-timeout", "2",
                    "--skip-tokenizer-init")  # fmt: skip
    line = said(a, "has not come")
    assert f"node 1 of 2 has not come to {address} within 2 s; start it with --nnodes 2 --node-rank 1" in line
    assert a.wait(IN_TIME_S) == 1


# --- torchrun


def torchrun(hosts: TwoHosts, *argv: str) -> list[warm.Popen]:
    port = str(hosts.free_port())
    return [
        hosts.start(i, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1",
                    f"--master_addr={hosts.address}", f"--master_port={port}", *argv)
        for i in range(2)
    ]  # fmt: skip


def test_the_book_s_demo_under_torchrun_on_two_hosts_says_what_transformers_says(hosts, tmp_path):
    a, b = torchrun(hosts, "ch07_sglang_radix/demo_tp_radix.py", "--force-cpu", "--json", str(tmp_path / "report.json"))
    out, err = a.communicate(timeout=400)
    assert (a.returncode, b.wait(200)) == (0, 0), err
    assert out.count("as the formula says") == 2
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["world_size"] == 2
    for request in report["requests"]:
        assert request["output_ids"] == greedy(TINY_QWEN_PATH, request["prompt_ids"], len(request["output_ids"]))


TALK = """
import torch
from common.distributed.launch import run_main
from common.parallel_state import all_reduce, initialize_tensor_parallel
def main():
    tp = initialize_tensor_parallel(device="cpu")
    print("talking", flush=True)
    while True:
        all_reduce(torch.ones(4), tp, "x")
run_main(main)
"""


@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_that_dies_under_torchrun_is_named_with_its_host(hosts, tmp_path, rank):
    (tmp_path / "talk.py").write_text(TALK, encoding="utf-8")
    both = torchrun(hosts, str(tmp_path / "talk.py"))
    assert [process.stdout.readline() for process in both] == ["talking\n"] * 2
    (victim,) = psutil.Process(both[rank].pid).children()
    victim.kill()
    _, _, errors = ends(both[1 - rank], 200)
    died = rf"rank {rank} \(pid {victim.pid}\) on host {re.escape(hosts.names[rank])} has died"
    assert len(errors) == 1
    assert re.search(died, errors[0]), errors
