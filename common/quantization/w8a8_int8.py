"""INT8: a weight is a signed byte times the scale of its row, -127 .. 127, so that a number and its negative are equally exact.

    weight        [out, in] I8
    weight_scale  [out, 1] or [out]; [] or [1] for one of the whole matrix

SGLang 0.5.23, srt/layers/quantization/w8a8_int8.py: x is rounded by the row (token), as it comes.
"""

from collections.abc import Mapping

import torch

from common.quantization.codes import Codes, one_group
from common.quantization.scheme import Expected, Scheme

SCALES = ("F32", "BF16", "F16")


def tensors(scheme: Scheme, out: int, in_: int) -> dict[str, Expected]:
    shapes = ((out, 1), (out,)) if scheme.strategy == "channel" else ((), (1,))
    return {".weight": Expected(((out, in_),), ("I8",)), ".weight_scale": Expected(shapes, SCALES)}


def codes(
    scheme: Scheme, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> Codes:
    q = parts[".weight"][rows, columns]
    scale = parts[".weight_scale"][rows] if scheme.strategy == "channel" else parts[".weight_scale"][...]
    return Codes(q, scale.float().reshape(-1, 1).expand(len(q), 1), None, one_group(q.shape[1]))


def encode(scheme: Scheme, codes: Codes) -> dict[str, torch.Tensor]:
    scale = codes.scale.contiguous() if scheme.strategy == "channel" else codes.scale[0, 0].clone()
    return {".weight": codes.q, ".weight_scale": scale}
