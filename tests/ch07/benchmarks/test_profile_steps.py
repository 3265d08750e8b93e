"""The trace of decode steps, and the tool that plays SGLang's own files, as far as they go without SGLang."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_a_folder_without_sglang_is_one_line(tmp_path):
    done = run("ch07_sglang_radix.benchmarks.compare_sglang", tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"{tmp_path}/sglang/srt does not exist; unpack the wheel of sglang 0.5.23" in done.stderr
