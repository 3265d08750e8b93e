"""Round to nearest: codes of a full-precision matrix, with scales from the numbers themselves.

What a scale covers (Scheme.strategy) is scaled so that its largest number becomes the largest code:

    float8_e4m3fn   scale = max|w| / 448                       q = w / scale, rounded to the nearest float8
    int, symmetric  scale = max|w| / (2^(bits-1) - 1)          q = round(w / scale), -(2^(bits-1) - 1) .. 2^(bits-1) - 1
    int, with zero  scale = (max - min) / (2^bits - 1)         q = round(w / scale) + zero, 0 .. 2^bits - 1; min <= 0 <= max, so
                                                               that 0 is a code

All in float32. A scale of numbers that are all 0 is 1.
"""

import torch

from common.quantization.codes import Codes
from common.quantization.scheme import Scheme


def round_to_nearest(w: torch.Tensor, scheme: Scheme) -> Codes:
    """w [out, in], the whole matrix -> its codes. Symmetric integers are int8 around 0 here, whatever offset a file adds."""
    raise NotImplementedError
