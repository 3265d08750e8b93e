"""A rank that rank 0 has started (spawn.py): python -m common.distributed.rank_main, with one line of JSON as input."""

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

LOOK_FOR_RANK_0_EVERY_S = 0.2
RANK_0_IS_SEEN_TO_BE_GONE_S = 0.5
RANK_0_SPEAKS_FIRST_S = 5.0


def main() -> None:
    text = sys.stdin.buffer.read()
    if not text:  # rank 0 was gone before it could say anything
        return
    job = json.loads(text)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: rank 0 decides
    if job["node_rank"]:  # and what stops a whole host reaches all of its processes: node 0 decides
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.path[:] = job["path"]  # first of all, so that both import the same files
    os.chdir(job["cwd"])
    os._exit(_follow(job))  # without destructors: a process group with a dead member may never finish its own


def _follow(job: dict) -> int:
    """Exit code."""
    from common.distributed.processes import RankFailure  # noqa: PLC0415, needs the parent's sys.path
    from common.distributed.spawn import BEREAVED, RankZeroLeft, SpawnedRanks  # noqa: PLC0415
    from common.parallel_state import become_follower, shutdown_tensor_parallel  # noqa: PLC0415

    rank = job["rank"]
    ranks = SpawnedRanks(Path(job["folder"]), job["size"], range(*job["here"]), job["node_rank"])
    threading.Thread(target=_end_with, args=(job["parent"], ranks.folder), daemon=True).start()
    try:
        module, _, name = job["target"].partition(":")
        function = getattr(importlib.import_module(module), name)
        become_follower(ranks, rank)
        function(**job["arguments"])
        raise ValueError(f"{job['target']} returned, and did not follow rank 0 to the end")
    except RankZeroLeft:
        pass  # with the exception its frames go, and with them the engine, whose CUDA graphs hold the process group
    except RankFailure:
        # if it was rank 0 that died, this process is ended meanwhile; else rank 0 will hear of it when this one hangs up
        time.sleep(RANK_0_IS_SEEN_TO_BE_GONE_S)
        return BEREAVED
    except (ValueError, OSError) as error:
        # most likely rank 0 meets the same error; if this rank went at once, rank 0 would hear of a dead peer first
        _say(ranks.last_words_file(rank), error)
        time.sleep(RANK_0_SPEAKS_FIRST_S)
        return 1
    except BaseException as error:
        _say(ranks.last_words_file(rank), error)
        traceback.print_exc()
        return 1
    shutdown_tensor_parallel()
    return 0


def _say(file: Path, error: BaseException) -> None:
    words = str(error).splitlines() or [""]
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    if file.parent.exists():  # else rank 0 has left
        file.write_text(kind + words[0], encoding="utf-8")


def _end_with(parent: int, folder: Path) -> None:
    """Wherever this rank is, it ends when rank 0 is gone, and the files with it."""
    from common.distributed.processes import DEAD, fate  # noqa: PLC0415
    from common.distributed.spawn import forget_folder  # noqa: PLC0415

    while fate(parent) != DEAD:
        time.sleep(LOOK_FOR_RANK_0_EVERY_S)
    forget_folder(folder)
    os._exit(1)


if __name__ == "__main__":
    main()
