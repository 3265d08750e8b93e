"""Recorded traffic: JSON lines, one request each, in the form of Mooncake's published traces (Qin et al. 2025):

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

A hash id stands for 512 prompt tokens and for everything before them: equal ids are equal prefixes up to there.
"""

import json
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

BLOCK = 512  # prompt tokens of a hash id
FORM = '{"timestamp": 0, "input_length": 700, "output_length": 20, "hash_ids": [1, 2]}'


@dataclass(frozen=True)
class TraceRequest:
    """timestamp: milliseconds. The lengths are tokens."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: str | Path) -> list[TraceRequest]:
    """In order of timestamp; requests of equal timestamp in the order of the file.

    Raises ValueError, with file and line, for a line that is no request of that form, and OSError for a missing file.
    """
    with open(path, "rb") as file:
        lines = tqdm(file, desc="read", unit="line", leave=False, disable=None)
        requests = list(_requests(path, lines))
    if not requests:
        raise ValueError(f"{path}: no request in it; expected lines like {FORM}")
    return sorted(requests, key=lambda request: request.timestamp)


def _requests(path: str | Path, lines: Iterable[bytes]) -> Iterable[TraceRequest]:
    """Of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8
            fields = None
        wrong = _what_is_wrong(fields)
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}; expected a line like {FORM}")
        yield TraceRequest(**{name: fields[name] for name in FIELDS})


def _what_is_wrong(fields: object) -> str | None:
    """In a few words, or None."""
    if not isinstance(fields, dict):
        return "not a JSON object"
    for name, (holds, form) in FIELDS.items():
        if name not in fields:
            return f"{name} is missing"
        if not holds(fields[name]):
            return f"{name}={reprlib.repr(fields[name])} is not {form}"
    return None


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")  # a bool is no number here


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # the tree compares int64


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "timestamp": (_is_time, "a number"),
    "input_length": (_is_whole, "a whole number of tokens"),
    "output_length": (_is_whole, "a whole number of tokens"),
    "hash_ids": (_are_ids, "a list of whole numbers from 0 to 2^63 - 1"),
}
