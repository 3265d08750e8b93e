"""Who goes away, who notices, and what is left: clients, operators, and every process of a server."""

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from urllib.parse import urlsplit

import psutil
import pytest

from ch07_sglang_radix.serving.watch import wait_until
from tests.ch07.serving.running import LEAN, RunningServer, a_server

LONG = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
ALL_END_S = 100.0  # they end at once; the rest is for a busy machine
STOPPED_S = 6.0  # the watchdog's, in these tests: as long may a process of a busy machine get no core


class Client:
    """A request on a connection of its own, read in a thread."""

    def __init__(self, server, **body):
        self.connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
        self.connection.request("POST", "/generate", json.dumps(LONG | body))
        self.status, self.text, self.error = None, b"", None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            answer = self.connection.getresponse()
            self.status = answer.status
            while piece := answer.read1():
                self.text += piece
        except (
            OSError,
            http.client.HTTPException,
            AttributeError,
            ValueError,
        ) as error:  # the last two are its own slips
            self.error = error

    def started(self):
        assert wait_until(lambda: b"data: " in self.text, 200)
        return self

    def done(self, timeout_s=200):
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "silence"
        return self

    @property
    def last(self):
        events = [line.removeprefix("data: ") for line in self.text.decode().split("\n\n") if line]
        return json.loads(events[-2])

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.connection.sock.shutdown(2)
        self.connection.close()


