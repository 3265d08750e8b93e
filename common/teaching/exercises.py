"""The checker of a chapter's exercises: which are started, and which are right?

A folder of exercises has files ex<NUMBER>_<name>.py with stubs that raise NotImplementedError, and files of the same
names in solutions/ and in checks/. `check(m)` of the latter takes the module of an exercise and raises AssertionError with the
reason if an answer is wrong. Each runs in a process of its own (apart.py), with a time limit.
"""

import argparse
import ast
import importlib
import re
import sys
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType

from common.teaching.apart import WORKER, run_apart, work
from common.teaching.expect import place_of

SECONDS = 60  # for one check; all of them take a few


class Exercises:
    """The exercises in `package`, "chapter.exercises"."""

    def __init__(self, package: str):
        self.package = package
        self.folder = Path(importlib.import_module(package).__file__).parent

    @cached_property
    def numbers(self) -> list[int]:
        return sorted(int(re.match(r"ex(\d+)_", path.name).group(1)) for path in self.folder.glob("ex*.py"))

    def name_of(self, number: int) -> str:
        (path,) = self.folder.glob(f"ex{number}_*.py")
        return path.stem

    def module_of(self, number: int, solutions: bool = False) -> ModuleType:
        """The reader's file, or the solution."""
        where = f"{self.package}.solutions" if solutions else self.package
        return importlib.import_module(f"{where}.{self.name_of(number)}")

    def outcome(self, number: int, module: ModuleType) -> str:
        """ "passed", "not started", or what is wrong; an exercise of several functions is started with the first of them."""
        stubs = [name for name, of in vars(module).items() if _is_stub(of)]
        if stubs and any(_is_written(of, module) for of in vars(module).values()):
            return f"not yet: {', '.join(stubs)} still to be written"
        if borrowed := self._borrowed(number, module):
            return f"not yet: {borrowed} is taken from the product; write it from the contract"
        try:
            importlib.import_module(f"{self.package}.checks.{self.name_of(number)}").check(module)
        except NotImplementedError:
            return "not started"
        except AssertionError as error:
            return f"not yet: {error}"
        except Exception as error:  # the reader's code may do anything
            return f"not yet: got {type(error).__name__}: {error}{place_of(error, module)}"
        return "passed"

    def _borrowed(self, number: int, module: ModuleType) -> str:
        """What the reader's file imports from this repository and the solution does without, or nothing."""
        file = getattr(module, "__file__", None)
        if file is None:
            return ""
        needed = imports_of(self.folder / "solutions" / f"{self.name_of(number)}.py")
        return ", ".join(sorted(imports_of(Path(file)) - needed))

    def main(self, description: str) -> None:
        """The command line of a chapter's check.py; exit code 1 if an exercise that was started is wrong."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("number", type=int, nargs="?", choices=self.numbers, help="one exercise; default: all")
        parser.add_argument("--solutions", action="store_true", help="check the solutions instead")
        parser.add_argument(WORKER, nargs=2, help=argparse.SUPPRESS)
        args = parser.parse_args()
        numbers = [args.number] if args.number else self.numbers
        if args.worker:
            jobs = [lambda n=n: self.outcome(n, self.module_of(n, args.solutions)) for n in numbers]
            work(Path(args.worker[0]), int(args.worker[1]), jobs)
            return
        command = ["-m", f"{self.package}.check", *map(str, numbers[: 1 if args.number else 0])]
        command += ["--solutions"] if args.solutions else []
        wrong = 0
        for number, result in zip(numbers, run_apart(command, [SECONDS] * len(numbers)), strict=True):
            said = result.get("value") or f"not yet: got {result['error']}"
            wrong += said.startswith("not yet")
            print(f"{self.name_of(number):26s} {said}", flush=True)
        sys.exit(1 if wrong else 0)


def imports_of(file: Path) -> set[str]:
    """What a file takes from this repository: "module.name" of each."""
    ours, found = re.compile(r"(common|ch\d\d_\w+)(\.|$)"), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and ours.match(node.module):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if ours.match(alias.name)}
    return found


def _is_stub(value: object) -> bool:
    return isinstance(value, FunctionType) and "NotImplementedError" in value.__code__.co_names


def _is_written(value: object, module: ModuleType) -> bool:
    """A function of the reader's own."""
    here = isinstance(value, FunctionType) and value.__module__ == getattr(module, "__name__", None)
    return here and not _is_stub(value)
