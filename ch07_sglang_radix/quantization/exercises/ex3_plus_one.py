"""Exercise 3: The famous + 1 (20 minutes).

Read  "Zero points" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 3

GPTQ's files with 4 bits: qweight [in/8, out] has a word for eight inputs of one output, qzeros [G, out/8] a word for eight outputs'
zero points, both with the lowest nibble first. scales is [G, out], and g_idx [in] says which group each input is in. In format
"gptq" a word holds each zero point less 1; in "gptq_v2" it holds the zero point. So in "gptq" a zero point can be 1 .. 16.
A number is (code - zero) * scale.

`zero_points(qzeros, checkpoint_format)`: [G, out].
`dequantise(qweight, qzeros, scales, g_idx, checkpoint_format)`: W, [out, in], as a layer has it.

    qweight, qzeros, g_idx   arrays of int32; words may be negative
    scales                   an array
    returns                  an array

    zero_points([[0x77777777]], "gptq")     ->  [[8, 8, 8, 8, 8, 8, 8, 8]]
    zero_points([[0x0000000F]], "gptq")     ->  [[16, 1, 1, 1, 1, 1, 1, 1]]
    zero_points([[0x0000000F]], "gptq_v2")  ->  [[15, 0, 0, 0, 0, 0, 0, 0]]
"""

import numpy as np


def zero_points(qzeros: np.ndarray, checkpoint_format: str) -> np.ndarray:
    raise NotImplementedError  # your turn


def dequantise(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, checkpoint_format: str
) -> np.ndarray:
    raise NotImplementedError  # your turn
