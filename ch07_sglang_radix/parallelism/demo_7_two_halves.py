"""Attention over two halves of the keys, merged; then a prompt whose tokens lie on two ranks.

    python ch07_sglang_radix/parallelism/demo_7_two_halves.py
    torchrun --nproc_per_node=2 ch07_sglang_radix/parallelism/demo_7_two_halves.py

First on paper: four keys, numbers that can be added up by hand. Then who computes which tokens, and how much work that is. Under
torchrun two ranks do it: keys go round a ring, page g lies on rank g % 2, and a new token attends to the pages of both.
"""

import math
import os

import numpy as np
import torch

from common.attention.context_parallel import ContextParallelAttention
from common.attention.context_table import ContextTable, RingInputs
from common.attention.kv_cache import PagedKVCache
from common.attention.merge import attend, merge
from common.attention.zigzag import pairs, role, seen, share
from common.distributed.launch import run_main
from common.parallel_state import ParallelState, all_gather
from common.teaching.show import check, heading, mistake, table

EXPONENTIALS, VALUES = [1, 2, 3, 4], [10, 20, 30, 40]  # exp(score) of each key, and its value
TOKENS, PAGE, D = 12, 2, 4


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        on_paper()
        without_keys()
        who_computes_what()
    if os.environ.get("WORLD_SIZE") == "2":
        two_ranks()
    elif rank == 0:
        print(
            "\nthe same with two ranks: torchrun --nproc_per_node=2 ch07_sglang_radix/parallelism/demo_7_two_halves.py"
        )


def on_paper() -> None:
    heading("One query and four keys: the scores are such that exp(score) = 1, 2, 3, 4")
    halves = [over(slice(0, 2)), over(slice(2, 4))]
    rows = [("all four", *over(slice(0, 4))), ("the first two", *halves[0]), ("the last two", *halves[1])]
    table(("keys", "sum of exp * value", "sum of exp", "o", "lse = log of the sum"), rows)
    (_, a, first, lse), (_, b, last, other) = halves
    merged, merged_lse = merge([(torch.tensor([o]), torch.tensor(x)) for o, x in ((first, lse), (last, other))])
    print(
        f"  merged: ({a} * {first:.2f} + {b} * {last:.2f}) / ({a} + {b}) = {merged.item():.2f}, lse {merged_lse.item():.2f}"
    )
    check("the halves, merged, are the whole", math.isclose(merged.item(), 30, rel_tol=1e-6))
    check("and so are their sums", math.isclose(merged_lse.item(), math.log(10), rel_tol=1e-6))
    mistake("the mean of the two halves", wrong=f"{(first + last) / 2:.2f}", right=f"{merged.item():.2f}")


def over(keys: slice) -> tuple[int, int, float, float]:
    """Attention over some of the keys: what is divided, by what, the quotient, and the log of the divisor."""
    total = sum(EXPONENTIALS[keys])
    weighted = sum(e * v for e, v in zip(EXPONENTIALS[keys], VALUES[keys], strict=True))
    return weighted, total, weighted / total, math.log(total)


def without_keys() -> None:
    heading("A part without keys has lse = log 0 = -inf")
    some, none = (torch.tensor([30.0]), torch.tensor(2.3)), (torch.tensor([torch.nan]), torch.tensor(-torch.inf))
    weight = torch.exp(none[1] - none[1])
    check("it changes nothing, whatever stands in it", torch.equal(merge([none, some])[0], some[0]))
    check("nothing but such parts: 0, and -inf again", merge([none, none])[0].item() == 0)
    mistake("its weight, if -inf is the largest lse: exp(-inf - -inf)", wrong=str(weight.item()), right="0")


