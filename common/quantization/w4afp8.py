"""W4A-FP8: experts' weights of 4 bits for x of 8 (FP8); the other layers of such a checkpoint are FP8 by blocks (fp8.py).

    weight            [out, in / 2] I8       byte b has columns 2b (low nibble) and 2b + 1, signed: -8 .. 7 as two's complement
    weight_scale_inv  [out, in / 128]        multiply by it
    input_scale       [] or [1]              x's; one of a layer is the largest of its experts'

Memory is read at 4 bits, products are made at 8: for DeepSeek's 256 experts on Hopper. SGLang 0.5.23,
srt/layers/quantization/w4afp8.py; its nibbles: sgl-kernel/tests/test_cutlass_w4a8_moe_mm.py.
"""

from collections.abc import Mapping

import torch

from common.quantization.codes import Codes, groups_of
from common.quantization.scheme import Expected, Scheme

SCALES = ("F32", "BF16", "F16")


def tensors(scheme: Scheme, out: int, in_: int) -> dict[str, Expected]:
    return {
        ".weight": Expected(((out, -(-in_ // 2)),), ("I8",)),
        ".weight_scale_inv": Expected(((out, -(-in_ // scheme.group_size)),), SCALES),
        ".input_scale": Expected(((), (1,)), SCALES, optional=True),
    }


def codes(
    scheme: Scheme, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> Codes:
    groups, group = groups_of(columns, scheme.group_size)
    octets = parts[".weight"][rows, columns.start // 2 : -(-columns.stop // 2)].view(torch.int8)
    nibbles = torch.stack([octets << 4 >> 4, octets >> 4], dim=-1).flatten(-2)  # >> of an int8 keeps its sign
    skip = columns.start % 2
    q = nibbles[:, skip : skip + columns.stop - columns.start].contiguous()
    return Codes(q, parts[".weight_scale_inv"][rows, groups].float(), None, group)


def encode(scheme: Scheme, codes: Codes) -> dict[str, torch.Tensor]:
    """Without input_scale, which is for whoever has seen activations."""
    pairs = torch.nn.functional.pad(codes.q, (0, codes.q.shape[1] % 2)).unflatten(-1, (-1, 2))
    return {".weight": pairs[..., 0] & 15 | pairs[..., 1] << 4, ".weight_scale_inv": codes.scale.contiguous()}
