"""Where the scheduler and the detokenizer run: in processes of their own, or as threads beside the event loop.

    Processes   two children (child.py), sockets in a folder that only this user can enter
    Threads     --single-process: the same functions and the same messages, over pipes in memory; a debugger sees all of it

Both have `schedulers`, one for each replica, `inbox` and `texts`, the ends that main holds, start(on_end) and end().
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from ch07_sglang_radix.serving.channels import MemoryPipe, Push, ipc, new_folder, open_pull, open_push
from ch07_sglang_radix.serving.child import begin, last_words, names_of
from ch07_sglang_radix.serving.detokenizer_manager import detokenize
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.scheduler_process import schedule
from ch07_sglang_radix.serving.watch import Watch, wait_until

LEAVE_S = 5.0  # that a process has to end by itself, once it was told to
OnEnd = Callable[[str, int | None], None]  # what has ended, and of which replica; None: of what nobody can do without


class Processes:
    """tokenizer_folder: None if nobody needs text. begun: children that have been started already (child.begin), by name."""

    def __init__(
        self, args: HttpArgs, tokenizer_folder: str | None, begun: Mapping[str, subprocess.Popen] | None = None
    ):
        if not zmq.has("ipc"):
            raise ValueError("this system's ZeroMQ has no ipc:// sockets; start with --single-process")
        self.args, self.tokenizer_folder = args, tokenizer_folder
        self.folder = new_folder()
        self.children: dict[str, subprocess.Popen] = {}
        self._begun = dict(begun or {})
        self.inbox = open_pull(ipc(self.folder, "main"), on_event_loop=True)
        self.names = names_of(args.engine.dp_size, tokenizer_folder is not None)
        self.schedulers = [open_push(ipc(self.folder, who)) for who in self.names if who != "detokenizer"]
        self.texts = (
            open_push(ipc(self.folder, "detokenizer")) if len(self.schedulers) > 1 and tokenizer_folder else None
        )
        self._watches: list[Watch] = []

    def start(self, on_end: OnEnd) -> None:
        """on_end: called from another thread when one of them has ended that nobody had told to."""
        for who in self.names:
            self.children[who] = self._start(who)
        for child in self._begun.values():  # nobody needs it: a model without a tokenizer
            child.stdin.close()
        for dp_rank in sorted(set(self.names.values()), key=lambda rank: -1 if rank is None else rank):
            pids = {who: child.pid for who, child in self.children.items() if self.names[who] == dp_rank}
            told = partial(self._ended, on_end, dp_rank)
            self._watches.append(Watch(pids, self.args.watchdog_timeout, told))

    def _ended(self, on_end: OnEnd, dp_rank: int | None, what: str) -> None:
        """In a watch's thread. A replica that is only stopped must not come back: the others have its place."""
        why = self._why(what)
        if dp_rank is not None:
            self.children[f"scheduler_{dp_rank}"].kill()
        on_end(why, dp_rank)

    def _start(self, who: str) -> subprocess.Popen:
        dp_rank = self.names[who]
        job = {
            "who": who, "path": sys.path, "cwd": os.getcwd(), "main": os.getpid(), "folder": str(self.folder_of(who)),
            "engine": plain(self.args, dp_rank), "dp_rank": dp_rank, "dp_size": self.args.engine.dp_size,
            "tokenizer": self.tokenizer_folder, "patience_s": self.args.watchdog_timeout,
            "log_level": self.args.engine.log_level, "log_format": self.args.log_format,
        }  # fmt: skip
        child = self._begun.pop(who, None) or begin(who, dp_rank, self.args.engine.ranks)
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
        for watch in self._watches:
            watch.leave()

    def end(self, patience_s: float = LEAVE_S) -> None:
        """Wait for them as long as `patience_s`, then kill. From any thread, and more than once."""
        self.expect_the_end()
        wait_until(lambda: all(child.poll() is not None for child in self.children.values()), patience_s)
        for child in self.children.values():
            child.kill()  # a stopped one too; ranks end with rank 0
            child.wait()

    def close(self) -> None:
        """In the thread of the event loop. Leaves no file behind."""
        for push in (*self.schedulers, *([self.texts] if self.texts else [])):
            push.close()
        self.inbox.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Threads:
    """The same in one process. A thread that fails is reported; the threads end with the process."""

    def __init__(self, args: HttpArgs, tokenizer_folder: str | None):
        self.args, self.tokenizer_folder = args, tokenizer_folder
        self.names = names_of(args.engine.dp_size, tokenizer_folder is not None)
        self.schedulers: list[Push] = [MemoryPipe() for who in self.names if who != "detokenizer"]
        self.inbox, self.texts = MemoryPipe(), MemoryPipe() if tokenizer_folder else None
        self.threads: list[threading.Thread] = []

    def start(self, on_end: OnEnd) -> None:
        def run(name: str, work: Callable[..., None], *arguments: Any) -> None:
            def guarded() -> None:
                try:
                    work(*arguments)
                except BaseException as error:
                    known = isinstance(error, ValueError | OSError)
                    what = f"{name}: {error}" if known else f"{name}: {type(error).__name__}: {error}"
                    on_end(what, self.names[name])

            self.threads.append(threading.Thread(target=guarded, name=name, daemon=True))
            self.threads[-1].start()

        for (who, dp_rank), pipe in zip(self.names.items(), self.schedulers, strict=False):
            run(who, schedule, plain(self.args, dp_rank), pipe, self.inbox, self.texts, None, dp_rank)
        if self.texts:
            run("detokenizer", detokenize, self.tokenizer_folder, self.texts, self.inbox, len(self.schedulers))

    def expect_the_end(self) -> None:
        pass

    def end(self, patience_s: float = LEAVE_S) -> None:
        for thread in self.threads:
            thread.join(patience_s)

    def close(self) -> None:
        self.inbox.close()


def plain(args: HttpArgs, dp_rank: int | None) -> dict[str, Any]:
    """The engine's arguments as JSON; a replica's own, if there are several."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args.engine).items()}
    trace = values["trace"]
    if dp_rank is not None and trace is not None:  # each writes its own
        values["trace"] = str(Path(trace).with_stem(f"{Path(trace).stem}-dp{dp_rank}"))
    return values | {"dp_size": 1, "load_balance_method": "round_robin"}
