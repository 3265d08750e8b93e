"""The grader of a project: a reader's file, judged part by part, and a score card.

A project is a folder's file NAME.py (the reader's; it starts as a contract with stubs), solutions/NAME.py, and parts. A part takes
the reader's module and returns what it found, or (share of its points, what it found); AssertionError says what is
wrong. A part without points is a measurement: it depends on the machine, so it is not in the score, but it must be good
enough for the project to be done. Everything runs in a process of its own (apart.py): a file that raises, hangs, ends the
process or returns nonsense costs its points and nothing else.
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from common.teaching.apart import WORKER, run_apart, work
from common.teaching.expect import place_of

GIVE_UP = 3  # parts that hang: the others would too
LOAD = 60.0  # seconds the reader's file may take to be imported

Found = str | tuple[float, str]


@dataclass(frozen=True)
class Part:
    name: str
    points: int
    judge: Callable[[ModuleType], Found]
    seconds: float = 60.0


@dataclass(frozen=True)
class Project:
    name: str
    title: str
    folder: Path
    parts: Sequence[Part]

    def file(self, solution: bool = False) -> Path:
        return self.folder / ("solutions" if solution else "") / f"{self.name}.py"


@dataclass
class Card:
    """What came out; `measured` is false if a measurement was not good enough."""

    points: float = 0.0
    measured: bool = True


def main(projects: Sequence[Project], module: str, description: str) -> None:
    """The command line of a chapter's grade.py; exit code 0 if the project is done."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", choices=[project.name for project in projects])
    parser.add_argument("--solution", action="store_true", help="grade the solution instead")
    parser.add_argument("--file", type=Path, help="grade this file instead")
    parser.add_argument(
        "--part", type=int, metavar="N", help="the N-th part alone, in this process: errors with their traceback"
    )
    parser.add_argument(WORKER, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    (project,) = [project for project in projects if project.name == args.project]
    file = (args.file or project.file(args.solution)).resolve()
    if not file.is_file():
        raise SystemExit(f"{file} is not there; give a Python file, or leave --file out")
    if args.worker:
        work(Path(args.worker[0]), int(args.worker[1]), _jobs(project, file))
        return
    if args.part is not None:
        if not 1 <= args.part <= len(project.parts):
            raise SystemExit(f"--part {args.part}: this project has the parts 1 to {len(project.parts)}")
        print(project.parts[args.part - 1].judge(load(file)))
        return
    print(f"{project.title}\n{file}\n")
    card = grade(project, file, ["-m", module, project.name, "--file", str(file)])
    total = sum(part.points for part in project.parts)
    print(f"\n{card.points:g} of {total} points{'' if card.measured else '; the measurement falls short'}")
    sys.exit(0 if card.measured and card.points == total else 1)


def grade(project: Project, file: Path, command: Sequence[str]) -> Card:
    """Print a line a part as it is judged. `command` starts this again, as a worker."""
    card, hung, stubs = Card(), 0, stubs_of(file)
    if isinstance(stubs, str):
        return _nothing(stubs)
    if stubs and not written_in(file):
        return _nothing(f"not started: {', '.join(stubs)} still to be written")
    if stubs:
        print(f"still to be written: {', '.join(stubs)}")
    results = run_apart(command, [LOAD, *(part.seconds for part in project.parts)])
    loaded = next(results)
    if "error" in loaded:
        results.close()
        return _nothing(f"the file cannot be imported: {loaded['error']}")
    for number, (part, result) in enumerate(zip(project.parts, results, strict=True), 1):
        share, said = result["value"] if "value" in result else (0.0, result["error"])
        _print_line(number, part, share, said)
        card.points += round(part.points * share, 1)
        card.measured &= bool(part.points) or share == 1
        hung += said.startswith("still busy")
        if hung == GIVE_UP:
            print(f"    {GIVE_UP} parts did not come to an end: the rest is not tried")
            card.measured = False
            break
    results.close()
    return card


def _nothing(why: str) -> Card:
    print(f"    {why}")
    return Card()


def _print_line(number: int, part: Part, share: float, said: str) -> None:
    points = (
        f"{round(part.points * share, 1):4g} of {part.points:2d}"
        if part.points
        else f"{'ok' if share == 1 else 'no':>10s}"
    )
    print(f"{number:3d}  {points}  {part.name}: {said}", flush=True)


def _jobs(project: Project, file: Path) -> list[Callable[[], tuple[float, str] | None]]:
    modules: list[ModuleType] = []

    def first() -> None:
        modules.append(load(file))

    def judge(part: Part) -> tuple[float, str]:
        if not modules:  # a process that was started anew behind a part which hung
            first()
        return _judge(part, modules[0])

    return [first, *(lambda part=part: judge(part) for part in project.parts)]


def _judge(part: Part, module: ModuleType) -> tuple[float, str]:
    try:
        found = part.judge(module)
    except NotImplementedError as error:
        return 0.0, f"not written yet{place_of(error, module)}"
    except AssertionError as error:
        return 0.0, f"{_line(error)}{place_of(error, module)}"
    except Exception as error:  # the reader's code may do anything
        return 0.0, f"{type(error).__name__}: {_line(error)}{place_of(error, module)}"
    return (1.0, found) if isinstance(found, str) else found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def load(file: Path) -> ModuleType:
    """The reader's file as a module, wherever it lies; not from compiled bytes, which Python takes for those of a file that has
    as many characters and was changed in the same second."""
    spec = importlib.util.spec_from_file_location(f"project_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    return module


def stubs_of(file: Path) -> list[str] | str:
    """Functions whose body is `raise NotImplementedError`, "Class.method"; a text if the file is no Python."""
    tree = _parsed(file)
    return tree if isinstance(tree, str) else [name for name, stub in _functions(tree) if stub]


def written_in(file: Path) -> list[str]:
    """Functions of the file that are not stubs."""
    return [name for name, stub in _functions(_parsed(file)) if not stub]


def _parsed(file: Path) -> ast.Module | str:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        return f"the file is no Python: {error.msg} (line {error.lineno})"
    except ValueError as error:  # bytes that are no text, or null bytes
        return f"the file is no Python: {error}"


def _functions(tree: ast.Module) -> list[tuple[str, bool]]:
    found = []
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inside:
            if isinstance(function, ast.FunctionDef):
                last = function.body[-1]
                stub = (
                    isinstance(last, ast.Raise)
                    and last.exc is not None
                    and "NotImplementedError" in ast.unparse(last.exc)
                )
                found.append((prefix + function.name, stub))
    return found
