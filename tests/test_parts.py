"""The line about how long each part takes."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import parts

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", parts.PARALLELISM)
def test_what_belongs_to_the_part_is_there(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


@pytest.mark.parametrize(
    ("nodeid", "part"),
    [
        ("tests/ch07/parallelism/test_router.py::test_a[b::c]", "parallelism"),
        ("tests/ch07/test_pipeline.py::test_a", "parallelism"),
        ("notebooks/ch07_6_costs.ipynb::ch07_6_costs.ipynb", "parallelism"),
        ("notebooks/ch06_1_shapes.ipynb::ch06_1_shapes.ipynb", "notebooks"),
        ("tests/ch07/test_engine.py::test_a[x/y]", "ch07"),
        ("tests/common/models/test_stages.py::test_a", "common/models"),
        ("tests/test_parts.py::test_a", "tests"),
    ],
)
def test_a_test_has_its_part(nodeid, part):
    assert parts.part_of(nodeid) == part


def test_all_that_a_test_took_is_added_and_the_longest_part_is_first():
    took = [
        ("tests/ch06/test_a.py::a", 4.0),
        ("tests/ch07/test_pipeline.py::b", 30.0),
        ("tests/ch06/test_a.py::a", 7.4),
    ]
    reports = [SimpleNamespace(nodeid=nodeid, duration=seconds) for nodeid, seconds in took]
    assert parts.said(reports) == "seconds of all workers together: parallelism 30, ch06 11"
    assert parts.said(reports[:1]) is None
