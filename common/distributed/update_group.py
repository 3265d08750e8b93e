"""A trainer and the ranks of an engine in one group, over which the trainer broadcasts new weights.

    trainer (rank 0)                               ranks 1 .. R of the group: those of an engine
    port = open_store(host)        -- port ->      UpdateGroup(host, port, 1 + rank, 1 + R)
    UpdateGroup(host, port, 0, 1 + R)              (both wait until all have come)
    broadcast(x)                                   broadcast(empty x)

It has nothing to do with the group in which the ranks work: they go on without it, whatever becomes of it. gloo sends a broadcast
down a tree, in which a rank may wait for another rank and not for the trainer. So whoever hears of a death, or gives up, leaves
the group at once, which breaks the connections of the others and lets them hear of it too: nobody waits for somebody who waits for
the dead. SGLang 0.5.23: srt/model_executor/model_runner.py, init_weights_update_group; there the backend is NCCL.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from common.distributed.reach import connect, in_time

TIMEOUT_S = 30.0  # for all to come, and for a broadcast to begin
REACH_S = 5.0  # for a name to be looked up, and for somebody to take a connection there
GREET_S = 10.0  # for a store to answer, once it is reached
MAX_MEMBERS = 4096  # each has a connection to every other


def open_store(host: str = "127.0.0.1", port: int = 0, timeout_s: float = TIMEOUT_S) -> dist.TCPStore:
    """The trainer's: where the others meet. Its `.port` is a free one unless it was given; keep it as long as the group."""
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def refuse_size(size: int, offset: int, ranks: int) -> None:
    """Raises ValueError if these ranks, from rank `offset` of the group on, are not the last of its `size` members."""
    if size != offset + ranks:
        raise ValueError(f"world_size={size}, but rank_offset={offset} and {ranks} rank(s) here make {offset + ranks}")


def reach(host: str, port: int) -> str:
    """The address at which the trainer listens; ValueError, within REACH_S, if nobody does. Not for an event loop: it waits."""
    try:
        with connect(host, port, REACH_S) as link:
            return link.getpeername()[0]
    except OSError as error:
        raise ValueError(
            f"nobody listens at {host}:{port} ({error.strerror or _first_line(error)}); start the trainer first"
        ) from None


class UpdateGroup:
    """One member, of `size`; rank 0 sends. Raises ValueError, and is no member, if the others do not come in time."""

    def __init__(
        self, host: str, port: int, rank: int, size: int, name: str = "weight_update_group",
        timeout_s: float = TIMEOUT_S, store: dist.Store | None = None,
    ):  # fmt: skip
        self.rank, self.size, self.name = rank, size, name
        self._store = dist.PrefixStore(name, store or _store_at(host, port, min(timeout_s, GREET_S)))
        patience = timedelta(seconds=timeout_s)
        try:
            self._group = dist.ProcessGroupGloo(self._store, rank, size, patience)
        except (RuntimeError, ValueError) as error:
            self.leave()
            raise ValueError(
                f"group {name}: not all {size} members have come to {host}:{port} within {timeout_s:g} s "
                f"({_first_line(error)}); start the trainer first, and give each its own rank"
            ) from None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] on the CPU, of rank 0 -> x on every member, in place. ValueError if one is lost; the group is gone then."""
        if self._group is None:
            raise ValueError(f"group {self.name} is gone; join a new one")
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            self._group.broadcast([x], options).wait()  # COMM broadcast [tensor]: the trainer's weights to every rank
        except RuntimeError as error:
            self.leave()
            raise ValueError(f"group {self.name} has lost a member ({_first_line(error)}); join a new one") from None
        return x

    def leave(self) -> None:
        """Close every connection, also under a broadcast that others wait for. Safe to call twice."""
        self._group = self._store = None


def _store_at(host: str, port: int, patience_s: float) -> dist.Store:
    """A TCPStore's own timeout is for trying again: it waits forever for the first word of somebody who listens and is silent."""
    address = reach(host, port)

    def greet() -> dist.Store:
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=patience_s / 2))

    try:
        return in_time(greet, patience_s, "its first word")
    except (RuntimeError, TimeoutError) as error:
        raise ValueError(
            f"who listens at {host}:{port} is no trainer's store ({_first_line(error)}); give the port of open_store()"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rpartition("] ")[2][:160]
