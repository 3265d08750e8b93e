"""Where ranks meet: the store in which each leaves its address for the others, and the names of the hosts it spans.

under torchrun             torchrun's own store
ranks that rank 0 started  a file in a temporary folder (spawn.py)
ranks of several nodes     a store of node 0's, on a port that the nodes tell each other (nodes.py)
"""

import os
import socket
import zlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common.distributed.goodbyes import Goodbyes
from common.distributed.membership import Membership
from common.distributed.nodes import START_S, choose_interface, own_address
from common.distributed.spawn import SpawnedRanks

JOIN_S = 30.0
PORT = "port of the membership"

_torchruns_store: dist.Store | None = None  # kept for the life of the process: a second one could meet a port in use
_starts = 0  # of a world over that store


def meeting(spawned: SpawnedRanks | None, rank: int, timeout: timedelta) -> dist.Store:
    """Of these ranks, or torchrun's."""
    if spawned is None:
        if _spans_hosts():
            choose_interface(own_address(os.environ.get("MASTER_ADDR", "localhost")))
        return next_meeting(timeout)
    file = spawned.meet(rank)
    if not spawned.several_nodes:
        return dist.FileStore(file, spawned.size)
    if rank != spawned.first:
        host, port = spawned.store_of_node_0()
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=START_S))
    members, node = spawned.members, spawned.node
    store = None
    if node.node_rank == 0:
        store = dist.TCPStore(
            members.address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=START_S)
        )
    late = f"the ranks of node {{0}} of {node.nnodes} are not ready after {node.timeout_s:g} s"
    port = members.all_say("store", store.port if store else None, node.timeout_s, late)[0]
    host = members.address if store else node.host
    spawned.tell_store(host, port)
    return store or dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=START_S))


def next_meeting(timeout: timedelta) -> dist.Store:
    """Where the ranks of this start meet: nothing in it is left over from an earlier start.

    torchrun's store outlives a process group, and so do the addresses that the ranks of the last one left in it: gloo
    would wait for peers that are gone (pytorch#114585). So each start has names of its own.
    """
    global _torchruns_store, _starts
    if _torchruns_store is None:
        _torchruns_store, _, _ = next(rendezvous("env://", timeout=timeout))
    _starts += 1
    return dist.PrefixStore(f"start {_starts}", _torchruns_store)


def host_number(spawned: SpawnedRanks | None) -> int:
    """The same for ranks that share a host: which node it is, where somebody says so; else its name."""
    if spawned and spawned.node_rank is not None:
        return spawned.node_rank
    return int(os.environ.get("GROUP_RANK", zlib.crc32(socket.gethostname().encode())))  # torchrun counts its agents


def who_tells(
    store: dist.Store | None, spawned: SpawnedRanks | None, rank: int, peers: tuple[tuple[int, int], ...]
) -> tuple[Membership | None, Goodbyes | None]:
    """(who tells of a death on another host, who tells that a rank has left in good order), once all have met in the store."""
    if spawned or store is None:
        return spawned.members if spawned else None, None
    members = _join_members(store, rank, len(peers)) if len({host for host, _ in peers}) > 1 else None
    return members, Goodbyes(store, rank, members)


def _join_members(store: dist.Store, rank: int, size: int) -> Membership:
    """Under torchrun, over several hosts: every rank is a member, rank 0 is the first."""
    where = f"host {socket.gethostname()}"
    name = f"rank {rank} (pid {os.getpid()}) on {where}"
    if rank > 0:
        port = int(store.get(PORT))
        return Membership.join(os.environ["MASTER_ADDR"], port, rank, size, name, JOIN_S, where)
    listener = _listen_everywhere(size)
    store.set(PORT, str(listener.getsockname()[1]))
    return Membership.host(listener, size, name, where)


def _listen_everywhere(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _spans_hosts() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > int(
        os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    )
