"""What may stand under a key of a JSON file: kinds of fields, and the one reader of all of them.

schema.py says which keys an architecture has, vision.py which a vision tower has.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.models.json_file import json_shown

REQUIRED = object()  # no default: without this key there is no model


@dataclass(frozen=True)
class Field:
    """One key: which values fit, the rule in words for the error, and its value if the file does not have the key."""

    fits: Callable[[Any], bool]
    rule: str  # reads on after "key=value"
    default: Any = REQUIRED
    older: str | None = None  # an older spelling of the key; `key` wins if both have a value
    alike: tuple[str, ...] = ()  # other spellings of it, refused unless all that are there have the same value


def read_fields(raw: dict[str, Any], fields: dict[str, Field], where: str, what: str) -> dict[str, Any]:
    """{key: value} of every field, given or by default.

    Raises ValueError: `where`, the key, its value and what is allowed; or all keys that `what` needs and has not.
    """
    values = {}
    for key, field in fields.items():
        name, value = key, raw.get(key, REQUIRED)
        if field.older and raw.get(key) is None and raw.get(field.older) is not None:
            name, value = field.older, raw[field.older]
        for other in field.alike:
            if other in raw and value is REQUIRED:
                name, value = other, raw[other]
            elif other in raw and raw[other] != value:
                raise ValueError(
                    f"{where}: {name}={json_shown(value)} and {other}={json_shown(raw[other])} are two names of one size; "
                    f"they must agree"
                )
        if value is not REQUIRED and not field.fits(value):
            raise ValueError(f"{where}: {name}={json_shown(value)} {field.rule}")
        values[key] = field.default if value is REQUIRED else value
    missing = [key for key, value in values.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"{where}: {what} needs {', '.join(missing)}")
    return values


# --- kinds of fields


def integer(
    default: Any = REQUIRED, low: int = 1, high: float = math.inf, null: bool = False, alike: tuple[str, ...] = ()
) -> Field:
    def fits(x):
        return (null and x is None) or (type(x) is int and low <= x <= high)  # isinstance would take a bool for one

    return Field(fits, f"must be an integer of at least {low}{_at_most(high)}{_or_null(null)}", default, alike=alike)


def number(
    default: Any = REQUIRED,
    low: float | None = None,
    above: float | None = None,
    high: float = 1e300,
    null: bool = False,
) -> Field:
    """From `low`, or more than `above`, to `high`; never NaN, infinite, or an integer that no float can hold."""
    floor, word = (low, "of at least") if above is None else (above, "above")

    def fits(x):
        if type(x) not in (int, float):
            return null and x is None
        return (floor is None or x > floor or (x == floor and above is None)) and -1e300 <= x <= high

    bound = "that is finite" if floor is None else f"{word} {floor:g}"
    return Field(fits, f"must be a number {bound}{_at_most(high)}{_or_null(null)}", default)


def boolean(default: Any = REQUIRED) -> Field:
    return Field(lambda x: type(x) is bool, "must be true or false", default)


def texts(default: Any = REQUIRED) -> Field:
    return Field(
        lambda x: x is None or (isinstance(x, list) and all(isinstance(item, str) for item in x)),
        "must be a list of texts, or null", default,
    )  # fmt: skip


def token_ids(default: Any = REQUIRED) -> Field:
    return Field(
        lambda x: x is None or type(x) is int or (isinstance(x, list) and all(type(item) is int for item in x)),
        "must be a token id, a list of token ids, or null", default,
    )  # fmt: skip


def layer_numbers(default: tuple[int, ...] | None = None) -> Field:
    return Field(
        lambda x: x is None or (isinstance(x, list) and all(type(item) is int for item in x)),
        "must be a list of numbers of layers, or null", default,
    )  # fmt: skip


def numbers(default: tuple[float, ...]) -> Field:
    """As many as the default has, none of them 0, NaN or infinite."""

    def fits(x):
        return (
            isinstance(x, list | tuple)
            and len(x) == len(default)
            and all(type(n) in (int, float) and 0 < abs(n) < 1e6 for n in x)
        )

    return Field(fits, f"must be a list of {len(default)} numbers other than 0", default)


def pair(default: Any = REQUIRED) -> Field:
    def fits(x):
        return x is None or (isinstance(x, list) and len(x) == 2 and all(type(n) is int and n > 0 for n in x))

    return Field(fits, "must be a list of two integers of at least 1, or null", default)


def json_object() -> Field:
    return Field(lambda x: x is None or isinstance(x, dict), "must be an object, or null", None)


def one_of(*values: Any, default: Any, older: str | None = None) -> Field:
    """The values whose meaning is known here. Any other would change the numbers if it were passed over."""
    allowed = ", ".join(x if isinstance(x, str) else json_shown(x) for x in values)
    # True == 1 in Python, but not in a config
    fits = lambda x: any(x == y and isinstance(x, bool) == isinstance(y, bool) for y in values)  # noqa: E731
    return Field(fits, f"is not supported; supported: {allowed}", default, older)


def empty(rule: str) -> Field:
    """Missing, null, or an empty object."""
    return Field(lambda x: not x, rule, None)


def _at_most(high: float) -> str:
    return f" and at most {high if isinstance(high, int) else format(high, 'g')}" if high < 1e300 else ""


def _or_null(null: bool) -> str:
    return ", or null" if null else ""
