"""Where a rank that torchrun has started says that it leaves: in torchrun's store, which outlives process groups.

To its peers a closed socket looks the same whether a rank has died, has shut its engine down, or has come to the end of its
script. Only the rank itself knows, so it says so before it closes anything, and its peers look there when a call fails.
Whoever leaves an engine's `with` block by an exception has not left in order: it says which one, and is named for it. An
exception that is caught inside the block is its own affair.
"""

import atexit
import sys
from contextlib import suppress

import torch.distributed as dist

from common.distributed.membership import Membership

WORDS = 300  # of an exception, in characters


class Goodbyes:
    """Of the ranks that met in `store`. A process that ends well says its own, if nobody has before; to the members too, if the
    ranks are on several hosts.
    """

    def __init__(self, store: dist.Store, rank: int, members: Membership | None):
        self._store, self._rank, self.members = store, rank, members
        self.bereaved = False  # this rank goes because another has gone: it has no goodbye to say
        atexit.register(self._at_exit)

    def say(self, error: BaseException | None = None) -> None:
        """error: what it leaves its engine with, if it does not leave in order."""
        atexit.unregister(self._at_exit)
        words = _words(error)
        if self.members:
            self.members.leave(f"rank {self._rank} has left with {words}" if words else None)
        if not self.bereaved:
            with suppress(RuntimeError):  # torchrun has gone, and all ranks with it
                self._store.set(self._key(self._rank), words)

    def said_by(self, rank: int) -> str | None:
        """None: nothing, so far. "": it has left in order. Else with what error it has left."""
        try:
            return self._store.get(self._key(rank)).decode() if self._store.check([self._key(rank)]) else None
        except RuntimeError:
            return None

    @staticmethod
    def _key(rank: int) -> str:
        return f"rank {rank} leaves"

    def _at_exit(self) -> None:
        if not hasattr(sys, "last_type"):  # else an exception ends this process
            self.say()


def _words(error: BaseException | None) -> str:
    """One line; "" if that is no failure: a script that ends itself without an error, a generator that is closed."""
    if error is None or isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and not error.code):
        return ""
    said = " ".join(str(error).split())[:WORDS]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
