"""What a room relies on, whatever carries the bytes: order, whole payloads in their place, and to hear of a peer that is gone."""

import socket
import threading
import time

import numpy as np
import pytest

from ch07_sglang_radix.disaggregation import shm, tcp
from ch07_sglang_radix.disaggregation.attach import TRANSPORTS
from ch07_sglang_radix.disaggregation.messages import HEAD, VERSION, Done, Fail, Hello, Write, encode
from ch07_sglang_radix.server_args import TRANSFER_BACKENDS
from ch07_sglang_radix.serving.watch import wait_until


class Listener:
    """A handler that writes down what it hears. wanted: bytes of a payload that it has room for; None: it wants none."""

    def __init__(self, kind, mode, wanted=None):
        self.hello, self.wanted = Hello(VERSION, mode, 0, 1), wanted
        self.heard, self.gone, self.links = [], [], []
        self.transport = TRANSPORTS[kind](self)

    def greeted(self, link):
        if link.peer.mode == self.hello.mode:
            raise ValueError("both sides are the same")
        self.links.append(link)

    def place(self, link, write, size):
        if self.wanted is None:
            return None
        if size != self.wanted:
            raise ValueError(f"{size} bytes, {self.wanted} are wanted")
        return memoryview(np.empty(size, dtype=np.uint8))

    def take(self, link, message, payload):
        self.heard.append((message, None if payload is None else bytes(payload)))

    def lost(self, link, why):
        self.gone.append(why)


@pytest.fixture(params=["tcp", "shm"])  # what carries bytes; the third is test_cuda_ipc.py's
def two(request):
    """two(bytes wanted) -> prefill's and decode's end."""
    made = []

    def make(wanted=None):
        made.extend([Listener(request.param, "prefill"), Listener(request.param, "decode", wanted)])
        made[1].link = made[1].transport.connect(made[0].transport.address)
        assert wait_until(lambda: made[0].links and made[1].links, 100)
        return made

    yield make
    for one in made:
        one.transport.close()


def test_every_backend_that_a_flag_may_name_is_there():
    assert tuple(TRANSPORTS) == TRANSFER_BACKENDS


def test_payloads_come_whole_and_everything_in_order(two, monkeypatch):
    monkeypatch.setattr(shm, "HALF", 1 << 16)  # so that a payload is longer than both halves
    size = 200_003
    prefill, decode = two(size)
    payloads = [np.random.default_rng(i).integers(0, 255, size, dtype=np.uint8) for i in range(5)]
    for i, payload in enumerate(payloads):
        prefill.links[0].send(Write(i, [i]), lambda payload=payload: memoryview(payload), size)
        prefill.links[0].send(Done(i))
    assert wait_until(lambda: len(decode.heard) == 10, 100)
    for i, payload in enumerate(payloads):
        assert decode.heard[2 * i] == (Write(i, [i]), payload.tobytes())
        assert decode.heard[2 * i + 1] == (Done(i), None)


def test_sending_does_not_wait_and_a_payload_is_read_when_its_turn_comes(two):
    prefill, decode = two(4)
    gate, value = threading.Event(), bytearray(b"old.")

    def late():
        gate.wait(100)
        return memoryview(value)

    prefill.links[0].send(Write(1, [1]), late, 4)
    value[:] = b"new."
    gate.set()
    assert wait_until(lambda: decode.heard, 100)
    assert decode.heard[0][1] == b"new."


def test_a_payload_whose_room_has_been_given_up_is_not_sent_and_the_link_goes_on(two):
    prefill, decode = two(8)
    prefill.links[0].send(Write(1, [1]), lambda: None, 8)
    prefill.links[0].send(Write(2, [2]), lambda: memoryview(b"12345678"), 8)
    assert wait_until(lambda: decode.heard, 100)
    assert decode.heard == [(Write(2, [2]), b"12345678")]


def test_a_payload_that_nobody_wants_any_more_is_read_and_forgotten(two):
    prefill, decode = two(None)
    prefill.links[0].send(Write(1, [1]), lambda: memoryview(bytearray(70_000)), 70_000)
    prefill.links[0].send(Fail(1, "late"))
    assert wait_until(lambda: len(decode.heard) == 2, 100)
    assert decode.heard == [(Write(1, [1]), None), (Fail(1, "late"), None)]


def test_a_payload_of_another_size_costs_the_link_and_says_both_numbers(two):
    prefill, decode = two(8)
    prefill.links[0].send(Write(1, [1]), lambda: memoryview(bytearray(9)), 9)
    assert wait_until(lambda: decode.gone and prefill.gone, 100)
    assert decode.gone == ["9 bytes, 8 are wanted"]
    assert not decode.heard


def test_a_peer_that_closes_is_heard_of_once(two):
    prefill, decode = two()
    prefill.transport.close()
    assert wait_until(lambda: decode.gone, 100)
    decode.link.send(Done(1))
    time.sleep(0.1)
    assert len(decode.gone) == 1
    assert not prefill.gone, "who closes need not be told"


def test_nobody_there_is_heard_of(two):
    _prefill, decode = two()
    free = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
    free.close()
    decode.transport.connect(address)
    assert wait_until(lambda: decode.gone, 100)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /route HTTP/1.1\r\nHost: a\r\n\r\n",
        encode(Done(1)),
        encode(Hello(VERSION + 1, "decode", 0, 1)),
        encode(Hello(VERSION, "prefill", 0, 1)),
        HEAD.pack(0, 1, 1),
    ],
)
def test_a_stranger_is_hung_up_on_and_others_go_on(two, sent):
    prefill, decode = two(4)
    host, port = prefill.transport.address.split(":")
    with socket.create_connection((host, int(port)), 5) as stranger:
        stranger.settimeout(10)
        stranger.sendall(sent)
        try:
            while stranger.recv(1000):
                pass
        except ConnectionError:
            pass
    assert not prefill.heard
    prefill.links[0].send(Done(2))
    assert wait_until(lambda: decode.heard, 100)


def test_silence_counts_as_death(two, monkeypatch):
    monkeypatch.setattr(tcp, "SILENCE_S", 0.3)
    prefill, decode = two()
    assert wait_until(lambda: decode.gone and prefill.gone, 100), "a ping would have come every 5 s"
    assert "no sign of life for 0.3 s" in decode.gone + prefill.gone


def test_pings_keep_a_quiet_link_alive(two, monkeypatch):
    monkeypatch.setattr(tcp, "SILENCE_S", 2.0)
    monkeypatch.setattr(tcp, "PING_S", 0.05)
    prefill, decode = two()
    time.sleep(2.5)
    assert not decode.gone
    assert not prefill.gone


def test_a_name_that_is_no_shared_memory_is_not_opened():
    with pytest.raises(ValueError, match="no name of shared memory"):
        shm._open_file(b"../../etc/passwd8")
