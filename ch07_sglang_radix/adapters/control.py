"""Adapters of an engine: rank 0 decides which is where, all ranks read, place and forget as it says.

    rank 0                                         every other rank
    load_lora_adapter(name, folder)                (follows)
      note "load_adapter"             ->           read the folder, keep this rank's part         LoRAManager.load (common/)
      what went wrong?          <- all-gather ->   what went wrong?
    gate: this request may run
      note "place_adapter"            ->           that part into a slot of each layer            LoRAManager.place
    task, with a column "adapter"     ->           each row with its own slot
    unload_lora_adapter(name)
      its last request has ended:
      note "unload_adapter"           ->           forget it                                      LoRAManager.unload

A note comes between two tasks, so a slot is never written while a step that was sent before reads it. Only names and numbers
travel: every rank reads the files by itself.
"""

from collections.abc import Sequence
from concurrent.futures import Future

from ch07_sglang_radix.adapters.gate import LoRAGate
from ch07_sglang_radix.adapters.registry import Adapter, LoRARegistry, users_of
from ch07_sglang_radix.lora import LoRARef
from ch07_sglang_radix.scheduler import TPScheduler
from common.distributed.messages import agree
from common.models.adapter_files import checksum
from common.values import shown

LOAD, PLACE, UNLOAD = "load_adapter", "place_adapter", "unload_adapter"  # notes


class Adapters:
    """On every rank of an engine; rank 0's keeps the registry and the gate. The limits are the registry's.

    refs: loaded at once, on all ranks, which all make this object. Raises FileNotFoundError or ValueError, on all of them, for one
    that cannot be read.
    """

    def __init__(self, scheduler: TPScheduler, refs: Sequence[LoRARef], max_loaded: int | None, policy: str):
        self._scheduler, self._ranks = scheduler, scheduler.wrapper.lora
        self.registry = LoRARegistry(scheduler.wrapper.lora.options.max_loras, max_loaded, policy)
        self._leaving: dict[str, Future] = {}  # adapters whose last users are waited for
        self._control = scheduler.control
        self._control.notes |= {LOAD: self._load, PLACE: self._ranks.place, UNLOAD: self._ranks.unload}
        for ref in refs:
            adapter = self.registry.add(ref, at_start=True)
            if error := self._load(adapter.number, ref.path, adapter.checksum):
                raise ValueError(error)
            self.registry.loaded.use(adapter.identity)
        if scheduler.replica.rank == 0:
            scheduler.lora = self.registry
            self.gate = LoRAGate(self.registry, self._seat)
            scheduler.admission.gates.append(self.gate)
            scheduler.beside.append(self._before_step)

    # --- rank 0, between two steps

    def load(self, ref: LoRARef) -> None:
        """Raises ValueError or FileNotFoundError, and nothing has changed, if it cannot be."""
        self.gate.look(self._scheduler.admitted, self._scheduler.waiting)
        if ref.pinned and (taken := len(self.gate.held)) >= self.registry.max_loras_per_batch:
            raise ValueError(
                f"lora_name={shown(ref.name)} would be pinned, and all {taken} places are taken by adapters that are in use or "
                "pinned; load it when fewer are, or leave pinned out"
            )
        adapter = self.registry.add(ref)
        try:
            self._bring(adapter)
        except ValueError:
            del self.registry.names[ref.name]
            self.registry.forget(adapter)
            raise

    def unload(self, name: str) -> Future:
        """Nobody can ask for it any more; done once nobody uses it, and it is forgotten. Raises ValueError if nobody could ask."""
        adapter = self.registry.take_name(name)
        gone = self._leaving[adapter.identity] = Future()
        self._say_goodbye()
        return gone

    def _before_step(self) -> bool:
        self._say_goodbye()
        s = self._scheduler
        not_begun = [*s.waiting, *s.elsewhere]
        for req in [req for req in not_begun if req.lora_id and self.registry.by_identity[req.lora_id].lost]:
            s.outcome.refuse(req, self.registry.by_identity[req.lora_id].lost)
        self.gate.look(s.admitted, s.waiting)
        return False  # nothing is on its way that no step moves

    def _say_goodbye(self) -> None:
        for identity in list(self._leaving):
            if not users_of(identity, self._scheduler.everybody):
                if identity in self.registry.loaded:
                    self._control.note(UNLOAD, adapter=self.registry.by_identity[identity].number)
                self.registry.forget(self.registry.by_identity[identity])
                self._leaving.pop(identity).set_result(None)

    def _seat(self, identity: str) -> bool:
        """The gate has found a place for it: have it in a slot when the next step is sent."""
        registry, adapter = self.registry, self.registry.by_identity[identity]
        if adapter.lost:
            return False
        if identity not in registry.loaded:
            try:
                if checksum(adapter.ref.path) != adapter.checksum:
                    raise ValueError(
                        f"the files in {adapter.ref.path} are not those that were loaded; unload it, and load it again"
                    )
                self._bring(adapter)
            except (ValueError, FileNotFoundError) as error:
                adapter.lost = (
                    f"adapter {adapter.ref.name} was forgotten for want of room, and does not come back: {error}"
                )
                return False
        registry.loaded.use(identity)
        if identity in registry.placed:
            registry.placed.use(identity)
            return True
        if (other := registry.placed.in_the_way(self.gate.held)) is not None:
            registry.leave_slot(other)
        self._control.note(PLACE, adapter=adapter.number, slot=registry.take_slot(identity))
        return True

    def _bring(self, adapter: Adapter) -> None:
        """Into every rank's memory; whoever is in the way is forgotten."""
        other = self.registry.loaded.in_the_way(self.gate.held - {adapter.identity})
        arguments = {"adapter": adapter.number, "folder": adapter.ref.path, "expected": adapter.checksum}
        if error := self._control.together(LOAD, **arguments):
            raise ValueError(error)
        if other is not None:
            self._control.note(UNLOAD, adapter=self.registry.by_identity[other].number)
            self.registry.drop(other)
        self.registry.loaded.use(adapter.identity)

    # --- every rank

    def _load(self, adapter: int, folder: str, expected: str) -> str | None:
        """Why it is not loaded, on no rank; None if it is, on all of them. expected: the checksum that rank 0 knows it by."""

        def load() -> None:
            self._ranks.load(adapter, folder)
            if checksum(folder) != expected:
                raise ValueError(
                    f"{folder} has other files here than rank 0 has looked at; give all ranks the same, and rename what is new"
                )

        _, error = agree(load, self._scheduler.replica, f"has other files in {folder} than rank 0", lambda _: expected)
        if error and adapter in self._ranks.loaded:
            self._ranks.unload(adapter)
        return error
