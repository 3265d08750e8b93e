"""Rank 0's book of adapters: which names there are, which numbers lie in memory, and which in a slot.

    known      name, folder, identity: it can be asked for
    loaded     its numbers are in every rank's memory      at most max_loaded_loras; the least recently used is forgotten
    placed     they are in a slot, on the device           at most max_loras_per_batch; who runs is placed

An identity is made at each load and never again: it names the adapter's K and V in the tree, so that what an earlier adapter of the
same name has computed is found by nobody. An adapter that is only forgotten for want of room keeps its identity, because it comes
back with the numbers that it had, or not at all (the checksum). SGLang 0.5.23: LoRARegistry, LoRAMemoryPool and the eviction
policies (srt/lora/lora_registry.py, mem_pool.py, eviction_policy.py).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import count
from uuid import NAMESPACE_URL, uuid5

from ch07_sglang_radix.lora import LoRARef
from common.models.adapter_files import checksum
from common.values import shown


@dataclass(eq=False)
class Adapter:
    """number: what the ranks call it. lost: why it cannot be used any more, if that is so."""

    ref: LoRARef
    number: int
    identity: str
    checksum: str
    lost: str | None = None


class Shelf:
    """Room for `size` adapters, by identity, in the order in which they would be forgotten.

    lru: the one that was used longest ago first; fifo: the one that came first.
    """

    def __init__(self, size: int | None, policy: str = "lru"):
        self.size, self.policy = size, policy
        self._order: dict[str, None] = {}

    def __contains__(self, identity: str) -> bool:
        return identity in self._order

    def __iter__(self):
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def use(self, identity: str) -> None:
        """It is used now, or put here."""
        if self.policy == "lru":
            self._order.pop(identity, None)
        self._order[identity] = None

    def remove(self, identity: str) -> None:
        self._order.pop(identity, None)

    def in_the_way(self, kept: Collection[str]) -> str | None:
        """Who has to go before another one fits; None if there is room. Raises ValueError if all that are here are `kept`."""
        if self.size is None or len(self._order) < self.size:
            return None
        for identity in self._order:
            if identity not in kept:
                return identity
        raise ValueError(f"all {self.size} places are taken by adapters that are in use or pinned")


class LoRARegistry:
    """max_loras_per_batch, max_loaded_loras (None: no limit), eviction_policy: SGLang's."""

    def __init__(self, max_loras_per_batch: int, max_loaded_loras: int | None = None, eviction_policy: str = "lru"):
        self.max_loras_per_batch = max_loras_per_batch
        self.names: dict[str, Adapter] = {}
        self.by_identity: dict[str, Adapter] = {}  # those that are leaving, too
        self.loaded = Shelf(max_loaded_loras)
        self.placed = Shelf(max_loras_per_batch, eviction_policy)
        self.slots: dict[str, int] = {}  # of those that are placed: 1 .. max_loras_per_batch
        self._numbers = count(1)

    # --- names

    def add(self, ref: LoRARef, at_start: bool = False) -> Adapter:
        """A new adapter, not loaded yet. at_start: its identity is that of its name and folder, the same wherever an engine starts
        with them; else one that nothing else has. Raises ValueError for a name that is taken, and for one pinned too many."""
        if ref.name in self.names:
            raise ValueError(f"lora_name={shown(ref.name)} is loaded already; unload it first, or use another name")
        if ref.pinned and len(self.pinned) + 1 >= self.max_loras_per_batch:
            raise ValueError(
                f"lora_name={shown(ref.name)} would be pinned as the {len(self.pinned) + 1}. of max_loras_per_batch="
                f"{self.max_loras_per_batch}; the others would never get a place: leave pinned out"
            )
        number = next(self._numbers)
        of = f"{ref.name}\0{ref.path}" + ("" if at_start else f"\0{number}")
        adapter = Adapter(ref, number, uuid5(NAMESPACE_URL, of).hex, checksum(ref.path))
        self.names[ref.name] = self.by_identity[adapter.identity] = adapter
        return adapter

    def acquire(self, name: str) -> str:
        """The identity of the adapter that has this name now. Raises ValueError, in one line, if none has."""
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise ValueError(f"lora_path={shown(name)} is not loaded; loaded: {known}")
        return self.names[name].identity

    def content(self, identity: str) -> str | None:
        adapter = self.by_identity.get(identity)
        return adapter and adapter.checksum

    def take_name(self, name: str) -> Adapter:
        """Nobody can ask for it any more; who has asked goes on. Raises ValueError if nobody could."""
        adapter = self.by_identity[self.acquire(name)]
        del self.names[name]
        return adapter

    def forget(self, adapter: Adapter) -> None:
        """Nobody uses it and nobody can."""
        del self.by_identity[adapter.identity]
        self.drop(adapter.identity)

    # --- places

    @property
    def pinned(self) -> set[str]:
        return {adapter.identity for adapter in self.by_identity.values() if adapter.ref.pinned}

    def drop(self, identity: str) -> None:
        """Its numbers are not in memory any more, nor in a slot."""
        self.loaded.remove(identity)
        self.leave_slot(identity)

    def leave_slot(self, identity: str) -> None:
        self.placed.remove(identity)
        self.slots.pop(identity, None)

    def take_slot(self, identity: str) -> int:
        """A free one. The caller has seen to it that there is one."""
        taken = set(self.slots.values())
        slot = next(slot for slot in range(1, self.max_loras_per_batch + 1) if slot not in taken)
        self.slots[identity] = slot
        self.placed.use(identity)
        return slot

    def facts(self) -> dict[str, object]:
        """For get_server_info."""
        return {
            "loaded_adapters": {name: adapter.ref.path for name, adapter in self.names.items()},
            "lora_in_memory": len(self.loaded), "lora_pool_slots_used": len(self.slots),
            "lora_pool_slots_total": self.max_loras_per_batch,
        }  # fmt: skip


def users_of(identity: str, everybody: Iterable) -> bool:
    return any(req.lora_id == identity for req in everybody)
