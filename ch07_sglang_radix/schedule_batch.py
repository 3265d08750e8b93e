"""The running requests as arrays, kept from one decode step to the next.

SGLang's ScheduleBatch: requests leave by `filter`, join by `merge`, and between two changes nobody walks over them to find out
what the next step is made of; only the numbers of each move on, in `advance`.
What a rank makes of a step, SGLang's ForwardBatch, is StepInputs in common/attention/sequence_table.py.
"""

from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.tasks import PageUpdate
from common.attention.prefix_groups import ALONE, Alike, PrefixGroups
from common.sampling.batch import SamplingBatch


class ScheduleBatch:
    """reqs with their rows [B], the positions [B] at which their next tokens will stand, and the ends [B] of their pages.

    group: put requests that begin with the same pages side by side, and say so in `alike`. counted: those that are no probes.
    needs_last_token: one of them must know its last token before the next one is drawn (common/sampling/edits.py).
    """

    def __init__(self, memory: RequestMemory, group: bool):
        self.memory = memory
        self.groups = PrefixGroups(memory.page_size) if group else None
        self.reqs: list[Req] = []
        self.alike: tuple[Alike, ...] = ()
        self.sampling: SamplingBatch | None = None  # of the last step; None if the next one's is to be made anew
        self.steps_left = 0  # until the first of them has all its tokens drawn
        self._members: set[Req] = set()
        self._chosen_from: list[Req] = []  # those that ran when it was made
        self._unsent: list[Req] = []  # whose newest pages the ranks may not know
        self._hold([], np.zeros((6, 0), dtype=np.int64))

    def is_of(self, running: list[Req]) -> bool:
        """Does everybody still want a token, and has nobody come or gone since `running` was what `become` chose from?"""
        return self.steps_left > 0 and running == self._chosen_from

    def become(self, reqs: Sequence[Req], running: Sequence[Req] = ()) -> None:
        """Filter out who is not in `reqs`, merge in who is new. running: whom `reqs` were chosen from."""
        self._chosen_from = list(running)
        if not (len(reqs) == len(self.reqs) and self._members.issuperset(reqs)):
            wanted = set(reqs)
            self.filter(np.array([req in wanted for req in self.reqs], dtype=bool))
            self.merge([req for req in reqs if req not in self._members])
            if self.groups:
                order, self.alike = self.groups.in_order(self._numbers)
                self._pick(order)
        self.steps_left = min([req.wanted for req in self.reqs], default=0)

    def filter(self, keep: np.ndarray) -> None:
        """Only those where keep [B] is true stay."""
        if not keep.all():
            for row in self.rows[~keep].tolist() if self.groups else ():
                self.groups.leave(row)
            self._pick(keep.nonzero()[0])

    def merge(self, reqs: Sequence[Req]) -> None:
        """These join at the end."""
        if reqs:
            new = np.array([self._told(req) for req in reqs], dtype=np.int64).T
            self._unsent += reqs
            if any([req.needs_last_token for req in reqs]):
                self.sampling = None
            elif self.sampling:
                self.sampling.merge_batch([req.sampling_row() for req in reqs])
            self._hold([*self.reqs, *reqs], np.concatenate((self._columns, new), axis=1))

    def grow(self) -> tuple[PageUpdate, ...]:
        """A page more for each whose last one is full; returns what the ranks do not know yet of all pages."""
        full = (self.positions == self.ends).nonzero()[0]
        if len(full):
            reqs = [self.reqs[i] for i in full.tolist()]
            self.memory.grow_by_a_page(reqs)
            self.ends[full] += self.memory.page_size
            self._unsent += reqs
        unsent, self._unsent = self._unsent, []
        return self.memory.page_updates(unsent) if unsent else ()

    def advance(self) -> None:
        """Every request has got one slot more, and a token is being drawn for it."""
        self.positions += 1
        self.steps_left -= 1
        for req in self.reqs:  # 256 of them in every step: no call, no property
            req.kv_len += 1
            req.pending += 1
            req.wanted -= 1

    def next_sampling(self) -> SamplingBatch:
        """The sampling parameters of the next step; who stays in the batch only moves on."""
        if self.sampling:
            self.sampling.advance()
            return self.sampling
        sampling = SamplingBatch([req.sampling_row() for req in self.reqs])
        if not self.needs_last_token:
            self.sampling = sampling
        return sampling

    def _told(self, req: Req) -> tuple[int, ...]:
        """What its column says of it, its group included."""
        number = self.groups.join(req.row, self.memory.tree_pages(req)) if self.groups else ALONE
        return req.row, req.kv_len, req.allocated_len, number, req.probe, req.needs_last_token

    def _pick(self, order: np.ndarray) -> None:
        """These stay, in this order [n]."""
        if len(order) == len(self.reqs) and (order[1:] > order[:-1]).all():
            return
        if self.sampling:
            self.sampling.filter_batch(order)
        self._hold([self.reqs[i] for i in order.tolist()], self._columns[:, order])

    def _hold(self, reqs: list[Req], columns: np.ndarray) -> None:
        """columns [6, B]: a request's is what `_told` says."""
        self.reqs, self._columns, self._members = reqs, columns, set(reqs)
        self.rows, self.positions, self.ends, self._numbers, probes, need = columns
        self.counted, self.needs_last_token = len(reqs) - int(probes.sum()), bool(need.any())
