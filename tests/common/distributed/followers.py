"""What the ranks of test_spawn.py do when rank 0 has started them: importable by name, as an engine's function is."""

import os
import signal
import sys
import time

import numpy as np
import torch

from common.distributed.launch import run_main
from common.distributed.messages import receive, send
from common.distributed.spawn import Follower
from common.parallel_state import TPGroup, all_reduce, initialize_tensor_parallel


def start(size: int, behave: str = "well", timeout_s: float | None = None, all_reduce: str = "auto") -> TPGroup:
    """On rank 0, as an engine does it: `size` ranks that add up what they are sent."""
    arguments = {"size": size, "behave": behave, "timeout_s": timeout_s, "how": all_reduce}
    follower = Follower("tests.common.distributed.followers:follow", arguments)
    return initialize_tensor_parallel(size, device="cpu", timeout_s=timeout_s, all_reduce=all_reduce, follower=follower)


def follow(size: int, behave: str, timeout_s: float | None, how: str) -> None:
    """Sum up over the ranks the words that rank 0 sends, each times rank + 1."""
    rank = int(os.environ["RANK"])
    if behave == "load for ever":
        time.sleep(600)
    if behave == "refuse" and rank == 1:
        raise ValueError("rank 1 does not like the model")
    tp = initialize_tensor_parallel(size, device="cpu", timeout_s=timeout_s, all_reduce=how)
    while True:
        words = receive(tp, "task")
        if rank == size - 1 and (behave == "die" or (behave == "die at 7" and 7 in words)):
            os.kill(os.getpid(), signal.SIGTERM)
        if behave == "stay away" and rank == 1:
            time.sleep(600)
        _sum(words, tp)


def total(words: list[int], tp: TPGroup) -> list[int]:
    """On rank 0: words times 1 + 2 + ... + R."""
    send(np.array(words, dtype=np.int64), tp, "task")
    return _sum(np.array(words, dtype=np.int64), tp)


def _sum(words: np.ndarray, tp: TPGroup) -> list[int]:
    return all_reduce(torch.from_numpy((tp.rank + 1) * words), tp, "total").tolist()


def work_for_ever() -> None:
    tp = start(3)
    print("pids", *(pid for _, pid in tp.peers), flush=True)
    while True:
        total([1], tp)


if __name__ == "__main__":
    run_main({"work for ever": work_for_ever, "load for ever": lambda: start(3, "load for ever")}[sys.argv[1]])
