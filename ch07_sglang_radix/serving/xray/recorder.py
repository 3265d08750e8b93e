"""From the scheduler to the page's events: what a step has changed in the tree, the pages, the requests, and what was sent.

    recorder = Recorder(engine.scheduler, publish)     # publish(line of bytes): to a file, a socket, a Feed
    recorder.start()                                   # a snapshot, then an event after every step
    recorder.stop()

It is one more of `scheduler.after_step`, and only while somebody looks: stopped, it is not in the list at all. It reads and
never changes anything but the ledger's switch. What a step has not touched is not read again: most decode steps leave the
tree alone.
"""

import logging
import time
from collections.abc import Callable

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.serving.xray import events
from ch07_sglang_radix.serving.xray.events import State
from ch07_sglang_radix.serving.xray.tree_rows import OTHER, TreeRows
from common.distributed.cost_model import wire_bytes
from common.teaching.show import WHY

log = logging.getLogger(__name__)

SHARE = 0.006  # of the time that the scheduler may lose to a page that is open: with the snapshots, under 1 %
BURST_S = 0.5  # so much of it at once: a small workload is told step by step
MOST_CELLS = 2048  # of the grid: larger pools put several pages into a cell
PROMPT_TOKENS, ANSWER_TOKENS = 40, 20  # shown of a request: the end, which tells it from others
FREE, REQUEST = 0, 1 << 32  # owners of pages as numbers: a node's is its own, a request's REQUEST + rid


