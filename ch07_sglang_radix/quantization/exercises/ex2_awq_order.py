"""Exercise 2: AWQ's order (20 minutes).

Read  "One row of weights" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 2

AWQ's qweight [in, out/8] has a word for eight outputs of one input. From the lowest nibble of a word on, these are outputs
0 2 4 6 1 3 5 7 of the eight. qzeros [G, out/8] has the zero points of `size` inputs each, in words of the same order, and scales
[G, out] their scales. A number is (code - zero) * scale.

`dequantise(qweight, qzeros, scales, size)`: W, [out, in], as a layer has it.

    qweight, qzeros   arrays of int32, which may be negative
    scales            an array
    size              how many inputs share a scale; G groups of them are all inputs
    returns           an array [out, in]

    with one input, one group, and scales of 1:
    dequantise([[0x76543210]], [[0]], scales, 1)            ->  [[0], [4], [1], [5], [2], [6], [3], [7]]
    dequantise([[0x76543210]], [[0x11111111]], scales, 1)   ->  [[-1], [3], [0], [4], [1], [5], [2], [6]]
"""

import numpy as np


def dequantise(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, size: int) -> np.ndarray:
    raise NotImplementedError  # your turn
