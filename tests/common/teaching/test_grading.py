"""A score card for any file: one that is right, half right, untouched, no Python, that raises, hangs, exits or returns nonsense."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.teaching.grading import stubs_of, written_in

ROOT = Path(__file__).parents[3]
GRADER = """
from pathlib import Path
from common.teaching.expect import ask, expect
from common.teaching.grading import Part, Project, main

def adds(m):
    expect("1 + 2", ask(m.add, 1, 2), 3)
    return "it adds"

def half(m):
    return (0.5, "half of it") if ask(m.add, 2, 2) == 4 else (0.0, "nothing")

def fast(m):
    return (1.0 if ask(m.add, 0, 0) == 0 else 0.0), "as fast as can be"

PARTS = (Part("adds", 10, adds, 1), Part("halves", 4, half, 1), Part("adds again", 6, adds, 1), Part("speed", 0, fast, 1))
PROJECTS = (Project("sum", "Write a sum", Path(__file__).parent, PARTS),)
if __name__ == "__main__":
    main(PROJECTS, "grader", "a sum")
"""
STUB = "def add(a, b):\n    '''a + b'''\n    raise NotImplementedError  # your turn\n"
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.fixture
def grade(tmp_path):
    """grade(text of the reader's file) -> (exit code, what is printed)."""
    (tmp_path / "grader.py").write_text(GRADER, encoding="utf-8")

    def run(text: str | bytes, *args: str) -> tuple[int, str]:
        file = tmp_path / "mine.py"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        argv = [sys.executable, "-m", "grader", "sum", "--file", str(file), *args]
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_right_file_gets_its_points(grade):
    code, said = grade(RIGHT)
    assert code == 1, "half of a part is not all of it"
    assert "10 of 10  adds: it adds" in said
    assert "2 of  4  halves: half of it" in said
    assert "ok  speed: as fast as can be" in said
    assert said.rstrip().endswith("18 of 20 points")


def test_an_untouched_starter_gets_0_and_hears_what_to_write(grade):
    code, said = grade(STUB)
    assert code == 1
    assert "not started: add still to be written" in said
    assert said.rstrip().endswith("0 of 20 points")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def add(a, b):\n    return a - b\n", "adds: 1 + 2: got -1, wanted 3"),
        ("def add(a, b):\n    return None\n", "adds: 1 + 2: got None, wanted 3"),
        (
            "def add(a, b):\n    c = a\n    return c + d\n",
            "NameError (name 'd' is not defined) in line 3 from add(1, 2)",
        ),
        ("def add(a, b):\n    raise SystemExit(0)\n", "SystemExit"),
        ("def add(a, b):\n    import os\n    os._exit(0)\n", "it ended the whole process (exit code 0)"),
        ("def add(a, b):\n    return add(a, b)\n", "RecursionError"),
        ("def other():\n    pass\n", "AttributeError"),
        ("def add(a, b:\n", "the file is no Python"),
        (b"\xff\xfe\x00def", "the file is no Python"),
        ("import nothing_of_that_name\n" + RIGHT, "the file cannot be imported: ModuleNotFoundError"),
        ("def helper():\n    return 1\n\n" + STUB, "still to be written: add"),
        ("class add:\n    def __init__(self, *_): print('9 of 9 points')\n", "adds: 1 + 2: got "),
    ],
)
def test_a_file_that_is_wrong_in_any_way_gets_0_and_a_line(grade, text, words):
    code, said = grade(text)
    assert code == 1
    assert words in said
    assert "Traceback" not in said
    assert said.rstrip().splitlines()[-1].startswith("0 of 20 points")


def test_a_file_that_hangs_costs_the_limit_of_a_part_and_the_rest_goes_on(grade):
    _, said = grade("def add(a, b):\n    while a == 2:\n        pass\n    return a + b\n")
    assert "0 of  4  halves: still busy after 1 seconds" in said
    assert "6 of  6  adds again: it adds" in said, "in a process of its own, the next part runs"
    assert said.rstrip().endswith("16 of 20 points")


def test_a_file_that_always_hangs_is_given_up(grade):
    _, said = grade("def add(a, b):\n    while True:\n        pass\n")
    assert said.count("still busy after 1 seconds") == 3
    assert "the rest is not tried" in said


def test_one_part_alone_shows_the_traceback(grade):
    code, said = grade("def add(a, b):\n    return a - b\n", "--part", "1")
    assert code == 1
    assert "Traceback" in said
    assert grade(RIGHT, "--part", "1") == (0, "it adds\n")
    assert "--part 9: this project has the parts 1 to 4" in grade(RIGHT, "--part", "9")[1]


def test_stubs_are_functions_that_end_in_not_implemented(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        STUB
        + "class A:\n    def b(self):\n        raise NotImplementedError('later')\n    def c(self):\n        return 1\n"
    )
    assert stubs_of(file) == ["add", "A.b"]
    assert written_in(file) == ["A.c"]
