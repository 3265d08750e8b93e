"""What dies, who notices, and after how many milliseconds.

    python ch07_sglang_radix/serving/demo_7_who_dies.py

Two servers, in processes of their own. Of the first a client hangs up, then its operator stops it, then its rank 1 is killed
while the last answer still runs. Of the second the main process is killed, which is the one that would have cleaned up. Nobody
asks a socket whether the other end lives; each looks at the processes it needs, four times a second (watch.py).
"""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from common.distributed.launch import run_main
from common.teaching.show import check, heading, table

MOST = 1900  # tokens of an answer
LONG = {"text": "Tell me all.", "sampling_params": {"max_new_tokens": MOST, "ignore_eos": True}, "stream": True}
PATIENCE_S = 120.0
CHILDREN = {"serving.child": lambda command: command[-1], "rank_main": lambda command: "rank 1"}


class Life:
    """A server, what it says, and the folder where its socket files lie."""

    def __init__(self, *flags: str):
        self.folder = tempfile.TemporaryDirectory(prefix="d7-")
        command = [sys.executable, "-m", "ch07_sglang_radix.launch_server", "--port", "0", "--device", "cpu", *flags]
        environment = os.environ | {"TMPDIR": self.folder.name, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment)
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()

    def said(self, words: str) -> str:
        """The line of its log that has these words, once it is there."""
        until(lambda: any(words in line for line in self.lines) or self.process.poll() is not None)
        found = [line for line in self.lines if words in line]
        if not found:
            raise ValueError(f"the server has ended: {''.join(self.lines[-3:])}")
        return found[0].strip()

    def ready(self) -> "Life":
        self.url = self.said("ready after").split()[-1]
        main = psutil.Process(self.process.pid)
        self.processes = {"main": main}
        for child in main.children(recursive=True):
            command = child.cmdline()
            self.processes |= {
                name(command): child for mark, name in CHILDREN.items() if any(mark in word for word in command)
            }
        return self

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body) if body else None

    def sockets(self) -> list[str]:
        return sorted(path.name for path in Path(self.folder.name).rglob("*") if not path.is_dir())

    def end(self) -> None:
        self.process.kill()  # whom it has started notices
        self.process.wait()
        self.folder.cleanup()


class Client:
    """A streamed request on a connection of its own. ended: time.perf_counter() at which it heard that there is no more."""

    def __init__(self, life: Life):
        self.connection = http.client.HTTPConnection(urlsplit(life.url).netloc, timeout=60)
        self.connection.request("POST", "/generate", json.dumps(LONG))
        self.events: list[bytes] = []
        self.ended: float | None = None
        threading.Thread(target=self._read, daemon=True).start()
        until(lambda: self.events)

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = self.connection.getresponse()
            while piece := answer.read1():
                self.events.append(piece)
        self.ended = time.perf_counter()

    def hang_up(self) -> None:
        self.connection.sock.shutdown(2)
        self.connection.close()

    @property
    def last_words(self) -> str:
        """What the last event says, if it is an error."""
        events = [one for one in b"".join(self.events).decode().split("\n\n") if one.startswith('data: {"error"')]
        if not events:
            return "the connection breaks off"
        return json.loads(events[-1].removeprefix("data: "))["error"]["message"]


def main() -> None:
    first, second = Life("--tp-size", "2"), Life()
    try:
        first.ready()
        client_leaves(first)
        told = operator_stops(first)
        rank_dies(first, told)
        second.ready()
        main_dies(second)
    finally:
        first.end()
        second.end()


def client_leaves(life: Life) -> None:
    heading("A client hangs up in the middle of its answer")
    client = Client(life)
    before = life.get("/server_info")[1]
    zero = time.perf_counter()
    client.hang_up()
    until(lambda: not life.get("/server_info")[1]["running"])
    gone = time.perf_counter()
    after = life.get("/server_info")[1]
    tokens = after["steps"]["decode"] - before["steps"]["decode"]
    print(f"  its request is gone after {1e3 * (gone - zero):.0f} ms, and {tokens} steps more, of {MOST}")
    free_or_cached = after["free_tokens"] + after["evictable_tokens"]
    check("all its pages are free or in the tree", free_or_cached == after["max_total_num_tokens"])


def operator_stops(life: Life) -> Client:
    heading("SIGTERM while an answer runs")
    client = Client(life)
    zero = time.perf_counter()
    life.process.terminate()
    until(lambda: life.get("/ready")[0] == 503)
    print(f"  /ready says {life.get('/ready')[1]} after {1e3 * (time.perf_counter() - zero):.0f} ms")
    there = len(client.events)
    until(lambda: len(client.events) > there + 5 or client.ended)
    check("the answer that was there goes on", client.ended is None)
    return client


def rank_dies(life: Life, client: Client) -> None:
    heading("Rank 1 is killed meanwhile")
    zero = time.perf_counter()
    life.processes["rank 1"].kill()
    rows = ends(life, zero, client)
    table(("who", "ends after ms"), [row for row in rows if row[0] != "rank 1"])
    print(f"  the client: {client.last_words}")
    check("everybody has ended within 5 s, and main not with 0", len(rows) == 5 and life.process.wait(5) != 0)
    check("the client was told why", "has died" in client.last_words)
    check("no socket file is left", life.sockets() == [])


def main_dies(life: Life) -> None:
    heading("Main is killed: who cleans up?")
    client = Client(life)
    print(f"  socket files before: {', '.join(life.sockets())}")
    zero = time.perf_counter()
    life.processes["main"].kill()
    rows = ends(life, zero, client)
    table(("who", "ends after ms"), [row for row in rows if row[0] != "main"])
    print(f"  the client: {client.last_words}")
    check("the other two have noticed within 5 s", {"scheduler", "detokenizer"} <= {who for who, _ in rows})
    check("and taken the socket files with them", life.sockets() == [])


def ends(life: Life, zero: float, client: Client) -> list[tuple[str, int]]:
    """(who, after how many ms), in order; who has not ended within 5 s is missing."""
    found: dict[str, float] = {}
    while time.perf_counter() < zero + 5 and len(found) <= len(life.processes):
        for who, process in life.processes.items():
            if who not in found and gone(process):
                found[who] = time.perf_counter()
        if client.ended and "the client's answer" not in found:
            found["the client's answer"] = client.ended
        time.sleep(0.001)
    return sorted(((who, round(1e3 * (at - zero))) for who, at in found.items()), key=lambda row: row[1])


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > deadline:
            raise ValueError(f"nothing happened within {PATIENCE_S:g} s")
        time.sleep(0.002)


if __name__ == "__main__":
    run_main(main)
