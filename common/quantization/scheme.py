"""What a quantized matrix is made of: facts, without a file or a tensor.

A checkpoint says them once for all of its matrices or for some (config.py), and everything else asks for them: which tensors a file
must have, how codes are read from them, and which kernel can multiply by them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["int", "float"]
KEPT = ("weight_only", "activations")  # quantized weights stay codes: x keeps its dtype, or is rounded too
QUANTIZED_COMPUTE = ("auto", "dequantise", *KEPT)


@dataclass(frozen=True)
class Activations:
    """How x is rounded before a product of two quantized matrices. dynamic: by scales of the numbers that come; else by a scale
    that the checkpoint has, one a matrix (`input_scale`).

    strategy: one scale for all of x (tensor), for each row (token), or for each `group_size` columns of a row (group).
    """

    bits: int
    kind: Kind
    dynamic: bool = True
    strategy: Literal["tensor", "token", "group"] = "token"
    group_size: int | None = None


@dataclass(frozen=True)
class Scheme:
    """Of one matrix [out, in]. method: a key of METHODS (methods.py), which knows the layout of its file.

    strategy: whose numbers share a scale: all (tensor), a row (channel), `group_size` columns of a row (group), or a rectangle of
    `block` = (rows, columns) (block). symmetric: no zero points. act_order: columns were quantized in another order, and the file
    says for each which group it belongs to (GPTQ's desc_act). format: which of its method's layouts the file has, where there are
    several. activations: None if only weights are quantized.
    """

    method: str
    bits: int
    kind: Kind
    strategy: Literal["tensor", "channel", "group", "block"] = "channel"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    act_order: bool = False
    format: str = ""
    activations: Activations | None = None

    def __str__(self) -> str:
        """fp8 float8 block 128x128, gptq int4 group 128."""
        share = {"group": f"group {self.group_size}", "block": "block {}x{}".format(*self.block or (0, 0))}
        return f"{self.method} {self.kind}{self.bits} {share.get(self.strategy, self.strategy)}"


class Expected(NamedTuple):
    """A tensor that a file must have, or may: its shape, one of some, and its type, by safetensors' names (F32, I32, F8_E4M3)."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    optional: bool = False
