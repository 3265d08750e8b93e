"""The check finds what is missing, says what to do about it, and talks between real processes."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from common import check_environment, start_times
from common.distributed import probe
from common.distributed.processes import RankFailure

ROOT = Path(__file__).parents[2]


def test_this_machine_can_run_it():
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    argv = [sys.executable, "-m", "common.check_environment"]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\neverything here can run\n")
    rows = dict(re.findall(r"^  (\S.*?)  +(.*)$", done.stdout, re.MULTILINE))
    assert re.fullmatch(r"all-reduce of 896 bytes [\d.]+ ms, of 8 MiB [\d.]+ ms", rows["gloo, 2 processes"])
    for model, megabytes in (("bundled model", "11.6"), ("Qwen2.5-0.5B", "1,976.1")):
        assert f": {megabytes} MB of float32 a token at " in rows[f"{model}, 1 rank"]
        assert rows[f"{model}, 2 ranks"].endswith(" ms of messages")


@pytest.fixture
def no_speed(monkeypatch):
    monkeypatch.setattr(check_environment, "speed", lambda problems: [])


def test_a_missing_package_is_named_and_nothing_is_imported_that_needs_it(monkeypatch, capsys):
    def version(name):
        if name == "psutil":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(check_environment.importlib.metadata, "version", version)
    monkeypatch.setattr(check_environment, "machine", lambda problems: pytest.fail("it went on"))
    assert check_environment.main() == 1
    out = capsys.readouterr().out
    assert "torch 1.0 (tested: 2." in out
    assert out.splitlines()[-1] == (
        "not right: there is no psutil; run `python setup_environment.py` (or `make setup`), then .venv's python"
    )


def test_too_little_memory_and_disk_are_said(monkeypatch, capsys, no_speed):
    memory = namedtuple("Memory", "total available")(8e9, 1.5e9)
    disk = namedtuple("Disk", "total used free")(1e12, 1e12, 2e8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    assert check_environment.main() == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "not right: 1.5 GB of memory are free, 2 wanted; end other programs",
        "not right: 0.2 GB of disk are free, 1 wanted for a small model; make room",
    ]


@pytest.mark.parametrize("kept", [True, False])
def test_bytecode_that_each_start_makes_anew_is_said(monkeypatch, capsys, no_speed, kept):
    monkeypatch.setattr(start_times, "has_bytecode", lambda file: kept)
    check_environment.main()
    said = re.search(r"^  bytecode +(.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert said == "kept" if kept else "set PYTHONPYCACHEPREFIX to a folder" in said


def test_processes_that_cannot_talk_are_a_problem(monkeypatch):
    def fails(device, small, large):
        raise RankFailure("rank 1 (pid 7) has died at its start: no network\nand more")

    monkeypatch.setattr(probe, "all_reduce_seconds", fails)
    monkeypatch.setattr(probe, "bytes_per_s", lambda *args, **kwargs: 1e10)
    problems = []
    rows = dict(check_environment.speed(problems))
    assert rows["gloo, 2 processes"] == "does not work"
    assert problems[0] == (
        'gloo, 2 processes: rank 1 (pid 7) has died at its start: no network; see "Without make" in README.md'
    )


def test_the_ceiling_is_bytes_over_bandwidth_and_the_waits():
    assert check_environment.ceiling(1e9, 10e9).startswith("at most 10 tokens/s: 1,000.0 MB of float32")
    assert check_environment.ceiling(1e9, 10e9, 0.1).startswith("at most 5 tokens/s")
