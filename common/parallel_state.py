"""Who am I, and with whom can I talk: the groups of this process, made once and kept.

    ParallelState.initialize(tensor_parallel_size=2, pipeline_parallel_size=2)    every kind of group, see layout.py
    initialize_tensor_parallel(2)                                                 the common case: all ranks cut each layer

`TPGroup` and the collectives are in distributed/collectives.py; they are at hand here too, as vLLM and SGLang have them in a
file of this name.
"""

import atexit
import gc
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.distributed import collectives
from common.distributed.collectives import (  # noqa: F401, for those who look for them here
    CPU,
    RankFailure,
    Sent,
    TPGroup,
    all_gather,
    all_gather_rows,
    all_reduce,
    all_reduce_add_norm,
    all_reduce_together,
    all_to_all,
    broadcast,
    gather,
    health,
    receive_from,
    reduce_scatter,
    send_to,
    start_all_reduce,
    start_exchange,
    start_receive,
)
from common.distributed.devices import pick_device
from common.distributed.fast_all_reduce import pick, quicken
from common.distributed.layout import GROUPS, Layout, Place
from common.distributed.processes import keep_freed_memory
from common.distributed.rendezvous import host_number, meeting, who_tells
from common.distributed.spawn import FRAME, LEAVE, LEAVE_S, Follower, SpawnedRanks, start_ranks

CPU_TIMEOUT_S = 60.0
GPU_TIMEOUT_S = 300.0  # the first NCCL call sets up rings, the first kernels are compiled
FOREVER = timedelta(days=365)  # that a follower waits for work: rank 0 may sit in a notebook overnight


