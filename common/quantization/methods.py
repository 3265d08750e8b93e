"""The formats: how each writes codes in a file.

A format is three functions, in a module of its own:

    tensors(scheme, out, in_)
        Which tensors a matrix [out, in] has in a file: {suffix: Expected}. A suffix is what stands behind the module's name, with
        its dot: ".weight", ".qweight", "_blocks".
    codes(scheme, parts, shape, rows, columns)
        The codes of a part of it: rows and columns are slices with start and stop, shape is (out, in), of the whole matrix.
        parts: {suffix: tensor}, of those that are there. Each is a tensor, or lies in a file and is read by indexing it as one:
        parts[".weight"][rows, columns]; parts[".scale"][...] is all of it. So index each once, with plain slices (no step, start
        and stop inside), and only for what is needed.
    encode(scheme, codes)
        The tensors of a whole matrix with these codes: {suffix: tensor}, the inverse.

What codes() raises (ValueError, one line) names no module: reader.py, which knows it, sets it before.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from common.quantization import awq, compressed_tensors, fp8, gptq, mxfp4, w4afp8, w8a8_int8
from common.quantization.codes import Codes
from common.quantization.scheme import Expected, Scheme


class Format(NamedTuple):
    tensors: Callable[[Scheme, int, int], dict[str, Expected]]
    codes: Callable[[Scheme, Mapping[str, torch.Tensor], tuple[int, int], slice, slice], Codes]
    encode: Callable[[Scheme, Codes], dict[str, torch.Tensor]]
    stored: torch.dtype  # in which encode() writes scales; codes are to be chosen for scales that it holds exactly


METHODS = {
    name: Format(of.tensors, of.codes, of.encode, stored)
    for name, (of, stored) in {
        "fp8": (fp8, torch.float32),
        "w8a8_fp8": (fp8, torch.float32),
        "w8a8_int8": (w8a8_int8, torch.float32),
        "compressed-tensors": (compressed_tensors, torch.bfloat16),
        "gptq": (gptq, torch.float16),
        "awq": (awq, torch.float16),
        "mxfp4": (mxfp4, torch.float32),  # powers of two
        "w4afp8": (w4afp8, torch.float32),
    }.items()
}
