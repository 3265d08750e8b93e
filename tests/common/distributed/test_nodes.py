"""What nodes tell each other before any rank is started."""

import os
import socket

import psutil
import pytest

from common.distributed import nodes
from common.distributed.nodes import (
    PIECE,
    READ_WHOLE,
    Node,
    choose_interface,
    code_digests,
    file_digests,
    meet,
    own_address,
    parse_address,
)  # fmt: skip
from tests.common.distributed.threads import together


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:5000", ("10.0.0.1", 5000)),
        ("host-a.cluster.local:1", ("host-a.cluster.local", 1)),
        ("[fd00::1]:65535", ("fd00::1", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(text, expected):
    assert parse_address("dist_init_addr", text) == expected


@pytest.mark.parametrize(
    "text", [None, "", "host", "host:", ":5000", "host:0", "host:65536", "host:x", "fd00::1:5000", "h:-1"]
)
def test_what_is_no_address_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="must be HOST:PORT of node 0") as error:
        parse_address("dist_init_addr", text)
    assert repr(text) in str(error.value)


def test_ranks_of_a_node_are_neighbours():
    assert [list(Node(2, i, "h", 1).ranks(8)) for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(Node(4, i, "h", 1).ranks(4)) for i in range(4)] == [[0], [1], [2], [3]]


@pytest.mark.parametrize(("world", "nearest"), [(1, "use 2 ranks"), (3, "use 2 or 4 ranks"), (7, "use 6 or 8 ranks")])
def test_a_world_that_does_not_divide_over_the_nodes_is_refused_with_the_nearest(world, nearest):
    with pytest.raises(ValueError, match=rf"^{world} rank.* nnodes=2; .*: {nearest}$"):
        Node(2, 0, "h", 1).ranks(world)


def node(i: int, port: int, **different) -> Node:
    same = {"argument": {"tp_size": 2, "dtype": "float32"} | different.get("arguments", {})}
    model = {"model.safetensors": "aaa"} | different.get("model", {})
    return Node(
        different.get("nnodes", 2), i, "127.0.0.1", port, different.get("timeout_s", 20), same, lambda: {"model": model}
    )


def met(*all_nodes: Node) -> list:
    """What meet() returns, or raises, on each."""
    members = together([lambda one=one: meet(one) for one in all_nodes])
    for one in members:
        if not isinstance(one, Exception):
            one.leave()
    return members


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_nodes_that_are_alike_meet():
    port = free_port()
    assert [one.name.partition(" (")[0] for one in met(*(node(i, port, nnodes=3) for i in range(3)))] == [
        "node 0", "node 1", "node 2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("different", "said"),
    [
        ({"arguments": {"tp_size": 4}}, r"tp_size is 2 on node 0 \(.*\), but 4 on node 1 \(.*\); give every node the same"),
        ({"arguments": {"page_size": 1}}, r"page_size is None on node 0 .*, but 1 on node 1 "),
        ({"model": {"model.safetensors": "bbb"}}, r"model.safetensors is of another content \(aaa\) on node 0 .*\(bbb\) on node 1"),
        ({"model": {"more.safetensors": "b"}}, r"more.safetensors is missing on node 0 .* node 1 .*copy one folder"),
    ],
)  # fmt: skip
def test_what_differs_is_one_line_that_names_both_on_each_of_them(different, said):
    port = free_port()
    first, second = met(node(0, port), node(1, port, **different))
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert str(first) == str(second)
    with pytest.raises(ValueError, match=said):
        raise first


def test_other_code_is_named_by_its_file(monkeypatch):
    told = iter([{"common/executor.py": "aaa"}, {"common/executor.py": "bbb"}])
    monkeypatch.setattr(nodes, "code_digests", lambda: next(told))
    port = free_port()
    first, second = met(node(0, port), node(1, port))
    assert str(first) == str(second)
    assert "common/executor.py is of another content (" in str(first)
    assert str(first).endswith("; bring every node to the same commit")


def test_another_number_of_nodes_is_refused_on_both():
    port = free_port()
    first, second = met(node(0, port, timeout_s=60), node(1, port, nnodes=3))
    for error in (first, second):
        assert "node 1 (host " in str(error)
        assert "is one of 3, but node 0 (host " in str(error)


def test_two_with_one_number_are_told_apart_and_the_others_go_on():
    port = free_port()
    first, second, third = met(node(0, port), node(1, port), node(1, port))
    assert not isinstance(first, Exception)
    refused = second if isinstance(second, ValueError) else third
    assert "is there already" in str(refused)


def test_a_node_that_does_not_come_is_named_with_its_command():
    port = free_port()
    (error,) = met(node(0, port, timeout_s=0.5))
    assert isinstance(error, TimeoutError)
    command = f"--nnodes 2 --node-rank 1 --dist-init-addr 127.0.0.1:{port}"
    assert str(error) == f"node 1 of 2 has not come to 127.0.0.1:{port} within 0.5 s; start it with {command}"


def test_the_others_hear_who_has_not_come():
    port = free_port()
    errors = met(node(0, port, nnodes=3, timeout_s=6), node(2, port, nnodes=3, timeout_s=6))
    assert all("node 1 of 3 has not come" in str(error) for error in errors), errors


def test_node_0_that_is_not_there_is_one_line():
    port = free_port()
    (error,) = met(node(1, port, timeout_s=0.5))
    assert isinstance(error, TimeoutError)
    assert str(error).startswith(f"nobody answers at 127.0.0.1:{port} within 0.5 s (")


def test_another_program_at_the_address_is_one_line(monkeypatch):
    def babble(listener):
        link, _ = listener.accept()
        link.sendall(b"220 welcome to the mail server\r\n")
        link.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        _, error = together([lambda: babble(listener), lambda: meet(node(1, listener.getsockname()[1]))])
    assert isinstance(error, ValueError)
    assert str(error).endswith("answers, but is not the first of these 2; is another program there?")


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.77"])
def test_an_address_that_node_0_cannot_have_is_one_line(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        one = Node(2, 0, host, taken.getsockname()[1])
        with pytest.raises(
            OSError, match=rf"^node 0 cannot listen at {host}:\d+: .*; --dist-init-addr is an address of its own"
        ):
            meet(one)


# --- what is compared


def test_line_ends_of_git_make_no_difference_and_a_changed_letter_does(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\ny = 2\n")
    first = file_digests([tmp_path / "a.py"])
    (tmp_path / "a.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    assert file_digests([tmp_path / "a.py"]) == first
    (tmp_path / "a.py").write_bytes(b"x = 1\ny = 3\n")
    assert file_digests([tmp_path / "a.py"]) != first


@pytest.mark.parametrize("where", ["the first byte", "the last byte", "all bytes", "the size"])
def test_large_files_that_differ_are_told_apart(tmp_path, where):
    size, path = READ_WHOLE + 3 * PIECE, tmp_path / "model.safetensors"
    data = bytearray(size)
    path.write_bytes(data)
    first = file_digests([path])
    if where == "the first byte":
        data[0] = 1
    elif where == "the last byte":
        data[-1] = 1
    elif where == "all bytes":
        data = bytearray(b"\1") * size
    else:
        data = bytearray(size + 1)
    path.write_bytes(data)
    assert file_digests([path]) != first


def test_the_code_is_every_module_of_the_project_and_no_test():
    names = code_digests().keys()
    assert {"common/executor.py", "ch07_sglang_radix/engine.py", "common/distributed/nodes.py"} <= names
    assert not any(name.startswith(("tests/", ".venv/")) for name in names)


# --- the network card


def loopback() -> str:
    return next(card for card, its in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in its))


def test_gloo_is_told_the_card_that_has_the_address(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback()


def test_the_user_s_own_choice_of_card_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_an_address_of_no_card_changes_nothing(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    choose_interface("192.0.2.77")
    choose_interface(None)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_the_way_to_this_machine_begins_at_this_machine():
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("no such host.invalid") is None
