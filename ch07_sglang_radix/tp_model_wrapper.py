"""The executor, taught to read the book's tasks.

`execute_*` computes this rank's logits and stops there: one place has the language model's will, and it
is not here.
"""

from collections.abc import Mapping

import numpy as np
import torch

from ch07_sglang_radix.tasks import DecodeTask, ParallelTask, PrefillTask, VerifyTask
from common.executor import NO_TOKENS, Executor, StepParts, first_of_each
from common.models.drafters.draws import DrawnRows
from common.values import flag, shown

LAST_TOKEN = -1  # in a prefill step: the last token of the row, which may be known to the device only


class TPRadixAttentionModelWrapper(Executor):
    """This rank's model, pages and page table (common/executor.py has the arguments)."""

    def refuse_another_layout(self, sizes: Mapping[str, int | None], enable_layernorm_sp: bool | None) -> None:
        """Whoever asks for one must mean this wrapper's; None asks for nothing. Raises ValueError on every rank alike."""
        layout, cuts_rows = self.parallel.layout, self.communicator.enable_layernorm_sp
        for name, size in sizes.items():
            if size not in (None, getattr(layout, name)):
                raise ValueError(
                    f"{name}_size={shown(size)}, but the wrapper's ranks are laid out as {layout}; give the same to "
                    "ParallelState.initialize, or leave it out"
                )
        if enable_layernorm_sp is not None and flag("enable_layernorm_sp", enable_layernorm_sp) != cuts_rows:
            raise ValueError(
                f"enable_layernorm_sp={enable_layernorm_sp}, but the wrapper was made with {cuts_rows}; give it the same, or "
                "leave it out"
            )

    def execute_prefill_task(self, task: PrefillTask) -> torch.Tensor | None:
        """Several prompts (or chunks of them) behind their cached prefixes, in one ragged step.

        Returns this rank's logits [B, V/R] of the sequences that emit a token, None if none does.
        """
        self.table.set_pages(task.updates)
        return self.ragged(*_ragged(task), shifts=task.columns.get("shift"), adapters=_adapters(task))

    def execute_decode_task(self, task: DecodeTask) -> torch.Tensor:
        """One more token for each running row: feed in its last token. Returns logits [B, V/R] of this rank."""
        self.table.set_pages(task.updates)
        rows, positions = np.array(task.rows, dtype=np.int64), np.array(task.positions, dtype=np.int64)
        return self.decode(rows, positions, task.alike, adapters=_adapters(task))

    def execute_verify_task(self, task: VerifyTask) -> torch.Tensor:
        """One token or more for each running row: feed in its last token and guesses. Returns logits [B * N, V/R] of this rank."""
        self.table.set_pages(task.updates)
        rows, positions = np.array(task.rows, dtype=np.int64), np.array(task.positions, dtype=np.int64)
        return self.verify(rows, positions, task.nodes, task.guesses, task.parents, _adapters(task), _drawn(task))

    def execute_parallel_task(self, task: ParallelTask) -> torch.Tensor | None:
        """This data rank's part, in step with the others: the logits are of all sequences that emit, part by part.

        Where one part prefills, the decodes of the others are sequences of a prefill step with one new token each.
        """
        own = task.parts[self.communicator.part]
        if own:
            self.table.set_pages(own.updates)
        if not any(isinstance(part, PrefillTask) for part in task.parts):
            rows, positions = (np.array(x, dtype=np.int64) for x in ((own.rows, own.positions) if own else ((), ())))
            return self.decode(rows, positions, parts=[len(part.rows) if part else 0 for part in task.parts])
        ragged = [_ragged(part) for part in task.parts]
        parts = StepParts(
            [len(tokens) for tokens, *_ in ragged],
            [np.cumsum(new)[np.flatnonzero(emits)] - 1 for _, _, _, new, emits, _ in ragged],
            [scored for *_, scored in ragged],
        )  # fmt: skip
        return self.ragged(*ragged[self.communicator.part], parts=parts)


def _adapters(task: PrefillTask | DecodeTask | VerifyTask) -> np.ndarray | None:
    """[B] slots, 0 for none; None if no sequence has an adapter."""
    slots = task.columns.get("adapter")
    return None if slots is None else np.array(slots, dtype=np.int64)


def _drawn(task: VerifyTask) -> DrawnRows | None:
    """With what guesses are drawn; None where they are chosen."""
    temperatures = task.columns.get("temperature")
    if temperatures is None:
        return None
    return DrawnRows(np.array(temperatures) / 1e6, np.array(task.columns["seed"], dtype=np.uint64))


def _ragged(task: PrefillTask | DecodeTask | None) -> tuple[np.ndarray, ...]:
    """Executor.ragged's arguments: token ids, and per sequence its row, cached and new tokens, does it emit; what is scored."""
    if task is None:
        return (NO_TOKENS,) * 6
    if isinstance(task, DecodeTask):
        rows, cached = np.array(task.rows, dtype=np.int64), np.array(task.positions, dtype=np.int64)
        new = np.ones_like(rows)
        return np.full_like(rows, LAST_TOKEN), rows, cached, new, new, NO_TOKENS
    rows, cached, new, emits = np.array(task.sequences, dtype=np.int64).T
    scored = first_of_each(new, np.array(task.columns.get("scored", 0 * new), dtype=np.int64))
    return np.array(task.token_ids, dtype=np.int64), rows, cached, new, emits, scored
