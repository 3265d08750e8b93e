"""When guessing does not pay: a verify step computes N rows a request, and from some batch on rows are not free.

Nobody can say beforehand where that is: it depends on the device, the model, the text and the drafter. So both kinds of steps are
measured, apart for batches of 1, 2, 3-4, 5-8, ... requests, and the kind goes on that has brought more tokens a second:

    a new batch size    TRIAL verify steps, then TRIAL plain ones
    afterwards          the better kind, and every AGAIN steps LOOK steps of the other: texts change, and guesses with them

With overlap a step waits for the one before it and gets its tokens, so the first of a kind tells nothing of it and is not counted.
What was measured fades by a tenth a step. The choice depends on times, so a run's steps need not repeat; its text does.
SGLang 0.5.23's speculative_adaptive changes the number of guesses by how many were right, apart for each size of batch
(srt/speculative/adaptive_spec_params.py); what a step costs it does not ask.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ch07_sglang_radix.scheduler import TPScheduler

TRIAL, AGAIN, LOOK = 8, 128, 2
FADES = 0.9


@dataclass
class _Measured:
    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.steps += 1
        self.tokens, self.seconds = FADES * self.tokens + tokens, FADES * self.seconds + seconds

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class StandDown:
    """The rule of one engine, on rank 0. `rates`: what it has measured."""

    def __init__(self, scheduler: TPScheduler, clock: Callable[[], float] = time.perf_counter):
        self._scheduler, self._clock = scheduler, clock
        self._measured: dict[int, tuple[_Measured, _Measured]] = {}  # by size: plain, verifying
        self._size = 0
        self._last: tuple[int, bool] | None = None  # size and kind of the step before, if it was a decode step
        scheduler.beside.append(self._begin)
        scheduler.after_step.append(self._end)

    def verifies(self, batch: int) -> bool:
        self._size = size = 1 << (batch - 1).bit_length() if batch else 0  # the bound that it is below or at
        plain, verifying = self._measured.setdefault(size, (_Measured(), _Measured()))
        if verifying.steps < TRIAL:
            return True
        if plain.steps < TRIAL:
            return False
        pays = verifying.rate >= plain.rate
        return pays != ((plain.steps + verifying.steps) % AGAIN < LOOK)

    @property
    def rates(self) -> dict[int, tuple[float, float]]:
        """Tokens a second of plain and of verify steps, by the largest batch that counts in."""
        return {size: (plain.rate, verifying.rate) for size, (plain, verifying) in sorted(self._measured.items())}

    def _counters(self) -> tuple[int, int, int, int]:
        s = self._scheduler
        return s.steps["prefill"], s.steps["decode"], s.speculation.launched, s.work["sampled"]

    def _begin(self) -> bool:
        self._began, self._before = self._clock(), self._counters()
        return False  # nothing is on its way

    def _end(self) -> None:
        prefills, decodes, verified, tokens = (
            now - then for now, then in zip(self._counters(), self._before, strict=True)
        )
        step = (self._size, bool(verified)) if decodes and not prefills and self._size else None
        if step and (step == self._last or not self._scheduler.overlap):
            self._measured[step[0]][step[1]].add(tokens, self._clock() - self._began)
        self._last = step
