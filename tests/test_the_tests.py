"""What the tests say about themselves."""

import re
from pathlib import Path

import pytest

from tests import conftest, mutation

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", conftest.THOROUGH)
def test_what_make_test_leaves_out_exists(name):
    path, _, function = name.partition("::")
    assert not function or f"\ndef {function}(" in (ROOT / path).read_text(encoding="utf-8")
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("module", mutation.TESTS)
def test_a_module_that_is_changed_has_places_and_tests(module):
    assert len(mutation.mutants(module)) > 2
    assert all((ROOT / "tests" / f"{test}.py").is_file() for test in mutation.TESTS[module])


def test_known_survivors_are_places_of_today():
    """A line of MUTATION.md that no change fits any more says nothing."""
    lines = re.findall(
        r"^- `(\S+): (.+? -> .+?)`: .", (ROOT / "tests" / "MUTATION.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    modules = {module: {mutant.change for mutant in mutation.mutants(module)} for module, _ in lines}
    assert [(module, change) for module, change in lines if change not in modules[module]] == []


def test_a_change_is_one_change(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(
        "def f(a, b=1):\n    if a <= b < 9 and not a:\n        print(a)\n    return [min(x, 2) for x in a if x]\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    assert [(one.line, one.change) for one in mutation.mutants("m.py")] == [
        (1, "1 -> 2"),
        (2, "a <= b < 9 and (not a) -> not (a <= b < 9 and (not a))"),
        (2, "a <= b < 9 and (not a) -> a <= b < 9 or not a"),
        (2, "a <= b < 9 -> a < b < 9"),
        (2, "a <= b < 9 -> a <= b <= 9"),
        (2, "9 -> 10"),
        (3, "print(a) -> None"),
        (4, "return [min(x, 2) for x in a if x] -> return None"),
        (4, "min(x, 2) -> max(x, 2)"),
        (4, "2 -> 3"),
        (4, " for x in a if x -> for x in a if not x".strip()),
    ]
