"""What `make test` takes of all tests: of what is long, little.

A test function has SHARE seconds: as many of its cases, evenly chosen, as take that long; none, if one takes much longer, unless
CORE names it, whose first case always runs; none of some files. How long they take says seconds.csv, to which `pytest
--write-seconds` writes what ran; what is not in it is short or new, and runs. hypothesis draws a tenth in `make test`.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from _pytest.reports import TestReport

FILE = Path(__file__).with_name("seconds.csv")
DRAWN = 0.1  # the draws of `make test` against those of everything (conftest.py)
SHARE = 0.5  # seconds of a function in `make test`, on the machine that wrote the file
CORE = (
    "notebooks/ch06_1_shapes.ipynb::ch06_1_shapes.ipynb",
    "tests/ch06/test_block_manager.py::TestBlocks::runTest",
    "tests/ch06/test_equality.py::test_tokens_equal_transformers",
    "tests/ch06/test_equality.py::test_tokens_equal_transformers_on_the_bundled_model",
    "tests/ch07/adapters/test_equality.py::test_no_schedule_changes_an_answer",
    "tests/ch07/adapters/test_server.py::test_each_prompt_of_a_batch_has_its_own_adapter",
    "tests/ch07/adapters/test_weights_in_flight.py::test_whenever_they_change_under_any_schedule",
    "tests/ch07/disaggregation/test_any_order.py::test_whatever_happens_each_request_ends_and_every_page_comes_back",
    "tests/ch07/disaggregation/test_rooms.py::TestSimulated::runTest",
    "tests/ch07/experts/test_equality.py::test_tokens_of_chapter_7_equal_transformers",
    "tests/ch07/experts/test_equality.py::test_whatever_runs_beside_it_an_answer_stays",
    "tests/ch07/images/test_equality.py::test_tokens_equal_transformers",
    "tests/ch07/parallelism/test_context_parallel.py::test_nothing_changes_an_answer",
    "tests/ch07/quantization/test_tiers_engine.py::test_nothing_changes_an_answer",
    "tests/ch07/serving/test_life_and_death.py::test_a_client_that_goes_away_has_its_request_aborted",
    "tests/ch07/serving/test_server.py::test_every_call_answers_what_the_engine_answers",
    "tests/ch07/speculative/test_product.py::test_no_guess_changes_an_answer",
    "tests/ch07/test_attention_data_parallel.py::test_nothing_changes_an_answer",
    "tests/ch07/test_continuous_decode.py::test_any_number_of_steps_and_any_arrivals_give_the_same_tokens_and_keep_every_page",
    "tests/ch07/test_demo.py::test_a_killed_rank_ends_the_others_and_is_named",
    "tests/ch07/test_deterministic_inference.py::test_500_prompts_cold_and_from_the_tree",
    "tests/ch07/test_equality.py::test_tokens_equal_transformers",
    "tests/ch07/test_equality.py::test_tokens_equal_transformers_on_the_bundled_model",
    "tests/ch07/test_kv_dtypes.py::test_pages_chunks_trees_and_retractions_change_nothing",
    "tests/ch07/test_latent_attention.py::test_nothing_changes_an_answer",
    "tests/ch07/test_pipeline.py::test_nothing_changes_an_answer",
    "tests/ch07/test_product.py::test_nothing_changes_an_answer",
    "tests/ch07/test_radix_cache.py::TestRadixAgainstDictionary::runTest",
    "tests/ch07/test_tasks.py::test_a_task_survives_the_wire",
    "tests/common/attention/test_batch_invariant.py::test_steps_do_not_matter",
    "tests/common/attention/test_torch_native.py::test_any_ragged_step_is_dense_attention_of_each_sequence",
    "tests/common/distributed/test_shared_memory.py::test_an_engine_s_answers_are_transformers",
    "tests/common/distributed/test_spawn.py::test_a_bare_script_gets_its_ranks_and_leaves_none_behind",
    "tests/common/tiny_qwen/test_tiny_qwen.py::test_answers_are_exact",
    "tests/test_exercises.py::test_the_solution_passes",
    "tests/test_started_ranks.py::test_chapter_7_s_engine_starts_its_ranks_and_ends_them",
    "tests/test_structure.py::test_every_collective_call_carries_its_marker",
    "tests/test_structure.py::test_modules_have_no_import_cycle",
    "tests/test_structure.py::test_where_things_go_names_what_is_there",
)  # fmt: skip

STARTS_LONG = (  # files: what their tests share, or each of them has, takes long to start
    "tests/ch07/disaggregation/test_deaths.py",
    "tests/ch07/disaggregation/test_mini_lb.py",
    "tests/ch07/disaggregation/test_router.py",
    "tests/ch07/images/test_server.py",
    "tests/ch07/speculative/test_server.py",
    "tests/ch07/test_hosts.py",
    "tests/common/layers/test_compiled.py",
)


def function_of(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def read() -> dict[str, tuple[int, float]]:
    """{function: (cases, seconds of them all)} of those that take longer than their share."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return {row["test"]: (int(row["cases"]), float(row["seconds"])) for row in csv.DictReader(file)}


def every(function: str, measured: dict[str, tuple[int, float]], drawn: bool = False) -> int:
    """`make test` takes the first of every so many of its cases; 0: none. drawn: hypothesis says what they are."""
    if function.startswith(STARTS_LONG):
        return 0
    cases, seconds = measured.get(function, (1, 0.0))
    seconds *= DRAWN if drawn else 1
    if seconds > 1.5 * SHARE * cases:
        return cases if function in CORE else 0
    return max(math.ceil(seconds / SHARE), 1)


def write(reports: Iterable[TestReport]) -> None:
    """What took longer than its share; of what did not run, what was known."""
    cases: dict[str, set[str]] = defaultdict(set)
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        if report.when == "call":
            cases[function_of(report.nodeid)].add(report.nodeid)
            seconds[function_of(report.nodeid)] += report.duration
    known = {name: row for name, row in (read() if FILE.exists() else {}).items() if name not in cases}
    known |= {name: (len(cases[name]), took) for name, took in seconds.items() if took > SHARE}
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("test", "cases", "seconds"))
        for name, (count, took) in sorted(known.items()):
            writer.writerow((name, count, f"{took:.1f}"))
