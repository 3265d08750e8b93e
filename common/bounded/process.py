"""What a stranger's program would do to us, done to a small process that can be ended: bounded in time and memory.

A chat template is a program, and so is a grammar. Each can run for ever, eat all memory or, in a library that is not
Python's, take its process down. A thread cannot be ended from outside; a process can.
"""

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Lock, Thread
from time import monotonic
from typing import Any

import psutil

START_SECONDS = 60.0  # until the process is there, on a machine that is busy
LOOK_SECONDS = 0.02  # between two looks at its memory

_COMMAND = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import serve; serve()"


class OutOfTime(ValueError):
    """It might have come to its end with more seconds."""


class BoundedProcess:
    """A process that answers a line of JSON with a line of JSON, one at a time. It starts with the first, and ends with this.

    module: where its `serve` is (answer_lines.py); it imports little, so as to be there soon. what, doing: how errors call
    it, "the chat template" and "renders it".
    """

    def __init__(self, module: str, what: str, doing: str):
        self._module, self._what, self._doing = module, what, doing
        self._process: subprocess.Popen | None = None
        self._lock = Lock()

    def close(self) -> None:
        if self._process is not None:
            self._end()

    def _first_lines(self) -> Sequence[bytes]:
        """What it is told before all others, every time it is started."""
        return ()

    def _answer(self, line: bytes, seconds: float, most: int) -> dict[str, Any]:
        """Its answer to a line, within so many seconds and bytes of memory. Raises ValueError, in one line, for an error;
        OutOfTime if the seconds were not enough."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start(most)
            answer = self._ask(line, seconds, most)
        if "error" in answer:
            raise (OutOfTime if "late" in answer else ValueError)(answer["error"])
        return answer

    def _start(self, most: int) -> None:
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND.format(self._module), json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if hasattr(psutil, "RLIMIT_AS"):  # Linux: where looking might come too late, as on a busy machine
            with suppress(psutil.Error, OSError):
                psutil.Process(process.pid).rlimit(psutil.RLIMIT_AS, (2 * most, 2 * most))
        self._answers: Queue[bytes] = Queue()
        Thread(target=_read, args=(process.stdout, self._answers), daemon=True).start()
        self._end = weakref.finalize(self, _kill, process)  # with this object, or with the program
        lines = [b"", *self._first_lines()]  # it says by itself that it is there
        for line in lines:
            if "error" in (answer := self._ask(line, START_SECONDS, most)):
                raise ValueError(answer["error"])

    def _ask(self, line: bytes, seconds: float, most: int) -> dict[str, Any]:
        end, late = monotonic() + seconds, {}
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            while monotonic() < end:
                try:
                    return json.loads(self._answers.get(timeout=LOOK_SECONDS))
                except Empty:
                    if _memory(self._process.pid) > most:
                        reason = f"takes more than {most >> 20} MB of memory"
                        break
            else:
                reason, late = f"takes more than {seconds:g} s", {"late": True}
        except (OSError, json.JSONDecodeError):  # nobody reads, or no answer comes
            reason = f"ended the process that {self._doing}"
        except BaseException:  # Ctrl-C: its answer must not become that of the next line
            self._end()
            raise
        self._end()
        return {"error": f"{self._what} {reason}", **late}


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
