"""Making room: when a decode step lacks pages even after eviction, who goes back to the queue?

Those with the fewest tokens out go first (ties: the longest prompt), until RETRACT_DECODE_STEPS more steps fit for each of the
others: what they had computed is lost least. The last one stays: alone it fits, or it had been refused. But where a wing's requests
hold pages and do not run yet (SchedulerState.elsewhere), it is not alone: it goes back, too, until they have run. SGLang:
retract_decode.
"""

from collections.abc import Callable

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler_state import SchedulerState

RETRACT_DECODE_STEPS = 20  # after a retraction this many steps fit for everyone left


class Retraction:
    """settle: makes every token known that is still being drawn; who goes back needs all of its own."""

    def __init__(self, state: SchedulerState, settle: Callable[[], None]):
        self.state, self.settle = state, settle

    def make_room(self) -> None:
        """Before a decode step: see to it that every running request can have its next slot."""
        s = self.state
        if s.memory.obtainable_slots() >= len(s.running) * s.page_size or not self.lacks_room(1):
            return
        self.settle()  # requests may have ended, too
        retracted = []
        if self.lacks_room(1) and s.chunked:  # it has no outputs yet, and what it computed stays in the tree
            s.memory.release(s.chunked)
            retracted.append(s.chunked)
            s.chunked = None
        if self.lacks_room(1):
            retracted += self._retract()
            decoded = sum(len(r.output_ids) for r in s.running)
            total = sum(r.params.max_new_tokens for r in s.running)
            s.new_token_ratio = min(1.0, (decoded + RETRACT_DECODE_STEPS * len(s.running)) / total)
        while self.lacks_room(1) and s.memory.sessions.forget_oldest():
            pass  # who is left has nobody else to wait for
        if self.lacks_room(1) and s.elsewhere:  # but these, who run without it
            retracted.append(s.running.pop())
            s.memory.release(retracted[-1])
        self._back_to_the_queue(retracted)

    def retract_all(self) -> None:
        """Everybody back to the queue, between two steps; what they had computed is in the tree as far as it was shared."""
        self.settle()
        s = self.state
        retracted = s.admitted
        for req in retracted:
            s.memory.release(req)
        s.running, s.chunked = [], None
        self._back_to_the_queue(retracted)

    def lacks_room(self, steps: int) -> bool:
        """Are there too few slots for so many more tokens of each running request?"""
        memory = self.state.memory
        return memory.slots_needed(self.state.running, steps) > memory.obtainable_slots()

    def _retract(self) -> list[Req]:
        s, retracted = self.state, []
        by_loss = sorted(s.running, key=lambda r: (len(r.output_ids), -len(r.prompt_ids)))
        while len(s.running) > 1 and self.lacks_room(RETRACT_DECODE_STEPS):
            req = by_loss.pop(0)
            s.running.remove(req)
            s.memory.release(req)
            retracted.append(req)
        return retracted

    def _back_to_the_queue(self, reqs: list[Req]) -> None:
        """In front: they came first."""
        if reqs:  # the same requests may run again in the next decode step of their lane, in other rows
            self.state.forget_batches()
        self.state.retractions += len(reqs)
        self.state.waiting = sorted(reqs, key=lambda req: req.rid) + self.state.waiting
