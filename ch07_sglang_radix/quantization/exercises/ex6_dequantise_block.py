"""Exercise 6: Blocks of FP8 (20 minutes).

Read  "A scale under a cut" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 6

A matrix of FP8 numbers [out, in] has one scale for each rectangle of a rows and b columns, in weight_scale_inv [ceil(out/a),
ceil(in/b)]. A number is its FP8 number TIMES that scale: the name says what the one who made it divided by. The rectangles at the
lower and the right end may be smaller.

`dequantise(q, weight_scale_inv, block, first=0)`: the numbers of rows first .. first + n-1, where q [n, in] are these rows' alone
and weight_scale_inv is the whole matrix's. A rank's rows may begin in the middle of a rectangle.

`quantise(w, block)`: (q, weight_scale_inv) of a whole matrix w [out, in]: the largest |w| of a rectangle becomes 448, the largest
FP8 number. q is w / scale as it is; rounding to FP8 is left to others. The scale of a rectangle of zeros is 1.

    q, w, weight_scale_inv   arrays
    block                    (a, b)

    dequantise([[1, 2, 3]], [[10, 100]], (2, 2))            ->  [[10, 20, 300]]
    dequantise([[1, 2]], [[10], [100]], (2, 2), first=2)    ->  [[100, 200]]
    quantise([[448, -896], [0, 1]], (1, 2))                 ->  ([[224, -448], [0, 448]], [[2], [1/448]])
"""

import numpy as np


def dequantise(q: np.ndarray, weight_scale_inv: np.ndarray, block: tuple[int, int], first: int = 0) -> np.ndarray:
    raise NotImplementedError  # your turn


def quantise(w: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    raise NotImplementedError  # your turn
