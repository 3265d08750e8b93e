"""Heads re-cut: which rank sends which heads to whom when the two sides have different numbers of ranks.

    python ch07_sglang_radix/disaggregation/demo_3_heads_recut.py

No engine: the pages are made of head numbers, so that one sees where they go. Qwen2.5-0.5B has 2 KV heads, Qwen3 8. Then a wrong
cut: each rank sends its whole page to the rank of its own number.
"""

import numpy as np

from ch07_sglang_radix.disaggregation.head_slices import head_slices, latent_slices
from common.distributed.launch import run_main
from common.layers.heads import HeadLayout
from common.teaching.show import check, heading, mistake, table


def main() -> None:
    for kv_heads, prefill, decode in ((2, 1, 2), (2, 2, 1), (2, 2, 3), (8, 4, 2), (2, 4, 4)):
        recut(kv_heads, prefill, decode)
    latent()
    by_number()


def held_by(kv_heads: int, rank: int, ranks: int) -> tuple[int, ...]:
    return HeadLayout.of(kv_heads, kv_heads, rank, ranks).kv_heads


def arrives(kv_heads: int, prefill: int, rank: int, decode: int) -> list[int]:
    """The heads on decode rank `rank`'s page, after everybody has sent what its slice says."""
    page = np.full(len(held_by(kv_heads, rank, decode)), -1)
    for source, heads, places in head_slices(kv_heads, prefill, rank, decode):
        payload = np.array(held_by(kv_heads, source, prefill))[list(heads)]
        for there, here in places:
            page[here] = payload[there]
    return page.tolist()


def recut(kv_heads: int, prefill: int, decode: int) -> None:
    heading(f"{kv_heads} KV heads: prefill on {prefill} rank(s), decode on {decode}")
    rows = []
    for rank in range(decode):
        for source, heads, places in head_slices(kv_heads, prefill, rank, decode):
            page = [f"h{head}" for head in held_by(kv_heads, source, prefill)]
            sent = [page[i] for i in heads]
            to = ", ".join(f"{sent[there]} -> place {here}" for there, here in places)
            rows.append((source, " ".join(page), " ".join(sent), rank, to))
    table(("from rank", "its page", "sends", "to rank", "where it goes"), rows)
    want = [list(held_by(kv_heads, rank, decode)) for rank in range(decode)]
    check(
        "every place has the head that the other side's cut says",
        [arrives(kv_heads, prefill, r, decode) for r in range(decode)] == want,
    )


def latent() -> None:
    heading("Latent pages (MLA): every rank has all of it, so each decode rank asks one")
    table(
        ("decode rank", "of 4 asks prefill rank", "of 2"),
        [(rank, latent_slices(2, rank, 4)[0].source, "") for rank in range(4)],
    )


def by_number() -> None:
    heading("Without re-cutting: prefill on 2 ranks, decode on 1")
    wrong = [0]  # rank 0's page, which has one head where the other side has two
    mistake("heads on decode's page", f"{wrong}, and head 1 is nobody's", arrives(2, 2, 0, 1))


if __name__ == "__main__":
    run_main(main)
