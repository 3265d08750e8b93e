"""A line of JSON a step: what the traces of both engines have in common. Each engine's trace.py says what its lines hold."""

import json
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.distributed.ledger import Ledger


class StepLog:
    """Writes `path`, a line a step, on the rank that has one: `begin`, `queued` and `write`, in this order.

    Adds to the facts of a step

        ledger     {op: [messages, bytes]} on this rank; the ledger is on as long as the log is open
        ms         schedule (decide, and tell the ranks), settle (take tokens, account), total

    The lines are in the file whenever nothing waits or runs any more (facts "waiting" and "running"), and after `close`.
    A disk that is full ends the trace with one warning, and not the engine.
    """

    def __init__(self, path: str | Path, ledger: Ledger):
        self._file = open(path, "w", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115, open until `close`
        self._path, self._broken = path, False
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
        at_rest = not facts["waiting"] and not facts["running"]
        self._put(json.dumps(facts | {"ledger": ledger, "ms": ms}) + "\n", flush=at_rest)

    def _put(self, line: str, flush: bool) -> None:
        """flush: not after each line, it would cost a quarter of all that a trace costs."""
        if self._broken:
            return
        try:
            self._file.write(line)
            if flush:
                self._file.flush()
        except OSError as error:
            self._broken = True
            warnings.warn(f"the trace ends here: {self._path}: {error.strerror}", stacklevel=2)

    def close(self) -> None:
        """Safe to call twice."""
        self._ledger.enabled = False
        self._put("", flush=True)
        with suppress(OSError):  # said already
            self._file.close()


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
