"""One will: rank 0 decides, all ranks execute.

    rank 0                                    every other rank
    build task                                follow():
    run(task):                                  receive task    <- broadcast
      send task        -> broadcast             execute it      (all-reduces inside)
      execute it       (all-reduces inside)     give logits     -> gather
      take logits      <- gather                receive tokens  <- broadcast
      sample                                    and again, until a StopTask
      send tokens      -> broadcast

This is the book's design. SGLang itself runs the same scheduler on every rank, which needs no task on the
wire but needs all of them to decide alike, always; here only one can be wrong.
"""

import json
from typing import Any

import numpy as np
import torch

from ch07_sglang_radix.tasks import DecodeTask, PrefillTask, StopTask, Task, decode, encode
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import broadcast
from common.sampler import SamplingRow, sample
from common.vocab import gather_logits

FRAME = 256  # words of a task's first message; a decode step of 60 sequences and its page updates fit


class ControlPlane:
    """The protocol between rank 0 and the others, over one wrapper a rank."""

    def __init__(self, wrapper: TPRadixAttentionModelWrapper):
        self.wrapper, self.tp = wrapper, wrapper.tp

    # --- rank 0

    def run(self, task: PrefillTask | DecodeTask, rows: list[SamplingRow]) -> tuple[list[int], list[float] | None]:
        """Have all ranks execute `task`; returns one token for each of `rows`, the sequences that emit."""
        self.send_task(task)
        logits = self._execute(task)  # [B, V]
        if logits is None:
            return [], None
        tokens, logprobs = sample(logits, rows)
        self._share_tokens(task, tokens)
        return tokens.tolist(), None if logprobs is None else logprobs.tolist()

    def send_task(self, task: Task) -> None:
        """One message of FRAME words; a longer task sends its rest in a second one."""
        if self.tp.size == 1:
            return
        words = encode(task)
        frame = np.zeros(FRAME, dtype=np.int64)
        frame[: len(words)] = words[:FRAME]
        broadcast(torch.from_numpy(frame), self.tp, "task")  # COMM broadcast [FRAME]: what to do in this step
        if len(words) > FRAME:
            rest = torch.from_numpy(words[FRAME:])
            broadcast(rest, self.tp, "task")  # COMM broadcast [length - FRAME]: the rest of a long task

    # --- the other ranks

    def follow(self) -> None:
        """Execute what rank 0 sends until it says stop."""
        while not isinstance(task := self.receive_task(), StopTask):
            self._execute(task)
            if rows := task.emitting_rows:
                self._share_tokens(task, torch.empty(len(rows), dtype=torch.int64, device=self.tp.device))

    def receive_task(self) -> Task:
        frame = torch.empty(FRAME, dtype=torch.int64)
        broadcast(frame, self.tp, "task")  # COMM broadcast [FRAME]: what to do in this step
        words, length = frame.numpy(), int(frame[3])
        if length > FRAME:
            rest = torch.empty(length - FRAME, dtype=torch.int64)
            broadcast(rest, self.tp, "task")  # COMM broadcast [length - FRAME]: the rest of a long task
            words = np.concatenate((words, rest.numpy()))
        return decode(words[:length])

    # --- both

    def _execute(self, task: PrefillTask | DecodeTask) -> torch.Tensor | None:
        """Every rank computes its shard; rank 0 gets the logits [B, V] of the rows that emit."""
        if isinstance(task, DecodeTask):
            logits_local = self.wrapper.execute_decode_task(task)
        else:
            logits_local = self.wrapper.execute_prefill_task(task)
        if logits_local is None:  # a chunk that completes no prompt: nothing to sample
            return None
        return gather_logits(logits_local, self.wrapper.config.vocab_size, self.tp)

    def _share_tokens(self, task: PrefillTask | DecodeTask, tokens: torch.Tensor) -> None:
        broadcast(tokens, self.tp, "tokens")  # COMM broadcast [B]: the tokens rank 0 chose
        self.wrapper.receive_tokens(task.emitting_rows, tokens)

    def share_results(self, results: Any = None) -> Any:
        """Rank 0's results, as JSON, to every rank: the script on each can go on with the same values."""
        if self.tp.size == 1:
            return results
        data = np.frombuffer(json.dumps(results).encode(), dtype=np.uint8).copy() if self.tp.rank == 0 else None
        size = torch.tensor([len(data) if data is not None else 0])
        broadcast(size, self.tp, "results")  # COMM broadcast [1]: bytes to come
        payload = torch.from_numpy(data) if data is not None else torch.empty(int(size), dtype=torch.uint8)
        broadcast(payload, self.tp, "results")  # COMM broadcast [bytes]: the finished answers, once at the end
        return json.loads(payload.numpy().tobytes())
