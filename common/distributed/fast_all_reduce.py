"""Which groups add up by a shorter way than their backend's: symmetric memory between GPUs, shared memory between CPU ranks.

Both have the same face, `fits(x)` and a call, and `collectives.all_reduce` takes them for what fits; all members of a group
have one, or none has.
"""

from dataclasses import replace

from common.distributed.collectives import TPGroup
from common.distributed.layout import Layout
from common.distributed.shared_memory import meet_in_shared_memory
from common.distributed.symmetric_memory import meet_in_symmetric_memory
from common.values import choice

SUMMED = ("tp", "attn_tp", "moe_tp")  # kinds of groups whose members add up


def pick(all_reduce: str, disable_custom_all_reduce: bool, device: str) -> str:
    """all_reduce="auto" | "shm", for cpu | cuda -> "none", "symmetric memory" or "shared memory"; ValueError for what cannot be."""
    if choice("all_reduce", all_reduce, ("auto", "shm")) == "shm":
        if device == "cuda":
            raise ValueError('all_reduce="shm" is for CPU ranks, and GPUs have symmetric memory; leave it out')
        return "shared memory"
    return "symmetric memory" if device == "cuda" and not disable_custom_all_reduce else "none"


def quicken(
    made: dict[str, TPGroup], world: TPGroup, layout: Layout, way: str, timeout_s: float
) -> tuple[dict[str, TPGroup], TPGroup]:
    """The groups that were made, by kind, and the world, with a fast all-reduce where there is one. All ranks call it.

    A kind that is not among them is the world, if that is its one group, or each rank alone.
    """
    kinds = {"shared memory": SUMMED, "symmetric memory": ("tp",)}.get(way, ())
    for kind in kinds:
        group = made.get(kind, world if len(layout.groups(kind)) == 1 else None)
        if group is None or group.fast_all_reduce:  # it may have the members of another kind
            continue
        if way == "shared memory":
            members = {rank: world.peers[rank] for rank in group.ranks or range(group.size)}
            fast = meet_in_shared_memory(group.rank, members, group.control_group, timeout_s)
        else:
            fast = meet_in_symmetric_memory(
                world.device, group.device_group, world.control_group, world.peers, world.spawned is not None
            )
        quick = replace(group, fast_all_reduce=fast)
        made = {other: quick if member is group else member for other, member in made.items()}
        world = quick if group is world else world
    return made, world
