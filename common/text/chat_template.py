"""Messages -> the text that a model was trained to see, by the checkpoint's own template, bounded in time and memory.

A chat template is a program from a stranger. Jinja's sandbox keeps it away from files and from Python, but a loop over
range(100000) inside another, a macro that calls itself twice, or 'x' * 10**10 never comes back, and a thread cannot be
ended from outside. So a small process renders (template_process.py); it is killed when it takes too long or too much.
"""

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, Queue
from threading import Lock, Thread
from time import monotonic
from typing import Any

import psutil

SECONDS = 5.0  # for one chat; the largest real template takes some milliseconds
START_SECONDS = 60.0  # until the process is there, on a machine that is busy
BYTES = 512 << 20  # of memory; it needs about 25 MB
LOOK_SECONDS = 0.02  # between two looks at its memory

_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from common.text.template_process import serve; serve()"
)


class TemplateRenderer:
    """Renders any number of chats, one at a time, in a process that is started with the first and ends with this one."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises ValueError, in one line, for a template that fails, refuses, is none, or takes too long or too much."""
        try:
            line = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and their parameters must be plain values as in JSON: {error}") from None
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._ask(line, SECONDS)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        if self._process is not None:
            self._end()

    def _start(self) -> None:
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if hasattr(psutil, "RLIMIT_AS"):  # Linux: where looking might come too late, as on a busy machine
            with suppress(psutil.Error, OSError):
                psutil.Process(process.pid).rlimit(psutil.RLIMIT_AS, (2 * BYTES, 2 * BYTES))
        self._answers: Queue[bytes] = Queue()
        Thread(target=_read, args=(process.stdout, self._answers), daemon=True).start()
        self._end = weakref.finalize(self, _kill, process)  # with this object, or with the program
        if "error" in (answer := self._ask(b"", START_SECONDS)):
            raise ValueError(answer["error"])

    def _ask(self, line: bytes, seconds: float) -> dict[str, str]:
        end = monotonic() + seconds
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            while monotonic() < end:
                try:
                    return json.loads(self._answers.get(timeout=LOOK_SECONDS))
                except Empty:
                    if _memory(self._process.pid) > BYTES:
                        reason = f"takes more than {BYTES >> 20} MB of memory"
                        break
            else:
                reason = f"takes more than {seconds:g} s"
        except (OSError, json.JSONDecodeError):  # nobody reads, or no answer comes
            reason = "ended the process that renders it"
        except BaseException:  # Ctrl-C: its answer must not become that of the next chat
            self._end()
            raise
        self._end()
        return {"error": f"the chat template {reason}"}


def _read(stream: Any, answers: Queue) -> None:
    """An own thread, as a pipe cannot be read with a time limit on every system; b"" says that it is closed."""
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(b"")


def _memory(pid: int) -> int:
    """Bytes, with its children: in a virtual environment on Windows python.exe starts the real one."""
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
    except psutil.Error:  # it has just ended
        return 0


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    with suppress(OSError):  # of what nobody has read
        process.stdin.close()
