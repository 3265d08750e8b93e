"""Attention consumes page ids: K and V lie anywhere, a list of numbers says where, and the result is the dense one.

    torchrun --nproc_per_node=2 ch07_sglang_radix/demo_3_page_ids.py

One sequence of ten tokens on pages of 4, which the pool has given out in the order 5, 2, 7. Its K and V are written
there, among pages that belong to others and hold other numbers. Attention gets q, the new tokens' k and v, and page ids:
no K, no V, no tree. Beside it stands attention over K and V in one piece. Then the ids are changed, and the numbers with
them. On two ranks each holds its own heads of every page; the ids are the same.
"""

import torch
import torch.nn.functional as F

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.torch_native import TorchNativeAttention
from common.distributed.launch import run_main
from common.parallel_state import TPGroup, all_gather, initialize_tensor_parallel
from common.teaching.show import check, heading, table

PAGES, P, PROMPT = 8, 4, 9  # pages of the pool, tokens a page; nine tokens are computed at once, the tenth is decoded
Q_HEADS, KV_HEADS, D = 4, 2, 4
RIGHT, OTHERS = [5, 2, 7], 3  # the sequence's pages; a page of somebody else


def main() -> None:
    tp = initialize_tensor_parallel(device="cpu")
    if KV_HEADS % tp.size:
        raise ValueError(f"{tp.size} ranks cannot share {KV_HEADS} KV heads here; start 1 or 2")
    torch.manual_seed(0)
    q, k, v = torch.randn(PROMPT + 1, Q_HEADS, D), *torch.randn(2, PROMPT + 1, KV_HEADS, D)
    others = torch.randn(1, 2, PAGES, P, KV_HEADS, D)  # what lies in the pool before
    dense = attend_densely(q, k, v)

    if tp.rank == 0:
        heading(f"Ten tokens on pages {RIGHT} of {PAGES}, {P} tokens a page")
        layout()
    mine = Rank(tp, q, k, v, others)
    prefill = mine.gathered(mine.step(RIGHT, 0, PROMPT))
    decode = mine.gathered(mine.step(RIGHT, PROMPT, PROMPT + 1))
    if tp.rank == 0:
        heading("What attention is told, and what it gives back")
        told("prefill", 0, PROMPT)
        told("decode", PROMPT, PROMPT + 1)
        rows = [
            ("K and V in one piece", *numbers(dense[-1])), ("K and V by page id", *numbers(decode[-1])),
        ]  # fmt: skip
        table(("token 9, head 0", "o[0]", "o[1]", "o[2]", "o[3]"), rows)
        far = (torch.cat((prefill, decode)) - dense).abs().max()
        print(f"  all ten tokens, all heads: {far:.0e} apart at most")
        check("the result does not depend on where the pages lie", far < 1e-6)

    wrong = {
        f"page {OTHERS} instead of 2": [5, OTHERS, 7],
        "2 and 5 change places": [2, 5, 7],
        "2 and 7 change places": [5, 7, 2],
    }
    results = {name: mine.gathered(mine.step(ids, PROMPT, PROMPT + 1)) for name, ids in wrong.items()}
    if tp.rank == 0:
        heading("Wrong ids, right code: the same decode step")
        rows = [("right", str(RIGHT), *numbers(decode[-1]), "")]
        for name, ids in wrong.items():
            o = results[name][-1]
            rows.append((name, str(ids), *numbers(o), f"{(o - dense[-1]).abs().max():.2f}"))
        table(("", "page ids", "o[0]", "o[1]", "o[2]", "o[3]", "furthest off"), rows)
        off = {name: float((o[-1] - dense[-1]).abs().max()) for name, o in results.items()}
        print("  two full pages may change places: a decode sees all keys, and RoPE has put its position into each")
        print("  the last page may not: its empty slots would count, and keys on a full page would not")
        check("nothing fails, and two of three are wrong", [far > 1e-3 for far in off.values()] == [True, False, True])

    shares = all_gather(torch.tensor([mine.cache.kv.numel()]), tp, "to compare")  # COMM all-gather [1]: for the table
    if tp.rank == 0:
        heading(f"{tp.size} rank(s): the same ids, other heads")
        page = str([P, KV_HEADS // tp.size, D])
        rows = [
            (rank, str(RIGHT), heads_of(rank, Q_HEADS, tp.size), heads_of(rank, KV_HEADS, tp.size), page, int(share))
            for rank, share in enumerate(shares)
        ]
        table(("rank", "page ids", "query heads", "KV heads", "K on a page", "numbers in the pool"), rows)
        check("the ranks' outputs side by side are the dense one", torch.allclose(decode[-1], dense[-1], atol=1e-6))


class Rank:
    """One rank's heads of everything: its pool of pages, with somebody else's numbers in the rest of it."""

    def __init__(self, tp: TPGroup, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, others: torch.Tensor):
        self.tp = tp
        self.q, self.k, self.v = (x.chunk(tp.size, dim=1)[tp.rank] for x in (q, k, v))  # [10, heads/R, d]
        self.cache = PagedKVCache(1, PAGES, P, KV_HEADS // tp.size, D)
        self.cache.kv.copy_(others.chunk(tp.size, dim=4)[tp.rank])

    def step(self, ids: list[int], start: int, stop: int) -> torch.Tensor:
        """Tokens start .. stop-1 are written where they belong, and attend by `ids`. -> o [stop - start, Hq/R, d]."""
        where, ends, length = torch.tensor(slots(start, stop)), torch.tensor([0, stop - start]), torch.tensor([stop])
        meta = AttentionMetadata(where, torch.tensor([ids]), ends, length, P)
        return TorchNativeAttention(self.cache, meta)(0, self.q[start:stop], self.k[start:stop], self.v[start:stop])

    def gathered(self, o: torch.Tensor) -> torch.Tensor:
        """The heads of all ranks [T, Hq, d]; an engine adds up their projections instead and never does this."""
        parts = all_gather(o.contiguous(), self.tp, "heads")  # COMM all-gather [T, Hq/R, d]: to compare
        return torch.cat(parts, dim=1)


def heads_of(rank: int, heads: int, size: int) -> str:
    return str(list(range(heads))[rank * heads // size : (rank + 1) * heads // size])


def slots(start: int, stop: int) -> list[int]:
    """Where these tokens of the sequence lie."""
    return [RIGHT[t // P] * P + t % P for t in range(start, stop)]


def attend_densely(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The textbook: one K, one V, a causal mask. [T, heads, d] -> o [T, Hq, d]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


def layout() -> None:
    for page in range(PAGES):
        tokens = [RIGHT.index(page) * P + i for i in range(P)] if page in RIGHT else []
        cells = [f"token {t}" if t <= PROMPT else "empty" for t in tokens] or ["somebody else's"]
        print(f"  page {page}, slots {page * P:2} to {page * P + P - 1:2}: {', '.join(cells)}")


def told(name: str, start: int, stop: int) -> None:
    where = f"query_start [0, {stop - start}]  slot_mapping {slots(start, stop)}"
    print(f"  {name:8} page_table {[RIGHT]}  context_lens [{stop}]  {where}")


def numbers(o: torch.Tensor) -> list[str]:
    """The first head, [d]."""
    return [f"{x:+.4f}" for x in o[0]]


if __name__ == "__main__":
    run_main(main)
