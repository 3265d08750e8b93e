"""What a message costs: the bytes of its tensor, the bytes on the wire, and time.

The ledger counts tensor bytes: n, what one rank hands over. How often they cross between ranks depends on the operation
and on R, the number of ranks:

    op              on the wire, all together   one after the other   bytes of each
    all_reduce      2 (R-1) n                   2 (R-1)               n / R      ring: parts are added up, then handed round
    reduce_scatter  (R-1) n                     R-1                   n / R      ring: the first half of it
    all_gather      R (R-1) n                   R-1                   n          ring: the second; n is a rank's own shard
    all_to_all      (R-1) n                     R-1                   n / R      pairwise: in round i with rank + i
    gather          (R-1) n                     1                     (R-1) n    all send their shard n to rank 0
    broadcast       (R-1) n                     log2 R, rounded up    n          a tree
    send            n                           1                     n          to one rank, however many there are
    receive         0                           0                     0          its other end: counted by the sender
    exchange        R n                         1                     n          round a ring: all send on, all at once

    seconds = start + messages one after the other * (latency + bytes of each / bandwidth)

A kernel of one's own may send a small sum to all others at once. Then a measurement of it stands for its start and all of its
latency (Link.sums); the bytes that must leave a rank are the ring's.

Patarasuk and Yuan 2009 for the ring; Thakur, Rabenseifner and Gropp 2005 for the others. Gloo's own bytes, counted at a
machine's loopback device with tensors of 4 MB on 2, 3 and 4 ranks, are these within 3 %; with small ones the envelopes
(addresses, acknowledgements) are several times the letter. How far the seconds are from those of a machine is measured by
measure_links.py, and drawn in figures/links.svg.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Cost(NamedTuple):
    """Of one operation: its bytes on the wire in units of (R-1) n, its rounds, and the bytes of each of their messages."""

    on_the_wire: float
    rounds: int
    each: float


def _cost(op: str, nbytes: int, ranks: int) -> Cost:
    if ranks == 1:
        return Cost(0, 0, 0.0)
    share, tree = nbytes / ranks, math.ceil(math.log2(ranks))
    costs = {
        "all_reduce": Cost(2, 2 * (ranks - 1), share),
        "reduce_scatter": Cost(1, ranks - 1, share),
        "all_gather": Cost(ranks, ranks - 1, nbytes),
        "all_to_all": Cost(1, ranks - 1, share),
        "gather": Cost(1, 1, (ranks - 1) * nbytes),
        "broadcast": Cost(1, tree, nbytes),
        "send": Cost(1 / (ranks - 1), 1, nbytes),
        "receive": Cost(0, 0, 0.0),
        "exchange": Cost(ranks / (ranks - 1), 1, nbytes),
    }
    return costs[op]


def wire_bytes(op: str, nbytes: int, ranks: int) -> int:
    """Bytes between all `ranks` together for one `op` of a tensor of `nbytes` on each."""
    return round(_cost(op, nbytes, ranks).on_the_wire * (ranks - 1) * nbytes)


def rounds(op: str, ranks: int) -> int:
    """Messages that wait for one another."""
    return _cost(op, 0, ranks).rounds


@dataclass(frozen=True)
class Sample:
    """A measurement: `op` of `nbytes` on each of `ranks` took `seconds`."""

    op: str
    ranks: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Link:
    """Between two ranks: what a message costs that is empty, and how many bytes a second a rank sends or receives.

    start_s: what an operation costs before its first message, whatever it is: a kernel's launch on a GPU. sums: the quickest
    all-reduces that were measured, if those are not sent as the others are.
    """

    latency_s: float
    bytes_per_s: float
    start_s: float = 0.0
    sums: tuple[Sample, ...] = ()

    def seconds(self, op: str, nbytes: int, ranks: int) -> float:
        """How long `op` of a tensor of `nbytes` on each rank takes."""
        cost, measured = _cost(op, nbytes, ranks), [s for s in self.sums if s.op == op and s.ranks <= ranks]
        if measured:  # of fewer ranks, too: more are no quicker, as each hears from more others
            wire = Link(0.0, self.bytes_per_s)
            starts = [s.seconds - wire.seconds(op, s.nbytes, s.ranks) for s in measured]
            return max(starts) + wire.seconds(op, nbytes, ranks)
        return bool(cost.rounds) * self.start_s + cost.rounds * (self.latency_s + cost.each / self.bytes_per_s)

    def error(self, samples: Sequence[Sample]) -> float:
        """How far off it is: the root mean square of (model - measured) / measured."""
        off = [self.seconds(s.op, s.nbytes, s.ranks) / s.seconds - 1 for s in samples]
        return math.sqrt(sum(x * x for x in off) / len(off))

    @staticmethod
    def fit(samples: Sequence[Sample]) -> "Link":
        """The link whose times are nearest to the measured ones, by least squares of the relative error.

        Relative, because a microsecond is much of a small message and nothing of a large one. Two samples are met exactly.
        Raises ValueError if more bytes did not take longer: then no bandwidth can be read from them.
        """
        costs = [_cost(s.op, s.nbytes, s.ranks) for s in samples]
        took = np.array([s.seconds for s in samples])
        # seconds = rounds * latency + (rounds * each) / bandwidth: linear in latency and in 1 / bandwidth
        columns = np.array([[c.rounds, c.rounds * c.each] for c in costs]) / took[:, None]
        scale = np.maximum(columns.max(axis=0), 1e-300)  # seconds and seconds a byte differ by many powers of ten
        (latency, per_byte), _, rank, _ = np.linalg.lstsq(columns / scale, np.ones(len(took)), rcond=None)
        latency, per_byte = latency / scale[0], per_byte / scale[1]
        if latency < 0:  # a message that costs less than nothing: then nothing, and bytes explain all
            latency, per_byte = 0.0, columns[:, 1].sum() / (columns[:, 1] ** 2).sum()
        if rank < 2 or per_byte <= 0:
            least, most = min(samples, key=lambda s: s.nbytes), max(samples, key=lambda s: s.nbytes)
            raise ValueError(
                f"{most.nbytes} bytes took {most.seconds:.2g} s and {least.nbytes} bytes {least.seconds:.2g} s: "
                f"too alike to tell bytes from messages"
            )
        return Link(float(latency), 1 / float(per_byte))
