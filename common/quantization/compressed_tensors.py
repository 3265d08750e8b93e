"""compressed-tensors: what llm-compressor writes; one format for integers and FP8, and for every way to share scales.

    weight_scale        [1] or [], [out, 1] or [out], [out, G], [ceil(out/rows), ceil(in/columns)]     tensor, channel, group, block
    pack-quantized
      weight_packed     [out, ceil(in * b / 32)] I32       a word has codes of consecutive inputs: value + 2^(b-1), never negative
      weight_shape      [2] I64                            [out, in], which the words do not tell
      weight_zero_point [ceil(out * b / 32), G] I32        only if not symmetric; packed down the OUTPUTS
    int-quantized, float-quantized, naive-quantized
      weight            [out, in] I8 or F8_E4M3
      weight_zero_point as weight_scale, I8                only if not symmetric
    mxfp4-pack-quantized
      weight_packed     [out, in / 2] U8                   as MXFP4's blocks (mxfp4.py), with weight_scale [out, in / 32] U8
    weight_g_idx        [in] I32                           the group of each input, where they are no runs (actorder "group")
    input_scale         [] or [1]                          x's, if it is static

    value = (q - zero) * scale;  packed zero points have 2^(b-1) added as well, so that there it cancels

Any number of bits from 1 to 8 is one string, cut into words. Older versions of the library did not let codes of 3, 5, 6 and 7 bits
cross words, which took more of them: such files are refused, by the shape of weight_packed.
Source: compressed-tensors 0.20, compressors/ pack_quantized/base.py and helpers.py, naive_quantized/base.py, mxfp4/base.py.
"""

from collections.abc import Mapping

import torch

from common.quantization import mxfp4
from common.quantization.codes import Codes, groups_of, one_group, unsigned
from common.quantization.packing import pack, unpack, word_count, words_around
from common.quantization.scheme import Expected, Scheme

SCALES = ("F32", "BF16", "F16")
PACKED, MX, ONE = "pack-quantized", "mxfp4-pack-quantized", ((1,), ())


