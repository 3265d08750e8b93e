"""Every format: written and read again, whole and in any part, and only the bytes that a part needs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Activations, Scheme

OUT, IN = 40, 160  # in is 5 groups of 32, and one and a quarter blocks
STATIC = Activations(8, "float", dynamic=False, strategy="tensor")
GPTQ = Scheme("gptq", 4, "int", "group", 32)
PACKED = Scheme("compressed-tensors", 4, "int", "group", 32, format="pack-quantized")
INT8 = Scheme("compressed-tensors", 8, "int", "channel", format="int-quantized")
FLOAT8 = Scheme("compressed-tensors", 8, "float", "channel", format="float-quantized")
SCHEMES = [
    *(replace(GPTQ, bits=bits, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    replace(GPTQ, format="gptq_v2", symmetric=False),
    replace(GPTQ, strategy="channel", group_size=None),
    replace(GPTQ, group_size=48),  # the last group has 16 columns
    Scheme("awq", 4, "int", "group", 32, symmetric=False),
    *(
        replace(PACKED, bits=bits, symmetric=symmetric)
        for bits in (1, 2, 3, 4, 5, 6, 7, 8)
        for symmetric in (True, False)
    ),
    replace(PACKED, strategy="channel", group_size=None, symmetric=False),
    replace(PACKED, strategy="tensor", group_size=None, symmetric=False),
    INT8,
    replace(INT8, strategy="group", group_size=32, symmetric=False),
    replace(INT8, bits=4, strategy="tensor"),
    FLOAT8,
    replace(FLOAT8, strategy="tensor", activations=STATIC),
    replace(FLOAT8, strategy="block", block=(16, 128)),
    replace(FLOAT8, strategy="group", group_size=32),
    Scheme("mxfp4", 4, "float", "group", 32),
    Scheme("compressed-tensors", 4, "float", "group", 32, format="mxfp4-pack-quantized"),
    Scheme("w4afp8", 4, "int", "group", 128, activations=STATIC),
    Scheme("fp8", 8, "float", "tensor"),
    Scheme("fp8", 8, "float", "channel"),
    Scheme("fp8", 8, "float", "block", block=(16, 128)),
    Scheme("w8a8_int8", 8, "int", "channel"),
]
each_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s} {s.format} {'' if s.symmetric else 'zeros'}"
)
TYPES = {
    torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(scheme, seed=0):
    codes = round_to_nearest(random(OUT, IN, seed=seed), scheme, METHODS[scheme.method].stored)
    return codes, METHODS[scheme.method].encode(scheme, codes)


def read(scheme, parts, rows=slice(0, OUT), columns=slice(0, IN)):
    return METHODS[scheme.method].codes(scheme, parts, (OUT, IN), rows, columns)


@each_scheme
def test_what_is_written_is_what_a_file_must_have(scheme):
    _, parts = written(scheme)
    expected = METHODS[scheme.method].tensors(scheme, OUT, IN)
    for name, tensor in parts.items():
        assert tuple(tensor.shape) in expected[name].shapes, name
        assert TYPES[tensor.dtype] in expected[name].dtypes, name
    left_out = {name for name, of in expected.items() if name not in parts and not of.optional}
    assert left_out <= {".input_scale"}  # of activations, which an encoder has not seen


@each_scheme
def test_what_is_read_is_what_was_written(scheme):
    codes, parts = written(scheme)
    again = read(scheme, parts)
    assert torch.equal(again.dequantise(), codes.dequantise())
    assert again.q.dtype == codes.q.dtype or not scheme.symmetric
    assert (again.dequantise() - random(OUT, IN)).abs().max() <= error_bound(scheme, codes)


def error_bound(scheme, codes):
    """Half a step, and how far the largest number lies beyond the largest code; of floats, half a step of the largest numbers.

    A scale is (2^bits - 1) steps of all numbers where there is a zero point, whose rounding may put the largest number half a step
    beyond; symmetric below 8 bits it is (2^bits - 1) / 2 of the largest one, which lies half a step beyond at every width. A
    bfloat16 scale that is too small by 2^-8 of itself adds 2^-8 of that many steps. 127 steps of 8 bits, symmetric, end at the
    largest number, and 2^-8 of them is half a step.
    """
    if scheme.kind == "float":
        steps = 2.0 if scheme.bits == 4 else 16.0
    elif scheme.symmetric:
        steps = 0.5 + (2.0 ** (scheme.bits - 9) if scheme.bits < 8 else 0.0)
    else:
        steps = 0.5 + 2.0 ** (scheme.bits - 8)
    return 1.02 * codes.scale.max() * steps


@each_scheme
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_part_is_that_part_of_the_whole(scheme, data):
    codes, parts = written(scheme)
    rows, columns = (sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
                     for size in (OUT, IN))  # fmt: skip
    rows, columns = slice(*rows), slice(*columns)
    part = read(scheme, parts, rows, columns)
    assert torch.equal(part.dequantise(), codes.dequantise()[rows, columns])
    assert part.q.shape == (rows.stop - rows.start, columns.stop - columns.start)
    assert part.scale.shape[0] == len(part.q)
    assert part.group.max() < part.scale.shape[1]
    assert part.scale.dtype == torch.float32
    assert part.group.dtype == torch.int64


class Counting:
    """A tensor that counts what is read of it."""

    def __init__(self, tensor):
        self.tensor, self.bytes = tensor, 0

    def __getitem__(self, index):
        found = self.tensor[index]
        self.bytes += found.nbytes
        return found


@each_scheme
def test_a_fourth_of_the_rows_reads_about_a_fourth_of_the_bytes(scheme):
    _, parts = written(scheme)
    parts = {name: Counting(tensor) for name, tensor in parts.items() if "idx" not in name and "shape" not in name}
    whole = sum(part.tensor.nbytes for part in parts.values())
    if scheme.format == "pack-quantized":
        parts[".weight_shape"] = torch.tensor([OUT, IN])
    read(scheme, parts, slice(10, 20), slice(0, IN))
    said = sum(part.bytes for part in parts.values() if isinstance(part, Counting))
    assert said <= 0.6 * whole if scheme.bits == 3 else said <= 0.42 * whole  # 8 outputs a word, 32 in 3 words


@pytest.mark.parametrize("scheme", [GPTQ, replace(PACKED, symmetric=False)], ids=str)
def test_columns_in_another_order_keep_their_groups(scheme):
    scheme = replace(scheme, act_order=True)
    codes = round_to_nearest(random(OUT, IN), scheme)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(1))
    codes = codes._replace(q=codes.q[:, order], group=codes.group[order], scale=codes.scale.bfloat16().half().float())
    codes = codes._replace(scale=codes.scale.half().bfloat16().float())
    parts = METHODS[scheme.method].encode(scheme, codes)
    for start in (0, 50, 100):
        part = read(scheme, parts, slice(8, 16), slice(start, start + 50))
        assert torch.equal(part.dequantise(), codes.dequantise()[8:16, start : start + 50])


@pytest.mark.parametrize(("scheme", "name"), [(GPTQ, ".g_idx"), (PACKED, ".weight_g_idx")], ids=str)
def test_a_group_that_is_not_there_is_refused(scheme, name):
    scheme = replace(scheme, act_order=True)
    _, parts = written(scheme)
    parts[name][7] = 5
    with pytest.raises(ValueError, match=r"has groups 0 \.\. 5, of 5"):
        read(scheme, parts)
