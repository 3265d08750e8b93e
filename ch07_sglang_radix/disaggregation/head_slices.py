"""Which heads of which rank's page go where, if the two sides have different numbers of ranks.

    2 KV heads, prefill on 1 rank, decode on 2        rank 0's page [h0 h1]  ->  rank 0 [h0], rank 1 [h1]
    2 KV heads, prefill on 2, decode on 3 (padded)    rank 0's [h0], 1's [h1] ->  rank 0 [h0 h0], 1 [h0 h1], 2 [h1 h1]

HeadLayout (common/layers/heads.py) says who holds what: split, replicated or padded. A head that several prefill ranks hold has one
sender for each receiver; a head that a decode rank holds twice travels once and is copied there. Latent pages (MLA) are the same
on every rank, so that any rank can send all of one.
SGLang 0.5.23 (srt/disaggregation/common/conn.py and mooncake/conn.py, send_kvcache_slice) has split and replicated heads.
"""

from typing import NamedTuple

from common.layers.heads import HeadLayout


class HeadSlice(NamedTuple):
    """What prefill rank `source` sends of each page: its local heads `heads`, each once. places: (which of them, local head of the
    receiver), one for each head that the receiver fills from here."""

    source: int
    heads: tuple[int, ...]
    places: tuple[tuple[int, int], ...]


def head_slices(num_kv_heads: int, prefill_ranks: int, rank: int, decode_ranks: int) -> list[HeadSlice]:
    """What decode rank `rank` of `decode_ranks` gets, one slice for each prefill rank that has something for it, by source.

    Every local head is filled exactly once.
    """
    held = [HeadLayout.of(num_kv_heads, num_kv_heads, i, prefill_ranks).kv_heads for i in range(prefill_ranks)]
    mine = HeadLayout.of(num_kv_heads, num_kv_heads, rank, decode_ranks).kv_heads
    near = (
        rank * prefill_ranks // decode_ranks
    )  # so that replicated heads are not all fetched from the first who has them
    places: dict[int, list[tuple[int, int]]] = {}
    for local, head in enumerate(mine):
        holders = [i for i in range(prefill_ranks) if head in held[i]]
        source = min(holders, key=lambda i: (abs(i - near), i))
        places.setdefault(source, []).append((held[source].index(head), local))
    return [_slice(source, places[source]) for source in sorted(places)]


def latent_slices(prefill_ranks: int, rank: int, decode_ranks: int) -> list[HeadSlice]:
    """The same for pages that every rank holds whole: one source, and the pages count as one head."""
    return [HeadSlice(rank * prefill_ranks // decode_ranks, (0,), ((0, 0),))]


def _slice(source: int, places: list[tuple[int, int]]) -> HeadSlice:
    heads = tuple(dict.fromkeys(head for head, _ in places))
    return HeadSlice(source, heads, tuple((heads.index(head), local) for head, local in places))
