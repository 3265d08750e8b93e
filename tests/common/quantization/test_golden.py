"""Words written by hand, as tools of the field write them, and what they stand for; and files that one of those tools writes."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from common.kernels.quantized_layout import pack, unpack
from common.quantization.codes import Codes, one_group
from common.quantization.methods import METHODS
from common.quantization.mxfp4 import octets_of
from common.quantization.scheme import Scheme


def words(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def numbers(scheme, parts, out, in_):
    return METHODS[scheme.method].codes(scheme, parts, (out, in_), slice(0, out), slice(0, in_)).dequantise()


@pytest.mark.parametrize(("format", "zero"), [("", 8), ("gptq_v2", 7)])
def test_gptq_4_bits(format, zero):
    """Output o's word has codes o, o+1, .., o+7 (mod 16), that of input 0 lowest; all zeros are stored as 7."""
    qweight = words([sum((o + i) % 16 << 4 * i for i in range(8)) for o in range(8)])
    parts = {".qweight": qweight, ".qzeros": words([0x77777777]), ".scales": torch.full((1, 8), 0.5).half()}
    assert qweight[0, 0] == 0x76543210
    got = numbers(Scheme("gptq", 4, "int", "group", 8, symmetric=False, format=format), parts, 8, 8)
    assert got.tolist() == [[0.5 * ((o + i) % 16 - zero) for i in range(8)] for o in range(8)]


def test_gptq_adds_1_after_the_zero_is_cut_out():
    """A stored 15 means 16; added to the word, the 1 would run over into output 1's zero, and output 0 would have 0."""
    parts = {
        ".qweight": words([0] * 8),
        ".qzeros": words([0x0000000F]),
        ".scales": torch.ones(1, 8).half(),
        ".g_idx": torch.zeros(8, dtype=torch.int32),
    }
    got = numbers(Scheme("gptq", 4, "int", "channel", symmetric=False), parts, 8, 8)
    assert got[:, 0].tolist() == [-16.0, *[-1.0] * 7]


def test_gptq_desc_act():
    """Inputs 0 .. 7 are in groups 1 0 1 0 0 0 1 1, of which 0 has scale 1 and 1 has 10; every code is 9, every zero 8."""
    parts = {
        ".qweight": words([0x99999999] * 8),
        ".qzeros": words([0x77777777], [0x77777777]),
        ".scales": torch.tensor([[1.0] * 8, [10.0] * 8]).half(),
        ".g_idx": torch.tensor([1, 0, 1, 0, 0, 0, 1, 1], dtype=torch.int32),
    }
    scheme = Scheme("gptq", 4, "int", "group", 4, act_order=True)
    assert numbers(scheme, parts, 8, 8)[3].tolist() == [10, 1, 10, 1, 1, 1, 10, 10]
    with pytest.raises(ValueError, match="desc_act=false"):
        numbers(Scheme("gptq", 4, "int", "group", 4), parts, 8, 8)


def test_gptq_that_says_sym_and_has_other_zeros_is_refused():
    """As v2 files read as v1: their 8 becomes 9, and every weight would be off by a step."""
    parts = {".qweight": words([0] * 8), ".qzeros": words([0x88888888]), ".scales": torch.ones(1, 8).half()}
    with pytest.raises(
        ValueError, match=r"zero points are 9 \.\. 9, not all 8; set sym to false, or checkpoint_format"
    ):
        numbers(Scheme("gptq", 4, "int", "channel"), parts, 8, 8)


def test_awq():
    """A word's nibbles 0 .. 7 are 0 .. 7, and so are outputs 0 2 4 6 1 3 5 7; zeros are packed alike, and nothing is added."""
    parts = {
        ".qweight": words([0x76543210], [0xFFFFFFFF]),
        ".qzeros": words([0x10101010]),
        ".scales": torch.full((1, 8), 2.0).half(),
    }
    got = numbers(Scheme("awq", 4, "int", "group", 2, symmetric=False), parts, 8, 2)
    codes, zeros = [0, 4, 1, 5, 2, 6, 3, 7], [0, 0, 1, 1, 0, 0, 1, 1]
    assert got[:, 0].tolist() == [2.0 * (c - z) for c, z in zip(codes, zeros, strict=True)]
    assert got[:, 1].tolist() == [2.0 * (15 - z) for z in zeros]


