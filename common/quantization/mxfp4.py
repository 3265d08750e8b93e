"""MXFP4: 16 numbers, E2M1, and a power of two for each 32 of them along the inputs.

    _blocks  [out, in / 32, 16] U8      byte b has elements 2b (low nibble) and 2b + 1; [E, ..] where experts are stacked
    _scales  [out, in / 32] U8          2^(stored - 127), E8M0; 255 is NaN

    nibble   s e e m      0 .. 7 are 0 0.5 1 1.5 2 3 4 6, 8 .. 15 the same below zero

4.25 bits a number, and scales that cost no multiplication. In gpt-oss, which was published so, only the experts' matrices are, and
gate and up are rows of one matrix in turn (an even row is gate's): that is the layer's affair, a matrix here is as it is stored.

Sources: OCP Microscaling Formats (MX) 1.0; gpt-oss gpt_oss/torch/weights.py; transformers 5.23 integrations/mxfp4.py.
"""

from collections.abc import Mapping

import torch

from common.quantization.codes import Codes, groups_of
from common.quantization.scheme import Expected, Scheme

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GROUP = 32


def tensors(scheme: Scheme, out: int, in_: int) -> dict[str, Expected]:
    groups = -(-in_ // GROUP)
    return {
        "_blocks": Expected(((out, groups, GROUP // 2),), ("U8",)),
        "_scales": Expected(((out, groups),), ("U8",)),
    }


def codes(
    scheme: Scheme, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> Codes:
    groups, group = groups_of(columns, GROUP)
    octets = parts["_blocks"][rows, groups, :].flatten(1)
    skip = columns.start - groups.start * GROUP
    q = numbers(octets)[:, skip : skip + columns.stop - columns.start]
    return Codes(q, power(parts["_scales"][rows, groups]), None, group)


def numbers(octets: torch.Tensor) -> torch.Tensor:
    """[.., B] U8 -> [.., 2 B] float8_e4m3fn, which has each of the 16 exactly."""
    nibbles = torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)
    return E2M1.to(torch.float8_e4m3fn).view(torch.uint8)[nibbles.int()].view(torch.float8_e4m3fn)


def power(stored: torch.Tensor) -> torch.Tensor:
    """U8 -> 2^(stored - 127), float32."""
    scale = torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127)
    return scale.masked_fill(stored == 255, torch.nan)


def encode(scheme: Scheme, codes: Codes) -> dict[str, torch.Tensor]:
    octets = octets_of(torch.nn.functional.pad(codes.q.view(torch.uint8), (0, -codes.q.shape[1] % GROUP)))
    return {"_blocks": octets.unflatten(-1, (-1, GROUP // 2)), "_scales": exponents(codes.scale)}


def octets_of(q: torch.Tensor) -> torch.Tensor:
    """The inverse of numbers(): [.., 2 B] float8_e4m3fn, or its bytes -> [.., B] U8."""
    nibbles = torch.zeros(256, dtype=torch.uint8)
    nibbles[E2M1.to(torch.float8_e4m3fn).view(torch.uint8).int()] = torch.arange(16, dtype=torch.uint8)
    nibbles = nibbles[q.view(torch.uint8).int()].unflatten(-1, (-1, 2))
    return nibbles[..., 0] | nibbles[..., 1] << 4


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """The inverse of power()."""
    return (scale.log2().to(torch.int32) + 127).to(torch.uint8)
