"""Jobs in copies of this process: each is done once, by whoever is free, and no child is left behind."""

import gc
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from common.kernels import children
from common.kernels.children import in_children

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied on POSIX systems only")


def left_by(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def no_child_is_left():
    before = {child.pid for child in psutil.Process().children()}  # of the tests' own tools
    yield
    assert {child.pid for child in psutil.Process().children()} <= before


def write(path):
    path.with_name(f"{path.name}-{os.getpid()}").touch()


def test_every_job_is_done_once_and_not_here(tmp_path):
    jobs = [lambda i=i: write(tmp_path / f"{i:02d}") for i in range(40)]
    in_children(jobs, 3)
    names, pids = zip(*(name.split("-") for name in left_by(tmp_path)), strict=True)
    assert list(names) == [f"{i:02d}" for i in range(40)]
    assert str(os.getpid()) not in pids


def test_a_job_that_fails_takes_no_other_with_it(tmp_path):
    def fail():
        raise ValueError("no such kernel")

    def die():
        os._exit(3)

    in_children([fail, die, *(lambda i=i: (tmp_path / str(i)).touch() for i in range(5))], 2)
    assert left_by(tmp_path) == [str(i) for i in range(5)]


def test_nobody_waits_for_a_child_that_does_not_end(tmp_path):
    jobs = [lambda: time.sleep(600), (tmp_path / "done").touch]
    began = time.monotonic()
    in_children(jobs, 2, patience_s=2.0)
    assert time.monotonic() - began < 60
    assert left_by(tmp_path) == ["done"]


def test_no_room_for_children_is_no_error(tmp_path, monkeypatch):
    def no_room():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_room)
    in_children([(tmp_path / "done").touch], 2)
    assert left_by(tmp_path) == []  # whoever asked does it then


def test_patience_is_with_one_job_and_not_with_all(tmp_path):
    jobs = [lambda i=i: (time.sleep(0.4), (tmp_path / str(i)).touch()) for i in range(8)]
    in_children(jobs, 1, patience_s=1.0)
    assert left_by(tmp_path) == [str(i) for i in range(8)]


def test_there_are_not_more_children_than_is_said(tmp_path, monkeypatch):
    fork, forks = os.fork, []
    monkeypatch.setattr(children, "MOST", 3)
    monkeypatch.setattr(os, "fork", lambda: forks.append(1) or fork())
    in_children([lambda i=i: (tmp_path / str(i)).touch() for i in range(9)], 64)
    assert len(forks) == 3
    assert len(left_by(tmp_path)) == 9


def test_whoever_started_this_process_may_have_children_ignored(tmp_path):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        in_children([lambda i=i: (tmp_path / str(i)).touch() for i in range(5)], 3)
        in_children([lambda: time.sleep(600)], 1, patience_s=0.5)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert left_by(tmp_path) == [str(i) for i in range(5)]


@pytest.mark.parametrize("room", [True, False])
def test_a_child_begins_without_a_collector_and_the_parent_gets_its_own_back(monkeypatch, room):
    fork, on = os.fork, []

    def noted():
        on.append(gc.isenabled())
        if room:
            return fork()
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", noted)
    assert gc.isenabled()
    in_children([int], 1)
    assert gc.isenabled()
    assert on == [False]


def test_an_interrupt_ends_the_children_and_is_heard(monkeypatch):
    reap, calls = children._has_ended, []

    def interrupted(child):
        calls.append(child)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return reap(child)

    monkeypatch.setattr(children, "_has_ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_children([lambda: time.sleep(600)] * 2, 2)
    for child in set(calls):
        assert not psutil.pid_exists(child)


ORPHANS = """
import os, sys, time
from pathlib import Path
from common.kernels.children import in_children
def job(i):
    (Path(sys.argv[1]) / f"{i}-{os.getpid()}").touch()
    time.sleep(float(sys.argv[2]))
in_children([lambda i=i: job(i) for i in range(60)], 2, patience_s=float(sys.argv[3]))
"""


@pytest.mark.parametrize(("job_s", "patience_s"), [(0.5, 120.0), (600.0, 1.0)], ids=["between jobs", "in a job"])
def test_children_do_not_outlive_a_parent_that_is_killed(tmp_path, job_s, patience_s):
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path), str(job_s), str(patience_s)])
    until = time.monotonic() + 60
    while len(left_by(tmp_path)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    pids = {int(name.partition("-")[2]) for name in left_by(tmp_path)}
    assert pids
    until = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [pid for pid in pids if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
