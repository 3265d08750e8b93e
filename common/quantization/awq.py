"""AWQ: codes of 4 bits, packed along the outputs, in an order of their own.

    qweight  [in, out / 8] I32       a word has the codes of 8 consecutive outputs, of one input
    qzeros   [G, out / 8] I32        zero points, packed alike
    scales   [G, out] F16

    value = (q - zero) * scale       no + 1

Within a word, nibbles 0 .. 7 from the lowest hold outputs 0 2 4 6 1 3 5 7. So the kernel it was made for gets, with one mask and
one shift by 16 bits, two neighbours side by side as it wants them in half precision. To read: output c is nibble
[0, 4, 1, 5, 2, 6, 3, 7][c]. This is the layout of `"version": "gemm"`; there are others, and nobody's files have them.

What AWQ is known for happened before: columns of large inputs were made larger, and the layer before them smaller, so that
rounding hurts less where it counts (Lin et al. 2023). Nothing in the file needs to say so.

Source: AutoAWQ awq/utils/packing_utils.py, awq/modules/linear/gemm.py.
"""

from collections.abc import Mapping

import torch

from common.quantization.codes import Codes, groups_of, unsigned
from common.quantization.packing import pack, unpack, words_around
from common.quantization.scheme import Expected, Scheme

NIBBLE_OF = [0, 4, 1, 5, 2, 6, 3, 7]  # output -> nibble
OUTPUT_OF = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble -> output
SCALES = ("F16", "BF16", "F32")


def tensors(scheme: Scheme, out: int, in_: int) -> dict[str, Expected]:
    groups = -(-in_ // (scheme.group_size or in_))
    return {
        ".qweight": Expected(((in_, -(-out // 8)),), ("I32",)),
        ".qzeros": Expected(((groups, -(-out // 8)),), ("I32",)),
        ".scales": Expected(((groups, out),), SCALES),
    }


def codes(
    scheme: Scheme, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> Codes:
    (out, in_), count = shape, rows.stop - rows.start
    first, last, skip = words_around(rows.start, rows.stop, 4, out)
    groups, group = groups_of(columns, scheme.group_size or in_)
    q = _in_order(parts[".qweight"][columns, first:last])[:, skip : skip + count]
    zero = _in_order(parts[".qzeros"][groups, first:last])[:, skip : skip + count]
    scale = parts[".scales"][groups, rows].float()
    return Codes(q.T.contiguous(), scale.T.contiguous(), zero.float().T.contiguous(), group)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """words [.., W] -> codes [.., 8 W], those of output 0 first."""
    return unpack(words, 4, 8 * words.shape[-1]).unflatten(-1, (-1, 8))[..., NIBBLE_OF].flatten(-2)


def encode(scheme: Scheme, codes: Codes) -> dict[str, torch.Tensor]:
    """Raises ValueError if the rows do not fill their words."""
    if len(codes.q) % 8:
        raise ValueError(f"AWQ packs 8 outputs a word, and there are {len(codes.q)}; leave this matrix as it is")
    q, zero = (x.T.to(torch.uint8).unflatten(-1, (-1, 8))[..., OUTPUT_OF].flatten(-2) for x in unsigned(codes, 4))
    return {".qweight": pack(q, 4), ".qzeros": pack(zero, 4), ".scales": codes.scale.T.to(torch.float16).contiguous()}
