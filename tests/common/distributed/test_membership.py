"""Who has died, told apart from who has left; always the same name to everybody."""

import json
import socket
import time

import pytest

from common.distributed import membership
from common.distributed.membership import SILENT_BEATS, VERSION, Membership
from common.distributed.processes import RankFailure
from tests.common.distributed.threads import together


class Stranger:
    """The other end of a connection, by hand."""

    def __init__(self, port: int):
        self.link = socket.create_connection(("127.0.0.1", port))
        self.link.settimeout(60)
        self.unread = b""

    def joins(self, number: int, size: int, name: str) -> "Stranger":
        self.sends({"join": number, "of": size, "name": name, "version": VERSION})
        assert self.hears() == {"welcome": "a"}
        return self

    def sends(self, message: dict) -> None:
        self.link.sendall(json.dumps(message).encode() + b"\n")

    def hears(self) -> dict | None:
        """The next message that is no beat; None at the end."""
        while True:
            line, found, rest = self.unread.partition(b"\n")
            if found:
                self.unread = rest
                if line:
                    return json.loads(line)
            elif data := self.link.recv(4096):
                self.unread += data
            else:
                return None


@pytest.fixture
def first():
    """first(size) -> (member 0, its port)."""
    made = []

    def get(size: int):
        listener = socket.create_server(("127.0.0.1", 0))
        made.append(Membership.host(listener, size, "a", "host a"))
        return made[-1], listener.getsockname()[1]

    yield get
    for one in made:
        one.leave()


def join(port: int, number: int, size: int, name: str) -> Membership:
    return Membership.join("127.0.0.1", port, number, size, name, 60.0, f"host {name}")


def within(seconds: float, true) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return False


def test_all_hear_what_all_have_said_in_their_order(first):
    a, port = first(3)
    b, c = join(port, 1, 3, "b"), join(port, 2, 3, "c")
    said = together([lambda one=one: one.all_say("k", one.name, 10, "{0}") for one in (c, a, b)])
    assert said == [["a", "b", "c"]] * 3
    for one in (b, c):
        one.leave()


def test_a_closed_connection_is_a_death_and_everybody_gives_the_same_name(first):
    a, port = first(3)
    b, c = join(port, 1, 3, "b"), Stranger(port).joins(2, 3, "c")
    c.link.close()
    assert within(60, lambda: a.lost and b.lost)
    assert (a.lost, b.lost) == ("c has died", "c has died")
    b.leave()


def test_the_first_who_died_keeps_the_blame(first):
    a, port = first(3)
    b, c = Stranger(port).joins(1, 3, "b"), Stranger(port).joins(2, 3, "c")
    c.link.close()
    assert within(60, lambda: a.lost)
    b.link.close()
    assert not within(0.3, lambda: a.lost != "c has died")


def test_the_death_of_member_0_is_seen_by_all():
    listener = socket.create_server(("127.0.0.1", 0))

    def member_0():
        link, _ = listener.accept()
        link.recv(4096)
        link.sendall(b'{"welcome": "a"}\n')
        return link

    link, b = together([member_0, lambda: join(listener.getsockname()[1], 1, 2, "b")])
    assert b.lost is None
    link.close()
    assert within(60, lambda: b.lost)
    assert b.lost == "a has died"


def test_who_says_bye_has_not_died(first):
    a, port = first(2)
    b = join(port, 1, 2, "b")
    b.leave()
    assert within(60, lambda: a.left == {1: "b"})
    assert not within(0.3, lambda: a.lost)


def test_who_leaves_because_of_another_names_it(first):
    a, port = first(3)
    b, c = join(port, 1, 3, "b"), join(port, 2, 3, "c")
    b.leave(because="rank 3 (pid 7) on host b has died")
    assert within(60, lambda: a.lost and c.lost)
    assert a.lost == c.lost == "rank 3 (pid 7) on host b has died"
    c.leave()


def test_a_member_tells_of_its_own_host_s_dead_although_nobody_there_asks(first, monkeypatch):
    monkeypatch.setattr(membership, "BEAT_S", 0.02)
    a, port = first(3)
    b, c = join(port, 1, 3, "b"), join(port, 2, 3, "c")
    b.watch = lambda: "rank 3 (pid 7) on host b has died"
    assert within(60, lambda: a.lost and b.lost and c.lost)
    assert {a.lost, b.lost, c.lost} == {"rank 3 (pid 7) on host b has died"}
    for one in (b, c):
        one.leave()


def test_a_host_that_says_nothing_any_more_is_lost_after_some_beats(first, monkeypatch):
    monkeypatch.setattr(membership, "BEAT_S", 0.02)
    a, port = first(2)
    silent = Stranger(port).joins(1, 2, "b")
    assert within(60, lambda: a.lost)
    assert a.lost == f"b has not been heard of for {SILENT_BEATS * 0.02:g} s"
    silent.link.close()


def test_a_host_that_does_no_more_than_beat_is_not_lost(first, monkeypatch):
    monkeypatch.setattr(membership, "BEAT_S", 0.02)
    a, port = first(2)
    b = join(port, 1, 2, "b")
    assert not within(3 * SILENT_BEATS * 0.02, lambda: a.lost or b.lost)
    b.leave()


def test_who_waits_for_one_that_dies_hears_its_name_at_once(first):
    a, port = first(2)
    b = Stranger(port).joins(1, 2, "b")
    outcomes = together([lambda: a.all_say("k", 1, 30, "{0}"), b.link.close])
    assert isinstance(outcomes[0], RankFailure)
    assert str(outcomes[0]) == "b has died"


def test_who_waits_for_one_that_leaves_hears_its_name(first):
    a, port = first(2)
    b = join(port, 1, 2, "b")
    outcomes = together([lambda: a.all_say("k", 1, 30, "{0}"), b.leave])
    assert isinstance(outcomes[0], RankFailure)
    assert str(outcomes[0]) == "b has left"


@pytest.mark.parametrize(
    "rubbish",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff" * 999 + b"\n", b"[1]\n", b'{"join": 1, "of": "x", "version": 1}\n', b""],
)
def test_rubbish_at_the_port_disturbs_nobody(first, rubbish):
    a, port = first(2)
    other = Stranger(port)
    other.link.sendall(rubbish)
    b = join(port, 1, 2, "b")
    assert together([lambda one=one: one.all_say("k", one.name, 10, "{0}") for one in (a, b)]) == [["a", "b"]] * 2
    other.link.close()
    assert not within(0.2, lambda: a.lost or b.lost)
    b.leave()


def test_a_line_without_end_is_cut_off(first, monkeypatch):
    monkeypatch.setattr(membership, "MOST_BYTES", 1000)
    _, port = first(2)
    other = Stranger(port)
    other.link.sendall(b"x" * 5000)
    try:
        heard = other.hears()
    except ConnectionError:  # it closed with our bytes unread
        heard = None
    assert heard is None


def test_messages_of_another_version_are_refused(first):
    _, port = first(2)
    other = Stranger(port)
    other.sends({"join": 1, "of": 2, "name": "b", "version": VERSION + 1})
    assert other.hears() == {"refused": "a has other code than b; bring both to one commit"}


def test_leaving_twice_is_leaving_once(first):
    a, port = first(2)
    b = join(port, 1, 2, "b")
    b.leave()
    b.leave(because="nobody hears this")
    assert within(60, lambda: a.left)
    assert a.lost is None
