import numpy as np

from ch07_sglang_radix.quantization.exercises.solutions.ex6_dequantise_block import dequantise, quantise


def divided(q, scale, block, first=0):
    return q / (dequantise(np.ones(q.shape), scale, block, first))


def from_its_own_start(q, scale, block, first=0):
    return dequantise(q, scale[first // block[0] :], block)


def first_forgotten(q, scale, block, first=0):
    return dequantise(q, scale, block)


def block_turned(q, scale, block, first=0):
    down, across = (first + np.arange(len(q))) // block[1], np.arange(q.shape[1]) // block[0]
    return q * scale[np.minimum(down, len(scale) - 1)[:, None], np.minimum(across, scale.shape[1] - 1)]


def whole_blocks_only(q, scale, block, first=0):
    """np.repeat, cut to size: right where the rows begin with a block."""
    spread = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)
    return q * spread[: len(q), : q.shape[1]]


def inverse(w, block):
    q, scale = quantise(w, block)
    return q, 1 / scale


def of_127(w, block):
    q, scale = quantise(w, block)
    return q * 127 / 448, scale * 448 / 127


def zeros_divide(w, block):
    q, scale = quantise(w, block)
    largest = np.array([[np.abs(w[i : i + block[0], j : j + block[1]]).max() for j in range(0, w.shape[1], block[1])]
                        for i in range(0, w.shape[0], block[0])])  # fmt: skip
    return q, np.where(largest == 0, 0.0, scale)


def signed_largest(w, block):
    """The largest w, and not the largest |w|."""
    scale = quantise(w, block)[1].copy()
    for i, j in np.ndindex(*scale.shape):
        part = w[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        scale[i, j] = max(part.max(), 1e-3) / 448
    return w / dequantise(np.ones(w.shape), scale, block), scale


WRONG = [
    ({"dequantise": divided}, "dequantise of [1, 3]"),
    ({"dequantise": from_its_own_start}, "first=2"),
    ({"dequantise": first_forgotten}, "first=2"),
    ({"dequantise": block_turned}, "blocks of 2 x 3"),
    ({"dequantise": whole_blocks_only}, "first=2"),
    ({"quantise": inverse}, "scales"),
    ({"quantise": of_127}, "scales"),
    ({"quantise": zeros_divide}, "scales"),
    ({"quantise": signed_largest}, "scales"),
]
