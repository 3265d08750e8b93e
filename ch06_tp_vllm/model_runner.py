"""One step's metadata, and the rank that carries it out.

Rank 0 schedules; all ranks get the same few integers and execute them, each on its own heads:

    per new piece of a block table    row, first block, n, n block ids
    per sequence                      row, tokens computed, tokens new, emits, tokens scored (of the new ones, from the
                                      first on: the next token's log-probability is asked for)
    token ids                         of all sequences, end to end; -1: the one drawn last, which every rank has
    per group that begins alike       first sequence, how many, blocks that all of them begin with; in decode steps

What attention is told (slot_mapping, block tables, query_start, context_lens) follows from these on every rank by
itself. In a pure decode step there are no token ids at all. Where somebody has an adapter, the slot of each sequence comes behind
them (0 for none); a message has told what lies there (lora_request.py). A verify step (ngram_proposer.py) has the first part,
then rows, tokens computed, and n guesses for each sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from ch06_tp_vllm.scheduler import SchedulerOutput, num_scored
from common.attention.prefix_groups import Alike
from common.distributed.messages import agree, receive, send
from common.executor import Executor, first_of_each
from common.layers.vocab import gather_logits
from common.models.adapter_files import checksum
from common.parallel_state import broadcast
from common.sampling.batch import SamplingBatch
from common.sampling.sampler import Drawn, sample

STOP, STEP, VERIFY, STEP_WITH_ADAPTERS, LOAD, PLACE = range(6)
STOP_MESSAGE = np.array([STOP], dtype=np.int64)


@dataclass(frozen=True)
class StepMetadata:
    """See the top of this file. rows, computed, new, emits, scored [B]; token_ids [T], or [0] in a decode step, in which alone some
    may be alike. adapters [B]: a slot each, 0 for none; None: nobody has one."""

    updates: Sequence[tuple[int, int, Sequence[int]]]
    rows: np.ndarray
    computed: np.ndarray
    new: np.ndarray
    emits: np.ndarray
    scored: np.ndarray
    token_ids: np.ndarray
    alike: Sequence[Alike] = ()
    adapters: np.ndarray | None = None

    def encode(self) -> np.ndarray:
        """-> int64 [n]"""
        kind = STEP if self.adapters is None else STEP_WITH_ADAPTERS
        counts = [kind, len(self.updates), len(self.rows), len(self.token_ids), len(self.alike)]
        return np.concatenate(
            (
                np.array(counts, dtype=np.int64),
                _encoded(self.updates),
                self.rows,
                self.computed,
                self.new,
                self.emits,
                self.scored,
                self.token_ids,
                np.array(self.alike, dtype=np.int64).reshape(-1),
                *([] if self.adapters is None else [self.adapters]),
            )
        )

    @staticmethod
    def decode(words: np.ndarray) -> "StepMetadata":
        """Raises ValueError for anything that `encode` did not write."""
        if len(words) < 5 or words[0] not in (STEP, STEP_WITH_ADAPTERS):
            raise ValueError(f"not a step: {len(words)} words, kind {words[0] if len(words) else None}")
        num_updates, batch, tokens, groups = words[1:5].tolist()
        updates, at = _decoded(words, 5, num_updates)
        ids = at + 5 * batch
        behind = ids + tokens
        slots = behind + 3 * groups
        end = slots + (batch if words[0] == STEP_WITH_ADAPTERS else 0)
        if end != len(words):
            raise ValueError(f"a step of {len(words)} words announces {end}")
        alike = [Alike(*group) for group in words[behind:slots].reshape(groups, 3).tolist()]
        adapters = words[slots:end] if words[0] == STEP_WITH_ADAPTERS else None
        return StepMetadata(updates, *words[at:ids].reshape(5, batch), words[ids:behind], alike, adapters)


@dataclass(frozen=True)
class VerifyMetadata:
    """rows, computed [B], guesses [B, n] behind each sequence's last token."""

    updates: Sequence[tuple[int, int, Sequence[int]]]
    rows: np.ndarray
    computed: np.ndarray
    guesses: np.ndarray

    def encode(self) -> np.ndarray:
        """-> int64 [n]"""
        counts = np.array([VERIFY, len(self.updates), *self.guesses.shape], dtype=np.int64)
        return np.concatenate((counts, _encoded(self.updates), self.rows, self.computed, self.guesses.reshape(-1)))

    @staticmethod
    def decode(words: np.ndarray) -> "VerifyMetadata":
        """Raises ValueError for anything that `encode` did not write."""
        if len(words) < 4 or words[0] != VERIFY:
            raise ValueError(f"not a verify step: {len(words)} words, kind {words[0] if len(words) else None}")
        num_updates, batch, n = words[1:4].tolist()
        updates, at = _decoded(words, 4, num_updates)
        if at + batch * (2 + n) != len(words):
            raise ValueError(f"a verify step of {len(words)} words announces {at + batch * (2 + n)}")
        rows, computed = words[at : at + 2 * batch].reshape(2, batch)
        return VerifyMetadata(updates, rows, computed, words[at + 2 * batch :].reshape(batch, n))


def _encoded(updates: Sequence[tuple[int, int, Sequence[int]]]) -> np.ndarray:
    heads = chain.from_iterable((row, first, len(blocks), *blocks) for row, first, blocks in updates)
    return np.fromiter(heads, dtype=np.int64)


