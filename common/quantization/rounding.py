"""Round to nearest: codes of a full-precision matrix, with scales from the numbers themselves.

What a scale covers (Scheme.strategy) is scaled so that its largest number becomes the largest code:

    float8_e4m3fn   scale = max|w| / 448                   q = w / scale, rounded to the nearest float8
    E2M1            scale = 2^(floor(log2 max|w|) - 2)     q = the nearest of +-{0, .5, 1, 1.5, 2, 3, 4, 6}
    int8, symmetric scale = max|w| / 127                   q = round(w / scale), -127 .. 127: w and -w are rounded alike
    int, symmetric  scale = max|w| / (2^bits - 1) * 2      q = round(w / scale), -2^(bits-1) .. 2^(bits-1) - 1: of few codes, all
    int, with zero  scale = (max - min) / (2^bits - 1)     q = round(w / scale) + zero, 0 .. 2^bits - 1; zero = round(-min / scale)

All in float32. Where all numbers are 0, the scale is 1. E2M1's is a power of two, and what is beyond 6 becomes 6 (OCP Microscaling
1.0, section 6.3). With a zero, min <= 0 <= max: 0 has a code.
"""

import torch

from common.quantization.codes import Codes, groups_of, one_group
from common.quantization.scheme import Scheme

E4M3 = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_to_nearest(w: torch.Tensor, scheme: Scheme, stored: torch.dtype = torch.float32) -> Codes:
    """w [n, m] -> its codes; rows may be some of a matrix's unless they share scales (tensor, block). Symmetric integers are int8
    around 0, others uint8, whatever offset a file adds. stored: the type in which a file will hold the scales."""
    w, group = w.float(), groups(w.shape[1], scheme)
    high = _largest(w.clamp(min=0), group, scheme)  # [n, G]
    low = -_largest(-w.clamp(max=0), group, scheme)
    scale, zero = scales(low, high, scheme, stored)
    return Codes(codes_of(w, scale[:, group], None if zero is None else zero[:, group], scheme), scale, zero, group)


def groups(columns: int, scheme: Scheme) -> torch.Tensor:
    """[m] which group each column is in."""
    if scheme.strategy == "block":
        return groups_of(slice(0, columns), scheme.block[1])[1]
    size = scheme.group_size if scheme.strategy == "group" else None
    return one_group(columns) if size is None else groups_of(slice(0, columns), size)[1]


def scales(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, stored: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of numbers from low <= 0 to high >= 0: scale, and zero if the scheme has zeros; all of one shape. A scale is first rounded to
    the type it is `stored` in: codes are chosen for the numbers that a reader will get."""
    largest = torch.maximum(-low, high)
    if scheme.kind == "float" and scheme.bits == 4:
        return torch.where(largest == 0, 1.0, torch.exp2(largest.log2().floor() - 2)), None
    if scheme.symmetric:
        half = E4M3 if scheme.kind == "float" else 127 if scheme.bits == 8 else (2**scheme.bits - 1) / 2
        scale = largest / half
        return _as_stored(scale, stored), None
    scale = _as_stored((high - low) / (2**scheme.bits - 1), stored)
    least = 1 if scheme.method == "gptq" and scheme.format != "gptq_v2" else 0  # a file holds zero - 1, and no -1
    return scale, (-low / scale).round().clamp(least, 2**scheme.bits - 1)


def _as_stored(scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    scale = scale.to(stored).float()
    return torch.where(scale == 0, 1.0, scale)  # NaN stays, to be found


def codes_of(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """w / scale (+ zero) as codes; the three have one shape, or are broadcast to it."""
    value = w / scale
    if scheme.kind == "float" and scheme.bits == 4:
        steps = torch.tensor(E2M1, device=w.device)
        middles = (steps[1:] + steps[:-1]) / 2
        return (steps[torch.bucketize(value.abs(), middles)] * value.sign()).to(torch.float8_e4m3fn)
    if scheme.kind == "float":
        return value.clamp(-E4M3, E4M3).to(torch.float8_e4m3fn)
    if zero is None:
        most = 2 ** (scheme.bits - 1) - 1
        return value.round().clamp(-most - (scheme.bits < 8), most).to(torch.int8)
    return (value.round() + zero).clamp(0, 2**scheme.bits - 1).to(torch.uint8)


def _largest(w: torch.Tensor, group: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Of numbers >= 0 [n, m] the largest in each row and group [n, G], or in all rows that share a scale."""
    largest = torch.zeros(len(w), int(group[-1]) + 1, device=w.device)
    largest.scatter_reduce_(1, group.expand(len(w), -1), w, "amax")
    if scheme.strategy == "tensor":
        return largest.amax().expand_as(largest)
    if scheme.strategy == "block":
        blocks = largest.split(scheme.block[0])
        return torch.cat([block.amax(0, keepdim=True).expand_as(block) for block in blocks])
    return largest
