"""A server of this chapter in processes of its own, for whoever wants to ask it: load test, benchmarks, tests.

with served("--tp-size", "2") as (url, pid): ...
"""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager

from ch07_sglang_radix.serving.http_client import Client

START_S, LEAVE_S = 300.0, 200.0
LAST_WORDS = 3  # lines of its log that an error repeats


@contextmanager
def served(*flags: str, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """(url, pid of its main process) once it is ready, on a free port. At the end it is asked to leave.

    Raises ValueError, with the last lines of its log, if it does not start, or does not leave in good order.
    """
    command = [sys.executable, "-m", "ch07_sglang_radix.launch_server", "--port", "0", *flags]
    said: deque[str] = deque(maxlen=LAST_WORDS)
    address: Future[str] = Future()

    def listen(lines: Iterable[str]) -> None:
        for line in lines:
            said.append(line)
            if not address.done() and (found := re.search(r"http://\S+", line)):
                address.set_result(found[0])
        if not address.done():
            address.set_exception(ValueError(f"the server did not start: {''.join(said)}"))

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", env=os.environ | (environment or {})
    ) as process:  # fmt: skip
        listener = threading.Thread(target=listen, args=(process.stderr,), daemon=True)
        listener.start()
        try:
            try:
                url = address.result(START_S)
            except FutureTimeout:
                raise ValueError(
                    f"the server has not said its address within {START_S:g} s (is --log-level info?)"
                ) from None
            asyncio.run(_until_ready(url))
            yield url, process.pid
            process.terminate()
            if process.wait(LEAVE_S):
                raise ValueError(f"the server has ended with exit code {process.returncode}: {''.join(said)}")
        finally:
            process.kill()  # a no-op if it has left; whom it has started notices and ends too
            listener.join(10)


async def _until_ready(url: str) -> None:
    async with Client(url) as client:
        deadline = time.monotonic() + START_S
        while (await client.call("GET", "/ready"))[0] != 200:
            if time.monotonic() > deadline:
                raise ValueError(f"{url}/ready does not say yes within {START_S:g} s")
            await asyncio.sleep(0.1)
