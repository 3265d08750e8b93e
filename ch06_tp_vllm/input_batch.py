"""What a step is made of: who was scheduled -> the few integers that every rank gets, and how each row is drawn.

vLLM keeps the same in a persistent batch on the worker (v1/worker/gpu_input_batch.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ch06_tp_vllm.model_runner import StepMetadata, VerifyMetadata
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.scheduler import ScheduledRequest, SchedulerOutput, num_scored
from common.attention.prefix_groups import Alike, PrefixGroups
from common.sampling.batch import SamplingBatch

LAST_TOKEN = -1  # in the place of a token id: the one drawn last, which every rank has


class InputBatch:
    """settle: makes every token known that is still being drawn. group: attention reads blocks that several sequences begin with
    once for all of them, if they stand side by side."""

    def __init__(self, settle: Callable[[], None], block_size: int, group: bool):
        self.settle, self.block_size = settle, block_size
        self.groups = PrefixGroups(block_size) if group else None
        # the group of each that decodes, by request and preemptions
        self._numbers: dict[tuple[Request, int], int] = {}
        self._order, self._alike = np.zeros(0, dtype=np.int64), ()
        self._drawn_for: list[Request] = []  # in the last step, and how
        self._sampling: SamplingBatch | None = None

    def in_order(self, output: SchedulerOutput) -> tuple[SchedulerOutput, tuple[Alike, ...]]:
        """A decode step's sequences with those that begin with the same blocks side by side, and which ones do.

        The block tables say it: the same block is in two of them only if one has found it in the prefix cache, or both have.
        Full blocks are never written again, and those that a sequence begins to decode with count.
        """
        if self.groups is None or not output.is_decode:
            return output, ()
        # a request that was preempted and is back has other blocks
        there = {(s.request, s.request.num_preemptions): s for s in output.scheduled}
        if list(there) != list(self._numbers):
            for gone in self._numbers.keys() - there.keys():
                self.groups.leave(gone)
            self._numbers = {
                one: self._numbers[one] if one in self._numbers else self.groups.join(one, self._full_blocks(s))
                for one, s in there.items()
            }
            self._order, self._alike = self.groups.in_order(np.fromiter(self._numbers.values(), dtype=np.int64))
        return replace(output, scheduled=[output.scheduled[i] for i in self._order.tolist()]), self._alike

    def _full_blocks(self, s: ScheduledRequest) -> np.ndarray:
        return np.array(s.request.block_table[: s.num_computed // self.block_size], dtype=np.int64)

    def metadata(
        self, output: SchedulerOutput, slots: Mapping[int, int], alike: tuple[Alike, ...] = ()
    ) -> StepMetadata:  # fmt: skip
        """slots: of the adapters that lie in one, by number. alike: who of a decode step's sequences, as they stand, begins with
        the same blocks."""
        updates, tokens = self._updates(output), []
        columns = [(s.request.row, s.num_computed, s.num_new, s.emits, num_scored(s)) for s in output.scheduled]
        if not output.is_decode:
            for s in output.scheduled:
                if s.num_new == 1 and s.request.drawn_here:
                    tokens.append(LAST_TOKEN)
                else:
                    tokens += s.request.all_token_ids[s.num_computed : s.num_computed + s.num_new]
        adapters = [slots[s.request.adapter] if s.request.adapter else 0 for s in output.scheduled]
        return StepMetadata(
            updates, *np.array(columns, dtype=np.int64).T, np.array(tokens, dtype=np.int64), alike,
            np.array(adapters, dtype=np.int64) if any(adapters) else None,
        )  # fmt: skip

    def verify_metadata(self, output: SchedulerOutput, guesses: np.ndarray) -> VerifyMetadata:
        """guesses [B, n] behind the last token of each."""
        self.forget()  # how far the next decode step has come is not known here
        columns = [(s.request.row, s.num_computed) for s in output.scheduled]
        return VerifyMetadata(self._updates(output), *np.array(columns, dtype=np.int64).T, guesses)

    def _updates(self, output: SchedulerOutput) -> list[tuple[int, int, list[int]]]:
        """New pieces of block tables, which from now on every rank knows."""
        updates = []
        for s in output.scheduled:
            request = s.request
            if request.num_blocks_sent < len(request.block_table):
                updates.append((request.row, request.num_blocks_sent, request.block_table[request.num_blocks_sent :]))
                request.num_blocks_sent = len(request.block_table)
        return updates

    def sampling(self, requests: list[Request]) -> SamplingBatch:
        """How the step's rows are drawn. Whoever got a token in the last step too has only moved on; the others leave and join."""
        if self._sampling and requests == self._drawn_for:
            self._sampling.advance()
            return self._sampling
        if any(request.grammar or request.params.needs_last_token for request in requests):
            self.settle()  # a grammar or a penalty must know every token before the one it is for
            self.forget()
            return SamplingBatch([request.sampling_row() for request in requests])
        if self._sampling is None:
            self._sampling = SamplingBatch([request.sampling_row() for request in requests])
        else:
            self._sampling.advance()
            places = {request: i for i, request in enumerate(self._drawn_for)}
            joining = [request for request in requests if request not in places]
            places |= {request: len(self._drawn_for) + i for i, request in enumerate(joining)}
            self._sampling.merge_batch([request.sampling_row() for request in joining])
            self._sampling.filter_batch(np.array([places[request] for request in requests]))
        self._drawn_for = requests
        return self._sampling

    def forget(self) -> None:
        """How many tokens each has drawn is not what the last step and this one say."""
        self._sampling, self._drawn_for = None, []
