"""Values that a user, a JSON body or somebody else's class may put where a number, a text or token ids belong.

`NASTY` has a maker for each, since some of them can be read only once. `some_value(rng)` makes up another.
"""

import array
import datetime
import enum
import itertools
import random
import types
from collections import OrderedDict, UserDict, UserList, UserString, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ch06_tp_vllm.sampling_params import SamplingParams as VLLMParams
from common.sampling.params import SamplingParams


class Number(enum.IntEnum):
    THREE = 3


class Text(str):
    """A text with a type of its own, as some libraries have."""


class Raises:
    """Whatever is asked of it."""

    def _raise(self, *args):
        raise RuntimeError("no,\nnever")

    __repr__ = __len__ = __iter__ = __index__ = __float__ = __eq__ = __bool__ = __getattr__ = _raise
    __hash__ = None


class Endless(list):
    """Says that it is short."""

    def __len__(self):
        return 2

    def __iter__(self):
        return itertools.count()


class Liar:
    """A sequence that has fewer items than it says."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        raise IndexError(i)


class OneOfMany:
    """As an array of one dimension, with a method that is none."""

    ndim, shape = 1, (3,)
    tolist = item = None

    def __len__(self):
        return 3


def _cycle() -> list:
    found: list = [1, 2]
    found.append(found)
    return found


def _deep() -> list:
    found: list = [1]
    for _ in range(5000):
        found = [found]
    return found


NASTY: dict[str, Callable[[], Any]] = {
    # nothing, and what is nearly a number
    "None": lambda: None, "True": lambda: True, "False": lambda: False, "0": lambda: 0, "1": lambda: 1, "-1": lambda: -1,
    "2": lambda: 2, "-2": lambda: -2, "7": lambda: 7, "40": lambda: 40, "10**6": lambda: 10**6, "2**31": lambda: 1 << 31,
    "2**31-1": lambda: (1 << 31) - 1, "-2**31": lambda: -(1 << 31), "2**63": lambda: 1 << 63, "2**64": lambda: 1 << 64,
    "10**400": lambda: 10**400, "-10**400": lambda: -(10**400), "10**5000": lambda: 10**5000,
    "0.0": lambda: 0.0, "-0.0": lambda: -0.0, "1.0": lambda: 1.0, "0.5": lambda: 0.5, "4.7": lambda: 4.7,
    "-0.3": lambda: -0.3, "1e-39": lambda: 1e-39, "5e-324": lambda: 5e-324, "1e308": lambda: 1e308,
    "inf": lambda: float("inf"), "-inf": lambda: float("-inf"), "nan": lambda: float("nan"), "1j": lambda: 1j,
    "Decimal": lambda: Decimal("0.7"), "Decimal nan": lambda: Decimal("sNaN"), "Decimal large": lambda: Decimal("1e999999"),
    "Fraction": lambda: Fraction(1, 3), "Fraction large": lambda: Fraction(10**500, 3), "IntEnum": lambda: Number.THREE,
    "np.int64": lambda: np.int64(5), "np.uint8": lambda: np.uint8(200), "np.float32": lambda: np.float32(0.5),
    "np.float64 nan": lambda: np.float64("nan"), "np.bool": lambda: np.bool_(True), "np.str": lambda: np.str_("a"),
    "np.datetime64": lambda: np.datetime64("2026-01-01"), "np 0-d": lambda: np.array(3), "np 0-d text": lambda: np.array("a"),
    "torch int": lambda: torch.tensor(3), "torch float": lambda: torch.tensor(0.5), "torch bool": lambda: torch.tensor(True),
    "torch grad": lambda: torch.tensor(0.5, requires_grad=True), "torch meta": lambda: torch.empty((), device="meta"),
    # texts
    "''": lambda: "", "' '": lambda: " ", "a": lambda: "a", "digits": lambda: "45", "number": lambda: "0.5",
    "yes": lambda: "yes", "long": lambda: "word " * 4000, "newlines": lambda: "a\nb\r\n\u2028c", "zero": lambda: "\x00",
    "surrogate": lambda: "a\ud800", "low surrogate": lambda: "\udc00", "emoji": lambda: "👩‍👩‍👧‍👦",
    "chinese": lambda: "什么是分页？",
    "rtl": lambda: "\u202eabc", "replacement": lambda: "\ufffd", "special": lambda: "<|im_end|>", "open bracket": lambda: "(",
    "empty pattern": lambda: "a*", "bad repeat": lambda: "(?P<a>x)(?P<a>y)", "explodes": lambda: "(a|a)*b" * 3,
    "own str": lambda: Text("a"), "UserString": lambda: UserString("a"), "bytes": lambda: b"abc",
    "bytearray": lambda: bytearray(b"abc"), "memoryview": lambda: memoryview(b"abc"), "path": lambda: Path("a"),
    # several
    "[]": lambda: [], "()": lambda: (), "{}": dict, "set()": set, "[[]]": lambda: [[]], "[None]": lambda: [None],
    "[1, 2]": lambda: [1, 2], "(1, 2)": lambda: (1, 2), "{1, 2}": lambda: {1, 2}, "frozenset": lambda: frozenset({3}),
    "[4.7]": lambda: [4.7], "[True]": lambda: [True], "['a']": lambda: ["a"], "['']": lambda: [""], "['a', 5]": lambda: ["a", 5],
    "['a', 'b']": lambda: ["a", "b"], "['a', 'a']": lambda: ["a", "a"], "['a\ud800']": lambda: ["a\ud800"],
    "[[1], [2]]": lambda: [[1], [2]], "[[1], 'a']": lambda: [[1], "a"], "[1, [2]]": lambda: [1, [2]], "[[4.7]]": lambda: [[4.7]],
    "[[[1]]]": lambda: [[[1]]], "[-1]": lambda: [-1], "[10**6]": lambda: [10**6], "[2**63]": lambda: [1 << 63],
    "[10**400]": lambda: [10**400], "[nan]": lambda: [float("nan")], "[1] * 100": lambda: [1] * 100,
    "[1] * 3000": lambda: [1] * 3000, "[np]": lambda: [np.int64(3), np.int32(4)], "[torch]": lambda: [torch.tensor(3)],
    "[b'a']": lambda: [b"a"], "[Raises]": lambda: [Raises()], "[{}]": lambda: [{}], "[dict]": lambda: [{"max_new_tokens": 2}],
    "cycle": _cycle, "deep": _deep, "range": lambda: range(3), "range(10**12)": lambda: range(10**12),
    "generator": lambda: (i for i in (1, 2)), "endless": lambda: itertools.repeat(1),
    "endless texts": lambda: itertools.repeat("a"),
    "deque": lambda: deque([1, 2]), "array": lambda: array.array("i", [1, 2]), "UserList": lambda: UserList([1, 2]),
    "map": lambda: map(str, [1]), "np ids": lambda: np.array([1, 2, 3]), "np empty": lambda: np.array([]),
    "np floats": lambda: np.array([1.5, 2]), "np 2-d": lambda: np.array([[1, 2], [3, 4]]),
    "np 3-d": lambda: np.zeros((1, 1, 2), int),
    "np objects": lambda: np.array([1, "a", None], dtype=object), "np texts": lambda: np.array(["a", "b"]),
    "np bools": lambda: np.array([True, False]), "np wide": lambda: np.array([1 << 63], dtype=np.uint64),
    "torch ids": lambda: torch.tensor([1, 2, 3]), "torch empty": lambda: torch.tensor([]),
    "torch 2-d": lambda: torch.tensor([[1, 2]]),
    "torch floats": lambda: torch.tensor([0.5, 1]), "torch bools": lambda: torch.tensor([True]),
    "torch meta ids": lambda: torch.empty(3, dtype=torch.int64, device="meta"),
    "torch sparse": lambda: torch.tensor([0, 1]).to_sparse(),
    # mappings
    "{1: 0.5}": lambda: {1: 0.5}, "{'1': 5}": lambda: {"1": 5}, "{'a': 1}": lambda: {"a": 1}, "{1: nan}": lambda: {1: float("nan")},
    "{1: None}": lambda: {1: None}, "{None: 1}": lambda: {None: 1}, "{-1: 1}": lambda: {-1: 1}, "{10**9: 1}": lambda: {10**9: 1},
    "{(): ()}": lambda: {(): ()}, "{'a\\n': 1}": lambda: {"a\nb": 1}, "long key": lambda: {"k" * 5000: 1},
    "surrogate key": lambda: {"\ud800": 1}, "many keys": lambda: {f"k{i}": i for i in range(5000)},
    "OrderedDict": lambda: OrderedDict(n=1), "UserDict": lambda: UserDict(n=1), "proxy": lambda: types.MappingProxyType({"n": 1}),
    "prompt dict": lambda: {"prompt": "a"}, "ids dict": lambda: {"prompt_token_ids": [1, 2]},
    # other people's classes
    "object": object, "type": lambda: int, "module": lambda: itertools, "function": lambda: len, "lambda": lambda: lambda: 1,
    "Ellipsis": lambda: ..., "NotImplemented": lambda: NotImplemented, "exception": lambda: ValueError("a\nb"),
    "slice": lambda: slice(3), "date": lambda: datetime.date(2026, 1, 1), "Raises": Raises, "Raises class": lambda: Raises,
    "Endless": Endless, "Liar": Liar, "OneOfMany": OneOfMany, "VLLMParams": VLLMParams, "SamplingParams": SamplingParams,
    "row params": lambda: SamplingParams(max_new_tokens=3),
}  # fmt: skip


def some_value(rng: random.Random, depth: int = 0) -> Any:
    """A number of any size, a text of any characters, or a list, tuple or dict of such."""
    sign = rng.choice((-1, 1))
    makers = [
        lambda: rng.randrange(-3, 12),
        lambda: sign * rng.randrange(1 << rng.randrange(1, 90)),
        lambda: sign * rng.random() * 10.0 ** rng.randrange(-40, 40),
        lambda: "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x11000)))) for _ in range(rng.randrange(9))
        ),
        rng.choice(list(NASTY.values())),
    ]
    if depth < 3:
        items = [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        keyed = {str(i) if rng.random() < 0.5 else i: item for i, item in enumerate(items)}
        makers += [lambda: items, lambda: items, lambda: tuple(items), lambda: keyed]
    return rng.choice(makers)()
