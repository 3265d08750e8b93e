"""What the exercises of both chapters look like, so that a reader who has done one knows them all."""

import ast
import re
from inspect import iscoroutinefunction
from itertools import dropwhile, takewhile
from pathlib import Path
from types import SimpleNamespace

from common.teaching.exercises import Exercises, imports_of

ROOT = Path(__file__).parents[1]


def check_exercise(exercises: Exercises, number: int, chapter: Path) -> None:
    path = Path(exercises.module_of(number).__file__)
    text = path.read_text(encoding="utf-8")
    head = re.match(
        rf'"""Exercise {number}: .+ \(\d+ minutes\)\.\n\nRead  (.+)\nEdit  this file\nTest  python -m '
        rf"{re.escape(exercises.package)}.check {number}\n\n",
        text,
    )
    assert head, f"{path.name} does not begin as an exercise does"
    assert "raise NotImplementedError  # your turn" in text
    read = head.group(1)
    assert ".py" not in read, "to read is an idea; a file of the product would be the answer"
    headings = re.findall(r"^## \d+\. (.+)$", (chapter / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    steps = re.findall(r'"(.+?)"', read.partition(" in the chapter")[0])
    assert steps, f"{read!r} names no step of the chapter"
    assert set(steps) <= set(headings), f"{path.name} says to read {steps}; the chapter has {headings}"
    assert imports_of(path) <= imports_of(path.parent / "solutions" / path.name)


def check_nothing_returned(exercises: Exercises, number: int) -> None:
    """Who forgets a `return` reads what was wanted, whichever of the functions it is."""
    right = {name: of for name, of in vars(exercises.module_of(number, solutions=True)).items() if callable(of)}
    stub = vars(exercises.module_of(number))
    for name, of in right.items():
        if of.__module__.startswith(exercises.package) and name in stub and not isinstance(of, type):
            said = exercises.outcome(
                number, SimpleNamespace(**right | {name: _coroutine if iscoroutinefunction(of) else _nothing})
            )
            assert said.startswith("not yet: "), name
            assert "wanted " in said, (name, said)


def _nothing(*args) -> None:
    pass


async def _coroutine(*args) -> None:
    pass


def check_table(exercises: Exercises) -> None:
    """The table of the exercises' README says what the files say."""
    table = (exercises.folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| \[(.+?)\]\((.+?)\) \|(?: [\d, ]+ \|)? (\d+) min \| (.+) \|$", table, re.MULTILINE)
    assert [int(row[0]) for row in rows] == exercises.numbers
    for number, title, file, minutes, read in rows:
        text = (exercises.folder / file).read_text(encoding="utf-8")
        assert text.startswith(f'"""Exercise {number}: {title} ({minutes} minutes).\n\nRead  {read}\n'), file


def check_steps(exercises: Exercises, chapter: Path) -> None:
    """The table of the chapter's steps has a column `exercises`, in which every one is named."""
    lines = (chapter / "README.md").read_text(encoding="utf-8").splitlines()
    lines = dropwhile(lambda line: not re.search(r"\| exercises\b", line), lines)
    head, *rows = [
        [cell.strip() for cell in line.split("|")] for line in takewhile(lambda line: line[:1] == "|", lines)
    ]
    named = [cell for row in rows if row[1].isdigit() for cell in row[head.index("exercises")].split(",")]
    assert {int(number) for number in named if number.strip().isdigit()} == set(exercises.numbers)


def check_messages(exercises: Exercises) -> None:
    """No assertion without a message; where it is written by hand it says "got" and "wanted", as `expect` does."""
    for path in sorted((exercises.folder / "checks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                said = ast.unparse(node.msg) if node.msg else ""
                assert "got " in said, f"{path.name}, line {node.lineno}"
                assert "wanted " in said, f"{path.name}, line {node.lineno}"


def check_links(readme: Path) -> None:
    """To files, and to headings of its own."""
    written = readme.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", written)
    assert targets
    assert [target for target in targets if not (readme.parent / target).exists()] == []
    headings = re.findall(r"^##+ (.+)$", written, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", written)) <= anchors
