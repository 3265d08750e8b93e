"""A line of JSON a step: what the traces of both engines have in common. Each engine's trace.py says what its lines hold."""

import json
import time
from pathlib import Path
from typing import Any

from common.distributed.ledger import Ledger


class StepLog:
    """Writes `path`, a line a step, on the rank that has one: `begin`, `queued` and `write`, in this order.

    Adds to the facts of a step

        ledger     {op: [messages, bytes]} on this rank; the ledger is on as long as the log is open
        ms         schedule (decide, and tell the ranks), settle (take tokens, account), total

    The lines are in the file whenever nothing waits or runs any more (facts "waiting" and "running"), and after `close`.
    """

    def __init__(self, path: str | Path, ledger: Ledger):
        self._file = open(path, "w", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115, open until `close`
        self._ledger = ledger
        ledger.entries.clear()
        ledger.enabled = True

    def begin(self) -> None:
        """Before a step."""
        if not self._ledger.recordings:
            self._ledger.entries.clear()
        self._first = len(self._ledger.entries)
        self._began = time.perf_counter()

    def queued(self) -> None:
        """All ranks know what to do."""
        self._queued_at = time.perf_counter()

    def write(self, facts: dict[str, Any]) -> None:
        """After the step."""
        now, began, queued_at = time.perf_counter(), self._began, self._queued_at
        ledger = {op: [row["calls"], row["bytes"]] for op, row in self._ledger.summary(self._first).items()}
        ms = {"schedule": _ms(queued_at - began), "settle": _ms(now - queued_at), "total": _ms(now - began)}
        self._file.write(json.dumps(facts | {"ledger": ledger, "ms": ms}) + "\n")
        if (
            not facts["waiting"] and not facts["running"]
        ):  # after each line it would cost a quarter of all that a trace costs
            self._file.flush()

    def close(self) -> None:
        self._ledger.enabled = False
        self._file.close()


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
