"""One row of weights in every format, bit by bit: what a number becomes, where in the file it lies, and what it costs.

    python ch07_sglang_radix/quantization/demo_1_one_row.py

The row is of the bundled model's first layer; eight numbers of it are shown. FP8 keeps a floating point of its own, INT8 and the
4-bit formats keep a whole number and share a scale; and three formats put the same eight 4-bit codes into words in three ways.
"""

import torch
from safetensors.torch import load_file

from common.distributed.launch import run_main
from common.models.published_configs import published_shape
from common.quantization.awq import OUTPUT_OF
from common.quantization.config import QuantizationConfig
from common.quantization.make import config_of
from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen import TINY_QWEN_PATH

MODULE, SHOWN = "model.layers.0.self_attn.q_proj", 8
NAMES = {
    "FP8, a scale a row": ("fp8-dynamic", {}),
    "FP8, a scale for 128 x 128": ("fp8-block", {}),
    "INT8, a scale a row": ("w8a8", {}),
    "w4a16, groups of 32": ("w4a16", {"group_size": 32}),
    "GPTQ, groups of 128, zeros": ("gptq", {"group_size": 128, "zero_points": True}),
    "GPTQ, 3 bits, groups of 32": ("gptq", {"bits": 3, "group_size": 32}),
    "AWQ, groups of 32": ("awq", {"group_size": 32}),
    "MXFP4": ("mxfp4", {}),
}


def main() -> None:
    weight = load_file(TINY_QWEN_PATH / "model.safetensors")[f"{MODULE}.weight"].float()  # [224, 224]
    fp8(weight)
    int8(weight)
    four_bits(weight)
    mxfp4(weight)
    what_it_costs(weight)


def scheme_of(name: str, **options) -> Scheme:
    return QuantizationConfig.from_checkpoint({"quantization_config": config_of(name, **options)}, name).scheme_of(
        MODULE
    )


def written(weight: torch.Tensor, scheme: Scheme) -> tuple:
    """(codes, tensors of the file, the numbers that they stand for)."""
    codes = round_to_nearest(weight, scheme, METHODS[scheme.method].stored)
    return codes, METHODS[scheme.method].encode(scheme, codes), codes.dequantise()


def fp8(weight: torch.Tensor) -> None:
    heading("FP8: sign, 4 bits of exponent, 3 of mantissa, times a scale of the row")
    codes, parts, back = written(weight, scheme_of("fp8-dynamic"))
    scale = float(codes.scale[0, 0])
    print(f"  largest |w| of the row {weight[0].abs().max():.5f} / 448 = scale {scale:.3g}, as bfloat16")
    rows = []
    for w, q, octet, b in zip(
        weight[0], codes.q[0].float(), parts[".weight"][0].view(torch.uint8), back[0], strict=True
    ):
        bits = f"{int(octet):08b}"
        rows.append((f"{w:.5f}", f"{w / scale:.2f}", f"{bits[0]} {bits[1:5]} {bits[5:]}", f"{q:g}", f"{b:.5f}"))
    table(("w", "w / scale", "s eeee mmm", "stands for", "times scale"), rows[:SHOWN])


def int8(weight: torch.Tensor) -> None:
    heading("INT8: a whole number, times a scale of the row")
    codes, parts, back = written(weight, scheme_of("w8a8"))
    scale = float(codes.scale[0, 0])
    print(f"  largest |w| of the row {weight[0].abs().max():.5f} / 127 = scale {scale:.3g}, as bfloat16")
    rows = [
        (f"{w:.5f}", f"{w / scale:.2f}", f"{int(q) & 255:08b}", int(q), f"{b:.5f}")
        for w, q, b in zip(weight[0], parts[".weight"][0], back[0], strict=True)
    ]
    table(("w", "w / scale", "bits", "stands for", "times scale"), rows[:SHOWN])


