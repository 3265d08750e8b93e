from types import ModuleType
from typing import Any

from common.teaching.expect import ask, expect

PATIENCE = 30.0
A, B, C = ("request", "a"), ("request", "b"), ("request", "c")
TERM, TICK = ("SIGTERM",), ("tick",)


def check(m: ModuleType) -> None:
    life = play(m, "a request", (0, A, 200), (1, ("done", "a"), None))
    expect("a request comes and is done: life", life, a_life())

    said = "SIGTERM while a and b run"
    life = play(m, said, (0, A, 200), (1, B, 200), (10, TERM, None))
    expect(f"{said}: life", life, a_life(ready=False, running=["a", "b"], deadline=40.0))
    life = play(
        m, said, (0, A, 200), (1, B, 200), (10, TERM, None), (11, C, 503), (12, ("done", "a"), None), (39, TICK, None)
    )
    expect(
        f"{said}, c comes, a is done: life before the deadline", life, a_life(ready=False, running=["b"], deadline=40.0)
    )
    life = play(
        m, said, (0, A, 200), (1, B, 200), (10, TERM, None), (12, ("done", "a"), None), (13, ("done", "b"), None)
    )
    expect(f"{said}, both are done: life", life, a_life(ready=False, deadline=40.0, exit=0))
    for when in (40, 41):
        life = play(m, said, (0, A, 200), (1, B, 200), (10, TERM, None), (12, ("done", "a"), None), (when, TICK, None))
        expect(f"{said}, a is done, b is not at {when}: exit code, running, who was told", ended(life), (0, [], ["b"]))
    late = play(m, said, (0, A, 200), (10, TERM, None), (39, TICK, None))
    expect("SIGTERM, and a still runs just before the deadline: exit code", late["exit"], None)

    life = play(m, "SIGTERM and nothing runs", (5, TERM, None))
    expect("SIGTERM and nothing runs: exit code, running, who was told", ended(life), (0, [], []))

    said = "two SIGTERMs while a runs"
    life = play(m, said, (0, A, 200), (10, TERM, None), (11, TERM, None))
    expect(f"{said}: exit code, running, who was told", ended(life), (1, [], ["a"]))

    for before in ((), ((9, TERM, None),)):
        said = f"the scheduler dies while a runs{' and SIGTERM has come' if before else ''}"
        life = play(m, said, (0, A, 200), *before, (10, ("died", "scheduler"), None))
        expect(f"{said}: exit code, running, who was told", ended(life), (1, [], ["a"]))
        expect(f"{said}: is a request taken", life["ready"], False)
    life = play(m, "a death and nothing runs", (3, ("died", "detokenizer"), None))
    expect("a death and nothing runs: exit code, running, who was told", ended(life), (1, [], []))

    said = "after the end"
    death = ("died", "scheduler")
    life = play(
        m, said, (0, A, 200), (1, death, None), (2, TERM, None), (3, B, 503), (99, TICK, None), (100, TERM, None)
    )
    expect(f"{said}: exit code, running, who was told", ended(life), (1, [], ["a"]))


def a_life(**different: Any) -> dict[str, Any]:
    return {"ready": True, "running": [], "deadline": None, "told": {}, "exit": None} | different


def play(m: ModuleType, said: str, *events: tuple[float, tuple[str, ...], int | None]) -> dict[str, Any]:
    """Life afterwards. Each event: (when, what, the status that it gets)."""
    life = a_life()
    for now, event, status in events:
        expect(f"{said}: status of {event} at {now}", ask(m.react, life, event, float(now), PATIENCE), status)
    return life


def ended(life: dict[str, Any]) -> tuple[int | None, list[str], list[str]]:
    return life["exit"], list(life["running"]), sorted(life["told"])
