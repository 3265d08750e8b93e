"""Solution of exercise 6: The last minute of a server."""

from typing import Any


def react(life: dict[str, Any], event: tuple[str, ...], now: float, patience: float) -> int | None:
    kind, running = event[0], life["running"]
    status = None
    if kind == "request":
        status = 200 if life["ready"] else 503
        if life["ready"]:
            running.append(event[1])
    if life["exit"] is not None:
        return status
    if kind == "done":
        running.remove(event[1])
    elif kind == "died":
        end(life, 1, f"{event[1]} has died")
    elif kind == "SIGTERM" and life["deadline"] is not None:
        end(life, 1, "stopped at once")
    elif kind == "SIGTERM":
        life["ready"], life["deadline"] = False, now + patience
    if life["exit"] is None and life["deadline"] is not None and (not running or now >= life["deadline"]):
        end(life, 0, "not done in time")
    return status


def end(life: dict[str, Any], code: int, why: str) -> None:
    life["told"] |= dict.fromkeys(life["running"], why)
    life["ready"], life["running"], life["exit"] = False, [], code
