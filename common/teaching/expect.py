"""What a check says about a reader's function: what was got, and what was wanted.

A check calls the function with `ask` and compares with `expect`; both raise AssertionError with one line.
"""

import math
import reprlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from numbers import Number
from pathlib import Path
from types import ModuleType
from typing import Any

FEW = 14  # values of a list that are shown; of an argument that has more, the shape alone
MOST = 300  # characters of a value, of all arguments of a call, and of what an error says


class _Short(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        """Who has an id is called by it; what does not say what it holds is called by its name."""
        if hasattr(x, "rid"):
            return f"req {x.rid}"
        if callable(x) and hasattr(x, "__name__"):
            return x.__name__
        return type(x).__name__ if type(x).__repr__ is object.__repr__ else super().repr_instance(x, level)


_SHORT = _Short()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = _SHORT.maxdeque = FEW
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def expect(what: str, got: Any, want: Any) -> None:
    """Raises AssertionError, with `what` and both values, unless they are equal; arrays, tuples and lists are alike.

    True is not 1, and a float is no whole number: 12.0 counts nothing, and indexes no list.
    """
    plain = _plain(got)
    other_kind = isinstance(want, bool) != isinstance(plain, bool) or (
        isinstance(want, int) and isinstance(plain, float)
    )
    if plain != _plain(want) or other_kind:
        raise AssertionError(f"{what}: got {short(got)}, wanted {short(want)}")


def ask(function: Callable[..., Any], *args: Any, why: str = "", several: bool | int = False) -> Any:
    """function(*args); what it raises becomes an AssertionError: `why` it should not, what it was, for which arguments.

    several: what it returns is looked through and comes as a list, of so many values if that is a number; what cannot be
    looked through, None above all, is an AssertionError too.
    """
    said = _cut(", ".join(map(_argument, args)))  # before the call: it may change what it is given
    try:
        result = function(*args)
        if not several:
            return result
        found = list(result) if isinstance(result, Iterable) else None  # now, since a generator begins to run here
    except (NotImplementedError, AssertionError):
        raise
    except Exception as error:  # the reader's code may do anything
        raised = f"{type(error).__name__} ({_cut(' '.join(str(error).split()))}){_line_of(error, function)}"
        raise AssertionError(f"wanted {why or 'a result'}, got {raised} from {function.__name__}({said})") from error
    if found is None or (several is not True and len(found) != several):
        why = why or ("several values" if several is True else f"{several} values")
        raise AssertionError(f"wanted {why}, got {short(result)} from {function.__name__}({said})")
    return found


def short(value: Any) -> str:
    """One line, cut where it is long."""
    return _cut(_SHORT.repr(_plain(value, tuples=True)))


def _argument(value: Any) -> str:
    shape = getattr(value, "shape", ())
    return f"array {list(shape)}" if math.prod(shape) > FEW else short(value)


def _cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


def place_of(error: BaseException, module: ModuleType) -> str:
    """Where in the reader's file it was raised: " (line 12 of ex1_match_prefix.py)", or nothing."""
    file = getattr(module, "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (line {lines[-1]} of {Path(file).name})" if lines else ""


def _line_of(error: Exception, function: Callable) -> str:
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if code and frame.filename == code.co_filename]
    return f" in line {lines[-1]}" if lines else ""


def _plain(value: Any, tuples: bool = False, depth: int = 9) -> Any:
    """Arrays, tensors and ranges as lists, their numbers as Python's, tuples too unless they are to stay; the rest as it is.

    No deeper than `depth`: a tree may lead back to itself.
    """
    if depth == 0:
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple | range):
        made = [_plain(one, tuples, depth - 1) for one in value]
        return tuple(made) if tuples and type(value) is tuple else made
    if isinstance(value, Mapping):
        return {_plain_key(key): _plain(one, tuples, depth - 1) for key, one in value.items()}
    return value


def _plain_key(key: Any) -> Any:
    return key.item() if isinstance(key, Number) and hasattr(key, "item") else key
