"""FP8: a weight is a float8_e4m3fn number (4 bits of exponent, 3 of mantissa; +-448 at most, no infinity) times a scale.

    weight            [out, in] F8_E4M3
    weight_scale      [] or [1], or [out] or [out, 1]                 strategy tensor, channel
    weight_scale_inv  [ceil(out/128), ceil(in/128)]                   strategy block; not an inverse: multiply by it
    input_scale       [] or [1]                                       x's, if it is not found as x comes (activation_scheme static)

The one of a block comes from DeepSeek-V3 (its inference/kernel.py, weight_dequant), who named it for what the quantizer divides by.
"""

from collections.abc import Mapping

import torch

from common.quantization.codes import Codes, groups_of, one_group
from common.quantization.scheme import Expected, Scheme

SCALES = ("F32", "BF16", "F16")
ONE = ((), (1,))


def tensors(scheme: Scheme, out: int, in_: int) -> dict[str, Expected]:
    found = {".weight": Expected(((out, in_),), ("F8_E4M3",))}
    if scheme.strategy == "block":
        rows, columns = scheme.block
        found[".weight_scale_inv"] = Expected(((-(-out // rows), -(-in_ // columns)),), SCALES)
    else:
        shapes = ((out,), (out, 1)) if scheme.strategy == "channel" else ONE
        found[".weight_scale"] = Expected(shapes, SCALES)
    if scheme.activations and not scheme.activations.dynamic:
        found[".input_scale"] = Expected(ONE, SCALES)
    return found


def codes(
    scheme: Scheme, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> Codes:
    q = parts[".weight"][rows, columns]
    if scheme.strategy == "block":
        return Codes(q, *_of_blocks(parts[".weight_scale_inv"], scheme.block, rows, columns))
    scale = parts[".weight_scale"][rows] if scheme.strategy == "channel" else parts[".weight_scale"][...]
    return Codes(q, scale.float().reshape(-1, 1).expand(len(q), 1), None, one_group(q.shape[1]))


def _of_blocks(
    scales: torch.Tensor, block: tuple[int, int], rows: slice, columns: slice
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Of the blocks that the rows and columns lie in, one scale for each of the rows."""
    down, of_row = groups_of(rows, block[0])
    across, group = groups_of(columns, block[1])
    return scales[down, across].float()[of_row], None, group


def encode(scheme: Scheme, codes: Codes) -> dict[str, torch.Tensor]:
    """Activations' scales are not made of weights: a static input_scale is left to whoever has seen activations."""
    if scheme.strategy == "block":
        return {".weight": codes.q, ".weight_scale_inv": codes.scale[:: scheme.block[0]].contiguous()}
    scale = codes.scale.contiguous() if scheme.strategy == "channel" else codes.scale[0, 0].clone()
    return {".weight": codes.q, ".weight_scale": scale}
