"""What a user typed -> plain Python values, or one ValueError that names the field, the value and what it may be.

A number may come as NumPy's, as a torch scalar, as a Fraction: it becomes an int or a float here, so that nothing behind
this line meets another kind. A bool is no number: `top_k=True` is a slip, not a 1.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from operator import index
from typing import Any

MAX_IDS = 1 << 20  # token ids in one list: more than any vocabulary has
MAX_INT = (1 << 31) - 1  # what a task's or a kernel's int32 holds


def shown(value: Any) -> str:
    """`value` in an error message: one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of 5,000 digits has no text, and other people's classes may do anything
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def whole(name: str, value: Any, least: int, most: int = MAX_INT, say: str = "") -> int:
    """An int from least to most; `say` is what the message adds."""
    try:
        number = index(_plain(value))
    except Exception:
        raise ValueError(f"{name}={shown(value)} must be a whole number{say}") from None
    if number < least:
        raise ValueError(f"{name}={shown(value)} must be at least {least}{say}")
    if number > most:
        raise ValueError(f"{name}={shown(value)} must be at most {most}{say}")
    return number


def real(name: str, value: Any, least: float, most: float, say: str = "", open_below: bool = False) -> float:
    """A float from least to most (without least itself: `open_below`)."""
    try:
        plain = _plain(value)
        if not isinstance(plain, Real | Decimal):
            raise TypeError
    except Exception:
        raise ValueError(f"{name}={shown(value)} must be a number{say}") from None
    try:
        number = float(plain)
    except OverflowError:  # 10**400
        number = math.inf if plain > 0 else -math.inf
    except Exception:  # Decimal("sNaN")
        number = math.nan
    if not (least < number <= most if open_below else least <= number <= most):
        raise ValueError(f"{name}={shown(value)} must be in {'(' if open_below else '['}{least:g}, {most:g}]{say}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False; "no" and 0 are neither."""
    try:
        plain = _plain_or_bool(value)
    except Exception:
        plain = None
    if not isinstance(plain, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False")
    return plain


def several(name: str, value: Any, what: str) -> list[Any]:
    """The items of a list, tuple, set, range, NumPy array or tensor; a text is one value, and a generator may not end."""
    try:
        if isinstance(value, str | bytes | bytearray | Mapping):
            raise TypeError
        size = len(value)
        items = list(value) if size <= MAX_IDS else None
    except Exception:
        raise ValueError(f"{name}={shown(value)} must be {what}") from None
    if items is None:
        raise ValueError(f"{name} has {size} items, and may have {MAX_IDS}")
    return items


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Several token ids -> tuple. How large the vocabulary is, is not known here."""
    what = "token ids, whole numbers from 0"
    items = several(name, value, what)
    try:
        ids = tuple(index(_plain(one)) for one in items)
    except Exception:
        raise ValueError(f"{name}={shown(value)} must be {what}") from None
    for one in ids:
        if not 0 <= one <= MAX_INT:
            raise ValueError(f"{name}={shown(value)} must be {what}; {shown(one)} is none")
    return ids


def _plain(value: Any) -> Any:
    """A scalar of NumPy or torch as a Python number. Raises TypeError for bools."""
    plain = _plain_or_bool(value)
    if isinstance(plain, bool):
        raise TypeError
    return plain


def _plain_or_bool(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
