"""One rank among its peers, and every way in which they talk.

`TPGroup` says which rank this is and whom it can talk to. Layers take it as an argument, so a notebook can build all R ranks
of a layer in one process (`TPGroup(rank, size)` without process groups) and add up the partial sums by hand. The groups of
all other kinds (pipeline, context, ...: layout.py) are of the same class; it is named after the first.

Collectives, all in one file so that none passes by the process's ledger, which records each under a label:

    all_reduce        partial sums -> the full sum on every rank          start_all_reduce: while something else is computed
                                                                          all_reduce_add_norm: and the norm that follows it
    reduce_scatter    partial sums -> this rank's rows of the full sum    all_reduce = reduce_scatter, then all_gather
    all_gather        shards       -> all shards on every rank            all_gather_merge: and what the parts of an attention make
    gather            shards       -> all shards on rank 0
    broadcast         rank 0's     -> every rank's
    all_to_all        rows for each rank -> the rows that each has for me    start_all_to_all: while something else is computed
    send_to, receive_from    one rank's -> another one's; sending does not wait, start_receive neither
    start_exchange    to one rank, and from another at the same time    round a ring; while something else is computed

Vocabulary and semantics: Megatron-LM (Shoeybi et al. 2019); vLLM and SGLang call a group a GroupCoordinator. In one file:
whoever asks how ranks talk, and what happens when one is gone, finds all of it here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from common.distributed.goodbyes import Goodbyes
from common.distributed.ledger import Ledger
from common.distributed.membership import Membership
from common.distributed.processes import DEAD, RankFailure, fate
from common.distributed.shared_memory import SharedMemoryAllReduce
from common.distributed.spawn import SpawnedRanks
from common.distributed.symmetric_memory import SymmetricAllReduce

CPU = torch.device("cpu")
GONE_S = 5.0  # a dying process closes its sockets before it is gone: a moment, or longer where nobody gets a core
SILENCE_IS_TOLD_S = 15.0  # a death on another host is told by its host, if that one is silent after SILENT_BEATS
# torch 2.13 gave them new names; 2.11 has the old ones
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class TPGroup:
    """This rank among the peers of one group.

    device_group carries tensors (gloo on CPU, NCCL on GPU), control_group is always gloo and carries what
    the CPU decides. Both are None for a single process and for ranks that a notebook plays by hand.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    device_group: Any = None
    control_group: Any = None
    peers: tuple[tuple[int, int], ...] = ()  # (host, pid) of each rank of the world, to name the one that died
    fast_all_reduce: SymmetricAllReduce | SharedMemoryAllReduce | None = None  # between GPUs, or CPU ranks, of one host
    spawned: SpawnedRanks | None = None  # rank 0 started the others: only it runs a script, they follow
    goodbyes: Goodbyes | None = None  # torchrun started them: who shuts down says so
    members: Membership | None = None  # of a group that spans hosts: who of another one has died
    ranks: tuple[int, ...] = ()  # of the members in the world; (): 0 .. size-1
    ledger: Ledger = field(default_factory=Ledger, compare=False)  # one a process, of all its groups

    def __post_init__(self):
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} is outside 0..{self.size - 1} (size={self.size})")

    @property
    def world_rank(self) -> int:
        return self.ranks[self.rank] if self.ranks else self.rank


class _Health:
    """Of this process's messages: one that failed may have left a group that never ends."""

    failed = False


health = _Health()


# --- the collectives: one rank alone has nothing to say, so a group of 1 returns its input and records nothing


def all_reduce(x: torch.Tensor, tp: TPGroup, label: str) -> torch.Tensor:
    """x [...] partial on each rank -> the sum, equal on every rank. Go on with the result: x may be overwritten."""
    if tp.size == 1:
        return x
    if tp.fast_all_reduce and tp.fast_all_reduce.fits(x):
        return _communicate("all_reduce", x, tp, label, lambda group: tp.fast_all_reduce(x))
    _communicate("all_reduce", x, tp, label, lambda group: dist.all_reduce(x, group=group))
    return x


