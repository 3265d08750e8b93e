"""The trace of decode steps, and the tool that plays SGLang's own files, as far as they go without SGLang."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ch07_sglang_radix.benchmarks import compare_sglang

ROOT = Path(__file__).parents[3]


def run(*args):
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_the_trace_holds_every_part_once_a_step(tmp_path):
    out = tmp_path / "steps.json"
    done = run("ch07_sglang_radix.benchmarks.profile_steps", out, "--running", 3, "--steps", 4)
    assert done.returncode == 0, done.stderr
    events = [event.get("name") for event in json.loads(out.read_text())["traceEvents"]]
    for part in ("step", "prepare_for_decode", "run_batch: forward", "run_batch: sample", "process_batch_result"):
        assert events.count(part) == 4, part
    assert "control.execute" in done.stdout


def test_a_folder_without_sglang_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_sglang", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"unpack the wheel of sglang 0\.5\.23") as told:
        compare_sglang.main()
    assert len(str(told.value).splitlines()) == 1
    assert f"{tmp_path}/sglang/srt does not exist; " in str(told.value)
