"""Exercise 6: The last minute of a server (25 minutes).

Read  "Life and death" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.serving.exercises.check 6

An operator stops a server, which must cut off nobody and must not take for ever either. Write what it does when something
happens. The clock is an argument, and so nothing here waits.

    life       a dict: "ready" (are requests taken?), "running" (list of rids), "deadline" (None, or the time at which who still
               runs is cut off), "told" ({rid: why}: clients that were told an error), "exit" (None, or the exit code)
    event      ("request", rid)   a client asks          ("done", rid)   an answer is complete, and sent
               ("SIGTERM",)       the operator stops it  ("tick",)       time has passed
               ("died", who)      a process has died, without which nothing goes on
    now, patience    seconds; who runs at the first SIGTERM has so long
    returns    the status that a request gets: 200 if it may run, else 503; None for any other event. `life` is changed

At SIGTERM nothing new is taken, and those that run go on until they are done or the deadline has come (it has at
now == deadline): exit code 0 either way, and at once if nothing runs. A second SIGTERM ends now, with exit code 1, and so does
a death. Whenever it ends, all that still run are told, and no longer in "running". After the end nothing changes.
"""

from typing import Any


def react(life: dict[str, Any], event: tuple[str, ...], now: float, patience: float) -> int | None:
    raise NotImplementedError  # your turn
