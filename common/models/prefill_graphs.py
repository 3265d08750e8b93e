"""CUDA graphs for short prompts: where a prefill is some three hundred launches of a few microseconds, the CPU that queues them is
what the first token waits for, and not the GPU.

As for decode (graph_runner.py) the inputs lie at fixed addresses. A step of T tokens of B sequences is padded to a recorded number
of tokens, and to SEATS sequences: tokens of padding belong to nobody, are stored nowhere and come out as what nobody reads, and a
seat that is left over is a sequence without new tokens. What a sequence had cached is only a number, so prefills behind a prefix,
chunks, and steps in which some decode are replayed like others. SGLang 0.5.23 does this as the backend "full" of its prefill graphs
(srt/model_executor/cuda_graph_config.py, full_prefill_max_req), beside one that leaves attention out of the graph.
"""

import bisect

import numpy as np
import torch

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.distributed.transfer import copy_to
from common.layers.adapter_rows import AdapterBlocks
from common.models.decoder import CausalLM
from common.models.graph_runner import StepGraphs

PREFILL_GRAPH_TOKENS = 2048  # of the largest recorded step, unless said otherwise (figures/bench_gpu_prefill.csv)
SEATS = 8  # sequences of a recorded step
# (up to, step): from 33 tokens on a third of a recorded step is padding at most. Each size is a recording at the start, and its
# launches weigh less the more tokens they work for.
TOKEN_STEPS = ((64, 16), (256, 32), (512, 64), (1 << 30, 256))


def token_sizes(most: int) -> list[int]:
    """The numbers of tokens that are recorded, ascending: 20 up to 2048."""
    sizes, last = {most}, 0
    for end, step in TOKEN_STEPS:
        sizes |= set(range(last + step, min(end, most) + 1, step))
        last = end
    return sorted(sizes)


class PrefillGraphs(StepGraphs):
    """`run` is the model over several new tokens a sequence, with the same result as without graphs; `holds` says of which steps.

    inputs, int64: tokens [size], their rows [size], positions [size], and of the sequences rows [SEATS], context_lens [SEATS],
    query_start [SEATS + 1].
    """

    kind = "prefill"

    def __init__(
        self, model: CausalLM, attention: type, cache: PagedKVCache, table: SequenceTable, max_tokens: int,
        max_loras: int = 0,
    ):  # fmt: skip
        self.sizes = token_sizes(max_tokens)
        shapes = [(size, SEATS) for size in reversed(self.sizes)]
        rows, numbers = [size for size, _ in shapes], 3 * self.sizes[-1] + 3 * SEATS + 1
        super().__init__(model, attention, cache, table, max_loras, shapes, rows, numbers)

    def holds(self, tokens: int, sequences: int) -> bool:
        return tokens <= self.sizes[-1] and 1 <= sequences <= SEATS

    @torch.inference_mode()
    def run(
        self, tokens: np.ndarray, rows: np.ndarray, cached: np.ndarray, new: np.ndarray, adapters: np.ndarray | None = None
    ) -> torch.Tensor:  # fmt: skip
        """tokens [T], rows, cached, new [B] as those of SequenceTable.prefill; adapters [B]: LoRA slots, None for none.

        Returns hidden [T, D], valid until the next run.
        """
        total, size = len(tokens), self.sizes[bisect.bisect_left(self.sizes, len(tokens))]
        ends = np.cumsum(new)
        of_tokens, of_seats = np.zeros((3, size), dtype=np.int64), np.zeros((2, SEATS), dtype=np.int64)
        starts = np.full(SEATS + 1, total, dtype=np.int64)
        of_tokens[1] = -1
        of_tokens[:, :total] = tokens, np.repeat(rows, new), np.arange(total) + np.repeat(cached - (ends - new), new)
        of_seats[:, : len(rows)] = rows, cached + new
        starts[: len(rows)] = ends - new
        numbers = np.concatenate((of_tokens.reshape(-1), of_seats.reshape(-1), starts))
        copy_to(numbers, self.inputs[: len(numbers)])
        return self._replay((size, SEATS), None if adapters is None else np.repeat(adapters, new))[:total]

    def _pad(self, shape: tuple[int, int]) -> None:
        size, _ = shape
        self.inputs.zero_()
        self.inputs[size : 2 * size] = -1

    def _step(self, shape: tuple[int, int], adapters: AdapterBlocks | None = None) -> torch.Tensor:
        size, seats = shape
        tokens, of, positions = self.inputs[: 3 * size].view(3, size)
        rows, context = self.inputs[3 * size : 3 * size + 2 * seats].view(2, seats)
        starts = self.inputs[3 * size + 2 * seats :][: seats + 1]
        table, page_size = self.table, self.table.page_size
        real, of = of >= 0, of.clamp(min=0)
        slots = table.page_table[of, positions // page_size] * page_size + positions % page_size
        longest = max(2, size)  # not 1, which would be a decode step
        pages = table.page_table.index_select(0, rows)
        meta = AttentionMetadata(slots.where(real, -1), pages, starts, context, page_size, longest, padded=True)
        ids = tokens.where(tokens >= 0, table.last_token[of])
        return self.model(ids, positions, self.attention(self.cache, meta), adapters=adapters)
