"""The recorder of the stored trace: one of its workloads, and what must be in the file."""

import json

from ch07_sglang_radix.serving.xray.demo_record import WORKLOADS, Workload, record
from ch07_sglang_radix.serving.xray.events import check_recording, merged
from ch07_sglang_radix.serving.xray.page import FILES


def test_a_workload_is_recorded_step_by_step(tmp_path):
    path = tmp_path / "recording.jsonl"
    small = Workload("two turns", [["What is a page?", "What is a rank?"], ["Say that in Chinese."]], 2, 6)
    totals = record(path, 1, [small])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert check_recording(path) == len(lines) - 1
    states = [lines[0]["state"]]
    for line in lines[1:]:
        states.append(merged(states[-1], line["change"]))
    assert states[-1]["totals"] == totals
    assert totals["finished"] == 4, "each answer is continued with each question of the next level"
    assert {state["now"]["mark"] for state in states} == {"two turns"}
    assert (states[-1]["nodes"], states[-1]["pages"]) == ({}, {}), "flushed at the end"
    kinds = [state["now"]["kind"] for state in states]
    assert "several" not in kinds, "no step is left out"
    assert [state["now"]["step"] for state in states] == sorted(state["now"]["step"] for state in states)


def test_the_workloads_are_those_of_the_page():
    script = FILES["prompts.js"].body.decode()
    assert all(f'"{workload.mark}": {{' in script for workload in WORKLOADS)
