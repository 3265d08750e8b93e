"""launch_server on every node but 0: ranks, and nothing that listens to clients but GET /health (node_health.py).

start       meets the other nodes, starts this node's ranks, loads its part of the model
follow      what rank 0 sends, until node 0 leaves: exit 0
somebody dies, on any host: one line with the name; exit 1
SIGTERM     goes on as long as node 0 may need to let its requests end (--drain-timeout): where hosts are stopped together,
            as Kubernetes does, node 0 still answers. The signal again: ends now, and with it the others
"""

import os
import signal
import socket
import threading
from collections.abc import Callable

from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.logs import log, set_up_logging
from ch07_sglang_radix.serving.node_health import answer_health
from ch07_sglang_radix.serving.processes import LEAVE_S, plain
from ch07_sglang_radix.serving.watch import LOOK_EVERY_S, Watch
from common.distributed.spawn import end_all, lost_node
from common.parallel_state import RankFailure


def follow_node_0(args: HttpArgs) -> int:
    """Exit code."""
    own = args.engine
    set_up_logging(f"node {own.node_rank}", own.log_level, args.log_format)

    def end(what: str) -> None:
        log.error("%s; this node ends", what)
        end_all(what)
        os._exit(1)

    watch = Watch({}, args.watchdog_timeout, end, lost=_lost())
    _on_signal(lambda name: _stop_later(name, args.drain_timeout + LEAVE_S, end), end)
    log.info("node %d of %d: node 0 is expected at %s", own.node_rank, own.nnodes, own.dist_init_addr)
    try:
        engine = Engine(**plain(args, None))
        ranks = engine.scheduler.replica
        here = [rank for rank, (host, _) in enumerate(ranks.peers) if host == ranks.peers[ranks.rank][0]]
        watch.processes = {f"rank {rank}": ranks.peers[rank][1] for rank in here if rank != ranks.rank}
        log.info(
            "ready: rank(s) %s of %d, %s; does what node 0 says", ", ".join(map(str, here)), ranks.size, ranks.device
        )
        answer_health(args.host, args.port)  # now, as node 0 has its own port by now, perhaps on this very host
        engine.follow()
        watch.leave()
        engine.shutdown()
    except (ValueError, OSError, RankFailure) as error:
        watch.leave()
        log.error("%s; this node ends", error)
        end_all(str(error))
        return 1
    log.info("node 0 has left")
    return 0


def _lost() -> Callable[[], str | None]:
    """Who has died; or node 0, which has left, and this node has not heard its last task."""
    looks = 0

    def lost() -> str | None:
        nonlocal looks
        what, left = lost_node()
        looks += left is not None
        return what or (left if looks * LOOK_EVERY_S > LEAVE_S else None)

    return lost


def _stop_later(name: str, seconds: float, end: Callable[[str], None]) -> None:
    log.info("%s: goes on until node 0 leaves, %g s at most; again ends at once", name, seconds)
    timer = threading.Timer(seconds, end, [f"stopped ({name}), and node 0 had not left after {seconds:g} s"])
    timer.daemon = True
    timer.start()


def _on_signal(first: Callable[[str], None], again: Callable[[str], None]) -> None:
    """In a thread: the main one waits for node 0 inside a message, where Python hears no signal."""
    ours, systems = socket.socketpair()
    systems.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(systems.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        name = signal.Signals(ours.recv(1)[0]).name
        first(name)
        ours.recv(1)
        systems.close()
        again(f"stopped ({name})")

    threading.Thread(target=listen, name="signals", daemon=True).start()
