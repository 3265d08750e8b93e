from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    gate, up = np.arange(24).reshape(8, 3), 100 + np.arange(24).reshape(8, 3)
    for ranks in (1, 2, 4):
        share = 8 // ranks
        for rank in range(ranks):
            shard = ask(m.merged_shard, gate, up, rank, ranks)
            who = f"rank {rank} of {ranks}"
            expect(f"shape that {who} holds", np.shape(shard), (2 * share, 3))
            first = [int(row[0]) // 3 for row in np.asarray(shard)]  # rows of gate are 0 .. 7, those of up 33 .. 40
            rows = [f"gate[{i}]" if i < 8 else f"up[{i - 33}]" for i in first]
            mine = range(rank * share, (rank + 1) * share)
            expect(f"rows that {who} holds", rows, [f"gate[{i}]" for i in mine] + [f"up[{i}]" for i in mine])
            want = np.concatenate([gate[rank * share :][:share], up[rank * share :][:share]])
            expect(f"numbers that {who} holds", shard, want)
