from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for probs, p, want in (
        ([0.6, 0.3, 0.1], 0.5, [1, 0, 0]),
        ([0.6, 0.3, 0.1], 0.7, [1, 1, 0]),
        ([0.1, 0.3, 0.6], 0.95, [1, 1, 1]),
        ([0.25, 0.25, 0.5], 0.5, [0, 0, 1]),
        ([0.2, 0.5, 0.3], 1.0, [1, 1, 1]),
        ([0.125, 0.5, 0.375], 0.875, [0, 1, 1]),
        ([0.6, 0.3, 0.1], 0.01, [1, 0, 0]),
        ([0.125, 0.25, 0.0625, 0.5, 0.0625], 0.8, [1, 1, 0, 1, 0]),
        ([1.0], 0.3, [1]),
    ):
        got = _kept(m, probs, p)
        expect(f"of {probs} with p = {p} these are kept (1) or not (0)", got.astype(int), want)
    for probs, p, want in (([0.25] * 4, 0.5, 2), ([0.25] * 4, 0.6, 3), ([0.125, 0.125, 0.5, 0.125, 0.125], 0.625, 2)):
        expect(f"of {probs} with p = {p}, some of them equal, so many are kept", int(_kept(m, probs, p).sum()), want)


def _kept(m: ModuleType, probs: list[float], p: float) -> np.ndarray:
    given = np.array(probs)
    got = np.asarray(ask(m.top_p_keep, given, p))
    expect("probs, which stay as they are", given, probs)
    expect("shape of what is returned, one bool a token", got.shape, (len(probs),))
    expect("type of what is returned", str(got.dtype), "bool")
    return got
