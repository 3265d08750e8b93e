"""Where the scheduler and the detokenizer run: in processes of their own, or as threads beside the event loop.

    Processes   two children (child.py), sockets in a folder that only this user can enter
    Threads     --single-process: the same functions and the same messages, over pipes in memory; a debugger sees all of it

Both have `scheduler` and `inbox`, the two ends that the tokenizer manager holds, start(on_end) and end().
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zmq

from ch07_sglang_radix.serving.channels import MemoryPipe, ipc, open_pull, open_push
from ch07_sglang_radix.serving.child import begin, last_words
from ch07_sglang_radix.serving.detokenizer_manager import detokenize
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.scheduler_process import schedule
from ch07_sglang_radix.serving.watch import Watch, wait_until

LEAVE_S = 5.0  # that a process has to end by itself, once it was told to


class Processes:
    """tokenizer_folder: None if nobody needs text. begun: children that have been started already (child.begin), by name."""

    def __init__(
        self, args: HttpArgs, tokenizer_folder: str | None, begun: Mapping[str, subprocess.Popen] | None = None
    ):
        if not zmq.has("ipc"):
            raise ValueError("this system's ZeroMQ has no ipc:// sockets; start with --single-process")
        self.args, self.tokenizer_folder = args, tokenizer_folder
        self.folder = Path(tempfile.mkdtemp(prefix="serving-"))  # mode 0700
        self.children: dict[str, subprocess.Popen] = {}
        self._begun = dict(begun or {})
        self.inbox = open_pull(ipc(self.folder, "main"), on_event_loop=True)
        self.scheduler = open_push(ipc(self.folder, "scheduler"))
        self._watch: Watch | None = None

    def start(self, on_end: Callable[[str], None]) -> None:
        """on_end: called from another thread when one of them has ended that nobody had told to."""
        for who in ("scheduler", *(["detokenizer"] if self.tokenizer_folder else [])):
            self.children[who] = self._start(who)
        for child in self._begun.values():  # nobody needs it: a model without a tokenizer
            child.stdin.close()
        pids = {who: child.pid for who, child in self.children.items()}
        self._watch = Watch(pids, self.args.watchdog_timeout, lambda what: on_end(self._why(what)))

    def _start(self, who: str) -> subprocess.Popen:
        job = {
            "who": who, "path": sys.path, "cwd": os.getcwd(), "main": os.getpid(), "folder": str(self.folder_of(who)),
            "engine": plain(self.args), "tokenizer": self.tokenizer_folder, "patience_s": self.args.watchdog_timeout,
            "log_level": self.args.engine.log_level, "log_format": self.args.log_format,
        }  # fmt: skip
        child = self._begun.pop(who, None) or begin(who)
        with child.stdin as pipe:
            pipe.write(json.dumps(job).encode())
        return child

    def folder_of(self, who: str) -> Path:
        """Where the sockets lie that a child knows."""
        return self.folder

    def _why(self, what: str) -> str:
        """A child that could say why it ends has said more than that it is gone."""
        who = what.partition(" ")[0]
        words = last_words(self.folder_of(who), who)
        return f"{what}: {words}" if words else what

    def expect_the_end(self) -> None:
        """They have been told to leave."""
        if self._watch:
            self._watch.leave()

    def end(self, patience_s: float = LEAVE_S) -> None:
        """Wait for them as long as `patience_s`, then kill. From any thread, and more than once."""
        self.expect_the_end()
        wait_until(lambda: all(child.poll() is not None for child in self.children.values()), patience_s)
        for child in self.children.values():
            child.kill()  # a stopped one too; ranks end with rank 0
            child.wait()

    def close(self) -> None:
        """In the thread of the event loop. Leaves no file behind."""
        self.scheduler.close()
        self.inbox.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Threads:
    """The same in one process. A thread that fails is reported; the threads end with the process."""

    def __init__(self, args: HttpArgs, tokenizer_folder: str | None):
        self.args, self.tokenizer_folder = args, tokenizer_folder
        self.scheduler, self.inbox = MemoryPipe(), MemoryPipe()
        self.threads: list[threading.Thread] = []

    def start(self, on_end: Callable[[str], None]) -> None:
        def run(name: str, work: Callable[..., None], *arguments: Any) -> None:
            def guarded() -> None:
                try:
                    work(*arguments)
                except BaseException as error:
                    known = isinstance(error, ValueError | OSError)
                    on_end(f"{name}: {error}" if known else f"{name}: {type(error).__name__}: {error}")

            self.threads.append(threading.Thread(target=guarded, name=name, daemon=True))
            self.threads[-1].start()

        texts = MemoryPipe() if self.tokenizer_folder else None
        run("scheduler", schedule, plain(self.args), self.scheduler, self.inbox, texts)
        if texts:
            run("detokenizer", detokenize, self.tokenizer_folder, texts, self.inbox)

    def expect_the_end(self) -> None:
        pass

    def end(self, patience_s: float = LEAVE_S) -> None:
        for thread in self.threads:
            thread.join(patience_s)

    def close(self) -> None:
        self.inbox.close()


def plain(args: HttpArgs) -> dict[str, Any]:
    """The engine's arguments as JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args.engine).items()}
