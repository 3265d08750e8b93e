"""Where torchrun's ranks meet, and where each says that it has come to the end of its script.

A rank whose script ends early (`if rank == 0: llm.generate(...)`) looks to the others like one that was killed. It is another
mistake, with another remedy, so a rank that ends in order leaves a word in torchrun's store.
"""

import atexit
import os
import sys
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_store: dist.Store | None = None  # kept for the life of the process: a second one could meet a port in use
_starts = 0  # of a world over that store


def meeting_place(timeout: timedelta) -> dist.Store:
    """A store for this start of torchrun's ranks: nothing in it is left over from an earlier one.

    torchrun's store outlives a process group, and so do the addresses that the ranks of the last one left in it: gloo
    would wait for peers that are gone (pytorch#114585). So each start has names of its own.
    """
    global _store, _starts
    if _store is None:
        _store, _, _ = next(rendezvous("env://", timeout=timeout))
        atexit.register(_say_that_it_ends)
    _starts += 1
    return dist.PrefixStore(f"start {_starts}", _store)


def has_ended_in_order(rank: int) -> bool:
    """Has this rank of torchrun's come to the end of its script, and not been killed or died of an error?"""
    with suppress(RuntimeError):  # whoever kept the store is gone
        return _store is not None and _store.check([f"rank {rank} has ended"])
    return False


def _say_that_it_ends() -> None:
    if hasattr(sys, "last_value"):  # an error that nobody has caught
        return
    with suppress(RuntimeError):
        _store.set(f"rank {os.environ['RANK']} has ended", "1")
