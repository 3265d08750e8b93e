"""How fast memory and messages are on this machine, measured in a few seconds."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from common.distributed.messages import receive, send
from common.distributed.spawn import Follower
from common.parallel_state import TPGroup, all_reduce, initialize_tensor_parallel, shutdown_tensor_parallel

COLUMNS = 1024
MOST_BYTES = 256 << 20  # of a matrix: more than any cache holds
CPU = torch.device("cpu")


def bytes_per_s(size: float, device: torch.device = CPU, threads: int = 1) -> float:
    """What matrix-vector products read of `size` bytes of float32, again and again: from a cache, if they fit into one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = torch.ones(int(min(size, MOST_BYTES)) // 4 // COLUMNS, COLUMNS, device=device)
        vector = torch.ones(COLUMNS, device=device)
        return matrix.nbytes / min(_seconds(lambda: torch.mv(matrix, vector), device) for _ in range(7))
    finally:
        torch.set_num_threads(before)


def all_reduce_seconds(device: str, small: int, large: int) -> tuple[float, float]:
    """Median time of an all-reduce of `small` and of `large` bytes, between this process and one that it starts."""
    follower = Follower("common.distributed.probe:answer", {"device": device})
    tp = initialize_tensor_parallel(2, device, follower=follower)
    try:
        return _median(tp, small, 300), _median(tp, large, 9)
    finally:
        shutdown_tensor_parallel()


def answer(device: str) -> None:
    """The other process: as many all-reduces of as many bytes as rank 0 says."""
    tp = initialize_tensor_parallel(2, device)
    while True:
        size, times = receive(tp, "task").tolist()
        _reduce(tp, size, times)


def _median(tp: TPGroup, size: int, times: int) -> float:
    send(np.array([size, times]), tp, "task")
    return statistics.median(_reduce(tp, size, times)[times // 3 :])  # the first ones set things up


def _reduce(tp: TPGroup, size: int, times: int) -> list[float]:
    x = torch.zeros(size // 4, device=tp.device)

    def once() -> None:
        all_reduce(x, tp, "probe")  # COMM all-reduce [size / 4]: how long it takes

    return [_seconds(once, tp.device) for _ in range(times)]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
