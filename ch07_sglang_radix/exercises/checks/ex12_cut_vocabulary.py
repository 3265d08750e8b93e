from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for what, row, ranks, padding in (
        ("two ranks, no padding", [1, 5, 2, 3], 2, 0),
        ("the best is on the last rank", [1, 2, 3, 9], 2, 0),
        ("all logits are negative, and padding is zero", [-3, -1, -2], 2, 0),
        ("padding may be anything", [4, 1, 2, 3, 0], 3, 99),
        ("equal logits on two ranks: the first", [1, 7, 7, 0], 2, 0),
        ("equal logits on one rank: the first", [1, 0, 7, 7], 2, 0),
        ("rank 3 has nothing but padding", [-1, -2, -3, -4, -5], 4, 0),
        ("one rank", [2, 8, 8], 1, 0),
        ("all logits are the same", [3, 3, 3, 3, 3], 3, 5),
    ):
        _compare(m, what, np.array([row], dtype=np.float32), ranks, padding)
    rng = np.random.default_rng(0)
    for _ in range(40):
        logits = rng.integers(-6, 3, size=(3, rng.integers(1, 12))).astype(np.float32)
        _compare(m, "three rows of random logits", logits, int(rng.integers(1, 6)), 0)


def _compare(m: ModuleType, what: str, logits: np.ndarray, ranks: int, padding: float) -> None:
    vocab = logits.shape[1]
    share = -(-vocab // ranks)
    padded = np.full((len(logits), share * ranks), padding, dtype=np.float32)
    padded[:, :vocab] = logits
    offers = []
    for rank, mine in enumerate(np.split(padded, ranks, axis=1)):
        said = f"{what}: logits {logits.tolist()} on {ranks} ranks; "
        why = f"{said}rank {rank} offers a pair (logit, token) for each row"
        offered = ask(m.offer, mine.copy(), rank, vocab, why=why, several=True)
        offered = [(float(logit), int(token)) for logit, token in offered]
        expect(f"{said}rank {rank} offers the logits", [x for x, _ in offered], _best(logits, rank, share))
        ids = [token if logit > -np.inf else -1 for logit, token in offered]
        expect(f"{said}rank {rank} offers the tokens", ids, _where(logits, rank, share))
        offers.append(offered)
    expect(f"{what}: offers {offers}; the tokens", ask(m.choose, offers), logits.argmax(axis=1))


def _best(logits: np.ndarray, rank: int, share: int) -> list[float]:
    return [float(max(row[rank * share :][:share], default=-np.inf)) for row in logits]


def _where(logits: np.ndarray, rank: int, share: int) -> list[int]:
    own = logits[:, rank * share :][:, :share]
    return [rank * share + int(row.argmax()) if len(row) else -1 for row in own]
