"""Processes of their own that need not import torch first: they are forked from one that has.

A short script's time is that of `import torch` and of transformers' models, four seconds of a core, and the READMEs name a hundred
commands, many of several processes. A process from here is as new as one that Python starts, except that these two libraries and a
server's, and nothing of this repository, are in memory already. Variables of the environment that these read while they are
imported have the values that they had when the first process was started from here. Where there is no fork (Windows) each imports
them for itself.

What such a process starts of OURS, the ranks of an engine and the children of a server, is forked as well: a demo of two engines
imported torch three times. That they start as Python processes do is held by tests/ch07/serving/test_life_and_death.py.

Where there are namespaces (Linux), a process may enter those of another one before it begins: so it is on another host (hosts.py).
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import IO

import torch.distributed

IMPORTED = [
    "torch", "transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.tokenization_auto",
    "fastapi", "uvicorn", "prometheus_client", "zmq.asyncio", "llguidance",
]  # fmt: skip
OURS = ("common.distributed.rank_main", "ch07_sglang_radix.serving.child")
LIST_OF_FORKED = "LIST_OF_FORKED"  # in the environment: a file that gets a line for each of them, its pid and its words
FORK = "forkserver" in multiprocessing.get_all_start_methods()
AGENT_WAITS_S = 30.0  # for ranks that it has sent SIGTERM
# user, network, host name, mounts: CLONE_NEW... of sched.h
NAMESPACES = 0x10000000 | 0x40000000 | 0x04000000 | 0x00020000


def process(target: Callable, *args, env: dict[str, str] | None = None, **options) -> BaseProcess:
    """One that calls `target(*args)`, both as multiprocessing pickles them, in this environment (default: this process's)."""
    context = multiprocessing.get_context("forkserver" if FORK else "spawn")
    if FORK:
        context.set_forkserver_preload(IMPORTED)
    return context.Process(target=_in_environment, args=(dict(env or os.environ), target, args), **options)


class _Forked:
    """subprocess.Popen([sys.executable, *args], ...) of a file, or of -m and a module: as much of it as is asked of one here.

    beside: the pid of a process whose namespaces it enters first, as nsenter does. forks: whether OURS are forked that it starts.
    """

    def __init__(
        self, args, cwd=None, env=None, stdin=None, stdout=None, stderr=None, text=False, beside=None, forks=True
    ):
        self.args, self._lock = args, threading.Lock()
        self.stdin, stdin = _ours_and_its(0, stdin, text)
        self.stdout, stdout = _ours_and_its(1, stdout, text)
        self.stderr, stderr = _ours_and_its(2, stderr, text)
        folder = Path.cwd() if cwd is None else Path(cwd)
        its = [stdin, stdout, stderr]
        words = [str(arg) for arg in args[1:]]
        self._process = process(_script, words, folder, its, beside, forks, env=env, daemon=True)
        with _another_main():
            self._process.start()
        for end in its:
            end.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._lock:  # it is read once from a pipe, and two threads may ask
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            multiprocessing.connection.wait([self._process.sentinel], left)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """The rest of standard output and of standard error, to the end of both and of the process."""
        told = ["", ""]

        def read(i: int, file: IO) -> None:
            with file:
                told[i] = file.read()

        files = [(i, file) for i, file in enumerate((self.stdout, self.stderr)) if not file.closed]
        threads = [threading.Thread(target=read, args=one, daemon=True) for one in files]
        until = None if timeout is None else time.monotonic() + timeout
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return tuple(told)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Popen = _Forked if FORK else subprocess.Popen


def forks(ours: bool) -> dict[str, bool]:
    """An argument of Popen, where there is one."""
    return {"forks": ours} if FORK else {}


class _ForksOurs(subprocess.Popen):
    """Popen of a forked process: OURS are forked beside it, anything else starts as ever."""

    beside: int | None = None  # as its own was

    def __new__(cls, args, **options):
        if len(args) < 3 or args[2] not in OURS:
            return super().__new__(cls)
        one = _Forked(args, **options, beside=cls.beside)
        if file := os.environ.get(LIST_OF_FORKED):
            with open(file, "a", encoding="utf-8") as told:
                told.write(f"{one.pid} {' '.join(args[2:])}\n")
        return one


@contextlib.contextmanager
def _another_main() -> Iterator[None]:
    """multiprocessing would import this process's script in the new one, under another name."""
    mine, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = mine


def run(
    args: list[str], folder: Path, timeout_s: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`python *args` in `folder`, to its end, as subprocess.run tells it; a negative status is a signal. env: default, ours."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            one = Popen([sys.executable, *args], cwd=folder, env=env, stdout=stdout, stderr=stderr)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(timeout_s)
        finally:
            one.kill()  # if it has not ended
            one.wait()
        printed = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(args, one.returncode, *printed)


class Torchrun:
    """`torchrun --standalone --nproc_per_node=SIZE *args` in `folder`, less the process of its agent, which imports torch, too.

    What the agent does is done here: a store on a free port that all ranks join, and all end when one has failed.
    ranks: their processes. place: a folder, where what each prints is kept.
    """

    def __init__(self, args: list[str], size: int, folder: Path, env: dict[str, str], place: Path):
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._files = [(place / f"{rank}.out", place / f"{rank}.err") for rank in range(size)]
        env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(size)}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
        self.ranks = []
        try:
            for rank, files in enumerate(self._files):
                own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with files[0].open("wb") as out, files[1].open("wb") as err:
                    self.ranks.append(Popen([sys.executable, *args], cwd=folder, env=own, stdout=out, stderr=err))
        except BaseException:
            self._end()
            raise

    def printed(self) -> tuple[str, str]:
        """What all have printed so far, rank by rank, and on stderr."""
        return tuple(
            "".join(path.read_text(encoding="utf-8") for path in paths) for paths in zip(*self._files, strict=True)
        )

    def finish(self, timeout_s: float) -> tuple[int, str, str]:
        """(0 or the exit status of the first rank that failed, 1 if one never ends; what all printed, and on stderr)."""
        until = time.monotonic() + timeout_s
        try:
            while (
                None in (codes := [rank.poll() for rank in self.ranks]) and not any(codes) and time.monotonic() < until
            ):
                time.sleep(0.02)
        finally:
            self._end()
        return (next((code for code in codes if code), int(None in codes)), *self.printed())

    def _end(self) -> None:
        """Those that wait for the one that failed, or for ever."""
        for rank in self.ranks:
            rank.terminate()
        until = time.monotonic() + AGENT_WAITS_S
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, until - time.monotonic()))
            rank.kill()
            rank.wait()