def test_mxfp4():
    """All 16 numbers, twice, of which the second half times 2^-1 is a group of its own: the low nibble comes first."""
    octets = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8)
    parts = {
        "_blocks": octets.expand(1, 2, 16),
        "_scales": torch.tensor([[127, 126]], dtype=torch.uint8),
    }
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    once = (positive + [-x for x in positive]) * 2
    got = numbers(Scheme("mxfp4", 4, "float", "group", 32), parts, 1, 64)
    assert got[0].tolist() == once + [x / 2 for x in once]
    q = METHODS["mxfp4"].codes(Scheme("mxfp4", 4, "float"), parts, (1, 64), slice(0, 1), slice(0, 32)).q
    assert torch.equal(octets_of(q.view(torch.uint8))[0], octets)


def test_mxfp4_as_transformers_reads_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: PLC0415, seconds

    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 8, 2, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(100, 150, (3, 8, 2), dtype=torch.uint8, generator=g)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, in, out]
    for expert in range(3):
        parts = {"_blocks": blocks[expert], "_scales": scales[expert]}
        assert torch.equal(numbers(Scheme("mxfp4", 4, "float", "group", 32), parts, 8, 64), theirs[expert].T)


def test_w4afp8():
    """Bytes of two signed nibbles, the low one first: 0x8F is -1 and -8."""
    weight = torch.tensor([[0x8F, 0x70, 0x21]], dtype=torch.uint8).view(torch.int8)
    parts = {".weight": weight, ".weight_scale_inv": torch.tensor([[2.0, 10.0]])}
    got = numbers(Scheme("w4afp8", 4, "int", "group", 4), parts, 1, 6)
    assert got.tolist() == [[-2.0, -16.0, 0.0, 14.0, 10.0, 20.0]]


def test_a_scale_below_zero_is_a_scale():
    """AutoRound writes such where the number farthest from 0 is positive, so that it gets the code -2^(b-1), which has no positive
    twin (intel/auto-round, auto_round/data_type/int.py, quant_tensor_sym: max_v / maxq, with its sign)."""
    scheme = Scheme("gptq", 4, "int", "group", 8)
    codes = Codes(
        torch.tensor([[-8, 7, 0, 1, -1, 2, -2, 3]] * 8, dtype=torch.int8), torch.full((8, 1), -0.5), None, one_group(8)
    )
    parts = METHODS["gptq"].encode(scheme, codes)
    assert numbers(scheme, parts, 8, 8)[0].tolist() == [4.0, -3.5, 0.0, -0.5, 0.5, -1.0, 1.0, -1.5]
    packed = pack(codes, 4)
    assert torch.equal(unpack(packed).dequantise(), codes.dequantise())


BY_LIBRARY = [
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}),
    ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": True}),
    ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    ("pack-quantized", {"num_bits": 2, "strategy": "group", "group_size": 32, "symmetric": False}),
    *(
        ("pack-quantized", {"num_bits": n, "strategy": "group", "group_size": 32, "symmetric": n % 2 == 0})
        for n in (1, 3, 5, 6, 7)
    ),
    ("pack-quantized", {"num_bits": 6, "strategy": "channel", "symmetric": False}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": True}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}),
]


@pytest.mark.parametrize(
    ("format", "said"), BY_LIBRARY, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_a_file_that_the_library_writes(format, said):
    """compressed-tensors compresses, and what it decompresses is what is read here, in whole and in part."""
    out, in_ = 40, 128
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(3))
    args = QuantizationArgs(**said)
    blocks = {
        "tensor": weight.reshape(1, 1, -1),
        "channel": weight.reshape(out, 1, in_),
        "group": weight.reshape(out, -1, 32),
    }
    if args.strategy == "block":
        spans = torch.nn.functional.pad(weight, (0, 0, 0, 8)).reshape(3, 16, 4, 32).transpose(1, 2).flatten(-2)
    else:
        spans = blocks[args.strategy]
    scale, zero = calculate_qparams(spans.amin(-1), spans.amax(-1), args)
    if args.strategy == "tensor":
        scale, zero = scale.view(1), zero.view(1)
    theirs = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    compressor = BaseCompressor.get_value_from_registry(format)
    files = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, theirs)
    want = compressor.decompress(files, theirs)["weight"]
    scheme = Scheme(
        "compressed-tensors", args.num_bits, args.type, args.strategy, args.group_size,
        tuple(args.block_structure) if args.block_structure else None, args.symmetric, format=format,
    )  # fmt: skip
    parts = {f".{name}": tensor for name, tensor in files.items()}
    assert {
        name for name, of in METHODS["compressed-tensors"].tensors(scheme, out, in_).items() if not of.optional
    } == set(parts)
    assert torch.equal(numbers(scheme, parts, out, in_), want)
    part = METHODS["compressed-tensors"].codes(scheme, parts, (out, in_), slice(5, 30), slice(20, 75))
    assert torch.equal(part.dequantise(), want[5:30, 20:75])
