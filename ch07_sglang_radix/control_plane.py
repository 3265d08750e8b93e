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

Over several pipeline stages rank 0 begins a task and goes on: the task is sent to each rank by itself, hidden states travel from
stage to stage, and the logits come back from the last one while later tasks are on their way. So the tokens, which only the first
stage feeds in, come when rank 0 has them, and a TokensTask says so:

    rank 0                                          stage 0          stage 1
    begin(task k)       -> task -> hidden           execute k
    begin(task k+1)     -> task -> hidden           execute k+1      execute k     -> logits
    finish(), sample k  -> TokensTask, tokens       take them        execute k+1   -> logits

This is the book's design. SGLang itself runs the same scheduler on every rank, which needs no task on the
wire but needs all of them to decide alike, always (replicated.py); here only one can be wrong.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ch07_sglang_radix.tasks import (
    DecodeTask,
    NoteTask,
    ParallelTask,
    StepTask,
    StopTask,
    Task,
    TokensTask,
    VerifyTask,
    WingTask,
    decode,
    encode,
)
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.messages import receive, send, start_send
from common.models.links import Logits
from common.parallel_state import RankFailure, Sent, broadcast
from common.sampling.batch import SamplingBatch
from common.sampling.logprobs import TokenLogprobs
from common.sampling.sampler import Drawn, sample

TASKS_UNDER_WAY = 64  # messages that rank 0 keeps for ranks which have not taken them


class ControlPlane:
    """The protocol between rank 0 and the others, over one wrapper a rank.

    notes: what rank 0 may ask of all ranks that is no step, by name; the same names on every rank. wings: who reads the words of a
    WingTask, by the wing's number.
    """

    def __init__(self, wrapper: TPRadixAttentionModelWrapper):
        self.wrapper, self.links = wrapper, wrapper.links
        self.tp, self.replica = wrapper.tp, wrapper.parallel.replica  # of this stage; of all whom rank 0 leads
        self.staged = wrapper.parallel.pp.size > 1
        self.notes: dict[str, Callable[..., Any]] = {}
        self.wings: dict[int, Callable[[tuple[int, ...]], None]] = {}
        self._sent: deque[Sent] = deque()
        self._coming: deque[tuple[int, Logits]] = (
            deque()
        )  # (step, its logits), begun and not finished, the oldest first
        self._step = 0  # whose logits were looked at last
        self._torn = False  # steps that are under way in the stages

    # --- rank 0

    def execute(self, task: StepTask) -> torch.Tensor | None:
        """Have all ranks execute `task`; returns the logits [B, V] of the sequences that emit, None if none does."""
        self.begin(task)
        return self.finish() if task.num_emitting else None

    def begin(self, task: StepTask) -> None:
        """Have all ranks execute `task`; if a sequence emits, `finish` brings the logits.

        Raises RankFailure for whatever breaks it off here.
        """
        self.send_task(task)
        with self.wrapper.together:
            logits = self._execute(task)
        if logits is not None:
            self._coming.append((task.step, logits))

    def finish(self) -> torch.Tensor:
        """Logits [B, V] of the oldest task that has begun and emits; waits for them."""
        self._step, logits = self._coming.popleft()
        return logits()

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
        """Draw one token for each row of the logits that `execute` or `finish` brought last, and tell who feeds them in."""
        sampled = sample(logits, batch)
        if self.staged and self.tp.size > 1:
            self._send_directly(TokensTask(self._step, len(sampled.tokens)), range(1, self.tp.size))
        self._share_tokens(sampled.tokens)
        return Drawn(sampled)

    def prompt_logprobs(
        self, tokens: Sequence[int], top: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> list[TokenLogprobs]:
        """Of the tokens behind the scored ones of the prefill task that was begun last. Waits for the device."""
        return [one for part in self.wrapper.prompt_logprobs(tokens, top, ids) for one in part.take()]

    def note(self, note: str, /, **arguments: Any) -> Any:
        """Have all ranks do `notes[note]`, between two steps; returns what it is on this rank. arguments: JSON."""
        mine = self.notes[note](**arguments)  # first: what is refused here is not done anywhere
        self.send_task(NoteTask(0, json.dumps([note, arguments])))
        return mine

    def together(self, note: str, /, **arguments: Any) -> Any:
        """`note` for what ranks talk about while they do it: told first, or rank 0 would wait for who has not heard of it."""
        self.send_task(NoteTask(0, json.dumps([note, arguments])))
        return self.notes[note](**arguments)

    def send_task(self, task: Task) -> None:
        """To all ranks. Over several stages rank 0 waits only at a stop, for everybody to get there."""
        self.wrapper.together.check()
        if not self.staged:
            if self.replica.size > 1:
                send(encode(task), self.replica, "task")
            return
        if self._torn:
            raise RankFailure("a step was broken off and the stages are out of step; make a new engine")
        self._send_directly(task, range(1, self.replica.size))
        if isinstance(task, StopTask):
            self._keep(0)
            self.links.flush()

    def forget(self) -> None:
        """A step was broken off, by a dead rank or by Ctrl-C: what the stages still send is nobody's."""
        self._torn = True
        self._coming.clear()

    def _send_directly(self, task: Task, ranks: Sequence[int]) -> None:
        self._sent += start_send(encode(task), ranks, self.replica, "task")
        self._keep(TASKS_UNDER_WAY)

    def _keep(self, most: int) -> None:
        while len(self._sent) > most:
            self._sent.popleft().wait()

    # --- the other ranks

    def follow(self) -> StopTask:
        """Execute what rank 0 sends until it says stop; returns how it said so."""
        while not isinstance(task := self.receive_task(), StopTask):
            if isinstance(task, NoteTask):
                note, arguments = json.loads(task.text)
                self.notes[note](**arguments)
            elif isinstance(task, WingTask):
                self.wings[task.wing](task.words)
            elif isinstance(task, TokensTask):
                self._receive_tokens(task.count)
            else:
                self._execute(task)
                if task.scores:
                    self.wrapper.prompt_logprobs()
                if task.num_emitting and not self.staged:
                    self._receive_tokens(task.num_emitting)
        self.links.flush()
        return task

    def receive_task(self) -> Task:
        return decode(receive(self.replica, "task", direct=self.staged))

    # --- both

    def _execute(self, task: StepTask) -> Logits | None:
        """Every rank computes its shard; rank 0 gets the logits of the rows that emit, if one does."""
        mine = self._execute_locally(task)
        if task.num_emitting == 0:  # chunks that complete no prompt: nothing to sample
            return None
        return self.links.bring_logits(mine, task.num_emitting, task.best)

    def _execute_locally(self, task: StepTask) -> torch.Tensor | None:
        """This rank's logits [B, V/R] of the rows that emit; None if none does, or a later stage has them."""
        if isinstance(task, DecodeTask):
            return self.wrapper.execute_decode_task(task)
        if isinstance(task, VerifyTask):
            return self.wrapper.execute_verify_task(task)
        if isinstance(task, ParallelTask):
            return self.wrapper.execute_parallel_task(task)
        return self.wrapper.execute_prefill_task(task)

    def _receive_tokens(self, count: int) -> None:
        self._share_tokens(torch.empty(count, dtype=torch.int64, device=self.tp.device))

    def _share_tokens(self, tokens: torch.Tensor) -> None:
        broadcast(tokens, self.tp, "tokens")  # COMM broadcast [B]: the tokens rank 0 chose, to who embeds them
        self.wrapper.receive_tokens(tokens)
