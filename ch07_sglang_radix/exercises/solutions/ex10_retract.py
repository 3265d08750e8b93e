"""Solution of exercise 10: Who goes back to the queue."""

from collections.abc import Callable

from ch07_sglang_radix.request import Req


def retract(running: list[Req], lacks_room: Callable[[], bool], release: Callable[[Req], None]) -> list[Req]:
    by_loss = sorted(running, key=lambda req: (len(req.output_ids), -len(req.prompt_ids)))
    gone = []
    while len(running) > 1 and lacks_room():  # asked again after each: one may have been enough
        req = by_loss[len(gone)]
        running.remove(req)
        release(req)
        gone.append(req)
    return gone
