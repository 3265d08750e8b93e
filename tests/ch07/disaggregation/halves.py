"""Two halves and a balancer, as a reader starts them: processes of their own, on free ports."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.ch07.serving.running import ROOT, RunningServer

KEPT = ("--disaggregation-timeout", "100", "--watchdog-timeout", "100", "--drain-timeout", "1")


class Halves(NamedTuple):
    """front: what clients ask."""

    front: RunningServer
    prefill: RunningServer
    decode: RunningServer

    def at_rest(self) -> None:
        """Nothing runs or travels, and on both sides all pages are free or in the tree."""
        for half in (self.prefill, self.decode):
            if half.process.poll() is None:
                settled(half)


def settled(half: RunningServer) -> None:
    """No room is on its way, and conservation holds."""
    import time  # noqa: PLC0415

    deadline = time.monotonic() + 100
    while (info := half.info()) and (queues := info["disaggregation_queues"]):
        left = {name: n for name, n in queues.items() if n and name not in ("failed", "deflected")}
        if not left and not info["running"] and not info["waiting"]:
            break
        assert time.monotonic() < deadline, (left, info)
        time.sleep(0.05)
    half.at_rest()


@contextmanager
def a_front(*flags: str) -> Iterator[RunningServer]:
    command = [sys.executable, "-m", "ch07_sglang_radix.disaggregation.mini_lb", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    front = RunningServer.__new__(RunningServer)
    front.process, front.lines = process, []
    front._reader = threading.Thread(target=front._read, daemon=True)
    front._reader.start()
    try:
        front.url = front.said(r"ready: .*(http://\S+:\d+)")
        yield front
    finally:
        process.kill()
        process.wait()


@contextmanager
def two_halves(
    *flags: str, prefill: tuple[str, ...] = (), decode: tuple[str, ...] = (), cards: tuple[str, str] | None = None
) -> Iterator[Halves]:
    """flags: of both halves. cards: the GPUs that the prefill half sees, and the decode half."""
    seen = [{"CUDA_VISIBLE_DEVICES": names} for names in cards] if cards else [{}, {}]
    halves = [
        RunningServer("--disaggregation-mode", mode, *KEPT, *flags, *own, wait=False, variables=variables)
        for mode, own, variables in (("prefill", prefill, seen[0]), ("decode", decode, seen[1]))
    ]
    try:
        for half in halves:
            half.said("ready after")
        with a_front("--prefill", halves[0].url, "--decode", halves[1].url) as front:
            yield Halves(front, *halves)
    finally:
        for half in halves:
            half.process.kill()
            half.process.wait()
