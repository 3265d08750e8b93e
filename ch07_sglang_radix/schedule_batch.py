"""The running requests as arrays, kept from one decode step to the next.

SGLang's ScheduleBatch: requests leave by `filter`, join by `merge`, and between two changes nobody walks over them.
What a rank makes of a step, SGLang's ForwardBatch, is StepInputs in common/attention/sequence_table.py.
"""

from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.tasks import Alike
from common.sampling.batch import SamplingBatch


class ScheduleBatch:
    """reqs with their rows [B] and the positions [B] at which their next tokens will stand.

    group: put requests that begin with the same pages side by side, and say so in `alike`.
    """

    def __init__(self, memory: RequestMemory, group: bool):
        self.memory, self.group = memory, group
        self.reqs: list[Req] = []
        self.rows = self.positions = np.zeros(0, dtype=np.int64)
        self.alike: tuple[Alike, ...] = ()
        self.sampling: SamplingBatch | None = None  # of the last step; None once the batch has changed
        self._members: set[Req] = set()

    def become(self, reqs: Sequence[Req]) -> None:
        """Filter out who is not in `reqs`, merge in who is new."""
        if len(reqs) == len(self.reqs) and self._members.issuperset(reqs):
            return
        wanted = set(reqs)
        self.filter(np.array([req in wanted for req in self.reqs], dtype=bool))
        self.merge([req for req in reqs if req not in self._members])
        if self.group:
            self.reqs, self.alike = self.memory.alike(self.reqs)
            self._read()

    def filter(self, keep: np.ndarray) -> None:
        """Only those where keep [B] is true stay."""
        if not keep.all():
            self.reqs = [req for req, stays in zip(self.reqs, keep, strict=True) if stays]
            self.rows, self.positions = self.rows[keep], self.positions[keep]
            self._members, self.alike, self.sampling = set(self.reqs), (), None

    def merge(self, reqs: Sequence[Req]) -> None:
        """These join at the end."""
        if reqs:
            self.reqs = [*self.reqs, *reqs]
            self._members, self.alike = set(self.reqs), ()
            self._read()

    def advance(self) -> None:
        """Every request has got one slot more."""
        self.positions += 1
        for req in self.reqs:
            req.kv_len += 1

    def next_sampling(self) -> SamplingBatch:
        """The sampling parameters of the next step; they only move on while the batch stays the same."""
        if self.sampling and not self.sampling.needs_last_token:
            self.sampling.advance()
        else:
            self.sampling = SamplingBatch([req.sampling_row() for req in self.reqs])
        return self.sampling

    def _read(self) -> None:
        self.rows = np.array([req.row for req in self.reqs], dtype=np.int64)
        self.positions = np.array([req.kv_len for req in self.reqs], dtype=np.int64)
        self.sampling = None
