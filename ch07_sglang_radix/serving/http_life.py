"""uvicorn as a server that ends in an order of its own wants it: launcher.py, and the router in front of several."""

import contextlib
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

LAST_ANSWERS_S = 1.0  # that clients have to read why they get no more


class Http(uvicorn.Server):
    """It leaves the signals to us."""

    def __init__(self, app: ASGIApp):
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", server_header=False,
                timeout_graceful_shutdown=max(1, round(LAST_ANSWERS_S)),
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
