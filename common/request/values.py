"""User values -> right values, or one ValueError that names what was given, what is allowed and the way out.

Python says yes to much that an engine must not: True is an int, 4.7 can be cut to 4, a text is a sequence. What passes here is
a plain Python value of the one kind that the code behind expects.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

SHOWN = 80  # characters of a value in an error


def shown(value: Any) -> str:
    """A value as an error line shows it: short, and on one line whatever its repr does."""
    try:
        text = repr(value)
    except Exception:  # a class of the user's own
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def whole(
    name: str, value: Any, least: int | None = None, most: int | None = None, *, none: bool = False
) -> int | None:
    """A whole number in least..most (NumPy's and torch's count as such, bools do not); with `none`, None passes too."""
    if value is None and none:
        return None
    allowed = " or None" if none else ""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={shown(value)} must be a whole number{allowed}")
    try:
        number = value.__index__()
    except TypeError:  # a tensor of several numbers
        raise ValueError(f"{name}={shown(value)} must be one whole number{allowed}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}={shown(number)} must be a whole number, at least {least}{allowed}")
    if most is not None and number > most:
        raise ValueError(f"{name}={shown(number)} must be a whole number, at most {most}{allowed}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one: "no" would switch it on."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False")
    return value


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
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """None, one text, or several -> a tuple; none of them empty."""
    given = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple | set | frozenset):
        raise ValueError(f"{name}={shown(value)} must be one text or several")
    return tuple(text(name, one, empty=False) for one in given)


def token_ids(name: str, value: Any, vocab_size: int | None = None) -> list[int]:
    """Whole numbers in a sequence, or in a one-dimensional array or tensor; in 0..vocab_size-1 if that is given."""
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={shown(value)} must be token ids, whole numbers in a list")
    dimensions = getattr(value, "ndim", 1)
    if dimensions != 1:
        raise ValueError(
            f"{name} has {dimensions} dimensions, {list(value.shape)}; token ids are a list of whole numbers"
        )
    if hasattr(value, "tolist"):  # NumPy, torch: numbers of one kind, turned at one go
        value = value.tolist()
    ids = list(value)
    if not all(type(one) is int for one in ids):
        for one in ids:
            if isinstance(one, bool) or not isinstance(one, Integral):
                raise ValueError(f"{name} holds {shown(one)}, which is no token id: a whole number")
        ids = [int(one) for one in ids]
    if ids and vocab_size is not None and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"token id {shown(bad)} is outside the vocabulary 0..{vocab_size - 1}")
    return ids


def is_token_list(value: Any) -> bool:
    """One list of ids, and not a list of prompts: empty, an array of one dimension, or beginning with a number."""
    if hasattr(value, "ndim"):
        return value.ndim <= 1
    return isinstance(value, Sequence) and not isinstance(value, str) and (len(value) == 0 or not _is_prompt(value[0]))


def _is_prompt(value: Any) -> bool:
    if hasattr(value, "ndim"):
        return value.ndim > 0
    return isinstance(value, dict | Sequence)


def one_each(name: str, values: Any, n: int, kind: type, default: Any) -> list[Any]:
    """One value for all, or one for each of n prompts; None is the default."""
    if values is None or isinstance(values, kind):
        return [default if values is None else values] * n
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={shown(values)} must be a {kind.__name__}, or one for each prompt")
    values = list(values)
    if len(values) != n:
        raise ValueError(f"{len(values)} {name} for {n} prompts; give one for all or one for each")
    for one in values:
        if one is not None and not isinstance(one, kind):
            raise ValueError(f"{name} holds {shown(one)}, which is no {kind.__name__}")
    return [default if one is None else one for one in values]
