"""How a runnable script ends when something is wrong: one line, exit code 1, no rank left behind."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.distributed.spawn import ROOT, end_all
from common.parallel_state import RankFailure, lost_peer, shutdown_tensor_parallel

RANK_0_SPEAKS_FIRST_S = 5.0
ALL_ARE_TOLD_S = 1.5


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; turn Ctrl-C and the errors a user can mend into one line on stderr.

    Most errors are found by all ranks alike (a bad flag, a damaged file), and R copies of a line are noise: rank 0
    speaks, and its exit makes torchrun end the others. A rank that outlives that has a reason of its own.
    """
    signal.signal(signal.SIGTERM, _stopped)
    signal.signal(signal.SIGINT, _stopped)
    try:
        _check_clone()
        main()
        print(end="", flush=True)
    except RankFailure as error:
        _leave(f"error: {error}")
    except BrokenPipeError:  # `| head` has seen enough
        _leave("")
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # go in silence
            time.sleep(RANK_0_SPEAKS_FIRST_S)
        said = f"standard output: {error.strerror}" if _is_of_stdout(error) else error
        _leave(f"error: {said}" if rank == 0 else f"error on rank {rank}: {said}")
    shutdown_tensor_parallel()


def _check_clone() -> None:
    """Python finds the packages where they are installed, which may be another clone than the one whose script runs."""
    script, here = getattr(sys.modules["__main__"], "__file__", None), Path(__file__).resolve()
    place = here.relative_to(ROOT)
    for folder in Path(script).resolve().parents if script else ():
        if folder != ROOT and (folder / place).is_file():
            raise ValueError(
                f"this script is of {folder}, but Python imports the packages of {ROOT}, which is installed; "
                f"install {folder} (python setup_environment.py there), or set PYTHONPATH={folder}"
            )


def _stopped(signum: int, frame) -> None:
    """Ctrl-C, or torchrun ends all ranks because one has died, often before they have noticed: say which."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun asks more than once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank, name = os.environ.get("RANK"), signal.Signals(signum).name
    lost = lost_peer() if signum == signal.SIGTERM else None
    if lost:
        _leave(f"error: rank {rank or 0} is stopped because {lost}")
    time.sleep(ALL_ARE_TOLD_S)  # who goes at once looks, to the others, like the one that has died
    _leave(f"stopped ({name})" if rank is None else f"rank {rank}: stopped ({name})")


def _is_of_stdout(error: Exception) -> bool:
    """`print` does not say which file is full; if there is no name, and another line fails as well, it was stdout."""
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _leave(line: str) -> None:
    """Exit without destructors: a process group with a dead member may never finish its own."""
    with suppress(OSError, RuntimeError):  # said already; or the signal came in the middle of a `print`
        print(end="", flush=True)
    with suppress(OSError):
        os.write(2, f"{line}\n".encode() if line else b"")
    end_all(line.removeprefix("error: "))
    os._exit(1)