def all_reduce_add_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Any, tp: TPGroup, label: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, D] partial on each rank -> (norm(sum + residual), sum + residual); where x fits, GPUs do it in one kernel.

    norm: an RMSNorm, with weight, eps, and add(x, residual) for what does not fit. That kernel makes no codes of its rows: who
    wants some (norm.rounding) has a launch of its own then.
    """
    fast = tp.fast_all_reduce
    if tp.size > 1 and fast and fast.fits_norm(x):
        return _communicate("all_reduce", x, tp, label, lambda group: fast.add_norm(x, residual, norm.weight, norm.eps))
    x = all_reduce(x, tp, label)  # COMM all-reduce [T, D]: partial sums -> full sum
    return norm.add(x, residual)


def start_all_reduce(x: torch.Tensor, tp: TPGroup, label: str) -> Callable[[], torch.Tensor]:
    """Begin the sum of x [...] and compute something else; what comes back waits for it and returns it. Leave x alone till then."""
    if tp.size == 1:
        return lambda: x
    work = _communicate("all_reduce", x, tp, label, lambda group: dist.all_reduce(x, group=group, async_op=True))

    def wait() -> torch.Tensor:
        _call(work.wait, "all_reduce", x, tp, label)
        return x

    return wait


def all_reduce_together(xs: Sequence[torch.Tensor], tp: TPGroup, label: str) -> list[torch.Tensor]:
    """Several tensors of one dtype, summed in one message: one latency for all, for two copies more of each.

    It cannot help where one sum is needed to compute the next, as in a layer.
    """
    if tp.size == 1:
        return list(xs)
    packed = all_reduce(torch.cat([x.reshape(-1) for x in xs]), tp, label)  # COMM all-reduce [sum of sizes]: all in one
    parts = packed.split([x.numel() for x in xs])
    return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]


def reduce_scatter(x: torch.Tensor, tp: TPGroup, label: str) -> torch.Tensor:
    """x [R * n, ...] partial on each rank -> rows r*n .. (r+1)*n - 1 of the sum [n, ...] on rank r."""
    if tp.size == 1:
        return x
    if len(x) % tp.size:
        raise ValueError(f"reduce_scatter {label!r}: {len(x)} rows do not divide over {tp.size} ranks; pad them")
    x = x.contiguous()

    def call(group) -> torch.Tensor:
        if x.is_cuda:
            mine = x.new_empty(len(x) // tp.size, *x.shape[1:])
            _reduce_scatter_single(mine, x, group=group)
            return mine
        # gloo's own one sums everything everywhere; so each rank sends the others their rows, and adds up in rank order
        parts = torch.empty_like(x)
        dist.all_to_all_single(parts, x, group=group)
        return parts.unflatten(0, (tp.size, -1)).sum(dim=0)

    return _communicate("reduce_scatter", x, tp, label, call)


def all_gather(x: torch.Tensor, tp: TPGroup, label: str) -> list[torch.Tensor]:
    """x [...] -> [x of rank 0, x of rank 1, ...] on every rank."""
    if tp.size == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    _communicate("all_gather", x, tp, label, lambda group: dist.all_gather(parts, x, group=group))
    return parts


def all_gather_rows(x: torch.Tensor, tp: TPGroup, label: str) -> torch.Tensor:
    """x [n, ...] -> the rows of all ranks, one behind the other [R * n, ...], on every rank."""
    if tp.size == 1:
        return x
    x = x.contiguous()
    rows = x.new_empty(len(x) * tp.size, *x.shape[1:])
    _communicate("all_gather", x, tp, label, lambda group: _all_gather_single(rows, x, group=group))
    return rows


def all_gather_merge(
    answers: Any, merge: Callable[[torch.Tensor, Any], torch.Tensor], tp: TPGroup, label: str
) -> torch.Tensor:
    """answers.words [n] of each rank -> merge(the words of all [R * n], answers); where they fit, GPUs do it in one kernel."""
    fast = tp.fast_all_reduce
    if tp.size > 1 and fast and fast.fits_merge(answers):
        return _communicate("all_gather", answers.words, tp, label, lambda group: fast.merge(answers))
    parts = all_gather_rows(answers.words, tp, label)  # COMM all-gather [n]: each rank's answers -> those of all
    return merge(parts, answers)


def gather(x: torch.Tensor, tp: TPGroup, label: str) -> list[torch.Tensor] | None:
    """x [...] -> [x of rank 0, x of rank 1, ...] on rank 0, None elsewhere."""
    if tp.size == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(tp.size)] if tp.rank == 0 else None
    _communicate("gather", x, tp, label, lambda group: dist.gather(x, parts, group_dst=0, group=group))
    return parts


def broadcast(x: torch.Tensor, tp: TPGroup, label: str) -> torch.Tensor:
    """x [...] of rank 0 -> x on every rank. In place."""
    if tp.size > 1:
        _communicate("broadcast", x, tp, label, lambda group: dist.broadcast(x, group_src=0, group=group))
    return x


def all_to_all(x: torch.Tensor, tp: TPGroup, label: str, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
    """x [sum(send), ...], send[r] rows for rank r -> the rows that the others have for me [sum(receive), ...], by rank.

    A rank without rows takes part all the same. receive[r] is rank r's send[this rank]: exchange the counts first.
    """
    return start_all_to_all(x, tp, label, send, receive)()


def start_all_to_all(
    x: torch.Tensor, tp: TPGroup, label: str, send: Sequence[int], receive: Sequence[int]
) -> Callable[[], torch.Tensor]:
    """The same, begun: compute something else; what comes back waits for the rows and returns them. Leave x alone till then."""
    if len(x) != sum(send) or len(send) != tp.size or len(receive) != tp.size:
        raise ValueError(
            f"all_to_all {label!r}: {len(x)} rows, {list(send)} of them to send, for {tp.size} ranks; give each its count"
        )
    if tp.size == 1:
        return lambda: x
    x = x.contiguous()
    rows, sizes = x.new_empty(sum(receive), *x.shape[1:]), (list(receive), list(send))
    begin = lambda group: dist.all_to_all_single(rows, x, *sizes, group=group, async_op=True)  # noqa: E731
    work = _communicate("all_to_all", x, tp, label, begin)

    def wait() -> torch.Tensor:
        _call(work.wait, "all_to_all", x, tp, label)
        return rows

    return wait


class Sent:
    """A message on its way. It keeps its tensor, which must stay as it is until the other rank has it: `wait`."""

    def __init__(self, x: torch.Tensor, wait: Callable[[], Any]):
        self._x, self._wait = x, wait

    def wait(self) -> None:
        self._wait()


def send_to(x: torch.Tensor, to: int, tp: TPGroup, label: str) -> Sent:
    """Begin to send x [...] to the group's rank `to`. Messages between two ranks arrive in the order in which they were sent."""
    x = x.contiguous()
    work = _communicate("send", x, tp, label, lambda group: dist.isend(x, group_dst=to, group=group))
    return Sent(x, lambda: _call(work.wait, "send", x, tp, label))


