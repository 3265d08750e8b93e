"""Scripts of test_launch.py, by the name of a function: what a reader might start with torchrun, or alone."""

import sys
import time

import torch

from common.distributed.launch import run_main
from common.parallel_state import all_reduce, broadcast, initialize_tensor_parallel, shutdown_tensor_parallel


def start_and_shut_down() -> None:
    times = int(sys.argv[2])
    for i in range(times):
        tp = initialize_tensor_parallel(2, device="cpu", timeout_s=120)
        summed = all_reduce(torch.full((3,), float(tp.rank + i)), tp, "x").tolist()
        told = broadcast(torch.tensor([i if tp.rank == 0 else -1]), tp, "b").tolist()
        if (summed, told) != ([2 * i + 1] * 3, [i]):
            raise SystemExit(f"start {i}: {summed} {told}")
        if i % 3 == tp.rank:
            time.sleep(0.2)  # one leaves late, one comes early
        shutdown_tensor_parallel()
    print(f"{times} times\n", end="")


def _rank_0_alone_talks() -> int:
    """The rank."""
    tp = initialize_tensor_parallel(device="cpu")
    all_reduce(torch.ones(4), tp, "x")
    if tp.rank == 0:
        time.sleep(0.5)  # the other may be gone by now, or on its way
        all_reduce(torch.ones(4), tp, "y")
    return tp.rank


def rank_1_shuts_down_and_goes_on() -> None:
    if _rank_0_alone_talks() == 1:
        shutdown_tensor_parallel()
        time.sleep(20)


def rank_1_fails_in_its_engine() -> None:
    """And goes on, so that nobody can call it dead: what a `with Engine()` does when an exception leaves it."""
    if _rank_0_alone_talks() == 1:
        shutdown_tensor_parallel(error=KeyError("of rank 1"))
        time.sleep(20)


def rank_1_ends_itself_in_its_engine() -> None:
    if _rank_0_alone_talks() == 1:
        shutdown_tensor_parallel(error=SystemExit(0))
        time.sleep(20)


def rank_1_comes_to_its_end() -> None:
    if _rank_0_alone_talks() == 1:
        sys.exit()


def rank_1_fails() -> None:
    if _rank_0_alone_talks() == 1:
        raise KeyError("of rank 1")  # no error of a user's: it ends as Python ends it


def talk_for_ever() -> None:
    tp = initialize_tensor_parallel(device="cpu")
    print("talking\n", end="", flush=True)
    while True:
        all_reduce(torch.ones(4), tp, "x")


def print_much() -> None:
    for i in range(10_000):
        print(i)


def print_little() -> None:
    print(1)


def end_without_a_word() -> None:
    """As the book's listing does: no shutdown, no run_main."""
    tp = initialize_tensor_parallel(device="cpu")
    print(f"{int(all_reduce(torch.ones(4), tp, 'x')[0])}\n", end="", flush=True)


if __name__ == "__main__":
    function = globals()[sys.argv[1]]
    function() if function is end_without_a_word else run_main(function)