def tensors(scheme: Scheme, out: int, in_: int) -> dict[str, Expected]:
    shared = _shapes(scheme, out, in_)
    if scheme.format == MX:
        return {".weight_packed": Expected(((out, -(-in_ // 2)),), ("U8",)), ".weight_scale": Expected(shared, ("U8",))}
    found = {".weight_scale": Expected(shared, SCALES)}
    if scheme.format == PACKED:
        found[".weight_packed"] = Expected(((out, word_count(in_, scheme.bits)),), ("I32",))
        found[".weight_shape"] = Expected(((2,),), ("I64", "I32"))
    else:
        found[".weight"] = Expected(((out, in_),), ("F8_E4M3" if scheme.kind == "float" else "I8",))
    if scheme.act_order:
        found[".weight_g_idx"] = Expected(((in_,),), ("I32", "I64"))
    if not scheme.symmetric:
        if _zeros_are_packed(scheme):
            groups = shared[0][1]
            found[".weight_zero_point"] = Expected(((word_count(out, scheme.bits), groups),), ("I32",))
        else:
            found[".weight_zero_point"] = Expected(shared, ("I8",))
    if scheme.activations and not scheme.activations.dynamic:
        found[".input_scale"] = Expected(ONE, SCALES)
    return found


def _shapes(scheme: Scheme, out: int, in_: int) -> tuple[tuple[int, ...], ...]:
    if scheme.strategy == "tensor":
        return ONE
    if scheme.strategy == "channel":
        return ((out, 1), (out,))
    if scheme.strategy == "group":
        return ((out, -(-in_ // scheme.group_size)),)
    return ((-(-out // scheme.block[0]), -(-in_ // scheme.block[1])),)


def _zeros_are_packed(scheme: Scheme) -> bool:
    return scheme.format == PACKED and not scheme.symmetric and scheme.strategy in ("channel", "group")


def codes(
    scheme: Scheme, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> Codes:
    (out, in_), bits = shape, scheme.bits
    n, m = rows.stop - rows.start, columns.stop - columns.start
    half = 2 ** (bits - 1)
    if scheme.format == MX:
        groups, group = groups_of(columns, mxfp4.GROUP)
        first = groups.start * mxfp4.GROUP
        q = mxfp4.numbers(parts[".weight_packed"][rows, first // 2 : -(-columns.stop // 2)])
        scale = mxfp4.power(parts[".weight_scale"][rows, groups])
        return Codes(q[:, columns.start - first : columns.stop - first], scale, None, group)
    if scheme.format == PACKED:
        if (said := parts[".weight_shape"][:].tolist()) != [out, in_]:
            raise ValueError(f"weight_shape is {said}, and the model needs {[out, in_]}; use one checkpoint's files")
        first, last, skip = words_around(columns.start, columns.stop, bits, in_)
        q = unpack(parts[".weight_packed"][rows, first:last], bits, m, skip)
        if not _zeros_are_packed(scheme):  # else 2^(b-1) was added to both
            q = (q.to(torch.int16) - half).to(torch.int8)
    else:
        q = parts[".weight"][rows, columns]
    groups, group = _groups(scheme, parts, columns, in_)
    scale = _of_rows(scheme, parts[".weight_scale"], rows, groups).float()
    if scheme.symmetric:
        return Codes(q, scale, None, group)
    if _zeros_are_packed(scheme):
        first, last, skip = words_around(rows.start, rows.stop, bits, out)
        zero = unpack(parts[".weight_zero_point"][first:last, groups].T, bits, n, skip).T.float()
    else:
        zero = _of_rows(scheme, parts[".weight_zero_point"], rows, groups).float()
    return Codes(q, scale, zero.contiguous(), group)


def _groups(scheme: Scheme, parts: Mapping[str, torch.Tensor], columns: slice, in_: int) -> tuple[slice, torch.Tensor]:
    """(which groups the columns lie in, the group of each counted from the first of them)."""
    if scheme.act_order:
        group = parts[".weight_g_idx"][columns].long()
        count = -(-in_ // scheme.group_size)
        least, most = int(group.min()), int(group.max())
        if least < 0 or most >= count:
            raise ValueError(f"weight_g_idx has groups {least} .. {most}, of {count}; fetch it again")
        return slice(least, most + 1), group - least
    if scheme.strategy in ("group", "block"):
        return groups_of(columns, scheme.group_size if scheme.strategy == "group" else scheme.block[1])
    return slice(0, 1), one_group(columns.stop - columns.start)


def _of_rows(scheme: Scheme, shared: torch.Tensor, rows: slice, groups: slice) -> torch.Tensor:
    """Scales or zeros as a file has them -> one for each of the rows and groups, [n, G]."""
    n = rows.stop - rows.start
    if scheme.strategy == "tensor":
        return shared[...].reshape(1, 1).expand(n, 1)
    if scheme.strategy == "channel":
        return shared[rows].reshape(n, 1)
    if scheme.strategy == "group":
        return shared[rows, groups]
    down, of_row = groups_of(rows, scheme.block[0])
    return shared[down, groups][of_row]


def encode(scheme: Scheme, codes: Codes) -> dict[str, torch.Tensor]:
    """A static input_scale is left to whoever has seen activations."""
    if scheme.format == MX:
        return {".weight_packed": mxfp4.octets_of(codes.q), ".weight_scale": mxfp4.exponents(codes.scale)}
    found = {".weight_scale": _shared(scheme, codes.scale).to(torch.bfloat16)}
    half = 2 ** (scheme.bits - 1)
    q, zero = codes.q, codes.zero
    if scheme.kind == "int":
        q, zero = unsigned(codes, scheme.bits)
    if scheme.format == PACKED:
        found[".weight_packed"] = pack(q, scheme.bits)
        found[".weight_shape"] = torch.tensor(q.shape)
    else:
        found[".weight"] = q if scheme.kind == "float" else (q.to(torch.int16) - half).to(torch.int8)
    if scheme.act_order:
        found[".weight_g_idx"] = codes.group.to(torch.int32)
    if not scheme.symmetric:
        if _zeros_are_packed(scheme):
            found[".weight_zero_point"] = pack(zero.T, scheme.bits).T.contiguous()
        else:
            found[".weight_zero_point"] = (_shared(scheme, zero) - half).to(torch.int8)
    return found


def _shared(scheme: Scheme, of_rows: torch.Tensor) -> torch.Tensor:
    """The inverse of _of_rows."""
    if scheme.strategy == "tensor":
        return of_rows[0, :1].clone()
    return of_rows[:: scheme.block[0] if scheme.strategy == "block" else 1].contiguous()
