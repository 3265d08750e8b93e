"""Where the ranks of one torchrun meet, and where a rank says that it leaves: torchrun's store, which outlives process groups.

To its peers a closed socket looks the same whether a rank has died, has shut its engine down, or has come to the end of its
script. Only the rank itself knows, so it says so before it closes anything, and its peers look there when a call fails.
"""

import atexit
import sys
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_torchruns_store: dist.Store | None = None  # kept for the life of the process: a second one could meet a port in use
_starts = 0  # of a world over that store


def next_meeting(timeout: timedelta) -> dist.Store:
    """Where the ranks of this start meet: nothing in it is left over from an earlier start.

    torchrun's store outlives a process group, and so do the addresses that the ranks of the last one left in it: gloo
    would wait for peers that are gone (pytorch#114585). So each start has names of its own.
    """
    global _torchruns_store, _starts
    if _torchruns_store is None:
        _torchruns_store, _, _ = next(rendezvous("env://", timeout=timeout))
    _starts += 1
    return dist.PrefixStore(f"start {_starts}", _torchruns_store)


class Goodbyes:
    """Of the ranks that met in `store`. A process that ends well says its own, if nobody has before."""

    def __init__(self, store: dist.Store, rank: int):
        self._store, self._rank = store, rank
        self.bereaved = False  # this rank goes because another has gone: it has no goodbye to say
        atexit.register(self._at_exit)

    def say(self) -> None:
        atexit.unregister(self._at_exit)
        if not self.bereaved:
            with suppress(RuntimeError):  # torchrun has gone, and all ranks with it
                self._store.set(self._key(self._rank), "")

    def said_by(self, rank: int) -> bool:
        try:
            return self._store.check([self._key(rank)])
        except RuntimeError:
            return False

    @staticmethod
    def _key(rank: int) -> str:
        return f"rank {rank} leaves"

    def _at_exit(self) -> None:
        if not hasattr(sys, "last_type"):  # else an exception ends this process
            self.say()
