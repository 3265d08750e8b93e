"""K and V that belong to a room and to no request: the owner that conservation counts while pages travel."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.tree_node import TreeNode


@dataclass(frozen=True, eq=False)
class Held:
    """slots [n, whole pages], of a prompt in order: the first prefix_len are the tree's, on the path to last_node, which is
    locked; the others are the room's own."""

    slots: np.ndarray
    prefix_len: int
    last_node: TreeNode


class HeldPages:
    """What the rooms of an engine hold, by room. Conservation counts it (SchedulerState.more_owners, more_users)."""

    def __init__(self, memory: RequestMemory):
        self.memory, self.page_size = memory, memory.page_size
        self.of: dict[int, Held] = {}

    def pages(self, room: int) -> list[int]:
        return (self.of[room].slots[:: self.page_size] // self.page_size).tolist()

    def let_go(self, room: int) -> None:
        """Its own pages are free, the others evictable if nobody else uses them. Nothing, if it holds none."""
        if held := self.of.pop(room, None):
            self.memory.pool.free(held.slots[held.prefix_len :])
            self.memory.tree.dec_lock_ref(held.last_node)

    def owners(self) -> Iterator[tuple[str, np.ndarray]]:
        """(who it is, [pages it owns]); what is not in the tree alone."""
        for room, held in self.of.items():
            yield f"room {room}", held.slots[held.prefix_len :: self.page_size] // self.page_size
