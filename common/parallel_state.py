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

import ctypes
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

from common.distributed.ledger import Ledger
from common.distributed.symmetric_memory import SymmetricAllReduce

CPU_TIMEOUT_S = 60.0
CPU = torch.device("cpu")
GPU_TIMEOUT_S = 300.0  # the first NCCL call sets up rings, the first kernels are compiled
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's, from glibc's malloc.h
KEPT_BYTES = 256 << 20  # of freed memory, that stay with the process


class RankFailure(RuntimeError):
    """A collective could not finish because another rank died, stopped or stayed away."""


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
    ledger: Ledger = field(default_factory=Ledger, compare=False)

    def __post_init__(self):
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} is outside 0..{self.size - 1} (size={self.size})")


_tp: TPGroup | None = None  # the process's own group; read at the outer API only, never inside a layer


def initialize_tensor_parallel(
    tensor_parallel_size: int | None = None, device: str = "auto", timeout_s: float | None = None,
    disable_custom_all_reduce: bool = False,
) -> TPGroup:  # fmt: skip
    """Join the group of `tensor_parallel_size` ranks (default: as many as torchrun started).

    Without torchrun there is one rank, no process group and no communication. The address and the port
    come from torchrun's environment, never from here. A collective that a peer does not answer within
    `timeout_s` (default 60 s on CPU) raises RankFailure. Between GPUs of one host small all-reduces go through
    symmetric memory (symmetric_memory.py), unless `disable_custom_all_reduce`; all others through NCCL.

    Raises ValueError if the size is not the number of processes that run.
    """
    global _tp
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    size = world if tensor_parallel_size is None else tensor_parallel_size
    if size != world:
        raise ValueError(
            f"tensor_parallel_size={size} but {world} process(es) run; start the script with "
            f"torchrun --nproc_per_node={size}, or ask for tensor_parallel_size={world}"
        )
    rank = int(os.environ.get("RANK", "0"))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", rank)))
    if where.type == "cpu":
        # R ranks x several threads on the same cores made each collective 20 to 45 times slower
        torch.set_num_threads(1)
        _keep_freed_memory()
    else:
        torch.cuda.set_device(where)
    if size > 1:
        _tp = _join(
            where, timeout_s or (CPU_TIMEOUT_S if where.type == "cpu" else GPU_TIMEOUT_S), disable_custom_all_reduce
        )
    else:
        _tp = TPGroup(device=where)
    return _tp


def _keep_freed_memory() -> None:
    """Tell glibc not to give memory back to the system that the next step asks for again.

    A CPU step allocates and frees megabytes of activations; page faults for them took 4 to 14 % of a run.
    vLLM's CPU backend advises another allocator for the same reason. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def get_tensor_parallel(device: str = "auto") -> TPGroup:
    """The group of this process; made on the spot if initialize_tensor_parallel has not been called."""
    return _tp or initialize_tensor_parallel(device=device)


def shutdown_tensor_parallel() -> None:
    """Leave the group; safe to call twice. Drop the engine first: its CUDA graphs use the group."""
    global _tp
    on_gpu, _tp = _tp is not None and _tp.device.type == "cuda", None
    if dist.is_initialized():
        if on_gpu:
            # NCCL waits for captured graphs that hold its communicator, so what is garbage must go first
            gc.collect()
            torch.cuda.synchronize()
        dist.destroy_process_group()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """auto | cpu | cuda -> this rank's device. Raises ValueError if there is no such GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() > local_rank else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device != "cuda":
        raise ValueError(f"device={device!r} is unknown; use auto, cpu or cuda")
    if torch.cuda.device_count() <= local_rank:
        raise ValueError(
            f"device=cuda but local rank {local_rank} finds {torch.cuda.device_count()} GPU(s); one process "
            f"drives one GPU: start fewer ranks or use the CPU (--force-cpu, device=cpu)"
        )
    return torch.device("cuda", local_rank)


def _join(device: torch.device, timeout_s: float, disable_custom_all_reduce: bool) -> TPGroup:
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    device_group = dist.new_group(backend=backend, timeout=timeout)
    control_group = dist.new_group(backend="gloo", timeout=timeout)
    me = torch.tensor([zlib.crc32(platform.node().encode()), os.getpid()])
    everyone = [torch.empty_like(me) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, me, group=control_group)  # COMM all-gather [2]: host and pid, to name a rank that dies
    peers = tuple((int(host), int(pid)) for host, pid in everyone)
    fast = None
    if device.type == "cuda" and not disable_custom_all_reduce:
        fast = _connect(device, device_group, control_group, peers)
    return TPGroup(dist.get_rank(), len(peers), device, device_group, control_group, peers, fast)


def _connect(device: torch.device, device_group, control_group, peers) -> SymmetricAllReduce | None:
    """Symmetric memory, if all ranks can have it: they must all send the same message the same way."""
    possible = len({host for host, _ in peers}) == 1 and SymmetricAllReduce.reachable(device, len(peers))
    if not _all_agree(possible, control_group):
        return None
    fast = SymmetricAllReduce.connect(device_group, device)
    return fast if _all_agree(fast is not None, control_group) else None


def _all_agree(mine: bool, group) -> bool:
    vote = torch.tensor([int(mine)])
    dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=group)  # COMM all-reduce [1]: can every rank do it?
    return bool(vote)


# --- the collectives: one rank alone has nothing to say, so R = 1 returns its input and records nothing


def all_reduce(x: torch.Tensor, tp: TPGroup, label: str) -> torch.Tensor:
    """x [...] partial on each rank -> the sum, equal on every rank. Go on with the result: x may be overwritten."""
    if tp.size == 1:
        return x
    if tp.fast_all_reduce and tp.fast_all_reduce.fits(x):
        return _communicate("all_reduce", x, tp, label, lambda group: tp.fast_all_reduce(x))
    _communicate("all_reduce", x, tp, label, lambda group: dist.all_reduce(x, group=group))
    return x


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
    tp.ledger.record(op, label, x)
    try:
        return call(group)
    except RuntimeError as error:
        raise RankFailure(f"rank {tp.rank}: {op} {label!r} {list(x.shape)} failed: {_blame(tp, error)}") from error


def _blame(tp: TPGroup, error: Exception) -> str:
    """Which peer is gone: the backend names a socket, a reader wants a rank."""
    deadline = time.monotonic() + 2.0  # a dying process closes its sockets a moment before it is gone
    while time.monotonic() < deadline:
        if lost := lost_peer(tp):
            return lost
        time.sleep(0.02)
    return f"no peer on this host is dead, so one is stuck or unreachable ({str(error).splitlines()[0]})"


def lost_peer(tp: TPGroup | None = None) -> str | None:
    """ "rank 1 (pid 4711) has died", if a peer on this host has; None if all of them run."""
    tp = tp or _tp
    for rank, (host, pid) in enumerate(tp.peers if tp else ()):
        if rank != tp.rank and host == tp.peers[tp.rank][0] and (fate := _fate(pid)):
            return f"rank {rank} (pid {pid}) {fate}"
    return None


def _fate(pid: int) -> str | None:
    """None while the process runs, else what became of it."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # a killed child is a zombie until torchrun has reaped it
            state = stat.read().rpartition(")")[2].split()[0]
        return {"Z": "has died", "X": "has died", "T": "is stopped (SIGSTOP)"}.get(state)
    except ProcessLookupError:
        return "has died"
    except FileNotFoundError:  # gone in between, or a system without /proc, where it does run
        return "has died" if os.path.isdir("/proc/self") else None
    except PermissionError:
        return None
