"""Who may run together: at most max_loras_per_batch adapters, and nobody waits for ever.

A gate of the core's admission: asked for each waiting request, in the schedule policy's order. Requests without an adapter need no
place and always pass. An adapter that somebody runs with has a place, so whoever else wants it passes too. And there would be the
end of it for an adapter without a place, if those that have one are asked for again and again: so

    1  a request that has been passed over by PATIENCE prefill steps is overdue;
    2  the free places are for overdue adapters, in the order in which they came;
    3  for each overdue one that gets none, an adapter that runs drains: it takes nobody who came later than the overdue request,
       and its place comes free with its last request. It is the one whose requests have the fewest tokens left.

Whoever runs comes to an end, so a draining adapter does, after as many steps as it has tokens left: that is the bound of the wait.
In SGLang 0.5.23 nothing drains unless lora_drain_wait_threshold is set (srt/lora/lora_drainer.py), and that counts seconds.
"""

from collections.abc import Callable, Iterable

from ch07_sglang_radix.adapters.registry import LoRARegistry
from ch07_sglang_radix.request import Req

PATIENCE = 4  # prefill steps that may take later requests first


class LoRAGate:
    """seat: puts an adapter that is to run into a slot, and returns whether that has worked. patience: in place of PATIENCE."""

    def __init__(self, registry: LoRARegistry, seat: Callable[[str], bool], patience: float = PATIENCE):
        self._registry, self._seat, self._patience = registry, seat, patience
        self.held: set[str] = set()  # adapters that have a place: someone runs with them, or they are pinned
        self.draining: dict[str, int] = {}  # adapter: who came later than this request waits
        self._overdue: dict[str, int] = {}  # adapter without a place: its overdue request, the oldest first

    def look(self, admitted: Iterable[Req], waiting: Iterable[Req]) -> None:
        """Before each step: who runs, who has waited too long."""
        left: dict[str, int] = {}
        for req in admitted:
            if req.lora_id is not None:
                left[req.lora_id] = max(left.get(req.lora_id, 0), req.max_len - req.seq_len)
        pinned = self._registry.pinned
        self.held = pinned | left.keys()
        late = [r for r in waiting if r.lora_id and r.passed_over >= self._patience and r.lora_id not in self.held]
        self._overdue = {}
        for req in sorted(late, key=lambda req: req.rid):
            self._overdue.setdefault(req.lora_id, req.rid)
        can_drain = sorted((one for one in left if one not in pinned), key=lambda one: (left[one], one))
        in_want = list(self._overdue.values())[max(self._free, 0) :]
        self.draining = dict(zip(can_drain, in_want, strict=False))

    @property
    def _free(self) -> int:
        return self._registry.max_loras_per_batch - len(self.held)

    def __call__(self, req: Req, matched: int) -> bool:
        wanted = req.lora_id
        if wanted is None:
            return True
        if wanted in self.held:
            if req.rid > self.draining.get(wanted, req.rid):
                return False
        else:
            before = sum(rid < req.rid for one, rid in self._overdue.items() if one != wanted and one not in self.held)
            if self._free <= before:
                return False
        if not self._seat(wanted):
            return False
        self.held.add(wanted)
        return True