def who_computes_what() -> None:
    heading(f"{TOKENS} tokens on 2 ranks: token t attends to t + 1 tokens")
    runs = [range(0, 6), range(6, 12)]
    rows = [("in halves", *(said(run) for run in runs), *(pairs([*run]) for run in runs))]
    shares = [share(TOKENS, rank, 2).tokens() for rank in range(2)]
    rows.append(("in a zigzag", *map(said, shares), *map(pairs, shares)))
    table(("", "rank 0", "rank 1", "pairs of rank 0", "of rank 1"), rows)
    check("all pairs are somebody's", sum(rows[0][3:]) == sum(rows[1][3:]) == TOKENS * (TOKENS + 1) // 2)
    check("in a zigzag both have as many", rows[1][3] == rows[1][4])
    four = [[len(share(n, rank, 2, turn).tokens()) for rank in range(2)] for turn, n in enumerate([1, 1, 1, 1])]
    check("four prompts of one token: the ranks take turns", [sum(x) for x in zip(*four, strict=True)] == [2, 2])


def two_ranks() -> None:
    cp = ParallelState.initialize(context_parallel_size=2, device="cpu").cp
    torch.manual_seed(0)
    q, k, v = torch.randn(3, TOKENS + 1, 1, D)  # the same on both ranks: only the rows that are its own are used
    cache, table_of_rows = PagedKVCache(1, 4, PAGE, 1, D), ContextTable(1, 8, PAGE, cp.device, cp)
    table_of_rows.set_pages([(0, 0, range(7))])
    one = np.ones(1, dtype=np.int64)
    step = table_of_rows.prefill(np.arange(TOKENS), 0 * one, 0 * one, TOKENS * one)
    mine = step.input_ids  # the tokens were numbered
    with cp.ledger.recording() as ledger:
        o = ContextParallelAttention(cache, step.meta)(0, q[mine], k[mine], v[mine])
        sent = [entry for entry in ledger.entries if entry.op == "exchange"]
    if cp.rank == 0:
        heading("Prefill on two ranks: each block of k and v goes round, and is attended to on its way")
        print_ring()
    right = attend(q[:TOKENS], k[:TOKENS], v[:TOKENS], causal=True)[0]
    stored = cache.k[0].flatten(0, 1).abs().sum((1, 2)).nonzero().squeeze(-1)
    numbers = torch.tensor([
        torch.allclose(o, right[mine], atol=1e-6), len(sent), sent[0].bytes, work(step, cp.rank), len(stored),
    ])  # fmt: skip
    everyone = torch.stack(all_gather(numbers, cp, "told")).tolist()  # COMM all-gather [5]: to show them in one place

    new = table_of_rows.decode(0 * one, TOKENS * one)
    with cp.ledger.recording() as ledger:
        last = ContextParallelAttention(cache, new.meta)(0, q[TOKENS:], k[TOKENS:], v[TOKENS:])
        answer = ledger.entries[0]
    tokens = torch.tensor([float(new.meta.groups[0].lens)])
    lens = all_gather(tokens, cp, "told")  # COMM all-gather [1]: to show them in one place
    if cp.rank == 0:
        size = 2 * len(mine) * D * 4
        check("each rank's rows are those of attention over the whole prompt", all(row[0] for row in everyone))
        check(
            f"one message a rank: {size} bytes, k and v of its 6 tokens",
            [row[1:3] for row in everyone] == [[1, size]] * 2,
        )
        check("as many pairs on both", [row[3] for row in everyone] == [39, 39])
        heading(f"Page g lies on rank g % 2: {TOKENS} tokens in pages of {PAGE}")
        table(("rank", "pages", "tokens"), [(rank, said(range(rank, 6, 2)), everyone[rank][4]) for rank in range(2)])
        check("no token lies twice", sum(row[4] for row in everyone) == TOKENS)
        heading("Decode: both ranks have the new query, and attend to their own pages")
        table(("rank", "tokens attended to"), [(rank, int(n)) for rank, n in enumerate(lens)])
        print(f"  then {answer.op}: {list(answer.shape)}, o and lse, merged on both")
        whole = attend(q[TOKENS:], k, v)[0]
        check("the merged answer is that of all 13 tokens", torch.allclose(last, whole, atol=1e-6))


def print_ring() -> None:
    shares = [share(TOKENS, rank, 2) for rank in range(2)]
    rows = []
    for step in range(2):
        for rank in range(2):
            source = (rank - step) % 2
            block = seen(shares[rank], shares[source], role(rank, 2), role(source, 2))
            queries = shares[rank].tokens()[shares[rank].size - block.queries :]
            keys = shares[source].tokens()[: block.keys]
            count = block.queries * (block.queries + 1) // 2 if block.causal else block.queries * block.keys
            which = "own and before" if block.causal else "all"
            sends = f"k, v of {said(keys)} to rank {1 - rank}" if step == 0 else "nothing more"
            rows.append((step, rank, said(queries), said(keys), which, count, sends))
    table(("step", "rank", "queries", "keys", "seen", "pairs", "meanwhile it sends"), rows)


def work(step: RingInputs, rank: int) -> int:
    """(query, key) pairs of this rank, as its plan says."""
    total = 0
    for pieces in step.meta.pieces:
        for piece in pieces:
            queries, keys = (x.stop - x.start for x in (piece.queries, piece.keys))
            total += queries * (queries + 1) // 2 if piece.causal else queries * keys
    return total


def said(tokens) -> str:
    return " ".join(map(str, tokens))


if __name__ == "__main__":
    run_main(main)
