"""What all ranks together have said, each message counted once: for whoever compares a whole layout with a formula."""

from typing import NamedTuple

from common.distributed.collectives import TPGroup
from common.distributed.cost_model import wire_bytes
from common.distributed.messages import share_all


class Messages(NamedTuple):
    """Of one kind, between all ranks together; bytes of their tensors, and on the wire."""

    calls: int = 0
    bytes: int = 0
    wire: int = 0

    def __add__(self, other: "Messages") -> "Messages":
        return Messages(*(a + b for a, b in zip(self, other, strict=True)))


def messages_of_all(world: TPGroup) -> dict[str, Messages]:
    """Everything that any ranks have said to each other, by operation; what one sends to another one also by purpose.

    A collective counts once, as its group's first rank has seen it; a message at both its ends. Every rank calls it.
    """
    mine: dict[str, Messages] = {}
    for e in world.ledger.entries:
        direct = e.op in ("send", "receive")
        if direct or e.rank == 0:
            kind = f"{e.op} {e.label}" if direct else e.op
            mine[kind] = mine.get(kind, Messages()) + Messages(1, e.bytes, wire_bytes(e.op, e.bytes, e.ranks))
    total: dict[str, Messages] = {}
    for one in share_all(mine, world):
        for kind, said in one.items():
            total[kind] = total.get(kind, Messages()) + Messages(*said)
    return total
