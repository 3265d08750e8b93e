"""The checker of a chapter's exercises: which are started, and which are right?

A folder of exercises has files ex<NUMBER>_<name>.py with stubs that raise NotImplementedError, solutions/ with files
of the same names, and a dict CHECKS {number: check}. A check takes the module of an exercise and raises
AssertionError with the reason if an answer is wrong.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType


class Exercises:
    """The exercises in `package`, "chapter.exercises"."""

    def __init__(self, package: str, checks: Mapping[int, Callable[[ModuleType], None]]):
        self.package, self.checks = package, checks

    def module_of(self, number: int, solutions: bool = False) -> ModuleType:
        """The reader's file, or the solution."""
        folder = Path(importlib.import_module(self.package).__file__).parent
        (path,) = folder.glob(f"ex{number}_*.py")
        where = f"{self.package}.solutions" if solutions else self.package
        return importlib.import_module(f"{where}.{path.stem}")

    def outcome(self, number: int, module: ModuleType) -> str:
        """ "passed", "not started", or what is wrong; an exercise of several functions is started with the first of them."""
        stubs = [name for name, of in vars(module).items() if _is_stub(of)]
        if stubs and any(_is_written(of, module) for of in vars(module).values()):
            return f"not yet: {', '.join(stubs)} still to be written"
        try:
            self.checks[number](module)
        except NotImplementedError:
            return "not started"
        except AssertionError as error:
            return f"not yet: {error}" if str(error) else "not yet: an example of the check fails"
        except Exception as error:  # the reader's code may do anything
            return f"not yet: {type(error).__name__}: {error}"
        return "passed"

    def main(self, description: str) -> None:
        """The command line of a chapter's check.py; exit code 1 if an exercise that was started is wrong."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("number", type=int, nargs="?", choices=self.checks, help="one exercise; default: all")
        parser.add_argument("--solutions", action="store_true", help="check the solutions instead")
        args = parser.parse_args()
        wrong = 0
        for number in [args.number] if args.number else self.checks:
            module = self.module_of(number, args.solutions)
            said = self.outcome(number, module)
            wrong += said.startswith("not yet")
            print(f"{module.__name__.rpartition('.')[2]:26s} {said}")
        sys.exit(1 if wrong else 0)


def _is_stub(value: object) -> bool:
    return isinstance(value, FunctionType) and "NotImplementedError" in value.__code__.co_names


def _is_written(value: object, module: ModuleType) -> bool:
    """A function of the reader's own."""
    here = isinstance(value, FunctionType) and value.__module__ == getattr(module, "__name__", None)
    return here and not _is_stub(value)
