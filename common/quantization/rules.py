"""Which modules a sentence of a quantization config speaks of.

    lm_head, mlp.gate, self_attn        that module, or all that is below it, wherever in a name it stands between dots
    model.layers.*.mlp.router           the same; a star is any text without a dot
    re:.*self_attn.*                    a regular expression, matched from the beginning
    Linear                              all matrices of linear layers

A name of matrices that engines merge (qkv_proj, gate_up_proj) means each of them.
"""

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
    between_dots = rf"(?:^|\.){re.escape(name).replace(re.escape('*'), '[^.]*')}(?:\.|$)"
    return name == ALL or any(re.search(between_dots, one) for one in alike)


def readable(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The same; ValueError for a regular expression that is none."""
    for name in names:
        try:
            re.compile(name.removeprefix(REGEX) if name.startswith(REGEX) else "")
        except re.error as error:
            raise ValueError(f"{where}: {json_shown(name)} is no regular expression ({error}); correct it") from None
    return names
