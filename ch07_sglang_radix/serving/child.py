"""A process of the server that main has started: python -m ch07_sglang_radix.serving.child NAME, a line of JSON as its input.

The name is for whoever reads `ps`; all that counts is in the line.
Like the ranks that rank 0 starts (common/distributed/spawn.py, where it says why not multiprocessing): main says what to be
and where the sockets are; the child ends with main, whatever becomes of main, and takes the socket files with it.
launch_server begins its children first of all: they import torch and transformers, seconds, while main does, and wait.
"""

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

import zmq

ROOT = Path(__file__).parents[2]
MODULES = {"scheduler": "scheduler_process", "detokenizer": "detokenizer_manager"}  # by the first word of the name
WORDS_FILE = "{}.error"  # the last words of a child, for main to repeat


def names_of(dp_size: int, with_text: bool) -> dict[str, int | None]:
    """Who there is, and of schedulers of several replicas whose: {"scheduler_0": 0, "scheduler_1": 1, "detokenizer": None}."""
    schedulers = {f"scheduler_{rank}": rank for rank in range(dp_size)} if dp_size > 1 else {"scheduler": None}
    return schedulers | ({"detokenizer": None} if with_text else {})


def gpus_of(dp_rank: int | None, ranks: int) -> dict[str, str]:
    """The environment in which a replica of so many ranks sees no other's GPUs: `ranks` each, in order (SGLang's base_gpu_id)."""
    if dp_rank is None:
        return {}
    first, visible = dp_rank * ranks, os.environ.get("CUDA_VISIBLE_DEVICES")
    all_there_are = [str(i) for i in range(first + ranks)] if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(all_there_are[first : first + ranks])}


def begin(who: str, dp_rank: int | None = None, ranks: int = 1) -> subprocess.Popen:
    """Start it. Its stdin is for its job (Processes.start); closed without one, or if main ends, it ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "ch07_sglang_radix.serving.child", who], cwd=ROOT, stdin=subprocess.PIPE,
        env=os.environ | gpus_of(dp_rank, ranks),
    )  # fmt: skip


def main() -> None:
    # Ctrl-C, and a system that stops a service, reach all processes at once: main decides. Ranks started here inherit it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import_module(f"ch07_sglang_radix.serving.{MODULES[sys.argv[1].partition('_')[0]]}")
    text = sys.stdin.buffer.read()
    if not text:  # main was gone before it could say anything
        return
    job = json.loads(text)
    sys.path[:] = job["path"]
    os.chdir(job["cwd"])
    faulthandler.enable()
    os._exit(_work(job))  # without destructors, as in rank_main.py


def _work(job: dict) -> int:
    """Exit code."""
    from ch07_sglang_radix.serving.channels import ipc, open_pull, open_push  # noqa: PLC0415, needs main's sys.path
    from ch07_sglang_radix.serving.detokenizer_manager import detokenize  # noqa: PLC0415
    from ch07_sglang_radix.serving.logs import log, set_up_logging  # noqa: PLC0415
    from ch07_sglang_radix.serving.watch import Watch  # noqa: PLC0415
    from common.distributed.spawn import end_all  # noqa: PLC0415

    folder, who = Path(job["folder"]), job["who"]
    set_up_logging(who, job["log_level"], job["log_format"])

    def end(what: str) -> None:
        if what.startswith("step "):
            faulthandler.dump_traceback()
        say_last_words(folder, who, what)
        end_all(what)
        if what.startswith("main "):
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    watch = Watch({"main": job["main"]}, job["patience_s"], end)
    try:
        inbox, to_main = open_pull(ipc(folder, who)), open_push(ipc(folder, "main"))
        if who == "detokenizer":
            detokenize(job["tokenizer"], inbox, to_main, job["dp_size"])
        else:
            from ch07_sglang_radix.serving.scheduler_process import schedule  # noqa: PLC0415, the detokenizer needs none of it

            texts = open_push(ipc(folder, "detokenizer")) if job["tokenizer"] else None
            schedule(job["engine"], inbox, to_main, texts, watch, job["dp_rank"])
            if texts:
                texts.close()
        to_main.close()
        inbox.close()
        zmq.Context.instance().term()  # once the last messages have left
    except BaseException as error:
        known = isinstance(error, ValueError | OSError)
        words = str(error) if known else f"{type(error).__name__}: {error}"
        say_last_words(folder, who, words)
        if not known:
            log.error("%s", traceback.format_exc())
        end_all(words)
        return 1
    return 0


def say_last_words(folder: Path, who: str, words: str) -> None:
    if folder.exists():  # else main has left
        lines = words.splitlines() or [""]
        (folder / WORDS_FILE.format(who)).write_text(lines[0], encoding="utf-8")


def last_words(folder: Path, who: str) -> str | None:
    file = folder / WORDS_FILE.format(who)
    return file.read_text(encoding="utf-8") if file.exists() else None


if __name__ == "__main__":
    main()
