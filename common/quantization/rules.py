"""Which modules a sentence of a quantization config speaks of."""

import re
from typing import NamedTuple

from common.models.json_file import json_shown
from common.quantization.scheme import Scheme

REGEX, ALL = "re:", "Linear"
MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}  # names that engines give


class Rule(NamedTuple):
    """scheme: of the modules that `names` name; None: they are not quantized."""

    names: tuple[str, ...]
    scheme: Scheme | None

    def speaks_of(self, module: str) -> bool:
        """module: as the checkpoint names it."""
        return any(_matches(name, module) for name in self.names)


def _matches(name: str, module: str) -> bool:
    if name.startswith(REGEX):
        return re.match(name.removeprefix(REGEX), module) is not None
    own, _, last = module.rpartition(".")
    merged = next((ours for ours, theirs in MERGED.items() if last in theirs), last)
    alike = (module, f"{own}.{merged}")
    return name == ALL or name in alike or any(one.startswith(f"{name}.") or one.endswith(f".{name}") for one in alike)


def readable(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The same; ValueError for a regular expression that is none."""
    for name in names:
        try:
            re.compile(name.removeprefix(REGEX) if name.startswith(REGEX) else "")
        except re.error as error:
            raise ValueError(f"{where}: {json_shown(name)} is no regular expression ({error}); correct it") from None
    return names