def _decoded(words: np.ndarray, at: int, count: int) -> tuple[list[tuple[int, int, list[int]]], int]:
    """So many updates from word `at` on, and where they end."""
    updates = []
    for _ in range(count):
        row, first, n = words[at : at + 3].tolist()
        updates.append((row, first, words[at + 3 : at + 3 + n].tolist()))
        at += 3 + n
    return updates, at


class ModelRunner(Executor):
    """This rank's model, blocks and block tables (common/executor.py has the arguments)."""

    # --- rank 0

    def run(self, step: StepMetadata | VerifyMetadata) -> torch.Tensor | None:
        """Have all ranks execute the step; returns the logits [B, V] of the sequences that emit, None if none does; of a verify
        step those of all its tokens, B * (1 + n).

        Raises RankFailure for whatever breaks it off here.
        """
        self.together.check()
        if self.tp.size > 1:
            send(step.encode(), self.tp, "step")
        with self.together:
            return self._execute(step)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
        """Draw one token for each row of the last step's logits, and tell all ranks."""
        sampled = sample(logits, batch)
        self._share_tokens(sampled.tokens)
        return Drawn(sampled)

    def score_prompts(self, output: SchedulerOutput) -> None:
        """Log-probabilities of prompt tokens, for the requests of the step that ask for them. Waits for the device."""
        asked = [(s.request, s.num_computed, n) for s in output.scheduled if (n := num_scored(s))]
        if not asked:
            return
        nexts = [token for r, first, n in asked for token in r.prompt_token_ids[first + 1 : first + 1 + n]]
        top = [r.params.prompt_logprobs for r, _, n in asked for _ in range(n)]
        told = [one for part in self.prompt_logprobs(nexts, top, [()] * len(nexts)) for one in part.take()]
        for request, first, n in asked:
            mine, told = told[:n], told[n:]
            request.prompt_logprobs += mine[len(request.prompt_logprobs) - first :]  # what was told before it went back

    def place_adapter(self, adapter: int, slot: int) -> None:
        """Have it in this slot on all ranks, from the next step on."""
        self.together.check()
        if self.tp.size > 1:
            send(np.array([PLACE, adapter, slot], dtype=np.int64), self.tp, "adapter")
        with self.together:
            self.lora.place(adapter, slot)

    def tell_adapter(self, adapter: int, folder: str) -> None:
        """To ranks that run no script of their own: `load_adapter`, which is to be called here, too."""
        send(np.array([LOAD, adapter, *folder.encode()], dtype=np.int64), self.tp, "adapter")

    def stop(self) -> None:
        """Let the others out of `follow`."""
        self.together.check()
        if self.tp.size > 1:
            send(STOP_MESSAGE, self.tp, "stop")

    # --- the other ranks

    def follow(self) -> None:
        """Execute what rank 0 sends until it says stop."""
        while (words := receive(self.tp, "step"))[0] != STOP:
            if words[0] == VERIFY:
                verify = VerifyMetadata.decode(words)
                self._execute(verify)
                tokens = len(verify.rows) + verify.guesses.size
                self._share_tokens(torch.empty(tokens, dtype=torch.int64, device=self.tp.device))
                continue
            if words[0] == PLACE:
                self.lora.place(*words[1:].tolist())
                continue
            if words[0] == LOAD:
                self.load_adapter(int(words[1]), bytes(words[2:].tolist()).decode())
                continue
            step = StepMetadata.decode(words)
            self._execute(step)
            if step.scored.any():
                self.prompt_logprobs()
            if emitting := int(step.emits.sum()):
                self._share_tokens(torch.empty(emitting, dtype=torch.int64, device=self.tp.device))

    # --- both

    def load_adapter(self, adapter: int, folder: str) -> str | None:
        """Read this rank's part of it. Why no rank has it, or None if all have."""

        def load() -> str:
            self.lora.load(adapter, folder)
            return checksum(folder)

        _, wrong = agree(load, self.tp, "has read another adapter than rank 0", lambda digest: digest)
        if wrong and adapter in self.lora.loaded:
            self.lora.unload(adapter)
        return wrong

    def _execute(self, step: StepMetadata | VerifyMetadata) -> torch.Tensor | None:
        self.table.set_pages(step.updates)
        if isinstance(step, VerifyMetadata):
            batch, n = step.guesses.shape
            chains = np.tile(np.arange(n), batch)  # each guess follows the one before
            logits = self.verify(step.rows, step.computed, 1 + n, step.guesses.reshape(-1), chains)
        elif len(step.token_ids) == 0:
            logits = self.decode(step.rows, step.computed, step.alike, adapters=step.adapters)
        else:
            scored = first_of_each(step.new, step.scored)
            logits = self.ragged(
                step.token_ids, step.rows, step.computed, step.new, step.emits, scored, adapters=step.adapters
            )
        return None if logits is None else gather_logits(logits, self.config.vocab_size, self.tp)

    def _share_tokens(self, tokens: torch.Tensor) -> None:
        broadcast(tokens, self.tp, "tokens")  # COMM broadcast [B]: the tokens rank 0 chose
        self.receive_tokens(tokens)
