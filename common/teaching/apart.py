"""A reader's code, run where it can do no harm: in a process of its own, job by job, each with a time limit.

A job may raise, print, end its process or never come back; in every case the one who asked hears about it in a line, and
the next job runs. Both sides are the same command: the parent starts itself again with WORKER, a file and the number
of the first job, and reads from that file what the jobs say.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WORKER = "--worker"  # FILE FIRST
START = 120.0  # seconds a process may take until it begins: imports from a cold disk on a small machine
READY = "ready"
LOOK = 0.05  # seconds between two looks at the file


def work(file: Path, first: int, jobs: Sequence[Callable[[], Any]]) -> None:
    """The child: do the jobs from `first` on, and write what each returns (something that JSON knows) as a line."""
    with file.open("a", encoding="utf-8") as out:
        print(READY, file=out, flush=True)
        for job in jobs[first:]:
            try:
                line = json.dumps({"value": job()})
            except BaseException as error:  # a SystemExit too: it is the job's, not ours
                line = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]})
            print(line, file=out, flush=True)


def run_apart(command: Sequence[str], limits: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The parent: {"value": ...} or {"error": text} of each job, in order; limits: seconds each may take.

    command: the arguments of Python, as in ["-m", "package.module", "5"]. It is started anew behind a job that was
    stopped or that ended the process.
    """
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        while done < len(limits):
            file = Path(folder) / f"from_{done}.jsonl"
            file.touch()
            argv = [sys.executable, *command, WORKER, str(file), str(done)]
            child = subprocess.Popen(argv, env=os.environ | {"PYTHONUNBUFFERED": "1"})
            try:
                for result in _watch(child, file, limits[done:]):
                    done += 1
                    yield result
            finally:
                child.kill()
                child.wait()


def _watch(child: subprocess.Popen, file: Path, limits: Sequence[float]) -> Iterator[dict[str, Any]]:
    """What one process says, up to the job that it does not survive."""
    said, since = 0, time.monotonic()  # lines: READY, and one a job
    while True:
        ended = child.poll() is not None  # asked before the file is read: nothing comes behind it
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        for line in lines[said:]:
            said, since = said + 1, time.monotonic()
            if line != READY:
                yield json.loads(line)
        if said > len(limits):
            return
        if ended:
            yield {"error": f"it ended the whole process (exit code {child.returncode})"}
            return
        limit = limits[said - 1] if said else START
        if time.monotonic() - since > limit:
            yield {"error": f"still busy after {limit:.0f} seconds: a loop that does not end?"}
            return
        time.sleep(LOOK)
