from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect

# whole numbers, so that sums are exact
A, B = (
    np.array([[1, 0, 2, -1, 3, 1], [2, 1, 0, 1, -1, 1]]),
    np.array([[1, 2], [0, 1], [3, -1], [1, 1], [2, 0], [-1, 2]]),
)
X = np.array([[1, 2, 0, 1, 1, 3], [0, 1, 1, 2, 0, 1]])


def check(m: ModuleType) -> None:
    small = np.array([[1, 2]]), np.array([[1], [3]])
    expect("column, rank 1 of 2", ask(m.added, "column", np.array([[1, 1]]), *small, 1, 2, why="an array"), [[9]])
    expect("row, rank 1 of 2", ask(m.added, "row", np.array([[1]]), *small, 1, 2, why="an array"), [[2, 6]])
    whole = X @ A.T @ B.T
    for ranks in (1, 2, 3):
        share = 6 // ranks
        columns = [_array(m, "column", X, rank, ranks, share) for rank in range(ranks)]
        expect(f"column on {ranks} ranks, side by side", np.concatenate(columns, axis=1), whole)
        cut = [X[:, rank * share : (rank + 1) * share] for rank in range(ranks)]
        parts = [_array(m, "row", x, rank, ranks, 6) for rank, x in enumerate(cut)]
        expect(f"row on {ranks} ranks, added up", sum(parts), whole)
        for rank in range(ranks):
            own = [cut[rank] if other == rank else 0 * cut[other] for other in range(ranks)]
            alone = np.concatenate(own, axis=1) @ A.T @ B.T
            expect(f"row, what rank {rank} of {ranks} adds from its columns of x", parts[rank], alone)


def _array(m: ModuleType, kind: str, x: np.ndarray, rank: int, ranks: int, columns: int) -> np.ndarray:
    got = ask(m.added, kind, x, A, B, rank, ranks, why="an array")
    expect(f"{kind}, shape on rank {rank} of {ranks}", list(np.shape(got)), [len(x), columns])
    return np.asarray(got)
