"""Replicas on a Ray cluster of two nodes, both on this machine: placed, asked, killed, replaced."""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

ray = pytest.importorskip("ray", reason="ray is an extra: pip install -r requirements-deploy.txt")
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from ch07_sglang_radix.serving.deploy.ray_serve_app import build_app  # noqa: E402

ROOT = Path(__file__).parents[4]
PROMPT = "What is a radix cache?"
ASK = {"text": PROMPT, "sampling_params": {"max_new_tokens": 12, "temperature": 0}}
PATIENCE_S = 180


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of Serve on the cluster: two nodes of two CPUs each."""
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    few = {"num_cpus": 2, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=few | {"include_dashboard": False})
    cluster.add_node(**few)
    ray.init(address=cluster.address, log_to_driver=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def ask(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(url, data, timeout=200) as answer:
        return answer.read().decode()


def replicas(address: str) -> dict[tuple[int, ...], list[str]]:
    """{pids of the ranks: their Ray nodes} of all replicas that answer one of many questions."""
    found = [json.loads(ask(f"{address}/ray_nodes")) for _ in range(24)]
    return {tuple(one["pids"]): one["ray_nodes"] for one in found}


def numbers_of_replicas(address: str, name: str) -> Counter[str]:
    """{replica: the sum of its samples of this name}"""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(ask(f"{address}/metrics")):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels["replica"]] += sample.value
    return found


def expected(n: int) -> list[int]:
    return greedy(TINY_QWEN_PATH, Tokenizer(TINY_QWEN_PATH).encode(PROMPT), n)


def test_two_replicas_of_two_ranks_are_packed_answer_and_are_replaced_when_a_rank_dies(address):
    serve.run(build_app({"tp_size": 2, "device": "cpu", "min_replicas": 2, "max_replicas": 2}))
    assert json.loads(ask(f"{address}/generate", ASK))["output_ids"] == expected(12)
    first = replicas(address)
    assert len(first) == 2
    assert all(len(set(nodes)) == 1 for nodes in first.values()), "the ranks of a replica share a node"
    assert len({nodes[0] for nodes in first.values()}) == 2, "each node has a replica"

    events = ask(f"{address}/generate", ASK | {"stream": True}).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["output_ids"] == expected(12)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(f"{address}/generate", {"text": PROMPT, "sampling_params": {"temprature": 1}})
    assert refused.value.code == 400

    # the server's own routes: whoever is asked says of itself that it is well, and tells the numbers of both
    assert json.loads(ask(f"{address}/ready")) == {"status": "ready"}
    assert ask(f"{address}/health") == ""
    asked = [numbers_of_replicas(address, "sglang:num_requests_total") for _ in range(6)]
    assert all(counts == asked[0] for counts in asked), "the same, whichever replica tells them"
    assert sum(asked[0].values()) == 2
    assert len(numbers_of_replicas(address, "sglang:num_running_reqs")) == 2

    victims = next(iter(first))
    os.kill(victims[1], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(2)
        try:
            now = replicas(address)
        except urllib.error.HTTPError:  # of the one that has lost its rank
            continue
        if victims not in now and len(now) == 2:
            break
    assert victims not in now
    assert len(now) == 2
    assert json.loads(ask(f"{address}/generate", ASK))["output_ids"] == expected(12)


def test_ranks_that_do_not_fit_on_one_node_are_spread(address):
    serve.run(build_app({"tp_size": "2", "device": "cpu", "cpus_per_rank": 2}))
    ((_, nodes),) = replicas(address).items()
    assert len(set(nodes)) == 2
    assert json.loads(ask(f"{address}/generate", ASK))["output_ids"] == expected(12)


def test_what_runs_ends_before_its_replica_does(address):
    serve.run(build_app({"device": "cpu"}))
    long = ASK | {"sampling_params": {"max_new_tokens": 600, "temperature": 0, "ignore_eos": True}}
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(ask, f"{address}/generate", long)
        while numbers_of_replicas(address, "sglang:num_running_reqs").total() < 1:
            assert not running.done(), running.result()
        serve.delete("default")
        assert len(json.loads(running.result())["output_ids"]) == 600
    with pytest.raises(urllib.error.HTTPError):
        ask(f"{address}/ready")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"tp_size": 0}, "tp_size=0 must be at least 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2 must be at least 3"),
        ({"cpus_per_rank": "0"}, "cpus_per_rank=0"),
        ({"dp_size": 2}, "dp_size: here Serve starts the replicas"),
        ({"target_ongoing_requests": "many"}, "target_ongoing_requests='many'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(args, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        build_app({"device": "cpu"} | args)
