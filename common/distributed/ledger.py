"""The ledger: every collective a rank takes part in, written down while it is switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LedgerEntry:
    """One collective as this rank saw it.

    `bytes` is the size of the tensor this rank handed in: the message, not the traffic. What crosses
    the wire depends on the algorithm (a ring all-reduce sends it 2 (R-1)/R times), the message does not.
    """

    op: str  # all_reduce, all_gather, gather, broadcast, send, receive, ...
    label: str  # who talks: embed_tokens, layers.3.o_proj, logits, task, tokens
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    rank: int = 0  # this process's among those of the group that talked
    ranks: int = 1  # in that group


@dataclass
class Ledger:
    """Off by default; then one `if` is all it costs."""

    enabled: bool = False
    entries: list[LedgerEntry] = field(default_factory=list)
    recordings: int = 0  # `recording`s that are open: what was written down must stay for them

    def record(self, op: str, label: str, x: torch.Tensor, rank: int = 0, ranks: int = 1) -> None:
        if self.enabled:
            size, dtype = x.numel() * x.element_size(), str(x.dtype).removeprefix("torch.")
            self.entries.append(LedgerEntry(op, label, tuple(x.shape), dtype, size, rank, ranks))

    def replay(self, entries: list[LedgerEntry]) -> None:
        """Messages of a captured step that ran again: no Python did, so nothing was recorded."""
        if self.enabled:
            self.entries += entries

    @contextmanager
    def recording(self) -> Iterator["Ledger"]:
        """`with tp.ledger.recording() as ledger:` starts from an empty page; afterwards all is as it was before."""
        was_enabled, self.enabled = self.enabled, True
        self.entries.clear()
        self.recordings += 1
        try:
            yield self
        finally:
            self.enabled = was_enabled
            self.recordings -= 1

    def summary(self, first: int = 0) -> dict[str, dict[str, int]]:
        """{op: {"calls": n, "bytes": n}} over what was recorded from entry `first` on."""
        total: dict[str, dict[str, int]] = {}
        for entry in self.entries[first:]:
            row = total.setdefault(entry.op, {"calls": 0, "bytes": 0})
            row["calls"] += 1
            row["bytes"] += entry.bytes
        return total
