"""Who notices what: processes that die or are stopped, and a step that does not end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ch07_sglang_radix.serving.watch import LOOK_EVERY_S, Watch, wait_until


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def watching(processes, patience_s=60.0, **more):
    said = []
    return said, Watch(processes, patience_s, said.append, **more)


def test_a_process_that_dies_is_named_once(sleeper):
    said, _ = watching({"scheduler": sleeper.pid})
    time.sleep(3 * LOOK_EVERY_S)
    assert said == []
    sleeper.kill()
    assert wait_until(lambda: bool(said), 100)
    time.sleep(3 * LOOK_EVERY_S)
    assert said == [f"scheduler (pid {sleeper.pid}) has died"]


def test_a_process_may_be_stopped_for_a_while(sleeper):
    said, _ = watching({"detokenizer": sleeper.pid}, 1.0)
    os.kill(sleeper.pid, signal.SIGSTOP)
    time.sleep(2 * LOOK_EVERY_S)
    assert said == []
    os.kill(sleeper.pid, signal.SIGCONT)
    time.sleep(2 * LOOK_EVERY_S)
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert wait_until(lambda: bool(said), 100)
    assert said == [f"detokenizer (pid {sleeper.pid}) is stopped, for 1 s now (--watchdog-timeout)"]


def test_a_step_that_takes_too_long_is_named_and_many_short_ones_are_not():
    step = [0]
    said, _ = watching({}, 2.0, step=lambda: step[0])
    for _ in range(8):
        time.sleep(LOOK_EVERY_S)
        step[0] += 1
    assert said == []
    assert wait_until(lambda: bool(said), 100)
    assert said == [f"step {step[0]} takes more than 2 s (--watchdog-timeout)"]


def test_an_idle_scheduler_is_no_step_that_takes_too_long():
    said, _ = watching({}, 0.25, step=lambda: None)
    time.sleep(6 * LOOK_EVERY_S)
    assert said == []


def test_nobody_is_missed_after_leaving(sleeper):
    said, watch = watching({"scheduler": sleeper.pid})
    watch.leave()
    sleeper.kill()
    sleeper.wait()
    time.sleep(3 * LOOK_EVERY_S)
    assert said == []
