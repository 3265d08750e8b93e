"""Verify steps, on rank 0's side: what they are made of, and what comes out of them.

A verify step stands in a decode step's place, and brings each request one token or more. How many is known when the tokens are
there, so rank 0 waits for the paths (`measure`) before it plans the next step; the tokens themselves, stop texts and streams it
may look at when that step is under way.

    slots of a row     0 .. kv_len        .. kv_len + N              N nodes: the root at kv_len, the guesses behind it
    afterwards         0 .. kv_len + n                               n tokens came out: so many of the new slots count
                                          .. kv_len + N              what was rejected: still the request's, written over next time

Rejected tokens leave no trace: nothing of them is put into the tree, and their slots are the next step's reserve. Where pages
are short, or guesses do not pay, a plain decode step comes in place of a verify step, and the reserve is given back first: nobody
is retracted for a guess.
SGLang 0.5.23 also has more allocated than is committed (srt/managers/schedule_batch.py, ReqKvInfo: kv_allocated_len,
kv_committed_len).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.step_plan import StepPlan
from ch07_sglang_radix.tasks import VerifyTask
from common.distributed.transfer import Download
from common.draft_tree import Accepted, DraftTree
from common.sampling.acceptance import Rule
from common.sampling.logprobs import TokenLogprobs
from common.sampling.nodes import node_batch
from common.sampling.params import MASK64
from common.sampling.sampler import Drawn

Columns = dict[str, tuple[int, ...]]


class Guesser(Protocol):
    """Who guesses on rank 0, from the requests' tokens alone."""

    def guess(self, reqs: Sequence[Req], nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Trees of `nodes` nodes below each request's last token: tokens and parents [B, nodes - 1] of the nodes 1 .. nodes-1;
        parent 0 is the last token. All of their tokens are in all_ids."""
        ...


class StandDown(Protocol):
    """When verifying does not pay. rates: tokens a second of plain and of verify steps, by the largest batch that counts in."""

    rates: dict[int, tuple[float, float]]

    def verifies(self, batch: int) -> bool:
        """Is the next step of so many requests to be a verify step?"""
        ...


class Speculation:
    """nodes N: of each tree, with its root. settle: makes every token known that is on its way. A wing may set `guesser` and
    `rule`.

    Counts: verify steps that were launched, and those whose paths are known: sequences in them, guesses that were right, tokens
    that came out. newest: what was measured last, for the trace: of each request its number, guesses, their parents, and the
    path, as lists."""

    def __init__(self, state: SchedulerState, nodes: int, settle: Callable[[], None]):
        self.state, self.nodes, self.settle = state, nodes, settle
        self.guesser: Guesser | None = None
        self.rule: StandDown | None = None
        self.acceptance: Rule | None = None  # which guesses are kept, if not those that are drawn
        self.draws = False  # the drafter draws its guesses
        self.launched = self.steps = self.sequences = self.correct = self.tokens = 0
        self._keeps = False  # requests have pages for guesses
        self.reqs: Sequence[Req] = ()  # of the step that was planned last
        self.remember = False  # keep `newest`
        self.newest: list[dict] = []

    def plan(
        self, best: Callable[[Sequence[Req]], int], columns: Callable[[Sequence[Req]], Columns],
        launched: Callable[[], None],
    ) -> StepPlan | None:  # fmt: skip
        """A verify step of all who want more tokens; None if a plain one is due. best, columns, launched: StepTasks'."""
        s, memory = self.state, self.state.memory
        reqs = [req for req in s.in_lane if req.wanted]
        if not reqs or (self.rule and not self.rule.verifies(len(reqs))):
            return None
        if self.guesser:  # it reads every token
            self.settle()
            reqs = [req for req in s.in_lane if req.wanted]
        missing = sum(max(0, memory.whole_pages(req.kv_len + self.nodes) - req.allocated_len) for req in reqs)
        if missing > memory.obtainable_slots() or not reqs:
            return None
        for req in reqs:
            memory.grow(req, req.kv_len + self.nodes)
        self._keeps = True
        guesses = parents = ()
        if self.guesser:
            guesses, parents = (tuple(x.reshape(-1).tolist()) for x in self.guesser.guess(reqs, self.nodes))
        self.reqs, self.launched = reqs, self.launched + 1
        rows, positions = tuple(req.row for req in reqs), tuple(req.kv_len for req in reqs)
        task = VerifyTask(
            s.front.step_number, memory.page_updates(reqs), rows, positions, self.nodes, guesses, parents, best(reqs),
            columns(reqs) | (_draws(reqs) if self.draws else {}),
        )  # fmt: skip
        return StepPlan(
            task, reqs, reqs, 0, any(req.needs_last_token for req in reqs), launched,
            lambda: node_batch([req.sampling_row(0) for req in reqs], self.tree, self.acceptance),
        )  # fmt: skip

    def give_back(self) -> None:
        """The reserve for guesses: a plain step comes instead."""
        if self._keeps:
            self.state.memory.give_back(self.state.running)
            self._keeps = False

    @property
    def tree(self) -> DraftTree:
        """Of the step that was launched last."""
        return self.state.wrapper.verifier.waiting.tree

    def count(self, req: Req, tokens: int) -> None:
        req.verify_ct += 1
        req.correct_drafts += tokens - 1
        req.proposed_drafts += self.nodes - 1
        self.sequences += 1
        self.correct += tokens - 1
        self.tokens += tokens


def _draws(reqs: Sequence[Req]) -> Columns:
    """With what a drafter draws its guesses: the request's own temperature, up to what a word holds, and seed."""
    return {
        "temperature": tuple(
            0 if req.params.greedy else min(round(req.params.temperature * 1e6), 1 << 62) for req in reqs
        ),
        "seed": tuple(req.seed & (MASK64 >> 1) for req in reqs),
    }


class QueuedRuns:
    """A verify step on its way: a QueuedStep that brings every request a run of tokens."""

    def __init__(self, speculation: Speculation, reqs: Sequence[Req], drawn: Drawn, accepted: Accepted):
        self.speculation, self.requests, self.drawn = speculation, reqs, drawn
        self._paths = Download(accepted.nodes)
        self._tree = (
            (Download(speculation.tree.tokens), Download(speculation.tree.parents)) if speculation.remember else None
        )
        self._runs: list[list[int]] | None = None

    def measure(self) -> None:
        """Wait for the paths, and move every length on: the next step is made from these. No run goes beyond what was asked for."""
        if self._runs is not None:
            return
        self._runs, s = [], self.speculation
        for req, path in zip(self.requests, self._paths.numpy().tolist(), strict=True):
            nodes = [] if req.ended else [node for node in path if node >= 0][: req.wanted]
            self._runs.append(nodes)
            if nodes:
                req.kv_len += len(nodes)
                req.pending += len(nodes)
                req.wanted -= len(nodes)
                if not req.probe:
                    s.count(req, len(nodes))
        s.steps += 1
        s.state.front.work["sampled"] += sum(
            len(run) for req, run in zip(self.requests, self._runs, strict=True) if not req.probe
        )
        if self._tree:
            trees = zip(*(x.numpy().tolist() for x in self._tree), strict=True)
            s.newest = [
                {"request": req.rid, "tokens": tokens, "parents": parents, "path": run}
                for req, (tokens, parents), run in zip(self.requests, trees, self._runs, strict=True)
            ]

    def take(self) -> list[tuple[Req, int, TokenLogprobs | None]]:
        """(request, token, its log-probabilities) in order, the runs of those who have not ended meanwhile. Waits for the device.

        A run may go on behind its request's end: who takes them throws the rest away.
        """
        self.measure()
        taken, told = self.drawn.take(), []
        for number, (req, run) in enumerate(zip(self.requests, self._runs, strict=True)):
            req.pending -= len(run)
            if not req.ended:
                at = [number * self.speculation.nodes + node for node in run]
                told += [(req, taken.tokens[i], taken.logprobs[i]) for i in at]
        return told