def _ours_and_its(number: int, asked: int | IO | None, text: bool) -> tuple[IO | None, Connection]:
    """Of standard input (0), output or error: our end of the pipe, if one is asked for, and what the process has as its own.

    A connection, because multiprocessing hands that over; no message is sent on it.
    """
    if asked == subprocess.PIPE:
        read, write = os.pipe()
        ours, its = (write, read) if number == 0 else (read, write)
        mode = "w" if number == 0 else "r"
        return open(ours, mode if text else f"{mode}b", encoding="utf-8" if text else None), Connection(its)
    if asked == subprocess.DEVNULL:
        return None, Connection(os.open(os.devnull, os.O_RDWR))
    return None, Connection(os.dup(number if asked is None else asked.fileno()))


def _in_environment(env: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ.clear()  # the server's own, and that may be of long ago
    os.environ.update(env)
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))  # which Python reads at its start
    target(*args)


def _script(args: list[str], folder: Path, standard: list[Connection], beside: int | None, forks: bool) -> None:
    multiprocessing.current_process().daemon = False  # it may have processes of its own
    if beside:
        _enter_namespaces_of(beside)
    if forks:  # it has the address of the server that it comes from, and needs no other
        multiprocessing.forkserver._forkserver.ensure_running = lambda: None
        _ForksOurs.beside = beside and os.getpid()
        subprocess.Popen = _ForksOurs
    os.chdir(folder)
    for number, (name, end) in enumerate(zip(("stdin", "stdout", "stderr"), standard, strict=True)):
        os.dup2(end.fileno(), number)
        end.close()
        file = open(number, "w" if number else "r", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, file)
    threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())  # who imports it now reads that
    torch.set_num_threads(int(threads))
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]  # its own, not its parent's
    try:
        if args[0] == "-m":
            sys.argv, sys.path[:0] = args[1:], [str(folder), *paths]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = args, [str((folder / args[0]).parent), *paths]
            runpy.run_path(str(folder / args[0]), run_name="__main__")
    except SystemExit:
        raise
    except BaseException:  # as Python ends with one: who is called at exit may look there
        sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()
        raise
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _enter_namespaces_of(pid: int) -> None:
    """All of NAMESPACES; who made them may. os.setns is there from Python 3.12 on."""
    if sys.platform != "linux":
        raise OSError(f"namespaces of process {pid}: Linux alone has them")
    descriptor = os.pidfd_open(pid)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, NAMESPACES):
        raise OSError(ctypes.get_errno(), f"the namespaces of process {pid}")
    os.close(descriptor)
