"""GPTQ: codes of 2, 3, 4 or 8 bits, packed down the inputs; zero points are stored one too small.

    qweight  [ceil(in * b / 32), out] I32       a word has codes of consecutive inputs (32 / b of them), of one output
    qzeros   [G, ceil(out * b / 32)] I32        a word has zero points of consecutive outputs
    scales   [G, out] F16
    g_idx    [in] I32                           the group of each input

    value = (q - zero) * scale,  zero = stored + 1  (format gptq, "v1")  or  stored  (gptq_v2)

The famous + 1 comes after the code is cut out of its word: a stored 15 means 16, which has no code of its own (so 0.0 is beyond
the largest code), and a zero point of 0 cannot be written at all. Whoever adds 1 to the word instead lets 15 run over into its
neighbour. With desc_act (`act_order`) the columns were quantized in order of their inputs' size, so a group is no run of columns,
and g_idx is the only one who knows it; without, it says what is known, i // group_size.

Sources: AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda.py; GPTQModel, gptq_v2; vLLM 0.30 and SGLang 0.5.23 take i // group_size
where desc_act is false and do not look at g_idx: here a file that says two things is refused.
"""

from collections.abc import Mapping

import torch

from common.quantization.codes import Codes, groups_of, unsigned
from common.quantization.packing import pack, unpack, word_count, words_around
from common.quantization.scheme import Expected, Scheme

SCALES = ("F16", "BF16", "F32")


def tensors(scheme: Scheme, out: int, in_: int) -> dict[str, Expected]:
    groups = -(-in_ // (scheme.group_size or in_))
    return {
        ".qweight": Expected(((word_count(in_, scheme.bits), out),), ("I32",)),
        ".qzeros": Expected(((groups, word_count(out, scheme.bits)),), ("I32",)),
        ".scales": Expected(((groups, out),), SCALES),
        ".g_idx": Expected(((in_,),), ("I32", "I64"), optional=not scheme.act_order),
    }


def codes(
    scheme: Scheme, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> Codes:
    (out, in_), bits = shape, scheme.bits
    first, last, skip = words_around(columns.start, columns.stop, bits, in_)
    q = unpack(parts[".qweight"][first:last, rows].T, bits, columns.stop - columns.start, skip)
    groups, group = groups_of(columns, scheme.group_size or in_)
    if ".g_idx" in parts:
        groups, group = _as_said(parts[".g_idx"][columns].long(), groups, group, scheme, in_)
    first, last, skip = words_around(rows.start, rows.stop, bits, out)
    zero = unpack(parts[".qzeros"][groups, first:last], bits, rows.stop - rows.start, skip).float()
    zero = zero if scheme.format == "gptq_v2" else zero + 1
    scale = parts[".scales"][groups, rows].float().T.contiguous()
    if not scheme.symmetric:
        return Codes(q, scale, zero.T.contiguous(), group)
    middle = 2 ** (bits - 1)
    if (zero != middle).any():
        raise ValueError(
            f"config.json says sym=true, and zero points are {zero.min():g} .. {zero.max():g}, not all {middle}; "
            f"set sym to false, or checkpoint_format to the one it was written in"
        )
    return Codes((q.to(torch.int16) - middle).to(torch.int8), scale, None, group)


def _as_said(
    said: torch.Tensor, groups: slice, group: torch.Tensor, scheme: Scheme, in_: int
) -> tuple[slice, torch.Tensor]:
    """By g_idx: (which groups its columns lie in, the group of each counted from the first of them)."""
    if not scheme.act_order:
        if not torch.equal(said - groups.start, group):
            raise ValueError(
                f"g_idx puts columns into other groups than runs of {scheme.group_size or in_}, and config.json says "
                f"desc_act=false; set it to true if they were quantized in another order"
            )
        return groups, group
    count = -(-in_ // (scheme.group_size or in_))
    least, most = int(said.min()), int(said.max())
    if least < 0 or most >= count:
        raise ValueError(f"g_idx has groups {least} .. {most}, of {count}; fetch it again")
    return slice(least, most + 1), said - least


def encode(scheme: Scheme, codes: Codes) -> dict[str, torch.Tensor]:
    """Raises ValueError for a zero point that v1 cannot hold."""
    q, zero = unsigned(codes, scheme.bits)
    stored = zero if scheme.format == "gptq_v2" else zero - 1
    if stored.amin() < 0:
        raise ValueError("a zero point of 0 cannot be stored as zero - 1; use format gptq_v2")
    return {
        ".qweight": pack(q, scheme.bits).T.contiguous(),
        ".qzeros": pack(stored.T, scheme.bits),
        ".scales": codes.scale.T.to(torch.float16).contiguous(),
        ".g_idx": codes.group.to(torch.int32),
    }
