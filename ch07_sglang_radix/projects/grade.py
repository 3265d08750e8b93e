"""Grade a project of chapter 7: a score card, part by part.

    python -m ch07_sglang_radix.projects.grade radix_cache [--solution] [--file FILE] [--part N]

Exit code 0 if it has all points and its measurement is good enough.
"""

from pathlib import Path

from ch07_sglang_radix.projects.judge_radix_cache import PARTS
from common.teaching.grading import Project, main

PROJECTS = (
    Project("radix_cache", "Write the radix tree's match, insert, split and evict", Path(__file__).parent, PARTS),
)

if __name__ == "__main__":
    main(PROJECTS, "ch07_sglang_radix.projects.grade", __doc__)
