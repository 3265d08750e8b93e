import os
import subprocess
import sys

import psutil
import pytest

from common.distributed.processes import fate


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def test_a_process_that_runs_has_no_fate_yet(sleeper):
    assert fate(os.getpid()) is None
    assert fate(sleeper.pid) is None


def test_a_stopped_process_is_not_dead_and_may_go_on(sleeper):
    process = psutil.Process(sleeper.pid)
    process.suspend()
    assert fate(sleeper.pid) == "is stopped (SIGSTOP)"
    process.resume()
    assert fate(sleeper.pid) is None


def test_a_killed_process_is_dead_before_and_after_its_parent_has_asked(sleeper):
    sleeper.kill()
    while fate(sleeper.pid) is None:
        pass
    assert fate(sleeper.pid) == "has died"
    sleeper.wait()
    assert fate(sleeper.pid) == "has died"
