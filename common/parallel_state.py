"""Process groups, and the one place where ranks talk to each other.

`TPGroup` says which rank this is and whom it can talk to. Layers take it as an argument, so a notebook
can build all R ranks of a layer in one process (`TPGroup(rank, size)` without process groups) and add up
the partial sums by hand. `initialize_tensor_parallel` makes the real one.

Four collectives, each recorded by the group's ledger under a label:

    all_reduce  partial sums -> the full sum on every rank
    all_gather  shards       -> all shards on every rank
    gather      shards       -> all shards on rank 0
    broadcast   rank 0's     -> every rank's

Vocabulary and semantics: Megatron-LM (Shoeybi et al. 2019); vLLM and SGLang keep the same groups in a
file of this name.
"""

import atexit
import gc
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.distributed.goodbyes import Goodbyes, next_meeting
from common.distributed.ledger import Ledger
from common.distributed.processes import RankFailure, fate, keep_freed_memory
from common.distributed.spawn import FRAME, LEAVE, LEAVE_S, Follower, SpawnedRanks, start_ranks
from common.distributed.symmetric_memory import SymmetricAllReduce, meet_in_symmetric_memory

CPU_TIMEOUT_S = 60.0
CPU = torch.device("cpu")
GPU_TIMEOUT_S = 300.0  # the first NCCL call sets up rings, the first kernels are compiled
FOREVER = timedelta(days=365)  # that a follower waits for work: rank 0 may sit in a notebook overnight


@dataclass(frozen=True)
class TPGroup:
    """This rank among its tensor-parallel peers.

    device_group carries tensors (gloo on CPU, NCCL on GPU), control_group is always gloo and carries what
    the CPU decides. Both are None for a single process and for ranks that a notebook plays by hand.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    device_group: Any = None
    control_group: Any = None
    peers: tuple[tuple[int, int], ...] = ()  # (host, pid) of each rank, to name the one that died
    fast_all_reduce: SymmetricAllReduce | None = None  # for small messages between GPUs of one host
    spawned: SpawnedRanks | None = None  # rank 0 started the others: only it runs a script, they follow
    goodbyes: Goodbyes | None = None  # torchrun started them: who shuts down says so
    ledger: Ledger = field(default_factory=Ledger, compare=False)

    def __post_init__(self):
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} is outside 0..{self.size - 1} (size={self.size})")


_tp: TPGroup | None = None  # the process's own group; read at the outer API only, never inside a layer
_spawned: SpawnedRanks | None = None  # of the group there is now, if rank 0 started its ranks
_failed = False  # a message did
_own_world = False  # torch.distributed was initialized here, and not by whoever uses this module


def initialize_tensor_parallel(
    tensor_parallel_size: int | None = None, device: str = "auto", timeout_s: float | None = None,
    disable_custom_all_reduce: bool = False, follower: Follower | None = None,
) -> TPGroup:  # fmt: skip
    """Join the group of `tensor_parallel_size` ranks (default: as many as torchrun started).

    Without torchrun there is one rank, no process group and no communication, unless a `follower` says what other ranks
    would do: then they are started here (spawn.py), and end with this process or when others are started. The address
    and the port come from torchrun's environment, never from here. A collective that a peer does not answer within
    `timeout_s` (default 60 s on CPU) raises RankFailure. Between GPUs of one host small all-reduces go through symmetric
    memory (symmetric_memory.py), unless `disable_custom_all_reduce`; all others through NCCL.

    Raises ValueError if the size is not the number of processes that run.
    """
    global _tp, _spawned
    leading = _spawned is not None and bool(_spawned.processes)  # ranks of an earlier start follow this process
    joined = dist.is_initialized() and not leading
    world = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    size = world if tensor_parallel_size is None else tensor_parallel_size
    alone = not joined and "WORLD_SIZE" not in os.environ
    spawning = follower is not None and alone and isinstance(size, int) and size > 1
    if size != world and not spawning:
        raise ValueError(
            f"tensor_parallel_size={size} but {world} process(es) run; start the script with "
            f"torchrun --nproc_per_node={size}, or ask for tensor_parallel_size={world}"
        )
    rank = int(os.environ.get("RANK", "0"))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", rank)), ranks_here)
    if where.type == "cpu":
        # R ranks x several threads on the same cores made each collective 20 to 45 times slower
        torch.set_num_threads(1)
        keep_freed_memory()
    else:
        torch.cuda.set_device(where)
    if leading and not spawning:  # one rank beside them, which talks to nobody
        return TPGroup(device=where)
    timeout = timedelta(seconds=timeout_s or (CPU_TIMEOUT_S if where.type == "cpu" else GPU_TIMEOUT_S))
    if spawning:
        shutdown_tensor_parallel()
        _spawned = start_ranks(follower, size)
    if size == 1:
        _tp = TPGroup(device=where)
        return _tp
    try:
        _tp = _join(rank, size, where, timeout, disable_custom_all_reduce)
    except BaseException:  # Ctrl-C too: nobody would end the ranks that wait
        if spawning:
            shutdown_tensor_parallel()
        raise
    atexit.unregister(_leave_at_exit)
    atexit.register(_leave_at_exit)
    return _tp


def become_follower(ranks: SpawnedRanks, rank: int) -> None:
    """In a process that rank 0 has started: initialize_tensor_parallel will join these ranks, as it joins torchrun's."""
    global _spawned
    _spawned = ranks
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks.size), LOCAL_WORLD_SIZE=str(ranks.size)
    )


