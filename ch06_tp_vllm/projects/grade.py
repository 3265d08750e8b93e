"""Grade a project of chapter 6: a score card, part by part.

    python -m ch06_tp_vllm.projects.grade {schedule,same_step_sharing} [--solution] [--file FILE] [--part N]

Exit code 0 if it has all points and its measurement is good enough.
"""

from pathlib import Path

from ch06_tp_vllm.projects import judge_same_step_sharing, judge_schedule
from common.teaching.grading import Project, main

FOLDER = Path(__file__).parent
PROJECTS = (
    Project("schedule", "Write the scheduler's schedule()", FOLDER, judge_schedule.PARTS),
    Project("same_step_sharing", "Requests of one step share their full blocks", FOLDER, judge_same_step_sharing.PARTS),
)

if __name__ == "__main__":
    main(PROJECTS, "ch06_tp_vllm.projects.grade", __doc__)
