"""Who notices that a process has died, is stopped, or does not get on: a thread in each process that looks at the others.

    main         watches  scheduler, detokenizer       scheduler    watches  main, ranks 1.., and its own step
    detokenizer  watches  main                         rank r       watches  rank 0 (common/distributed/rank_main.py)

ZeroMQ does not tell that the other end is gone; it would wait for ever. So nobody asks the sockets: the operating system
knows. All look every LOOK_EVERY_S, so that a death anywhere has reached everybody within two looks.
SGLang 0.5.23 polls its children from main alone, every second (srt/managers/... subprocess watchdog), and children tell
main by SIGQUIT.
"""

import threading
import time
from collections.abc import Callable

from common.distributed.processes import DEAD, fate

LOOK_EVERY_S = 0.25


class Watch:
    """processes: {name: pid}. on_end: called once, in the watch's thread, with one line that says who and what.

    lost: of other hosts, where nobody can be looked at: who has died (nodes.py). patience_s: so long a process may be stopped,
    and a step may take. step: what is being done now, something new for each
    step; None: nothing. Time is counted in looks and not by the clock: who was stopped itself has not looked.
    """

    def __init__(
        self, processes: dict[str, int], patience_s: float, on_end: Callable[[str], None],
        step: Callable[[], object | None] = lambda: None, lost: Callable[[], str | None] = lambda: None,
    ):  # fmt: skip
        self.processes, self.on_end, self.step, self.lost = (
            processes,
            on_end,
            step,
            lost,
        )  # may be replaced as time goes on
        self.patience = max(1, round(patience_s / LOOK_EVERY_S))  # looks
        self.patience_s = patience_s
        self._looks: dict[str, int] = {}
        self._step: object | None = None
        self._left = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def leave(self) -> None:
        """From now on nobody is missed."""
        self._left.set()

    def _run(self) -> None:
        while not self._left.wait(LOOK_EVERY_S):
            if what := self._look():
                if not self._left.is_set():
                    self.on_end(what)
                return

    def _look(self) -> str | None:
        for name, pid in self.processes.items():
            what = fate(pid)
            if what == DEAD:
                return f"{name} (pid {pid}) {DEAD}"
            if self._too_long(name, what is not None):
                return f"{name} (pid {pid}) is stopped, for {self.patience_s:g} s now (--watchdog-timeout)"
        if lost := self.lost():
            return lost
        step = self.step()
        same, self._step = step is not None and step == self._step, step
        if self._too_long("step", same):
            return f"step {step} takes more than {self.patience_s:g} s (--watchdog-timeout)"
        return None

    def _too_long(self, name: str, now: bool) -> bool:
        self._looks[name] = self._looks.get(name, 0) + 1 if now else 0
        return self._looks[name] > self.patience


def wait_until(there: Callable[[], bool], timeout_s: float) -> bool:
    """Look again and again; False if it has not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
