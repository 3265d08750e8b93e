from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for word, version, want in (
        (0x77777777, "gptq", [8] * 8),
        (0x0000000F, "gptq", [16, *[1] * 7]),
        (0x0000000F, "gptq_v2", [15, *[0] * 7]),
        (0x76543210, "gptq", [1, 2, 3, 4, 5, 6, 7, 8]),
        (-1, "gptq", [16] * 8),
        (-1, "gptq_v2", [15] * 8),
    ):
        got = ask(m.zero_points, np.array([[word]], dtype=np.int64).astype(np.int32), version, why="an array [1, 8]")
        expect(f"zero_points([[{word & 0xFFFFFFFF:#010x}]], {version!r})", got, [want])
    rng = np.random.default_rng(0)
    for version, g_idx in (
        ("gptq", [0] * 8),
        ("gptq_v2", [0] * 8),
        ("gptq", [0] * 8 + [1] * 8),
        ("gptq_v2", [1, 0, 1, 2, 0, 0, 2, 1] * 2),
    ):
        n, groups = len(g_idx), max(g_idx) + 1
        codes, zeros = rng.integers(16, size=(n, 16)), rng.integers(1, 16, size=(groups, 16))
        scales = rng.integers(1, 5, size=(groups, 16)) / 4
        want = ((codes - zeros[g_idx]) * scales[g_idx]).T.tolist()
        args = (
            _words(codes.T).T.copy(),
            _words(zeros - (version == "gptq")),
            scales,
            np.array(g_idx, dtype=np.int32),
            version,
        )
        got = ask(m.dequantise, *args, why="an array [out, in]")
        got = np.asarray(got, dtype=float).tolist() if isinstance(got, np.ndarray) else got
        expect(f"dequantise of {version}, g_idx {g_idx}", got, want)


def _words(codes: np.ndarray) -> np.ndarray:
    """[.., 8 W] -> [.., W]."""
    eight = codes.reshape(len(codes), -1, 8).astype(np.uint32)
    return (eight << 4 * np.arange(8, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)
