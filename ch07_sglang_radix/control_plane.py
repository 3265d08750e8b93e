"""One will: rank 0 decides, all ranks execute.

    rank 0                                    every other rank
    build task                                follow():
    execute(task):                              receive task    <- broadcast
      send task        -> broadcast             execute it      (all-reduces inside)
      execute it       (all-reduces inside)     give logits     -> gather
      take logits      <- gather                receive tokens  <- broadcast
    sample(logits)                              and again, until a StopTask
      send tokens      -> broadcast

On a GPU none of this waits: forward, gather, sampling and the broadcast of the tokens are queued one behind the
other, the next step reads its tokens where they lie, and rank 0 looks at them when it wants to (Drawn.take).

This is the book's design. SGLang itself runs the same scheduler on every rank, which needs no task on the
wire but needs all of them to decide alike, always (replicated.py); here only one can be wrong.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ch07_sglang_radix.tasks import DecodeTask, NoteTask, PrefillTask, StopTask, Task, decode, encode
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.messages import receive, send
from common.layers.vocab import gather_best_logits, gather_logits
from common.parallel_state import broadcast
from common.sampling.batch import SamplingBatch
from common.sampling.logprobs import TokenLogprobs
from common.sampling.sampler import Drawn, sample


class ControlPlane:
    """The protocol between rank 0 and the others, over one wrapper a rank.

    notes: what rank 0 may ask of all ranks that is no step, by name; the same names on every rank.
    """

    def __init__(self, wrapper: TPRadixAttentionModelWrapper):
        self.wrapper, self.tp = wrapper, wrapper.tp
        self.notes: dict[str, Callable[..., Any]] = {}

    # --- rank 0

    def execute(self, task: PrefillTask | DecodeTask) -> torch.Tensor | None:
        """Have all ranks execute `task`; returns the logits [B, V] of the sequences that emit, None if none does."""
        self.send_task(task)
        return self._execute(task)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
        """Draw one token for each row of the last task's logits, and tell all ranks."""
        sampled = sample(logits, batch)
        self._share_tokens(sampled.tokens)
        return Drawn(sampled)

    def prompt_logprobs(
        self, tokens: Sequence[int], top: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> list[TokenLogprobs]:
        """Of the tokens behind the scored ones of the last prefill task. Waits for the device."""
        return [one for part in self.wrapper.prompt_logprobs(tokens, top, ids) for one in part.take()]

    def note(self, note: str, /, **arguments: Any) -> Any:
        """Have all ranks do `notes[note]`, between two steps; returns what it is on this rank. arguments: JSON."""
        mine = self.notes[note](**arguments)  # first: what is refused here is not done anywhere
        self.send_task(NoteTask(0, json.dumps([note, arguments])))
        return mine

    def send_task(self, task: Task) -> None:
        if self.tp.size > 1:
            send(encode(task), self.tp, "task")

    # --- the other ranks

    def follow(self) -> StopTask:
        """Execute what rank 0 sends until it says stop; returns how it said so."""
        while not isinstance(task := self.receive_task(), StopTask):
            if isinstance(task, NoteTask):
                note, arguments = json.loads(task.text)
                self.notes[note](**arguments)
                continue
            self._execute(task)
            if any(task.columns.get("scored", ())):
                self.wrapper.prompt_logprobs()
            if emitting := task.num_emitting:
                self._share_tokens(torch.empty(emitting, dtype=torch.int64, device=self.tp.device))
        return task

    def receive_task(self) -> Task:
        return decode(receive(self.tp, "task"))

    # --- both

    def _execute(self, task: PrefillTask | DecodeTask) -> torch.Tensor | None:
        """Every rank computes its shard; rank 0 gets the logits [B, V] of the rows that emit."""
        logits_local = self._execute_locally(task)
        if logits_local is None:  # a chunk that completes no prompt: nothing to sample
            return None
        vocab_size = self.wrapper.config.vocab_size
        if task.best:
            return gather_best_logits(logits_local, task.best, vocab_size, self.tp)
        return gather_logits(logits_local, vocab_size, self.tp)

    def _execute_locally(self, task: PrefillTask | DecodeTask) -> torch.Tensor | None:
        """This rank's logits [B, V/R] of the rows that emit; None if none does."""
        if isinstance(task, DecodeTask):
            return self.wrapper.execute_decode_task(task)
        return self.wrapper.execute_prefill_task(task)

    def _share_tokens(self, tokens: torch.Tensor) -> None:
        broadcast(tokens, self.tp, "tokens")  # COMM broadcast [B]: the tokens rank 0 chose
        self.wrapper.receive_tokens(tokens)
