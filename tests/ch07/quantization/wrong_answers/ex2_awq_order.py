import numpy as np

from ch07_sglang_radix.quantization.exercises.solutions.ex2_awq_order import NIBBLE_OF

OUTPUT_OF = [0, 2, 4, 6, 1, 3, 5, 7]


def by(order=NIBBLE_OF, zeros_order=NIBBLE_OF, add=0, mask=15, turned=False, spread=np.repeat):
    def dequantise(qweight, qzeros, scales, size):
        codes = (qweight[..., None] >> 4 * np.array(order) & mask).reshape(len(qweight), -1)
        zeros = (qzeros[..., None] >> 4 * np.array(zeros_order) & 15).reshape(len(qzeros), -1) + add
        found = (codes - spread(zeros, size, axis=0)) * spread(scales, size, axis=0)
        return found if turned else found.T

    return dequantise


def interleaved(x, size, axis):
    return np.tile(x, (size, 1))


WRONG = [
    ({"dequantise": by(list(range(8)), list(range(8)))}, "0x76543210"),
    ({"dequantise": by(OUTPUT_OF, OUTPUT_OF)}, "0x76543210"),
    ({"dequantise": by(zeros_order=list(range(8)))}, "zeros 0x30"),
    ({"dequantise": by(add=1)}, "zeros 0x0"),
    ({"dequantise": by(turned=True)}, "wanted"),
    ({"dequantise": by(spread=interleaved)}, "groups of 2"),
    ({"dequantise": by(mask=7)}, "wanted"),
]