def receive_from(x: torch.Tensor, source: int, tp: TPGroup, label: str) -> torch.Tensor:
    """Fill x [...] with what the group's rank `source` sends; waits for it (on a GPU its stream does)."""
    _communicate("receive", x, tp, label, lambda group: dist.recv(x, group_src=source, group=group))
    return x


def start_receive(x: torch.Tensor, source: int, tp: TPGroup, label: str) -> Callable[[], torch.Tensor]:
    """Begin to fill x [...] with the next message of the group's rank `source`; what comes back waits for it and returns x.

    Messages between two ranks fill what was started first, whoever waits first.
    """
    work = _communicate("receive", x, tp, label, lambda group: dist.irecv(x, group_src=source, group=group))

    def wait() -> torch.Tensor:
        _call(work.wait, "receive", x, tp, label)
        return x

    return wait


def start_exchange(
    x: torch.Tensor, to: int, y: torch.Tensor, source: int, tp: TPGroup, label: str
) -> Callable[[], torch.Tensor]:
    """Begin to send x [...] to rank `to` and to fill y [...] from rank `source`; what comes back waits for both and returns y.

    Leave both alone till then. Sending and receiving are posted together: in a ring where every rank first sent and then
    received, large messages between GPUs would all wait for one another. An empty one is not sent: both ends know its shape.
    """
    x = x.contiguous()

    def call(group) -> list[Any]:
        there = [dist.P2POp(dist.isend, x, group=group, group_peer=to)] if x.numel() else []
        back = [dist.P2POp(dist.irecv, y, group=group, group_peer=source)] if y.numel() else []
        return dist.batch_isend_irecv(there + back) if there or back else []

    works = _communicate("exchange", x, tp, label, call)

    def wait() -> torch.Tensor:
        for work in works:
            _call(work.wait, "exchange", x, tp, label)
        return y

    return wait


