import numpy as np

from ch07_sglang_radix.quantization.exercises.solutions.ex3_plus_one import SHIFTS, zero_points


def nibbles(words):
    return (words[:, :, None] >> SHIFTS & 15).reshape(len(words), -1)


def one_forgotten(qzeros, checkpoint_format):
    return nibbles(qzeros)


def one_for_both(qzeros, checkpoint_format):
    return nibbles(qzeros) + 1


def one_in_the_word(qzeros, checkpoint_format):
    return nibbles((qzeros.astype(np.int64) + 0x11111111 * (checkpoint_format == "gptq")).astype(np.int32))


def one_before_the_mask(qzeros, checkpoint_format):
    return nibbles(qzeros) + (checkpoint_format == "gptq") & 15


def high_first(qzeros, checkpoint_format):
    return (qzeros[:, :, None] >> SHIFTS[::-1] & 15).reshape(len(qzeros), -1) + (checkpoint_format == "gptq")


def by(groups=lambda g_idx: g_idx, along_outputs=False, turned=False):
    def dequantise(qweight, qzeros, scales, g_idx, checkpoint_format):
        codes = (qweight[:, None, :] >> SHIFTS[:, None] & 15).reshape(-1, qweight.shape[1])
        if along_outputs:
            codes = (qweight[:, :, None] >> SHIFTS & 15).reshape(-1, qweight.shape[1])
        group = groups(g_idx)
        found = (codes - zero_points(qzeros, checkpoint_format)[group]) * scales[group]
        return found if turned else found.T

    return dequantise


def runs(g_idx):
    return np.arange(len(g_idx)) * (g_idx.max() + 1) // len(g_idx)


WRONG = [
    ({"zero_points": one_forgotten}, "0x77777777"),
    ({"zero_points": one_for_both}, "gptq_v2"),
    ({"zero_points": one_in_the_word}, "0x0000000f"),
    ({"zero_points": one_before_the_mask}, "0x0000000f"),
    ({"zero_points": high_first}, "0x0000000f"),
    ({"dequantise": by(runs)}, "g_idx [1, 0, 1"),
    ({"dequantise": by(along_outputs=True)}, "dequantise"),
    ({"dequantise": by(turned=True)}, "dequantise"),
]
