"""Which exercises of chapter 6 are started, and which are right?

    python -m ch06_tp_vllm.exercises.check [NUMBER] [--solutions]

Exit code 1 if one that was started is wrong.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from ch06_tp_vllm.exercises.checks import CHECKS

FOLDER = Path(__file__).parent


def module_of(number: int, solutions: bool = False) -> ModuleType:
    """The reader's file, or the solution."""
    (path,) = FOLDER.glob(f"ex{number}_*.py")
    where = f"{__package__}.solutions" if solutions else __package__
    return importlib.import_module(f"{where}.{path.stem}")


def outcome(number: int, module: ModuleType) -> str:
    """ "passed", "not started", or what is wrong."""
    try:
        CHECKS[number](module)
    except NotImplementedError:
        return "not started"
    except AssertionError as error:
        return f"not yet: {error}" if str(error) else "not yet: an example of the check fails"
    except Exception as error:  # the reader's code may do anything
        return f"not yet: {type(error).__name__}: {error}"
    return "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", choices=CHECKS, help="one exercise; default: all")
    parser.add_argument("--solutions", action="store_true", help="check the solutions instead")
    args = parser.parse_args()
    wrong = 0
    for number in [args.number] if args.number else CHECKS:
        module = module_of(number, args.solutions)
        said = outcome(number, module)
        wrong += said.startswith("not yet")
        print(f"{module.__name__.rpartition('.')[2]:26s} {said}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