def _communicate(op: str, x: torch.Tensor, tp: TPGroup, label: str, call: Callable[[Any], Any]) -> Any:
    """Record the message, send it over the group that fits its device, and name the rank that failed it."""
    group = tp.control_group if x.device.type == "cpu" else tp.device_group
    if group is None:
        raise ValueError(
            f"{op} {label!r}: rank {tp.rank} of {tp.size} has no process group; start with torchrun and "
            f"initialize_tensor_parallel({tp.size}), or add up the partial results by hand (reduce_results=False)"
        )
    if tp.spawned and tp.spawned.ended:
        raise RankFailure(f"rank {tp.world_rank}: {op} {label!r}: the other ranks have ended; make a new engine")
    tp.ledger.record(op, label, x, tp.rank, tp.size)
    return _call(lambda: call(group), op, x, tp, label)


def _call(send: Callable[[], Any], op: str, x: torch.Tensor, tp: TPGroup, label: str) -> Any:
    try:
        return send()
    except RuntimeError as error:
        health.failed = True
        if tp.spawned:
            tp.spawned.broken = True
        if tp.goodbyes:
            tp.goodbyes.bereaved = True
        why, known = _blame(tp, error)
        if tp.members:
            tp.members.leave(because=why)
        said = f"rank {tp.world_rank}: {op} {label!r} {list(x.shape)} failed: {why}"
        raise RankFailure(said) from None if known else error  # the backend has nothing to add to a rank that is named


def _blame(tp: TPGroup, error: Exception) -> tuple[str, bool]:
    """Which peer is gone, and whether one is known to be: the backend names a socket, a reader wants a rank."""
    began, members = time.monotonic(), tp.members
    patience = SILENCE_IS_TOLD_S if members else GONE_S
    while time.monotonic() < began + patience:
        if lost := lost_peer(tp):
            return lost, True
        if left := _who_left(tp):
            return left, True
        if members and members.left and time.monotonic() > began + 1.0:  # who left because of another tells of it first
            return f"{next(iter(members.left.values()))} has left", True
        time.sleep(0.02)
    where = "no peer is known to be dead" if members else "no peer on this host is dead"
    return f"{where}, so one is stuck or unreachable ({str(error).splitlines()[0]})", False


def _who_left(tp: TPGroup) -> str | None:
    """Who left with an error is named before those that left in order."""
    said = [(rank, tp.goodbyes.said_by(rank)) for rank in range(len(tp.peers))] if tp.goodbyes else []
    left = [(rank, words) for rank, words in said if words is not None]
    for rank, words in left:
        if words:
            return f"rank {rank} has left with {words}"
    return f"rank {left[0][0]} has left and makes no such call; every rank must make the same calls" if left else None


def lost_peer(tp: TPGroup) -> str | None:
    """ "rank 1 (pid 4711) has died", if a peer has, "... on host b has died" if it spans hosts; None if all of them run."""
    where = f" on {tp.members.where}" if tp.members else ""
    for rank, (host, pid) in enumerate(tp.peers):
        if rank != tp.world_rank and host == tp.peers[tp.world_rank][0] and (what := fate(pid)):
            if what == DEAD and tp.spawned and tp.spawned.died_of_another(rank):  # whose end may take the system longer
                continue
            if tp.goodbyes and (words := tp.goodbyes.said_by(rank)) is not None:  # its end was no death
                if words:
                    return f"rank {rank} has left with {words}"
                continue
            return f"rank {rank} (pid {pid}){where} {what}{tp.spawned.last_words(rank) if tp.spawned else ''}"
    return tp.members.lost if tp.members else None
