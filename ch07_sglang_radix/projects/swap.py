"""A reader's RadixCache in the place of the product's: for a while, or for a whole run of pytest (as a plugin of it).

PROJECT_FILE=tree.py PROJECT_RESULTS=results.jsonl pytest -p ch07_sglang_radix.projects.swap tests/ch07
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ch07_sglang_radix import radix_cache
from common.teaching.grading import load

PRODUCT = radix_cache.RadixCache


def _put(tree_class: type) -> None:
    """Into every module of the chapter that is there; those to come take it from its own module."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ch07_sglang_radix.") and getattr(module, "RadixCache", None) in (PRODUCT, _put.now):
            module.RadixCache = tree_class
    _put.now = tree_class


_put.now = PRODUCT


@contextmanager
def in_place(tree_class: type) -> Iterator[None]:
    _put(tree_class)
    try:
        yield
    finally:
        _put(PRODUCT)


# --- as a plugin of pytest: a line for each thing that happens, as it happens, since a test may end the process


def pytest_configure(config) -> None:
    _put(load(Path(os.environ["PROJECT_FILE"])).RadixCache)


def pytest_collection_finish(session) -> None:
    _write({"collected": len(session.items)})


def pytest_runtest_logstart(nodeid, location) -> None:
    _write({"begun": nodeid.split("::")[-1]})


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.failed:
        said = "" if report.passed else getattr(report.longrepr, "reprcrash", report.longrepr)
        said = getattr(said, "message", str(said)).splitlines() or [""]
        _write({"test": report.nodeid.split("::")[-1], "passed": report.passed, "said": said[0][:300]})


def _write(row: dict) -> None:
    with Path(os.environ["PROJECT_RESULTS"]).open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
