"""What the kernels of sampling share: floats in their order, weights, random numbers, the draw itself."""

import triton
import triton.language as tl


@triton.jit
def weights(x, top, temperature):
    """exp((x - top) / temperature), in one definition for all passes: they must add up the same numbers."""
    return tl.exp((x - top) / temperature)


@triton.jit
def truncates(columns, rows, row):
    """Does this row have top-k, top-p or min-p? columns [4, rows]: `SamplingBatch.columns`."""
    top_k, top_p = tl.load(columns + rows + row), tl.load(columns + 2 * rows + row)
    return (tl.load(columns + row) > 0) & (
        (top_k > 0) | (top_p < 1) | (tl.load(columns + 3 * rows + row) > -float("inf"))
    )


@triton.jit
def uniform(seed, n):
    """The n-th number in [0, 1) of a seed: `uniform` of common/sampling/batch.py."""
    x = seed.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15 + (n + 1).to(tl.uint64, bitcast=True) * 0xD1342543DE82EF95
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 40).to(tl.int32).to(tl.float32) / (1 << 24)


@triton.jit
def crossing(mass, running, target, N: tl.constexpr):
    """Where the running sum of mass [N] exceeds the target; if rounding leaves that behind all, at the last mass."""
    i = tl.arange(0, N)
    first = tl.min(tl.where((running > target) & (mass > 0), i, N), 0)
    return tl.where(first < N, first, tl.max(tl.where(mass > 0, i, 0), 0))


@triton.jit
def key(x, HALF: tl.constexpr):
    """Floats -> int32 in the same order; a bf16 value in 16 bits, -0 as 0."""
    x = x.to(tl.float32) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    if HALF:
        bits = bits >> 16
    return tl.where(bits < 0, bits ^ (0x7FFF if HALF else 0x7FFFFFFF), bits)


@triton.jit
def value(key, HALF: tl.constexpr):
    """The float of a key."""
    bits = tl.where(key < 0, key ^ (0x7FFF if HALF else 0x7FFFFFFF), key)
    if HALF:
        bits = bits << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def middle(low, high):
    """Halfway between two int32, without overflow."""
    return (low & high) + ((low ^ high) >> 1)
