"""What a step is made of: who was scheduled -> the few integers that every rank gets, and how each row is drawn.

vLLM keeps the same in a persistent batch on the worker (v1/worker/gpu_input_batch.py).
"""

from collections.abc import Callable, Mapping

import numpy as np

from ch06_tp_vllm.model_runner import StepMetadata, VerifyMetadata
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.scheduler import SchedulerOutput, num_scored
from common.sampling.batch import SamplingBatch

LAST_TOKEN = -1  # in the place of a token id: the one drawn last, which every rank has


class InputBatch:
    """settle: makes every token known that is still being drawn."""

    def __init__(self, settle: Callable[[], None]):
        self.settle = settle
        self._decoding: tuple[list[Request], SamplingBatch] | None = None  # of the last step, if it was all decodes

    def metadata(self, output: SchedulerOutput, slots: Mapping[int, int]) -> StepMetadata:
        """slots: of the adapters that lie in one, by number."""
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
            updates, *np.array(columns, dtype=np.int64).T, np.array(tokens, dtype=np.int64),
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

    def sampling(self, requests: list[Request], is_decode: bool) -> SamplingBatch:
        """The parameters of the step's rows; those of a decode batch that has not changed are still there."""
        if is_decode and self._decoding and self._decoding[0] == requests:
            self._decoding[1].advance()
            return self._decoding[1]
        if any(request.grammar or request.params.needs_last_token for request in requests):
            self.settle()  # a grammar or a penalty must know every token before the one it is for
        batch = SamplingBatch([request.sampling_row() for request in requests])
        self._decoding = (requests, batch) if is_decode and not batch.needs_last_token else None
        return batch

    def forget(self) -> None:
        """The last step was not carried out, or not as a decode step."""
        self._decoding = None
