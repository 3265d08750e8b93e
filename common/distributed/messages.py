"""What rank 0 tells the others, over the control group: flat integers for a step, JSON for results. Never pickle.

send         a broadcast: all ranks take it together, and rank 0 waits until its own part of that is done
start_send   a message for each rank, and rank 0 goes on: between the stages of a pipeline nobody shall wait for who is behind.
             A broadcast goes down a tree, in which a rank hands on what it has got only when it gets there itself.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from common.distributed.spawn import FRAME, LEAVE, RankZeroLeft
from common.parallel_state import RankFailure, Sent, TPGroup, all_gather, broadcast, receive_from, send_to


def send(words: np.ndarray, tp: TPGroup, label: str) -> None:
    """int64 [n] to all ranks: one message of FRAME words that begins with n, and a second one if that is too short.

    A decode step of 60 sequences and its page updates fit into one.
    """
    if tp.size == 1:
        return
    for part in _parts(words):
        broadcast(part, tp, label)  # COMM broadcast [FRAME], then the rest of a long task: what to do in this step


def start_send(words: np.ndarray, to: Iterable[int], tp: TPGroup, label: str) -> list[Sent]:
    """The same to these ranks only, which take it with `receive(direct=True)`. Keep what comes back until they have."""
    sent = []
    for part in _parts(words):
        for rank in to:
            one = send_to(part, rank, tp, label)  # COMM send [FRAME], then the rest: what to do in this step
            sent.append(one)
    return sent


def receive(tp: TPGroup, label: str, direct: bool = False) -> np.ndarray:
    """The other end: int64 [n]. Raises RankZeroLeft, on a rank that rank 0 has started, when there is no more."""
    frame = _receive(FRAME, tp, label, direct)
    length, words = int(frame[0]), frame[1:].numpy()
    if length == LEAVE:
        raise RankZeroLeft
    if length <= len(words):
        return words[:length]
    return np.concatenate((words, _receive(length - len(words), tp, label, direct).numpy()))


def _parts(words: np.ndarray) -> Iterator[torch.Tensor]:
    frame = np.zeros(FRAME, dtype=np.int64)
    here = words[: FRAME - 1]
    frame[0], frame[1 : 1 + len(here)] = len(words), here
    yield torch.from_numpy(frame)
    if len(words) > len(here):
        yield torch.from_numpy(words[len(here) :])


def _receive(length: int, tp: TPGroup, label: str, direct: bool) -> torch.Tensor:
    x = torch.empty(length, dtype=torch.int64)
    if direct:
        return receive_from(x, 0, tp, label)  # COMM receive [FRAME], then the rest: what to do in this step
    return broadcast(x, tp, label)  # COMM broadcast [FRAME], then the rest: what to do in this step


def share(value: Any, tp: TPGroup) -> Any:
    """Rank 0's value, as JSON, to every rank: the script on each can go on with the same results.

    Ranks that rank 0 has started run no script, and are sent nothing.
    """
    if tp.size == 1 or tp.spawned:
        return value
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy() if tp.rank == 0 else None
    size = torch.tensor([len(data) if data is not None else 0])
    broadcast(size, tp, "results")  # COMM broadcast [1]: bytes to come
    payload = torch.from_numpy(data) if data is not None else torch.empty(int(size), dtype=torch.uint8)
    broadcast(payload, tp, "results")  # COMM broadcast [bytes]: the finished answers, once at the end
    return json.loads(payload.numpy().tobytes())


def share_all(value: Any, group: TPGroup) -> list[Any]:
    """Every rank's value, as JSON, on every rank of the group, by rank: where several decide, each about its own."""
    if group.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    sizes = [int(one) for one in all_gather(size, group, "results")]  # COMM all-gather [1]: bytes to come
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    parts = all_gather(padded, group, "results")  # COMM all-gather [bytes]: what each has finished, once at the end
    return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def agree(
    work: Callable[[], Any], group: TPGroup, other: str, facts: Callable[[Any], Any] = lambda _: None
) -> tuple[Any, str | None]:
    """All ranks of the group do `work`, which may fail on some: (this rank's result, what went wrong on any rank, or None).

    The second is the same on all ranks, so that all come to the same end. facts: what must be equal on all; other: what is said
    of a rank on which it is not.
    """
    done, wrong = None, None
    try:
        done = work()
    except RankFailure:
        raise
    except Exception as error:  # whatever it is, the others must hear of it
        wrong = " ".join(str(error).split()) or type(error).__name__
    said = share_all([wrong, None if wrong else facts(done)], group)
    errors = {rank: one for rank, (one, _) in enumerate(said) if one}
    if errors:
        rank, first = next(iter(errors.items()))
        alike = len(errors) == len(said) and len(set(errors.values())) == 1
        return done, first if alike or rank == 0 else f"rank {rank}: {first}"
    odd = next((rank for rank, (_, fact) in enumerate(said) if fact != said[0][1]), None)
    return done, None if odd is None else f"rank {odd} {other}"
