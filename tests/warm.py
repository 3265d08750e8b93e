"""Processes of their own that need not import torch first: they are forked from one that has.

A short script's time is that of `import torch` and of transformers' models, four seconds of a core, and the READMEs name a hundred
commands, many of several processes. A process from here is as new as one that Python starts, except that these two libraries, and
nothing of this repository, are in memory already. Variables of the environment that these read while they are imported have the
values that they had when the first process was started from here. Where there is no fork (Windows) each imports them for itself.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

IMPORTED = ["torch", "transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.tokenization_auto"]
FORK = "forkserver" in multiprocessing.get_all_start_methods()


def process(target: Callable, *args, env: dict[str, str] | None = None, **options) -> BaseProcess:
    """One that calls `target(*args)`, both as multiprocessing pickles them, in this environment (default: this process's)."""
    context = multiprocessing.get_context("forkserver" if FORK else "spawn")
    if FORK:
        context.set_forkserver_preload(IMPORTED)
    return context.Process(target=_in_environment, args=(dict(env or os.environ), target, args), **options)


def script(args: list[str], folder: Path, env: dict[str, str], out: Path, err: Path) -> BaseProcess:
    """`python *args` in `folder`: a file, or -m and a module, each with its arguments; what it prints goes to two files."""
    return process(_script, args, folder, out, err, env=env)


def run(args: list[str], folder: Path, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """`script` to its end, in this environment, as subprocess.run tells it; a negative status is a signal."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        one = script(args, folder, dict(os.environ), out, err)
        one.start()
        try:
            one.join(timeout_s)
        finally:
            one.kill()  # if it has not ended
            one.join()
        printed = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(args, one.exitcode, *printed)


def _in_environment(env: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ.clear()  # the server's own, and that may be of long ago
    os.environ.update(env)
    target(*args)


def _script(args: list[str], folder: Path, out: Path, err: Path) -> None:
    import torch  # noqa: PLC0415, in the child only

    os.chdir(folder)
    for number, name, path in ((1, "stdout", out), (2, "stderr", err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
    threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())  # who imports it now reads that
    torch.set_num_threads(int(threads))
    try:
        if args[0] == "-m":
            sys.argv, sys.path[:0] = args[1:], [str(folder)]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = args, [str((folder / args[0]).parent)]
            runpy.run_path(str(folder / args[0]), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
