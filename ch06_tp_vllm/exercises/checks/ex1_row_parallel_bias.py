from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(3, 12)), rng.normal(size=(5, 12)), rng.normal(size=5)
    given = x.copy(), weight.copy(), bias.copy()
    for ranks in (1, 2, 3, 4):
        parts = ask(m.partial_sums, x, weight, bias, ranks, why="an array a rank", several=True)
        expect("x, weight and bias are as they were", all(map(np.array_equal, (x, weight, bias), given)), True)
        expect("number of partial sums", len(parts), ranks)
        expect(
            "shapes of the partial sums: each is of the full output's",
            [np.shape(part) for part in parts],
            [(3, 5)] * ranks,
        )
        whole = x @ weight.T + bias
        off = np.abs(sum(parts) - whole).max()
        extra = _times(sum(parts) - x @ weight.T, bias)
        expect(f"the sum over {ranks} ranks is x W^T + b; bias in it, times", extra if off > 1e-9 else 1, 1)
        own = [np.allclose(part, want) or np.allclose(part, want + bias) for part, want in
               zip(parts, _products(x, weight, ranks), strict=True)]  # fmt: skip
        if ranks > 1:
            zero = ask(m.partial_sums, 0 * x, weight, bias, ranks, several=True)
            expect("ranks that add something of the bias", sum(bool(np.any(part != 0)) for part in zero), 1)
        expect(f"ranks whose part is made of their own columns, the r-th of {ranks} parts", sum(own), ranks)


def _products(x: np.ndarray, weight: np.ndarray, ranks: int) -> list[np.ndarray]:
    return [a @ b.T for a, b in zip(np.split(x, ranks, axis=1), np.split(weight, ranks, axis=1), strict=True)]


def _times(found: np.ndarray, bias: np.ndarray) -> float | str:
    """How often the bias is in `found`, if it is nothing else."""
    times = float(np.round((found / bias).mean(), 6))
    return times if np.allclose(found, times * bias) else "something else"
