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
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Link:
    """Between two ranks: what a message costs that is empty, and how many bytes a second a rank sends or receives."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, op: str, nbytes: int, ranks: int) -> float:
        """How long `op` of a tensor of `nbytes` on each rank takes."""
        return rounds(op, ranks) * (self.latency_s + _each(op, nbytes, ranks) / self.bytes_per_s)

    @staticmethod
    def fit(op: str, ranks: int, small: tuple[int, float], large: tuple[int, float]) -> "Link":
        """The link on which `op` takes what was measured: (tensor bytes, seconds) of a small tensor and of a large one.

        Raises ValueError if the large one was not slower: then no bandwidth can be read from them.
        """
        (n, fast), (m, slow) = small, large
        moved = rounds(op, ranks) * (_each(op, m, ranks) - _each(op, n, ranks))
        if slow <= fast or moved <= 0:
            raise ValueError(
                f"{m} bytes took {slow:.2g} s and {n} bytes {fast:.2g} s: too alike to tell bytes from messages"
            )
        bytes_per_s = moved / (slow - fast)
        latency = fast / rounds(op, ranks) - _each(op, n, ranks) / bytes_per_s
        return Link(max(0.0, latency), bytes_per_s)


def _each(op: str, nbytes: int, ranks: int) -> float:
    """Bytes of each of the messages that wait for one another."""
    return {"all_reduce": nbytes / ranks, "gather": (ranks - 1) * nbytes}.get(op, nbytes)
