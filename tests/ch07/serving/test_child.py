"""A child begins before it has a job, and ends if there is none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ch07_sglang_radix.serving.child import ROOT, begin


def test_a_child_whose_main_says_nothing_ends_in_silence(capfd):
    children = [begin(who) for who in ("scheduler", "detokenizer")]
    time.sleep(0.5)  # on its way: Ctrl-C reaches children too, and is main's to answer
    for child in children:
        child.stdin.close()
    assert [child.wait(60) for child in children] == [0, 0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc to ask for signals")
def test_a_child_that_waits_leaves_signals_to_main():
    child = begin("detokenizer")
    deadline = time.monotonic() + 60
    ignored = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
    while _ignored(child.pid) & ignored != ignored:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, number)
    time.sleep(0.2)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(60) == 0


def _ignored(pid: int) -> int:
    """The signals that a process ignores, a bit each."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("SigIgn"))


def test_the_detokenizer_starts_without_torch():
    """Which takes two seconds of a core, for what only turns ids into text."""
    script = "import sys, ch07_sglang_radix.serving.detokenizer_manager; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
