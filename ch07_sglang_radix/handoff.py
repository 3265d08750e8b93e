"""Where a request's prompt is computed elsewhere than its answer (disaggregation/): how the two sides find each other.

SGLang's names: bootstrap_host, bootstrap_port, bootstrap_room (managers/io_struct.py, 0.5.23). It imports nothing
that brings torch: a wrong value is told at once.
"""

from typing import Any, NamedTuple

from common.values import choice, whole

MODES = ("null", "prefill", "decode")
MAX_ROOM = (1 << 63) - 1
MAX_ANSWERS = 4096  # of one request, whose rooms are numbered one after the other
THIS_HOST = ("127.0.0.1", "localhost")  # a body must not make this engine ask any host it likes


class Handoff(NamedTuple):
    """One answer's. mode: which side of it this engine is. host, port: of the prefill side's bootstrap server."""

    mode: str
    host: str
    port: int
    room: int

    def next(self, i: int) -> "Handoff":
        """Of the i-th answer of a call: its rooms are numbered from the one that was given."""
        return self._replace(room=self.room + i)

    @classmethod
    def of(cls, mode: str, host: Any, port: Any, room: Any) -> "Handoff | None":
        """None for an engine that does both. Raises ValueError, in one line, if the request does not fit the engine's mode."""
        given = [value is not None for value in (host, port, room)]
        if mode == "null":
            if any(given):
                raise ValueError(
                    "bootstrap_room is for engines of a disaggregation_mode, and this one does both; leave it out"
                )
            return None
        if not all(given):
            raise ValueError(
                f"this engine does {mode} only; ask the balancer in front of it, which gives each request bootstrap_host, "
                "bootstrap_port and bootstrap_room"
            )
        host = choice("bootstrap_host", host, THIS_HOST)
        port = whole("bootstrap_port", port, 1, 65535)
        return cls(mode, host, port, whole("bootstrap_room", room, 0, MAX_ROOM - MAX_ANSWERS))
