"""How long the tests of each part take, in the time of all workers together: what a session of tests ends with.

A part is the folder that its tests lie in; of the wing parallelism, whose layouts run in the core's engine, some lie elsewhere.
"""

from collections import Counter
from collections.abc import Iterable

from _pytest.reports import TestReport

LEAST_S = 10.0  # a shorter part is no reason for a line's length
PARALLELISM = (
    "tests/ch07/parallelism/", "tests/ch07/test_pipeline.py", "tests/ch07/test_lanes.py", "tests/ch07/test_hosts.py",
    "tests/ch07/test_dynamic_chunk_sizer.py", "tests/ch07/test_attention_data_parallel.py", "tests/ch07/serving/deploy/",
    "tests/ch07/benchmarks/test_replicas.py", "tests/ch07/benchmarks/test_bench_layouts.py", "tests/common/planner/",
    "tests/ch07/benchmarks/test_record_layouts.py",
    "tests/common/test_pipeline.py", "tests/common/test_rows_over_ranks.py", "tests/common/attention/test_context_parallel.py",
    "tests/common/distributed/test_check_plan.py", "tests/common/distributed/test_cost_model.py",
    "tests/common/distributed/test_layout.py", "tests/common/distributed/test_machines.py",
    "tests/common/distributed/test_measure_links.py", "tests/common/distributed/test_plan.py",
    "tests/common/distributed/test_shared_memory.py",
    "notebooks/ch07_5_parallelism.ipynb", "notebooks/ch07_6_costs.ipynb",
)  # fmt: skip


def part_of(nodeid: str) -> str:
    """ "parallelism", "ch07/serving", "common/models", "ch06", "notebooks", ..."""
    if nodeid.startswith(PARALLELISM):
        return "parallelism"
    *folders, _ = nodeid.partition("::")[0].split("/")
    return "/".join(folders).removeprefix("tests/") or "tests"


def seconds_by_part(reports: Iterable[TestReport]) -> dict[str, float]:
    """Setup, test and teardown; the longest part first."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[part_of(report.nodeid)] += report.duration
    return dict(seconds.most_common())


def said(reports: Iterable[TestReport]) -> str | None:
    """A line, None if nothing took long."""
    parts = [f"{part} {seconds:.0f}" for part, seconds in seconds_by_part(reports).items() if seconds >= LEAST_S]
    return f"seconds of all workers together: {', '.join(parts)}" if parts else None