class Recorder:
    """share: how much of the time recording may take. Once a burst of BURST_S is used up, several steps are told as one, so that
    a server under load keeps its pace; 1.0 tells of every step. Rank 0 only, always between two steps.
    """

    def __init__(
        self,
        scheduler: TPScheduler,
        publish: Callable[[bytes], None],
        *,
        share: float = SHARE,
        replica: int | None = None,
    ):
        self.scheduler, self.publish, self.share, self.replica = scheduler, publish, share, replica
        self.on, self.mark = False, ""
        self.credit = BURST_S  # seconds of processor time that recording may take now
        self.state: State = {}
        self._seq = 0

    # --- on and off

    def watch(self, on: bool) -> None:
        """What a Feed asks for."""
        if on:
            self.start()
        else:
            self.stop()

    def start(self) -> None:
        """Tell everything there is, and from now on what changes. If it is on already: a snapshot for who has come late."""
        if not self.on:
            self.on = True
            self._begin()
            self.state = self._look() | {"pages": self._moved_cells()}
            self.scheduler.after_step.append(self.after_step)
        self.publish(events.snapshot(self._seq, self.state))

    def stop(self) -> None:
        """Nobody looks any more. Safe to call twice."""
        if self.on:
            self.on = False
            self.scheduler.after_step.remove(self.after_step)
            ledger = self.scheduler.tp.ledger
            ledger.recordings -= 1
            ledger.enabled = self._ledger_was_on or ledger.recordings > 0
            self.state = {}
            del self._tree, self._live  # they hold nodes and requests that nobody else needs any more

    def _begin(self) -> None:
        ledger = self.scheduler.tp.ledger
        self._ledger_was_on, ledger.enabled = ledger.enabled, True
        if not ledger.recordings:
            ledger.entries.clear()
        ledger.recordings += 1  # or a trace would throw away what is not told yet
        self._entry = len(ledger.entries)
        self._began = self._looked = time.perf_counter()
        self.credit = BURST_S
        self._tree = TreeRows(self.scheduler)
        self._live: dict[int, tuple[Req, int]] = {}  # who waited or ran, and with how many tokens computed
        self._says: dict[int, str] = {}
        self._cells = np.zeros(-(-self.scheduler.pool.num_pages // self._pages_per_cell), dtype=np.int64)  # all free
        self._steps, self._computed = dict(self.scheduler.steps), self.scheduler.work["tokens"]

    # --- events

    def after_step(self) -> None:
        """Tell of the step, unless recording has had its share: then a later event tells of it too. The last step before the
        scheduler has nothing to do is always told."""
        now = time.perf_counter()
        self.credit = min(BURST_S, self.credit + self.share * (now - self._looked))
        self._looked = now
        if self.credit > 0 or self.share >= 1 or not self.scheduler.unfinished:
            began = time.thread_time()  # of this thread alone, whatever else the machine does
            try:
                self.record()
            except Exception as error:  # a page that cannot be shown must not end the engine
                log.error("the X-ray page gets no more events: %s: %s", type(error).__name__, error)
                self.stop()
            self.credit -= time.thread_time() - began

    def at_rest(self) -> None:
        """Before the scheduler waits for work: tells of an abort or a flush, which no step follows."""
        if self.on and (self._tree.moved or self._live.keys() != {r.rid for r in self._asked()}):
            self.record()

    def record(self) -> None:
        """Tell what has changed since the last event."""
        if not self.on:
            return
        cells = self.state.pop("pages")
        after = self._look()
        change = events.difference(self.state, after)
        if moved := self._moved_cells():
            change["pages"], cells = moved, events.merged(cells, moved)
        self.state, self._seq = after | {"pages": cells}, self._seq + 1
        self.publish(events.step(self._seq, change))

    # --- the state

    def _look(self) -> State:
        """All but the pages, which are too many to be compared one by one."""
        kind = self._kind()
        self._tree.refresh()
        requests = self._requests()
        state = {
            "about": self.state.get("about") or self._about(), "now": self._now(kind), "totals": self._totals(),
            "nodes": self._tree.rows, "requests": requests, "sent": self._sent(),
        }  # fmt: skip
        self._steps, self._computed = dict(self.scheduler.steps), self.scheduler.work["tokens"]
        return state

    def _about(self) -> State:
        s = self.scheduler
        pages, data_ranks = s.pool.num_pages, len(s.data_ranks)
        parts = [
            f"replica {self.replica} alone" * (self.replica is not None),
            f"data rank 0 of {data_ranks}" * (data_ranks > 1),
        ]
        return {
            "shows": ", ".join(filter(None, parts)),
            "model": s.wrapper.config.architecture, "layers": s.wrapper.config.num_layers, "ranks": s.replica.size,
            "device": str(s.tp.device), "page_size": s.page_size, "num_pages": pages,
            "pages_per_cell": self._pages_per_cell, "cells": -(-pages // self._pages_per_cell),
            "max_total_num_tokens": s.pool.size, "chunked_prefill_size": s.chunked_prefill_size,
            "radix_eviction_policy": s.tree.eviction, "schedule_policy": s.policy.name, "why": WHY,
        }  # fmt: skip

    @property
    def _pages_per_cell(self) -> int:
        return -(-self.scheduler.pool.num_pages // MOST_CELLS)

    def _kind(self) -> str:
        """Of what has been done since the last event."""
        prefills, decodes = (self.scheduler.steps[kind] - self._steps[kind] for kind in ("prefill", "decode"))
        if prefills + decodes == 0:
            return "settle"
        return "several" if prefills + decodes > 1 else "prefill" if prefills else "decode"

    def _now(self, kind: str) -> State:
        s = self.scheduler
        return {
            "step": s.step_number, "kind": kind, "t": round(time.perf_counter() - self._began, 4),
            "tokens": s.work["tokens"] - self._computed, "mark": self.mark,
        }  # fmt: skip

    def _totals(self) -> State:
        s = self.scheduler
        prompt, cached = s.served["prompt"], s.served["cached"]
        return {
            "waiting": len(s.waiting), "running": len(s.admitted), "free_tokens": s.pool.free_slots,
            "evictable_tokens": s.tree.evictable_size, "protected_tokens": s.tree.protected_size,
            "prompt_tokens": prompt, "cached_tokens": cached, "hit_rate": round(cached / prompt, 4) if prompt else 0.0,
            "output_tokens": s.work["sampled"], "evicted_tokens": s.tree.evicted, "retractions": s.retractions,
            "finished": s.num_finished, "splits": s.tree.splits, "nodes_left_out": self._tree.left_out,
        }  # fmt: skip

    # --- the pages

    def _owners(self) -> np.ndarray:
        """[pages]: whose each page is."""
        s = self.scheduler
        owners = self._tree.owners.copy()
        rows = s.req_to_token.req_to_token
        for req in s.admitted:
            own = rows[req.row, req.prefix_len : req.allocated_len : s.page_size] // s.page_size
            owners[own] = OTHER if req.probe else REQUEST + req.rid
        for more in s.more_owners:
            for _, pages in more():
                owners[pages] = OTHER
        return owners

    def _moved_cells(self) -> dict[str, str | None]:
        """{cell: its new owner}. A cell of several pages shows the one that is most in use: a request's, then the newest node's."""
        owners = self._owners()
        cells = np.maximum.reduceat(owners, np.arange(0, len(owners), self._pages_per_cell))
        moved = np.flatnonzero(cells != self._cells)
        self._cells = cells
        return {str(cell): _owner(int(cells[cell])) for cell in moved}

    # --- the requests

    def _requests(self) -> State:
        s = self.scheduler
        prefilled = {req.rid: n for req, n in s.last_prefill} if s.steps["prefill"] > self._steps["prefill"] else {}
        waiting, live = {req.rid for req in s.waiting}, {req.rid: req for req in self._asked()}
        rows = {}
        for rid, (req, _) in self._live.items():
            if rid not in live:
                phase = "aborted" if (req.finish_reason or {}).get("type") == "abort" else "done"
                rows[str(rid)] = self._request(req, phase, 0)
                del self._says[rid]
        for rid, req in live.items():
            before = self._live.get(rid, (req, 0))[1]
            if rid in waiting:
                phase, new = "queued" if req.cached_tokens is None else "retracted", 0
            elif rid in prefilled:
                phase, new = "prefill", prefilled[rid]
            else:
                new = req.kv_len - before
                phase = "decode" if new > 0 else "stands"
            rows[str(rid)] = self._request(req, phase, new)
        self._live = {rid: (req, req.kv_len) for rid, req in live.items()}
        return rows

    def _asked(self) -> list[Req]:
        """Everybody who waits or runs, but for probes, which are counted nowhere."""
        return [req for req in self.scheduler.unfinished if not req.probe]

    def _request(self, req: Req, phase: str, new: int) -> State:
        page_size = self.scheduler.page_size
        if req.rid not in self._says:
            self._says[req.rid] = self._tail(req.prompt_ids, PROMPT_TOKENS)
        held = req.row >= 0 and phase not in ("done", "aborted")
        return {
            "phase": phase, "says": self._says[req.rid], "text": self._tail(req.output_ids, ANSWER_TOKENS),
            "prompt": len(req.prompt_ids), "cached": req.cached_tokens or 0, "computed": req.kv_len, "new": new,
            "out": len(req.output_ids), "most": req.params.max_new_tokens,
            "own": (req.allocated_len - req.prefix_len) // page_size if held else 0,
            "why": self.scheduler.held.get(req.rid, "") if phase in ("queued", "retracted") else "",
        }  # fmt: skip

    def _tail(self, ids: list[int], most: int) -> str:
        tokenizer, tail = self.scheduler.wrapper.tokenizer, ids[-most:]
        # it may begin or end within a character
        return tokenizer.decode(tail).strip("\ufffd") if tokenizer else " ".join(map(str, tail))

    # --- the messages

    def _sent(self) -> list[list]:
        """What stands in the ledger since the last event, by operation and purpose."""
        ledger, rows = self.scheduler.tp.ledger, {}
        for entry in ledger.entries[self._entry :]:
            row = rows.setdefault((entry.op, entry.label.rsplit(".", 1)[-1]), [0, 0, 0])
            row[0] += 1
            row[1] += entry.bytes
            row[2] += wire_bytes(entry.op, entry.bytes, entry.ranks)
        if ledger.recordings == 1:  # nobody else needs them
            ledger.entries.clear()
        self._entry = len(ledger.entries)
        return [[*what, *row] for what, row in rows.items()]


def _owner(number: int) -> str | None:
    if number == FREE:
        return None
    if number >= REQUEST:
        return f"r{number - REQUEST}"
    return "x" if number == OTHER else f"n{number}"
