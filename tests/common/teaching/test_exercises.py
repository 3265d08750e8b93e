"""The checker of exercises: each in a process of its own, and nothing that was to be written is borrowed."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.teaching.exercises import Exercises


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder of two exercises; write(number, text) puts an answer there and returns what the command prints."""
    root = tmp_path / "pkg"
    for folder in (root, root / "checks", root / "solutions"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    stub = '"""Exercise."""\n\n\ndef add(a, b):\n    raise NotImplementedError  # your turn\n'
    for name in ("ex1_add", "ex2_again"):
        (root / f"{name}.py").write_text(stub)
        (root / "solutions" / f"{name}.py").write_text("def add(a, b):\n    return a + b\n")
        (root / "checks" / f"{name}.py").write_text(
            "from common.teaching.expect import ask, expect\n\n\ndef check(m):\n    expect('1 + 2', ask(m.add, 1, 2), 3)\n"
        )
    (root / "check.py").write_text(
        "from common.teaching import exercises\nexercises.SECONDS = 3\n"
        "if __name__ == '__main__':\n    exercises.Exercises('pkg').main('two')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{':' if sys.platform != 'win32' else ';'}{Path(__file__).parents[3]}")

    def write(text: str, *args: str) -> tuple[int, list[str]]:
        (root / "ex1_add.py").write_text(text or stub)
        argv = [sys.executable, "-m", "pkg.check", *args]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert not done.stderr
        return done.returncode, [" ".join(line.split()) for line in done.stdout.splitlines()]

    return write


def test_what_is_not_started_is_no_failure(package):
    assert package("") == (0, ["ex1_add not started", "ex2_again not started"])
    assert package("", "--solutions") == (0, ["ex1_add passed", "ex2_again passed"])
    assert package("", "2") == (0, ["ex2_again not started"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def add(a, b):\n    return a * b\n", "not yet: 1 + 2: got 2, wanted 3"),
        ("def add(a, b):\n    while True:\n        pass\n", "not yet: got still busy after 3 seconds: a loop that does not end?"),
        ("import os\n\n\ndef add(a, b):\n    os._exit(4)\n", "not yet: got it ended the whole process (exit code 4)"),
        ("def add(a, b) return\n", "not yet: got SyntaxError: expected ':' (ex1_add.py, line 1)"),
        ("def minus(a, b):\n    return a\n", "not yet: got AttributeError: module 'pkg.ex1_add' has no attribute 'add'"),
        ("from common.teaching.expect import short\n\n\ndef add(a, b):\n    return a + b\n",
         "not yet: common.teaching.expect.short is taken from the product; write it from the contract"),
    ],
)  # fmt: skip
def test_a_wrong_answer_of_any_kind_is_one_line_and_the_others_are_checked(package, text, said):
    assert package(text) == (1, [f"ex1_add {said}", "ex2_again not started"])


def test_the_place_of_an_error_is_the_readers_line(package):
    package("def add(a, b):\n    c = [1]\n    return c[a]\n")
    exercises = Exercises("pkg")
    assert exercises.outcome(1, exercises.module_of(1)) == (
        "not yet: wanted a result, got IndexError (list index out of range) in line 3 from add(1, 2)"
    )
