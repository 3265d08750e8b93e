"""What a check says about a reader's function: what was got, and what was wanted.

A check calls the function with `ask` and compares with `expect`; both raise AssertionError with one line.
"""

import reprlib
import traceback
from collections.abc import Callable, Mapping
from numbers import Number
from pathlib import Path
from types import ModuleType
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = _SHORT.maxdeque = 14
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


def ask(function: Callable[..., Any], *args: Any, why: str = "") -> Any:
    """function(*args); what it raises becomes an AssertionError that says for which arguments, and `why` it should not."""
    said = f"{function.__name__}({', '.join(map(short, args))})"  # before the call: it may change what it is given
    try:
        return function(*args)
    except (NotImplementedError, AssertionError):
        raise
    except Exception as error:  # the reader's code may do anything
        raised = f"got {type(error).__name__} ({error}) from {said}{_line_of(error, function)}"
        raise AssertionError(f"{raised}, wanted {why or 'a result'}") from error


def short(value: Any) -> str:
    """One line, cut where it is long."""
    return _SHORT.repr(_plain(value, tuples=True))


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