def get_tensor_parallel(device: str = "auto") -> TPGroup:
    """The group of this process; made on the spot if initialize_tensor_parallel has not been called."""
    return _tp or initialize_tensor_parallel(device=device)


def shutdown_tensor_parallel(tp: TPGroup | None = None) -> None:
    """Leave the group; safe to call twice. Drop the engine first: its CUDA graphs use the group.

    With `tp` only if the process is in that one: a later start has a group of its own. Ranks that were started here
    end. A world that somebody else initialized stays.
    """
    global _tp, _spawned, _own_world
    if tp is not None and tp is not _tp:
        return
    tp, _tp = _tp, None
    spawned, _spawned = (_spawned, None) if _spawned and _spawned.processes else (None, _spawned)
    if spawned:
        _dismiss(spawned, tp)
    if tp is not None and tp.goodbyes:
        tp.goodbyes.say()
    if tp is not None and tp.device.type == "cuda":
        # NCCL waits for captured graphs that hold its communicator, and the next engine needs the memory: garbage goes first
        gc.collect()
        torch.cuda.synchronize()
    if _own_world and dist.is_initialized():
        dist.destroy_process_group()
        _own_world = False
    elif tp is not None and tp.size > 1 and dist.is_initialized():
        dist.destroy_process_group(tp.device_group)
        dist.destroy_process_group(tp.control_group)
    if spawned:
        spawned.close()


def _leave_at_exit() -> None:
    """For a script that ends without shutdown: the threads of a gloo group that is still there abort the process now and
    then. Not after a message has failed: a group that misses a member may never end; nor after an exception, whose end is no
    goodbye. A joined NCCL group ends by itself."""
    in_order = not _failed and not hasattr(sys, "last_type")
    if _tp and (_spawned or (_tp.device.type == "cpu" and in_order)):
        shutdown_tensor_parallel()


def _dismiss(spawned: SpawnedRanks, tp: TPGroup | None) -> None:
    """Tell the followers to leave; end those that cannot hear it."""
    frame = torch.zeros(FRAME, dtype=torch.int64)
    frame[0] = LEAVE
    try:
        if spawned.broken or tp is None:
            raise RankFailure("out of step")
        group = tp.control_group
        left = dist.broadcast(frame, group_src=0, group=group, async_op=True)  # COMM broadcast [FRAME]: no more work
        left.wait(timedelta(seconds=LEAVE_S))
    except RuntimeError:  # dead, or in the middle of a step that this process was torn out of
        spawned.kill()


