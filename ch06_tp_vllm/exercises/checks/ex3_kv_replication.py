from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for ranks, num_q, num_kv, want in (
        (1, 8, 2, [[0, 1]]),
        (2, 8, 2, [[0], [1]]),
        (2, 32, 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 8, 2, [[0], [0], [1], [1]]),
        (8, 16, 2, [[0]] * 4 + [[1]] * 4),
        (4, 16, 4, [[0], [1], [2], [3]]),
        (2, 4, 4, [[0, 1], [2, 3]]),
        (4, 4, 1, [[0]] * 4),
    ):
        got = [ask(m.kv_heads_of, rank, ranks, num_q, num_kv) for rank in range(ranks)]
        expect(f"{num_q} query and {num_kv} KV heads on {ranks} ranks: KV heads of each rank", got, want)