@dataclass(frozen=True)
class ParallelState:
    """The layout, this rank's place in it, and a group of each kind; of one member where the layout does not cut.

    Groups with the same members are one group, but for `pp`. `replica` is where one will reigns: its rank 0 decides for all.
    """

    layout: Layout
    place: Place
    world: TPGroup
    replica: TPGroup
    tp: TPGroup
    pp: TPGroup
    dp: TPGroup
    attn_tp: TPGroup
    attn_dp: TPGroup
    cp: TPGroup
    ep: TPGroup
    moe_tp: TPGroup

    @classmethod
    def of(cls, tp: TPGroup) -> "ParallelState":
        """Tensor parallelism alone, over this group; also one that a notebook plays by hand."""
        layout = Layout(tp.size)
        return cls._with({"tp": tp}, layout, layout.place(tp.rank), tp)

    def groups(self) -> tuple[TPGroup, ...]:
        return (self.world, *(getattr(self, kind) for kind in GROUPS))

    def process_groups(self) -> list[Any]:
        both = (p for group in self.groups() for p in (group.device_group, group.control_group))
        return list(dict.fromkeys(p for p in both if p is not None))

    @classmethod
    def _with(cls, made: dict[str, TPGroup], layout: Layout, place: Place, world: TPGroup) -> "ParallelState":
        alone = replace(world, rank=0, size=1, device_group=None, control_group=None, fast_all_reduce=None,
                        ranks=(place.rank,))  # fmt: skip
        groups = {}
        for kind in GROUPS:
            same = layout.group_of(kind, place.rank) == list(range(layout.world))
            groups[kind] = made.get(kind) or (world if same else alone)
        return cls(layout, place, world, **groups)

    @classmethod
    def initialize(
        cls, tensor_parallel_size: int | None = None, pipeline_parallel_size: int = 1, data_parallel_size: int = 1,
        expert_parallel_size: int = 1, context_parallel_size: int = 1, world_size: int | None = None, *,
        attention_data_parallel_size: int = 1, device: str = "auto", timeout_s: float | None = None,
        disable_custom_all_reduce: bool = False, all_reduce: str = "auto",  # noqa: F811, the flag's name
        follower: Follower | None = None,
    ) -> "ParallelState":  # fmt: skip
        """Join all groups of the layout; the tensor-parallel size is by default what is left of the world.

        data_parallel_size: whole replicas. Expert, context and attention-data parallelism are cut inside the tensor-parallel
        ranks and do not multiply. world_size: as many as torchrun started; given, it is checked.

        Without torchrun there is one rank, no process group and no communication, unless a `follower` says what other ranks
        would do: then they are started here (spawn.py), and end with this process or when others are started; its `node` says
        that this is one of several hosts, each of which starts its own (nodes.py). Under torchrun address and port come from
        its environment. A collective that a peer does not answer within `timeout_s` (default 60 s on CPU) raises RankFailure.
        Between GPUs of one host small all-reduces go through symmetric memory (symmetric_memory.py), unless
        `disable_custom_all_reduce`; all others through NCCL. all_reduce="shm": CPU ranks of one host add up in shared memory
        (shared_memory.py); "auto" is gloo for them.

        Raises ValueError, with the nearest legal sizes, if the layout is not the processes that run, or if ranks cannot share
        the memory that was asked for.
        """
        sizes = (tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
        cuts = {"attn_dp": attention_data_parallel_size, "cp": context_parallel_size, "ep": expert_parallel_size}
        world, joined = _world_size()
        if follower is not None and not joined:
            world = world_size  # those that are started here; None: as many as the sizes say
        elif world_size not in (None, world):
            raise ValueError(f"world_size={world_size} but {world} process(es) run; leave it out, or start as many")
        layout = Layout.of(*sizes, **cuts, world=world)
        return _start(layout, device, timeout_s, disable_custom_all_reduce, all_reduce, None if joined else follower)


_state: ParallelState | None = None  # the process's own; read at the outer API only, never inside a layer
_spawned: SpawnedRanks | None = None  # of the group there is now, if rank 0 started its ranks
_own_world = False  # torch.distributed was initialized here, and not by whoever uses this module


def initialize_tensor_parallel(
    tensor_parallel_size: int | None = None, device: str = "auto", timeout_s: float | None = None,
    disable_custom_all_reduce: bool = False, all_reduce: str = "auto",  # noqa: F811, the flag's name
    follower: Follower | None = None, expert_parallel: bool = False,
) -> TPGroup:  # fmt: skip
    """Join the group of `tensor_parallel_size` ranks (default: as many as torchrun started): ParallelState.initialize has all else.

    expert_parallel: experts are dealt out over all of them, as vLLM does; get_parallel_state has the groups.
    Raises ValueError if the size is not the number of processes that run.
    """
    world, joined = _world_size()
    size = world if tensor_parallel_size is None else tensor_parallel_size
    spawning = follower is not None and not joined and isinstance(size, int) and size > 1
    if size != world and not spawning:
        raise ValueError(
            f"tensor_parallel_size={size} but {world} process(es) run; start the script with "
            f"torchrun --nproc_per_node={size}, or ask for tensor_parallel_size={world}"
        )
    started = follower if spawning else None
    layout = Layout.of(size, ep=size if expert_parallel else 1)
    return _start(layout, device, timeout_s, disable_custom_all_reduce, all_reduce, started).tp


def _leading() -> bool:
    """Do ranks of an earlier start follow this process?"""
    return _spawned is not None and _spawned.started_here


def _world_size() -> tuple[int, bool]:
    """(processes that run together, have they been started or joined by others: torchrun, or rank 0)."""
    if dist.is_initialized() and not _leading():
        return dist.get_world_size(), True
    return int(os.environ.get("WORLD_SIZE", "1")), "WORLD_SIZE" in os.environ


def _start(
    layout: Layout, device: str, timeout_s: float | None, no_custom: bool, how: str, follower: Follower | None
) -> ParallelState:
    global _state, _spawned
    size, spawning = layout.world, follower is not None and layout.world > 1
    leading = _leading()
    rank = int(os.environ.get("RANK", "0"))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if spawning and follower.node:
        here = follower.node.ranks(size)
        rank, ranks_here, local_rank = here.start, len(here), 0
    where = pick_device(device, local_rank, ranks_here)
    fast = pick(how, no_custom, where.type)
    if where.type == "cpu":
        # R ranks x several threads on the same cores made each collective 20 to 45 times slower
        torch.set_num_threads(1)
        keep_freed_memory()
    else:
        torch.cuda.set_device(where)
    if leading and not spawning:  # one rank beside them, which talks to nobody
        return ParallelState.of(TPGroup(device=where))
    timeout = timedelta(seconds=timeout_s or (CPU_TIMEOUT_S if where.type == "cpu" else GPU_TIMEOUT_S))
    if spawning:
        shutdown_tensor_parallel()
        _spawned = start_ranks(
            follower, size, f"tensor_parallel_size={size}" if layout == Layout(size) else f"{layout}"
        )
    if size == 1:
        _state = ParallelState.of(TPGroup(device=where))
        return _state
    try:
        _state = _join(layout, rank, where, timeout, fast)
    except BaseException:  # Ctrl-C too: nobody would end the ranks that wait
        if spawning:
            shutdown_tensor_parallel()
        raise
    atexit.unregister(_leave_at_exit)
    atexit.register(_leave_at_exit)
    return _state


def become_follower(ranks: SpawnedRanks, rank: int) -> None:
    """In a process that rank 0 has started: initialize_tensor_parallel will join these ranks, as it joins torchrun's."""
    global _spawned
    _spawned = ranks
    local = {"LOCAL_RANK": rank - ranks.first, "LOCAL_WORLD_SIZE": len(ranks.here)}
    os.environ.update({name: str(n) for name, n in {"RANK": rank, "WORLD_SIZE": ranks.size, **local}.items()})


def get_tensor_parallel(device: str = "auto") -> TPGroup:
    """The group of this process; made on the spot if initialize_tensor_parallel has not been called."""
    return _state.tp if _state else initialize_tensor_parallel(device=device)


def get_parallel_state(device: str = "auto") -> ParallelState:
    """What initialize has made; without it tensor parallelism over all processes."""
    if _state is None:
        initialize_tensor_parallel(device=device)
    return _state


def shutdown_tensor_parallel(tp: TPGroup | None = None, error: BaseException | None = None) -> None:
    """Leave the group; safe to call twice. Drop the engine first: its CUDA graphs use the group.

    With `tp` only if the process is in that one: a later start has a group of its own. Ranks that were started here
    end. A world that somebody else initialized stays. error: what this rank leaves with, for the others to name.
    """
    global _state, _spawned, _own_world
    if tp is not None and (_state is None or tp is not _state.tp):
        return
    state, _state = _state, None
    tp = state.world if state else None
    spawned, _spawned = (_spawned, None) if _leading() else (None, _spawned)
    if spawned and spawned.first == 0:
        _dismiss(spawned, state)
    if tp is not None and tp.goodbyes:
        tp.goodbyes.say(error)
    for group in state.groups() if state else ():
        if group.fast_all_reduce:
            group.fast_all_reduce.close()
    if tp is not None and tp.device.type == "cuda":
        # NCCL waits for captured graphs that hold its communicator, and the next engine needs the memory: garbage goes first
        gc.collect()
        torch.cuda.synchronize()
    if _own_world and dist.is_initialized():
        dist.destroy_process_group()
        _own_world = False
    elif tp is not None and tp.size > 1 and dist.is_initialized():
        for group in state.process_groups():
            dist.destroy_process_group(group)
    if spawned:
        spawned.close()


def _leave_at_exit() -> None:
    """For a script that ends without shutdown: the threads of a gloo group that is still there abort the process now and
    then. Not after a message has failed: a group that misses a member may never end; nor after an exception, whose end is no
    goodbye. A joined NCCL group ends by itself."""
    in_order = not health.failed and not hasattr(sys, "last_type")
    if _state and (_spawned or (_state.world.device.type == "cpu" and in_order)):
        shutdown_tensor_parallel()


def _dismiss(spawned: SpawnedRanks, state: ParallelState | None) -> None:
    """Tell the followers to leave, in the way in which they hear of work; end those that cannot hear it."""
    frame = torch.zeros(FRAME, dtype=torch.int64)
    frame[0] = LEAVE
    try:
        if spawned.broken or state is None:
            raise RankFailure("out of step")
        group, left = (state.replica if state.dp.size == 1 else state.world).control_group, []
        if state.pp.size > 1:
            for rank in range(1, state.replica.size):
                one = dist.isend(frame, group_dst=rank, group=group)  # COMM send [FRAME]: no more work
                left.append(one)
        else:
            one = dist.broadcast(frame, group_src=0, group=group, async_op=True)  # COMM broadcast [FRAME]: no more work
            left.append(one)
        for one in left:
            one.wait(timedelta(seconds=LEAVE_S))
    except RuntimeError:  # dead, or in the middle of a step that this process was torn out of
        spawned.kill()


def _join(layout: Layout, rank: int, device: torch.device, timeout: timedelta, fast: str) -> ParallelState:
    global _own_world
    health.failed = False
    size, backend = layout.world, "gloo" if device.type == "cpu" else "nccl"
    store = None
    if not dist.is_initialized():
        store = meeting(_spawned, rank, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        _own_world = True
    device_group = dist.new_group(backend=backend, timeout=timeout)
    patience = FOREVER if _spawned and rank > 0 else timeout
    control_group = dist.new_group(backend="gloo", timeout=patience)
    me = torch.tensor([host_number(_spawned), os.getpid()])
    everyone = [torch.empty_like(me) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, me, group=control_group)  # COMM all-gather [2]: host and pid, to name a rank that dies
    peers = tuple((int(host), int(pid)) for host, pid in everyone)
    members, goodbyes = who_tells(store, _spawned, rank, peers)
    world = TPGroup(
        dist.get_rank(), len(peers), device, device_group, control_group, peers, None, _spawned, goodbyes, members
    )
    place = layout.place(world.rank)
    made: dict[str, TPGroup] = {}
    for kind in GROUPS:
        groups = layout.groups(kind)
        # hidden states have a group of their own: on a GPU the messages between two ranks of one group wait for each other, and
        # those that go up the stages must not wait for logits that come back
        same = next((other for other in made if layout.groups(other) == groups), None) if kind != "pp" else None
        if same:
            made[kind] = made[same]
        elif len(groups[0]) > 1 and (len(groups) > 1 or kind == "pp"):
            made[kind] = _join_groups(groups, world, backend, timeout)
    made, world = quicken(made, world, layout, fast, patience.total_seconds())
    return ParallelState._with(made, layout, place, world)


def _join_groups(groups: list[list[int]], world: TPGroup, backend: str, timeout: timedelta) -> TPGroup:
    """This rank's group of those of one kind. Every rank makes all of them, in the same order."""
    mine = None
    for ranks in groups:
        device_group = dist.new_group(ranks, backend=backend, timeout=timeout)
        control_group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if world.rank in ranks:
            mine = replace(
                world, rank=ranks.index(world.rank), size=len(ranks), device_group=device_group,
                control_group=control_group, ranks=tuple(ranks),
            )  # fmt: skip
    return mine


def lost_peer() -> str | None:
    """ "rank 1 (pid 4711) has died", if a peer on this host has; None if all of them run, or there are none."""
    return collectives.lost_peer(_state.world) if _state else None
