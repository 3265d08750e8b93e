"""What rank 0 tells the others, over the control group: flat integers for a step, JSON for results. Never pickle."""

import json
from typing import Any

import numpy as np
import torch

from common.distributed.spawn import FRAME, LEAVE, RankZeroLeft
from common.parallel_state import TPGroup, broadcast


def send(words: np.ndarray, tp: TPGroup, label: str) -> None:
    """int64 [n] to all ranks: one message of FRAME words that begins with n, and a second one if that is too short.

    A decode step of 60 sequences and its page updates fit into one.
    """
    if tp.size == 1:
        return
    frame = np.zeros(FRAME, dtype=np.int64)
    here = words[: FRAME - 1]
    frame[0], frame[1 : 1 + len(here)] = len(words), here
    broadcast(torch.from_numpy(frame), tp, label)  # COMM broadcast [FRAME]: what to do in this step
    if len(words) > len(here):
        rest = torch.from_numpy(words[len(here) :])
        broadcast(rest, tp, label)  # COMM broadcast [n - FRAME + 1]: the rest of a long task


def receive(tp: TPGroup, label: str) -> np.ndarray:
    """The other end of `send`: int64 [n]. Raises RankZeroLeft, on a rank that rank 0 has started, when there is no more."""
    frame = torch.empty(FRAME, dtype=torch.int64)
    broadcast(frame, tp, label)  # COMM broadcast [FRAME]: what to do in this step
    length, words = int(frame[0]), frame[1:].numpy()
    if length == LEAVE:
        raise RankZeroLeft
    if length <= len(words):
        return words[:length]
    rest = torch.empty(length - len(words), dtype=torch.int64)
    broadcast(rest, tp, label)  # COMM broadcast [n - FRAME + 1]: the rest of a long task
    return np.concatenate((words, rest.numpy()))


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