def gone(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("size", [1, 2])
def test_a_client_that_goes_away_has_its_request_aborted(size):
    with a_server("--tp-size", str(size), *(LEAN if size == 2 else ())) as server:
        clients = [Client(server, stream=True).started(), Client(server, stream=True).started(), Client(server)]
        assert wait_until(lambda: server.info()["running"] == 3, 100)
        before = server.info()["steps"]["decode"]
        for client in clients:
            client.hang_up()
        assert wait_until(lambda: server.info()["running"] == 0, 100)
        assert server.at_rest()["steps"]["decode"] < before + 1500, "not to their ends"
        waiting = Client(server, input_ids=[[1, 2]] * 3)
        assert wait_until(lambda: server.info()["running"] == 3, 100)
        waiting.hang_up()
        server.at_rest(100)


def test_sigterm_lets_running_requests_end_and_takes_no_new_ones():
    with a_server("--drain-timeout", "60") as server:
        client = Client(server, stream=True, sampling_params={"max_new_tokens": 300, "ignore_eos": True}).started()
        server.process.terminate()
        assert wait_until(lambda: server.call("/ready") == (503, {"status": "draining"}), 100)
        assert server.raw("/health")[0] == 503
        status, answer = server.call("/generate", {"input_ids": [1]})
        assert (status, answer["error"]["message"]) == (503, "the server is draining")
        client.done()
        assert len(client.last["output_ids"]) == 300
        assert client.last["meta_info"]["finish_reason"] == {"type": "length", "length": 300}
        assert server.process.wait(100) == 0
        assert server.leftovers() == []


def test_who_is_not_done_when_the_time_is_up_hears_so():
    with a_server("--drain-timeout", "0.3") as server:
        client = Client(server, stream=True).started()
        waiting = Client(server)
        everybody = server.processes()
        server.process.terminate()
        assert server.process.wait(100) == 0
        assert "not done in time" in client.done().last["error"]["message"]
        assert waiting.done().status == 500
        assert all(map(gone, everybody.values()))
        assert server.leftovers() == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_now(name):
    with a_server() as server:
        client = Client(server, stream=True).started()
        everybody = server.processes()
        server.process.send_signal(getattr(signal, name))
        server.said("no new requests")
        server.process.send_signal(getattr(signal, name))
        assert server.process.wait(100) == 1
        client.done(100)
        assert wait_until(lambda: all(map(gone, everybody.values())), ALL_END_S)
        assert server.leftovers() == []


def test_a_signal_while_it_loads_ends_it():
    server = RunningServer(wait=False)
    server.process.terminate()
    assert server.process.wait(100) in (0, -signal.SIGTERM)
    assert wait_until(lambda: server.leftovers() == [], ALL_END_S)


# an idle scheduler waits for messages, an idle rank for work; main and the detokenizer are watched alike, work or not
@pytest.mark.parametrize(
    ("who", "busy"),
    [
        ("scheduler", True),
        ("scheduler", False),
        ("detokenizer", True),
        ("main", True),
        ("rank 1", True),
        ("rank 1", False),
    ],
)
def test_when_one_is_killed_all_end(who, busy):
    """Of processes that Python starts, as at a user's; all other servers of these tests are forked."""
    with a_server(*(["--tp-size", "2"] if who == "rank 1" else []), forks=False) as server:
        clients = [Client(server, stream=True).started(), Client(server)] if busy else []
        everybody = server.processes()
        assert set(everybody) >= {"main", "scheduler", "detokenizer", who}
        everybody[who].kill()
        assert wait_until(lambda: all(map(gone, everybody.values())), ALL_END_S), [
            n for n in everybody if not gone(everybody[n])
        ]
        assert server.process.wait(100) != 0
        for client in clients:
            client.done(100)
        if busy and who != "main":
            assert "has died" in clients[0].last["error"]["message"]
            assert clients[1].status == 500
            assert who in "\n".join(server.lines)
        assert wait_until(lambda: server.leftovers() == [], 100), "main's own death is noticed by the others"


@pytest.mark.parametrize("who", ["scheduler", "detokenizer", "main", "rank 1"])
def test_when_one_is_stopped_all_others_end_in_the_watchdog_s_time(who):
    with a_server("--watchdog-timeout", str(STOPPED_S), *(["--tp-size", "2"] if who == "rank 1" else [])) as server:
        client = Client(server, stream=True).started()
        everybody = server.processes()
        os.kill(everybody[who].pid, signal.SIGSTOP)
        others = {name: process for name, process in everybody.items() if name != who}
        assert wait_until(lambda: all(map(gone, others.values())), STOPPED_S + ALL_END_S), [
            n for n in others if not gone(others[n])
        ]
        if who == "main":
            assert wait_until(lambda: server.leftovers() == [], 100)
            os.kill(server.process.pid, signal.SIGCONT)
        assert server.process.wait(ALL_END_S) == 1
        client.done(100)
        assert "error" in client.last
        assert wait_until(lambda: gone(everybody[who]), ALL_END_S)
        assert server.leftovers() == []


def test_a_step_that_takes_too_long_ends_the_server_and_shows_where():
    with a_server("--watchdog-timeout", "1.5", "--chunked-prefill-size", "-1", "--max-total-tokens", "40000") as server:
        body = {"input_ids": [[i, *range(2, 1950)] for i in range(28)], "sampling_params": {"max_new_tokens": 2}}
        status, answer = server.call("/generate", body | {"return_logprob": True, "logprob_start_len": 0})
        assert (status, server.process.wait(100)) == (500, 1), answer
        assert "--watchdog-timeout" in answer["error"]["message"]
        assert "most recent call first" in "\n".join(server.lines), "the stacks of all threads"
        assert server.leftovers() == []


def test_nothing_grows_with_the_requests_that_have_been():
    """Files, threads and what the processes remember of requests: as many after the last as after the first ones."""
    with a_server() as server:
        body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}

        def held():
            return {name: (p.num_fds(), p.num_threads()) for name, p in server.processes().items()}

        for _ in range(5):
            server.generate(**body)
        before = held()
        for i in range(40):
            server.generate(**body)
            server.stream(**body)
            Client(server, stream=bool(i % 2)).hang_up()
        server.at_rest()
        time.sleep(0.5)
        for name, (files, threads) in held().items():
            assert files <= before[name][0] + 2, name
            assert threads <= before[name][1] + 2, name
