"""What the tests say about themselves."""

import argparse
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import mutation, quick

ROOT = Path(__file__).parents[1]


def test_what_make_test_leaves_out_exists():
    """Else write seconds.csv again."""
    for name in (*quick.CORE, *quick.STARTS_LONG, *quick.read()):
        path, *names = name.split("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        if names and not path.endswith(".ipynb"):
            assert re.search(rf"^(def {names[0]}\(|{names[0]} = |class {names[0]}\b)", text, re.MULTILINE), name


def test_a_function_has_its_share():
    shares = {"short": (1, 1.2), "many": (10, 5.0), "long": (2, 40.0), quick.CORE[0]: (3, 40.0)}
    measured = {name: (cases, share * quick.SHARE) for name, (cases, share) in shares.items()}
    assert [quick.every(name, measured) for name in ("new", *measured)] == [1, 2, 5, 0, 3]
    assert quick.every("long", {"long": (2, 4 * quick.SHARE)}) == 0
    assert quick.every("long", {"long": (2, 4 * quick.SHARE)}, drawn=True) == 1


def test_what_took_long_is_written_and_read(monkeypatch, tmp_path):
    monkeypatch.setattr(quick, "FILE", tmp_path / "seconds.csv")

    def report(nodeid, when, duration):
        return SimpleNamespace(nodeid=nodeid, when=when, duration=duration)

    quick.write([
        report("a.py::test[1-[x]]", "setup", 9.0), report("a.py::test[1-[x]]", "call", 0.75), report("a.py::test[2]", "call", 0.5),
        report("a.py::short", "call", 0.9 * quick.SHARE), report("a.py::short", "setup", 9.0),
    ])  # fmt: skip
    assert quick.read() == {"a.py::test": (2, 1.2)}
    quick.write([report("a.py::other", "call", 9.0)])
    assert quick.read() == {"a.py::other": (1, 9.0), "a.py::test": (2, 1.2)}
    quick.write([report("a.py::test[1]", "call", 0.1)])
    assert quick.read() == {"a.py::other": (1, 9.0)}


@pytest.mark.parametrize("module", mutation.TESTS)
def test_a_module_that_is_changed_has_places_and_tests(module):
    assert len(mutation.mutants(module)) > 2
    assert all((ROOT / "tests" / f"{test}.py").is_file() for test in mutation.TESTS[module])


def test_known_survivors_are_places_of_today():
    """A line of MUTATION.md that no change fits any more says nothing."""
    lines = [line for line in (ROOT / "tests" / "MUTATION.md").read_text(encoding="utf-8").splitlines() if "->" in line]
    assert len(lines) == len(mutation.known_survivors())
    assert mutation.known_survivors() <= {one.name for module in mutation.TESTS for one in mutation.mutants(module)}


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


def test_places_have_names_of_their_own():
    names = [one.name for module in mutation.TESTS for one in mutation.mutants(module)]
    assert len(names) == len(set(names))


def test_a_sample_stays_when_another_line_changes(tmp_path, monkeypatch):
    """What is added may enter the sample, what is there does not make way for anything but that."""
    lines = [f"x = a{i} < b" for i in range(40)]
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    monkeypatch.setattr(mutation, "TESTS", {"m.py": []})
    args = argparse.Namespace(module=None, line=None, seed=1, sample=10)

    def sample() -> set[str]:
        (tmp_path / "m.py").write_text("\n".join(lines), encoding="utf-8")
        return {one.name for one in mutation.chosen(args)}

    before = sample()
    lines.insert(0, "y = c > d")
    assert len(before) == 10
    assert len(sample() - before) <= 1
