"""The links between the stages of a pipeline: what a rank gives to other stages in a step, and gets from them.

    hidden states [T, D]     to the rank with the same tp number in the next stage: it has the same rows and other layers
    logits [B, V/R]          from every rank of the last stage to rank 0 of the replica, which alone samples

Nobody waits for another rank to take what it has sent: it goes on with the next step, and keeps the message until it is gone.
All ranks carry out the same steps in the same order, so the k-th message between two ranks belongs to the k-th step that has
one, and a rank waits only for what an earlier stage, or itself in an earlier step, has to do: that cannot run in a circle.

SGLang sends two tensors, hidden_states and residual, because its norm adds them (0.5.23, srt/managers/scheduler_pp_mixin.py);
their sum is half of the bytes, and the next stage's first norm needs nothing else.
"""

from collections import deque
from collections.abc import Callable

import torch

from common.layers.vocab import best_pairs, gather_best_logits, gather_logits, join_best_logits, join_logits
from common.models.config import ModelConfig
from common.parallel_state import ParallelState, Sent, receive_from, send_to, start_receive

MOST_UNDER_WAY = 4  # hidden states that a stage runs ahead of the next one; each keeps its tensor

Logits = Callable[[], torch.Tensor]  # waits for them, and returns [B, V]


class StageLinks:
    """dtype: of hidden states and logits."""

    def __init__(self, parallel: ParallelState, config: ModelConfig, dtype: torch.dtype):
        self.tp, self.pp, self.replica = parallel.tp, parallel.pp, parallel.replica
        self.first, self.last = self.pp.rank == 0, self.pp.rank == self.pp.size - 1
        self.hidden_size, self.vocab_size, self.dtype = config.hidden_size, config.vocab_size, dtype
        self.steps_in_flight = 1  # that rank 0 may begin before it takes the logits of the first
        self._hidden: deque[Sent] = deque()
        self._logits: deque[Sent] = deque()

    def receive_hidden(self, tokens: int) -> torch.Tensor | None:
        """hidden [T, D] of the stage before; the first stage has none, it begins with token ids."""
        if self.first:
            return None
        x = torch.empty(tokens, self.hidden_size, dtype=self.dtype, device=self.tp.device)
        return receive_from(x, self.pp.rank - 1, self.pp, "hidden")  # COMM receive [T, D]: what my layers go on with

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """hidden [T, D] to the next stage; leave it as it is. Waits only if that stage is far behind."""
        sent = send_to(hidden, self.pp.rank + 1, self.pp, "hidden")  # COMM send [T, D]: what its layers go on with
        self._hidden.append(sent)
        if len(self._hidden) > MOST_UNDER_WAY:
            self._hidden.popleft().wait()

    def flush(self) -> None:
        """Wait until all that this rank has sent is taken: a message that nobody keeps any more is not sent."""
        for under_way in (self._hidden, self._logits):
            while under_way:
                under_way.popleft().wait()

    def bring_logits(self, mine: torch.Tensor | None, rows: int, best: int = 0) -> Logits | None:
        """From all ranks in a step of which `rows` sequences emit: logits [B, V] for rank 0, None for the others.

        mine: logits [B, V/R] of a rank of the last stage. best: with only so many of each rank (vocab.gather_best_logits).
        """
        if self.pp.size == 1:
            if best:
                logits = gather_best_logits(mine, best, self.vocab_size, self.tp)
            else:
                logits = gather_logits(mine, self.vocab_size, self.tp)
            return None if logits is None else lambda: logits
        if self.last:
            part = best_pairs(mine, best, self.vocab_size, self.tp) if best else mine
            sent = send_to(part, 0, self.replica, "logits")  # COMM send [B, V/R] or [B, best, 2]: rank 0 alone samples
            self._logits.append(sent)
            # rank 0 takes them when it has begun what comes next, for which this rank may be needed: so only those are waited for
            # that it must have taken before it began this step
            if len(self._logits) > self.steps_in_flight:
                self._logits.popleft().wait()
        return self._expect_logits(rows, best) if self.replica.rank == 0 else None

    def _expect_logits(self, rows: int, best: int) -> Logits:
        width = -(-self.vocab_size // self.tp.size)
        shape, dtype = ((rows, min(best, width), 2), torch.float32) if best else ((rows, width), self.dtype)
        waits = []
        for rank in range(self.tp.size):
            x = torch.empty(shape, dtype=dtype, device=self.tp.device)
            source = (self.pp.size - 1) * self.tp.size + rank
            wait = start_receive(x, source, self.replica, "logits")  # COMM receive: what a rank of the last stage sends
            waits.append(wait)
        join = join_best_logits if best else join_logits
        return lambda: join([wait() for wait in waits], self.vocab_size)
