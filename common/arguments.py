"""Arguments by name: what asks for nothing passes, what is not here is refused in a line that helps.

Scripts for vLLM and SGLang give an engine more names than it has. This imports nothing that brings torch: a wrong flag of a
command is told at once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from common.values import shown

MANY_NAMES = 10  # more are no help in an error
MANY_WRONG = 2  # of each kind: who has more begins with these
PLAIN = (bool, int, float, str, dict, list)  # what a default may be
F = TypeVar("F", bound=Callable)


def without_idle(given: Mapping[str, Any], idle: Mapping[str, Any]) -> dict[str, Any]:
    """`given` less those names of `idle` whose value asks for nothing: None, or the default that stands there.

    Scripts for vLLM and SGLang spell defaults out (pipeline_parallel_size=1, quantization=None), and an engine without
    pipelines does what they ask for.
    """
    return {name: value for name, value in given.items() if not (name in idle and _asks_nothing(value, idle[name]))}


def _asks_nothing(value: Any, default: Any) -> bool:
    return value is None or (
        type(value) in PLAIN and value == default and (type(value) is bool) == (type(default) is bool)
    )


def refuse_unknown(
    what: str, given: Iterable[str], known: Sequence[str], elsewhere: Mapping[str, str] | None = None, where: str = ""
) -> None:
    """Raises ValueError for names that nobody here would read; `elsewhere` says what to use instead of some, `where` has all."""
    wrong, elsewhere = sorted(set(map(str, given)) - set(known)), elsewhere or {}
    if not wrong:
        return
    absent, unknown = [[name for name in wrong if (name in elsewhere) == there][:MANY_WRONG] for there in (True, False)]
    said = [f"{what} {name} is not here: {elsewhere[name]}" for name in absent]
    if unknown:
        names = ", ".join(one if one.isidentifier() and len(one) < 60 else shown(one) for one in unknown)
        near = dict.fromkeys(close for name in unknown for close in get_close_matches(name, known, 3))
        if len(known) <= MANY_NAMES:
            way_out = f"known: {', '.join(sorted(known))}"
        elif near:
            way_out = f"did you mean {' or '.join(near)}?"
        else:
            way_out = where or f"there are {len(known)}, and none is like it"
        said.append(f"unknown {what} {names}; {way_out}")
    raise ValueError("; ".join(said))


def says_names(what: str, elsewhere: Mapping[str, str], idle: Mapping[str, Any]) -> Callable[[F], F]:
    """Of a method, or of a class for its constructor: leaves out what asks for nothing, and refuses a name that it has not
    in a line that helps, where Python would raise a TypeError that does not."""

    def decorate(made: F) -> F:
        if isinstance(made, type):
            made.__init__ = decorate(made.__init__)
            return made
        known = list(signature(made).parameters)[1:]  # without self
        where = f"help({made.__qualname__.removesuffix('.__init__')}) has them all"

        @wraps(made)
        def call(self, *args, **given):
            given = without_idle(given, idle)
            refuse_unknown(what, given, known, elsewhere, where)
            return made(self, *args, **given)

        return call

    return decorate
