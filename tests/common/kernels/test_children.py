"""Jobs in copies of this process: each is done once, by whoever is free, and no child is left behind."""

import os
import time

import psutil
import pytest

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