def pick_device(device: str, local_rank: int = 0, ranks: int = 1) -> torch.device:
    """auto | cpu | cuda -> this rank's device. Raises ValueError if there is no such GPU.

    `ranks` on this host must all land on the same kind: auto takes GPUs only if there is one for each.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= max(ranks, local_rank + 1) else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device != "cuda":
        raise ValueError(f"device={device!r} is unknown; use auto, cpu or cuda")
    if torch.cuda.device_count() < max(ranks, local_rank + 1):
        raise ValueError(
            f"device=cuda but local rank {local_rank} finds {torch.cuda.device_count()} GPU(s) for {ranks} "
            f"rank(s); one process drives one GPU: start fewer ranks or use the CPU (--force-cpu, device=cpu)"
        )
    return torch.device("cuda", local_rank)


def _join(rank: int, size: int, device: torch.device, timeout: timedelta, disable_custom_all_reduce: bool) -> TPGroup:
    global _own_world, _failed
    _failed = False
    backend = "gloo" if device.type == "cpu" else "nccl"
    goodbyes = None
    if not dist.is_initialized():
        store = dist.FileStore(_spawned.meet(rank), size) if _spawned else next_meeting(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        _own_world = True
        goodbyes = None if _spawned else Goodbyes(store, rank)
    device_group = dist.new_group(backend=backend, timeout=timeout)
    control_group = dist.new_group(backend="gloo", timeout=FOREVER if _spawned and rank > 0 else timeout)
    me = torch.tensor([zlib.crc32(platform.node().encode()), os.getpid()])
    everyone = [torch.empty_like(me) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, me, group=control_group)  # COMM all-gather [2]: host and pid, to name a rank that dies
    peers = tuple((int(host), int(pid)) for host, pid in everyone)
    fast = None
    if device.type == "cuda" and not disable_custom_all_reduce:
        fast = meet_in_symmetric_memory(device, device_group, control_group, peers, _spawned is not None)
    return TPGroup(dist.get_rank(), len(peers), device, device_group, control_group, peers, fast, _spawned, goodbyes)


# --- the collectives: one rank alone has nothing to say, so R = 1 returns its input and records nothing


def all_reduce(x: torch.Tensor, tp: TPGroup, label: str) -> torch.Tensor:
    """x [...] partial on each rank -> the sum, equal on every rank. Go on with the result: x may be overwritten."""
    if tp.size == 1:
        return x
    if tp.fast_all_reduce and tp.fast_all_reduce.fits(x):
        return _communicate("all_reduce", x, tp, label, lambda group: tp.fast_all_reduce(x))
    _communicate("all_reduce", x, tp, label, lambda group: dist.all_reduce(x, group=group))
    return x


def start_all_reduce(x: torch.Tensor, tp: TPGroup, label: str) -> Callable[[], torch.Tensor]:
    """Begin the sum of x [...] and compute something else; what comes back waits for it and returns it. Leave x alone till then."""
    if tp.size == 1:
        return lambda: x
    work = _communicate("all_reduce", x, tp, label, lambda group: dist.all_reduce(x, group=group, async_op=True))

    def wait() -> torch.Tensor:
        _call(work.wait, "all_reduce", x, tp, label)
        return x

    return wait


def all_gather(x: torch.Tensor, tp: TPGroup, label: str) -> list[torch.Tensor]:
    """x [...] -> [x of rank 0, x of rank 1, ...] on every rank."""
    if tp.size == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    _communicate("all_gather", x, tp, label, lambda group: dist.all_gather(parts, x, group=group))
    return parts


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


def _communicate(op: str, x: torch.Tensor, tp: TPGroup, label: str, call: Callable[[Any], Any]) -> Any:
    """Record the message, send it over the group that fits its device, and name the rank that failed it."""
    group = tp.control_group if x.device.type == "cpu" else tp.device_group
    if group is None:
        raise ValueError(
            f"{op} {label!r}: rank {tp.rank} of {tp.size} has no process group; start with torchrun and "
            f"initialize_tensor_parallel({tp.size}), or add up the partial results by hand (reduce_results=False)"
        )
    if tp.spawned and tp.spawned.ended:
        raise RankFailure(f"rank {tp.rank}: {op} {label!r}: the other ranks have ended; make a new engine")
    tp.ledger.record(op, label, x)
    return _call(lambda: call(group), op, x, tp, label)


def _call(send: Callable[[], Any], op: str, x: torch.Tensor, tp: TPGroup, label: str) -> Any:
    try:
        return send()
    except RuntimeError as error:
        global _failed
        _failed = True
        if tp.spawned:
            tp.spawned.broken = True
        if tp.goodbyes:
            tp.goodbyes.bereaved = True
        why, known = _blame(tp, error)
        said = f"rank {tp.rank}: {op} {label!r} {list(x.shape)} failed: {why}"
        raise RankFailure(said) from None if known else error  # the backend has nothing to add to a rank that is named


def _blame(tp: TPGroup, error: Exception) -> tuple[str, bool]:
    """Which peer is gone, and whether one is known to be: the backend names a socket, a reader wants a rank."""
    deadline = time.monotonic() + 2.0  # a dying process closes its sockets a moment before it is gone
    while time.monotonic() < deadline:
        if lost := lost_peer(tp):
            return lost, True
        if tp.goodbyes and (left := [rank for rank in range(tp.size) if tp.goodbyes.said_by(rank)]):
            return f"rank {left[0]} has left and makes no such call; every rank must make the same calls", True
        time.sleep(0.02)
    return f"no peer on this host is dead, so one is stuck or unreachable ({str(error).splitlines()[0]})", False


def lost_peer(tp: TPGroup | None = None) -> str | None:
    """ "rank 1 (pid 4711) has died", if a peer on this host has; None if all of them run."""
    tp = tp or _tp
    for rank, (host, pid) in enumerate(tp.peers if tp else ()):
        if rank != tp.rank and host == tp.peers[tp.rank][0] and (what := fate(pid)):
            if tp.spawned and tp.spawned.died_of_another(rank):  # whose end may take the system longer
                continue
            if tp.goodbyes and tp.goodbyes.said_by(rank):  # its end was no death
                continue
            return f"rank {rank} (pid {pid}) {what}{tp.spawned.last_words(rank) if tp.spawned else ''}"
    return None
