import os
import subprocess
import sys
import time

import psutil
import pytest

from common.distributed.processes import fate


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def wait_for_a_change(pid):
    """A signal takes effect a moment after it was sent."""
    deadline = time.monotonic() + 100
    while fate(pid) is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_process_that_runs_has_no_fate_yet(sleeper):
    assert fate(os.getpid()) is None
    assert fate(sleeper.pid) is None


def test_a_stopped_process_is_not_dead_and_may_go_on(sleeper):
    process = psutil.Process(sleeper.pid)
    process.suspend()
    wait_for_a_change(sleeper.pid)
    assert fate(sleeper.pid) == "is stopped (SIGSTOP)"
    process.resume()
    assert fate(sleeper.pid) is None


def test_a_killed_process_is_dead_before_and_after_its_parent_has_asked(sleeper):
    sleeper.kill()
    wait_for_a_change(sleeper.pid)
    assert fate(sleeper.pid) == "has died"
    sleeper.wait()
    assert fate(sleeper.pid) == "has died"
