"""JSON that somebody else wrote: read within bounds, and shown in one line when it is wrong."""

import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 4 << 20  # a config.json has a few KB; nested lists take 20 times their text in memory


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises FileNotFoundError if there is no such file, ValueError for anything but one object in UTF-8 of at most
    `max_bytes` whose keys stand once: of two values, JSON does not say which one counts.
    """
    try:
        if not path.is_file():  # a named pipe would wait for ever
            there = os.path.lexists(path)
            raise FileNotFoundError(f"{path} is {'not a file' if there else 'missing'}")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None
    if len(data) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes} bytes, far too many for what it should hold")
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON that anybody needs: nested too deeply") from None
    except KeyTwiceError as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not an object")
    return raw


class KeyTwiceError(ValueError):
    pass


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique and unique[key] != value:
            raise KeyTwiceError(
                f"{json_shown(key)} stands twice, as {json_shown(unique[key])} and as {json_shown(value)}"
            )
        unique[key] = value
    return unique


class _OneLine(reprlib.Repr):
    """Python's repr, but for the words of JSON; looks at no more of a value than it shows."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxlist, self.maxdict = 2, 60, 40, 4, 4

    def repr_bool(self, x, level):
        return "true" if x else "false"

    def repr_NoneType(self, x, level):
        return "null"


_one_line = _OneLine().repr


def json_shown(value: Any) -> str:
    """Any JSON value, of any size and depth, in JSON's words (null, true) and one line of at most 200 characters."""
    text = _one_line(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def name_shown(name: str) -> str:
    """A name from a file as it is if it is an ordinary one, else as `json_shown` writes it: nothing breaks the line."""
    return name if name.isprintable() and 0 < len(name) <= 200 else json_shown(name)


def names_shown(names: Iterable[str], most: int = 8) -> str:
    """The first few names, separated by commas."""
    names = list(names)
    return ", ".join(map(name_shown, names[:most])) + (", ..." if len(names) > most else "")
