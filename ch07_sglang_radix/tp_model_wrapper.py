"""The executor, taught to read the book's tasks.

`execute_*` computes this rank's logits and stops there: one place has the language model's will, and it
is not here.
"""

import numpy as np
import torch

from ch07_sglang_radix.tasks import DecodeTask, PrefillTask
from common.executor import Executor, first_of_each


class TPRadixAttentionModelWrapper(Executor):
    """This rank's model, pages and page table (common/executor.py has the arguments)."""

    def execute_prefill_task(self, task: PrefillTask) -> torch.Tensor | None:
        """Several prompts (or chunks of them) behind their cached prefixes, in one ragged step.

        Returns this rank's logits [B, V/R] of the sequences that emit a token, None if none does.
        """
        self.table.set_pages(task.updates)
        rows, cached, new, emits = np.array(task.sequences, dtype=np.int64).T
        scored = first_of_each(new, np.array(task.columns.get("scored", 0 * new), dtype=np.int64))
        return self.ragged(np.array(task.token_ids, dtype=np.int64), rows, cached, new, emits, scored)

    def execute_decode_task(self, task: DecodeTask) -> torch.Tensor:
        """One more token for each running row: feed in its last token. Returns logits [B, V/R] of this rank."""
        self.table.set_pages(task.updates)
        rows, positions = np.array(task.rows, dtype=np.int64), np.array(task.positions, dtype=np.int64)
        return self.decode(rows, positions, task.alike)
