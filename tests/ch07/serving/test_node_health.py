"""A node above 0 is looked at like any other."""

import json
import logging
import socket
import urllib.error
import urllib.request

import pytest

from ch07_sglang_radix.serving.http_args import bind
from ch07_sglang_radix.serving.node_health import ROUTES, answer_health


@pytest.fixture
def port():
    server = answer_health("127.0.0.1", 0)
    yield server.socket.getsockname()[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", [*ROUTES, "/health?x=1"])
def test_who_follows_is_well(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        assert (answer.status, json.load(answer)) == (200, {"status": "following node 0"})


def test_all_else_is_node_0_s(port):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/generate", timeout=60)
    assert error.value.code == 404
    assert "node 0 answers" in error.value.read().decode()


def test_who_says_nothing_keeps_nobody_else_from_being_answered(port):
    with socket.create_connection(("127.0.0.1", port)):
        test_who_follows_is_well(port, "/health")


def test_beside_node_0_on_one_host_there_is_none_and_a_line_says_so(caplog):
    with bind("127.0.0.1", 0) as taken, caplog.at_level(logging.INFO, logger="ch07_sglang_radix"):
        assert answer_health("127.0.0.1", taken.getsockname()[1]) is None
    assert "no health route on this node: 127.0.0.1:" in caplog.text
