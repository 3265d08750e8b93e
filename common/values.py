"""What a user typed -> plain Python values, or one ValueError that names the field, the value and what it may be.

A number may come as NumPy's, as a torch scalar, as a Fraction: it becomes an int or a float here, so that nothing behind
this line meets another kind. A bool is no number: `top_k=True` is a slip, not a 1.
"""

import math
import re
from collections.abc import Mapping, Sequence, Set
from decimal import Decimal
from ipaddress import ip_address
from itertools import islice
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any

MAX_IDS = 1 << 20  # token ids in one list: more than any vocabulary has
MAX_INT = (1 << 31) - 1  # what a task's or a kernel's int32 holds
# RFC 1035's letters, digits and lengths; and _, which containers have in their names
HOST = re.compile(r"(?=.{1,253}\Z)([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?")


def shown(value: Any) -> str:
    """`value` in an error message: one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of 5,000 digits has no text, and other people's classes may do anything
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def whole(name: str, value: Any, least: float, most: float = MAX_INT, say: str = "") -> int:
    """An int from least to most; `say` is what the message adds."""
    try:
        number = _index(value)
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
        items = list(islice(value, size)) if size <= MAX_IDS else None
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
        ids = tuple(map(_index, items))
    except Exception:
        raise ValueError(f"{name}={shown(value)} must be {what}") from None
    for one in ids:
        if not 0 <= one <= MAX_INT:
            raise ValueError(f"{name}={shown(value)} must be {what}; {shown(one)} is none")
    return ids


def prompt_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """The token ids of a prompt, in a list or in an array or tensor of one dimension, all in 0..vocab_size - 1."""
    if dimensions(value) not in (None, 1):
        raise ValueError(f"{name} has the shape {list(value.shape)}; token ids are whole numbers in a row")
    if type(value) is list and set(map(type, value)) <= {int}:  # as mostly, and may be long
        ids = list(value)
    else:
        try:
            ids = list(map(_index, several(name, value, "") if dimensions(value) is None else value.tolist()))
        except Exception:
            raise ValueError(f"{name} is a text or token ids (whole numbers), not {shown(value)}") from None
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"token id {shown(bad)} is outside the vocabulary 0..{vocab_size - 1}")
    return ids


def walked(name: str, value: Any, what: str) -> list[Any]:
    """The items of whatever has them in an order, a generator too; a text is one value."""
    try:
        if isinstance(value, str | bytes | bytearray | Mapping | Set):
            raise TypeError
        items = list(islice(value, MAX_IDS + 1))
    except Exception:
        raise ValueError(f"{name}={shown(value)} must be {what}") from None
    if len(items) > MAX_IDS:
        raise ValueError(f"{name} has more than {MAX_IDS} items, or no end")
    return items


def dimensions(value: Any) -> int | None:
    """Of an array or a tensor; None for everything else."""
    try:
        found = getattr(value, "ndim", None)
    except Exception:  # other people's classes may do anything
        return None
    return found if isinstance(found, int) and callable(getattr(value, "tolist", None)) else None


def prompts(name: str, value: Any, what: str) -> tuple[list[Any], bool]:
    """Token ids, or several prompts -> (the prompts, whether it was a single one). Whoever holds nothing is one without tokens."""
    if dimensions(value) == 1:
        return [value], True
    items = walked(name, value, what)
    first = items[0] if items else None
    single = not (isinstance(first, Mapping | Sequence) or dimensions(first))
    return ([items], True) if single else (items, False)


def is_unicode(text: str) -> bool:
    """Not so if it holds half a surrogate pair, as a damaged JSON string may: no encoder takes it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def text(name: str, value: Any, *, empty: bool = True, none: bool = False) -> str | None:
    """A text of whole characters; with `none`, None passes too."""
    if value is None and none:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name}={shown(value)} must be a text{' or None' if none else ''}")
    if not value and not empty:
        raise ValueError(f"{name}: an empty text is none; leave it out")
    if not is_unicode(value):
        raise ValueError(f"{name} holds half a surrogate pair, which is no character: {shown(value)}")
    return str.__str__(value)  # of a type of its own, such as NumPy's


def texts(name: str, value: Any) -> tuple[str, ...]:
    """None, one text, or several -> a tuple; none of them empty."""
    given = () if value is None else (value,) if isinstance(value, str) else value
    return tuple(text(name, one, empty=False) for one in several(name, given, "one text or several"))


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={shown(value)} is unknown; use {', '.join(allowed[:-1])} or {allowed[-1]}")
    return value


def path(name: str, value: Any) -> str | Path | None:
    """A folder, a Hub id, or None."""
    return value if isinstance(value, Path) else text(name, value, empty=False, none=True)


def host_name(name: str, value: Any) -> str:
    """A host's name or its address, by its look: distributed/reach.py knows whether it is there."""
    try:
        right = isinstance(value, str) and bool(HOST.fullmatch(value) or ip_address(value))
    except ValueError:
        right = False
    if not right:
        raise ValueError(
            f"{name}={shown(value)} must be the name of a host or its address, as trainer.local or 10.0.0.2"
        )
    return value


def new_file(name: str, value: Any) -> str | Path | None:
    """A file that can be written, as far as one sees without writing; or None."""
    if value is None:
        return None
    try:
        there = "\0" not in str(value) and not Path(value).is_dir() and Path(value).absolute().parent.is_dir()
    except Exception:  # no text, too long, half a surrogate pair
        there = False
    if not there:
        raise ValueError(f"{name}={shown(value)} must be a file in a folder that exists")
    return value


def one_each(name: str, values: Any, n: int, kind: type, default: Any) -> list[Any]:
    """One value for all, or one for each of n prompts; None is the default."""
    if values is None or isinstance(values, kind):
        return [default if values is None else values] * n
    what = f"a {kind.__name__}, or one for each prompt"
    values = walked(name, values, what)
    if len(values) != n:
        raise ValueError(f"{len(values)} {name} for {n} prompts; give one for all or one for each")
    for one in values:
        if not isinstance(one, kind):
            raise ValueError(f"{name} holds {shown(one)}, which is no {kind.__name__}")
    return values


def _index(value: Any) -> int:
    if dimensions(value):  # index takes a tensor of one item
        raise TypeError
    return int(index(_plain(value)))  # index leaves an IntEnum what it is


def _plain(value: Any) -> Any:
    """A scalar of NumPy or torch as a Python number. Raises TypeError for bools."""
    plain = _plain_or_bool(value)
    if isinstance(plain, bool):
        raise TypeError
    return plain


def _plain_or_bool(value: Any) -> Any:
    return value.item() if dimensions(value) == 0 else value
