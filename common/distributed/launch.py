"""How a runnable script ends when something is wrong: one line, exit code 1, no rank left behind."""

import os
import signal
import sys
import time
from collections.abc import Callable

from common.parallel_state import RankFailure, lost_peer, shutdown_tensor_parallel

RANK_0_SPEAKS_FIRST_S = 5.0


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; turn the errors a user can mend into one line on stderr.

    Most are found by all ranks alike (a bad flag, a damaged file), and R copies of a line are noise: rank 0
    speaks, and its exit makes torchrun end the others. A rank that outlives that has a reason of its own.
    """
    signal.signal(signal.SIGTERM, _stopped)
    try:
        main()
    except RankFailure as error:
        _leave(f"error: {error}")
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # go in silence
            time.sleep(RANK_0_SPEAKS_FIRST_S)
        _leave(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}")
    shutdown_tensor_parallel()


def _stopped(signum, frame) -> None:
    """torchrun ends all ranks when one dies, often before they have noticed: say which."""
    lost = lost_peer()
    _leave(f"error: rank {os.environ.get('RANK', '0')} is stopped because {lost}" if lost else "stopped (SIGTERM)")


def _leave(line: str) -> None:
    """Exit without destructors: a process group with a dead member may never finish its own."""
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    os._exit(1)
