"""What a message costs: trips * latency + bytes on the wire / bandwidth.

The ledger counts tensors: the bytes that a rank hands in. What crosses the wire depends on how the collective is carried
out. With n bytes handed in by each of R ranks, the rank with the most to do

                 carried out as                                   trips           moves in one direction
    all_reduce   ring: reduce-scatter, then all-gather            2 (R - 1)       2 (R - 1) / R * n
    all_gather   ring: each shard goes round                      R - 1           (R - 1) / R * (R n), what comes out
    gather       rank 0 takes a shard from each other rank        1               (R - 1) * n
    broadcast    tree: who has it passes it on, doubling          ceil(log2 R)    ceil(log2 R) * n

gloo does the first, third and fourth so (allreduce.cc, gather.cc, broadcast.cc); NCCL picks rings and trees by size, and
for a few kilobytes between GPUs of one host symmetric_memory.py takes one trip. So small messages cost trips, large ones
bytes: at R = 8 a ring takes 14 trips to move 1.75 n. (Patarasuk and Yuan 2009 show that no all-reduce moves less.)
"""

from dataclasses import dataclass


def wire_bytes(op: str, tensor_bytes: int, size: int) -> int:
    """Bytes that the busiest of `size` ranks sends, or receives, if each hands in `tensor_bytes`; rounded up."""
    return -(-_parts(op, size) * tensor_bytes // _pieces(op, size))


def trips(op: str, size: int) -> int:
    """Messages that must follow one another."""
    return {
        "all_reduce": 2 * (size - 1), "all_gather": size - 1, "gather": min(1, size - 1),
        "broadcast": (size - 1).bit_length(),
    }[op]  # fmt: skip


@dataclass(frozen=True)
class Link:
    """Between two ranks: what a message costs that is empty, and what each byte adds."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, op: str, tensor_bytes: int, size: int) -> float:
        return trips(op, size) * self.latency_s + wire_bytes(op, tensor_bytes, size) / self.bytes_per_s

    @staticmethod
    def fit(op: str, size: int, small: tuple[int, float], large: tuple[int, float]) -> "Link":
        """The link on which `op` takes what was measured: two times (tensor bytes, seconds), of a small and a large one.

        Raises ValueError if the large one was not slower: then no bandwidth can be read from them.
        """
        (n, fast), (m, slow) = small, large
        moved = wire_bytes(op, m, size) - wire_bytes(op, n, size)
        if slow <= fast or moved <= 0:
            raise ValueError(
                f"{m} bytes took {slow:.2g} s and {n} bytes {fast:.2g} s: too alike to tell bytes from trips"
            )
        bytes_per_s = moved / (slow - fast)
        latency = (fast - wire_bytes(op, n, size) / bytes_per_s) / trips(op, size)
        return Link(max(0.0, latency), bytes_per_s)


def _parts(op: str, size: int) -> int:
    """Of `_pieces` into which a tensor is cut: how many the busiest rank moves."""
    return {"all_reduce": 2 * (size - 1), "all_gather": size - 1, "gather": size - 1, "broadcast": trips(op, size)}[op]


def _pieces(op: str, size: int) -> int:
    return size if op == "all_reduce" else 1