def four_bits(weight: torch.Tensor) -> None:
    heading("4 bits: eight codes in a word of 32, and three ways to choose which eight")
    corner = weight[:SHOWN, :32]  # 8 outputs, one group of inputs
    codes, packed, _ = written(corner, scheme_of("w4a16", group_size=32))
    gptq, awq = (METHODS[name].encode(scheme_of(name, group_size=32), codes) for name in ("gptq", "awq"))
    offset = codes.q.int() + 8
    print("  the same codes (with 8 added, so that none is negative), outputs down, inputs across:")
    for output in (0, 1, 2):
        print(f"    output {output}: {' '.join(f'{int(q):x}' for q in offset[output, :SHOWN])} ..")
    rows = []
    for name, word, shape, holds in (
        ("w4a16", packed[".weight_packed"][0, 0], "weight_packed [out, in/8]", "inputs 0 1 2 3 4 5 6 7 of output 0"),
        ("GPTQ", gptq[".qweight"][0, 0], "qweight [in/8, out]", "inputs 0 1 2 3 4 5 6 7 of output 0"),
        ("AWQ", awq[".qweight"][0, 0], "qweight [in, out/8]", f"outputs {' '.join(map(str, OUTPUT_OF))} of input 0"),
    ):
        word = int(word) & 0xFFFFFFFF  # noqa: PLW2901
        nibbles = " ".join(f"{word >> 4 * k & 15:x}" for k in range(8))
        rows.append((name, shape, f"0x{word:08X}", nibbles, holds))
    table(("", "tensor", "its first word", "lowest nibble first", "which are"), rows)
    word = int(packed[".weight_packed"][0, 0])
    high_first = [(word >> 4 * (k ^ 1) & 15) - 8 for k in range(8)]
    mistake("the high nibble of each byte taken first", wrong=high_first, right=codes.q[0, :8])
    word = int(awq[".qweight"][0, 0])
    mistake("AWQ's nibbles taken in their order: codes of outputs 0 .. 7", wrong=[(word >> 4 * k & 15) - 8 for k in range(8)],
            right=codes.q[:, 0])  # fmt: skip


def mxfp4(weight: torch.Tensor) -> None:
    heading("MXFP4: one of 16 numbers, times a power of two that 32 share")
    codes, parts, back = written(weight, scheme_of("mxfp4"))
    stored = int(parts[".weight_scale"][0, 0])
    print(f"  largest |w| of the 32: {weight[0, :32].abs().max():.5f}")
    print(f"  stored {stored}: scale 2^({stored} - 127) = {float(codes.scale[0, 0]):g}")
    rows = []
    for i in range(SHOWN):
        octet = int(parts[".weight_packed"][0, i // 2])
        bits = f"{octet >> 4 * (i % 2) & 15:04b}"
        where = f"byte {i // 2}, {'high' if i % 2 else 'low'}"
        rows.append(
            (
                f"{weight[0, i]:.5f}",
                f"{bits[0]} {bits[1:3]} {bits[3]}",
                where,
                f"{float(codes.q[0, i]):g}",
                f"{back[0, i]:.5f}",
            )
        )
    table(("w", "s ee m", "nibble", "stands for", "times scale"), rows)


def what_it_costs(weight: torch.Tensor) -> None:
    heading("What a number costs: bits of the file, and how far off the whole matrix is")
    config = published_shape("Qwen2.5-7B")
    hidden, kv, width = config.hidden_size, config.num_kv_heads * config.head_dim, config.intermediate_size
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(width, hidden)] * 2 + [(hidden, width)]
    numbers = config.num_layers * sum(out * width_in for out, width_in in shapes)
    rows, off = [("bfloat16, as it is", 16.0, f"{numbers * 2 / 1e9:.1f}", "0")], []
    some = torch.randn(256, hidden, generator=torch.Generator().manual_seed(0))  # a part of a matrix as wide as 7B's
    for name, (kind, options) in NAMES.items():
        scheme = scheme_of(kind, **options)
        bits = 8 * sum(part.nbytes for part in written(some, scheme)[1].values()) / some.numel()
        off.append(float((written(weight, scheme)[2] - weight).norm() / weight.norm()))
        rows.append((name, bits, f"{numbers * bits / 8e9:.1f}", f"{100 * off[-1]:.2f} %"))
    table(("", "bits a number", "GB, 7B's layers", "error, as a share of the norm"), rows)
    eight, three, four = off[:3], off[5], [*off[3:5], *off[6:]]
    check("8 bits are nearer than 4, and 4 nearer than 3", max(eight) < min(four) and max(four) < three)


if __name__ == "__main__":
    run_main(main)
