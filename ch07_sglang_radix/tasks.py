"""What rank 0 decides for one step, and its form on the wire; both in one file, since they change together.

A task says which rows run, and which pages were added to or changed in the rows' page tables. It does not
repeat what the ranks know: page ids sent before stay in each rank's page table, and the token that a decode
step feeds in is the one every rank got when rank 0 broadcast the last step's tokens. So a decode task has
the same size after 10 tokens of context and after 10,000.

One list of page ids serves all layers: every layer's pool has the same numbering, so the page of a token
is the same page in each (a map layer -> page ids would repeat one list L times).

On the wire a task is a flat int64 tensor:

    word 0   magic and version           5   sequences; parts of a parallel task
         1   kind (1 stop, 2 prefill,    6   page updates
             3 decode, 4 note,           7   token ids; of a note, the bytes of its text
             5 parallel, 6 tokens,
             7 wing, 8 verify),
             columns << 8
         2   step                        8   best: logits a rank gives (0: all)
         3   length in words             9   groups of sequences that begin alike; of a verify
                                             task, nodes of each tree
         4   CRC-32 of all the others    then, in this order:
                                         per update:    row, first page index, n, n page ids
                                         prefill: (row, cached, new, emits) per sequence, then token ids
                                         decode:  the rows, their positions, (first, count, pages) of those alike
                                         verify:  the rows, their positions, guesses, their parents
                                         per column: its number in COLUMNS, a value for each sequence
                                         parallel: per part its length and the task itself; 0 is no work

A column is one more number a sequence, for a capability that has to tell the ranks something about its rows (an adapter, a
stage, what to score). A rank that does not know a column refuses the task: to ignore it would be to compute something else.

No pickle: a rank that reads a task can come to no other harm than ValueError.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple
from zlib import crc32

import numpy as np

from common.attention.prefix_groups import Alike

MAGIC = 0x5A11_0000
VERSION = 3
HEADER = 10
STOP, PREFILL, DECODE, NOTE, PARALLEL, TOKENS, WING, VERIFY = 1, 2, 3, 4, 5, 6, 7, 8
LEAVE = -1
# name -> number on the wire. scored: of a prefill sequence's new tokens, from the first on, so many whose next token's
# log-probability is asked for. shift: by how much the pictures before a prefill sequence's tokens shift their positions.
# adapter: the slot of the sequence's LoRA adapter, 0 for none. temperature, in millionths (0: greedy), and seed: with what a
# drafter draws a verify step's guesses
COLUMNS = {"scored": 1, "shift": 2, "adapter": 3, "temperature": 4, "seed": 5}


class PageUpdate(NamedTuple):
    """Pages first .. first+len(pages)-1 of a row are these from now on."""

    row: int
    first: int
    pages: tuple[int, ...]


class PrefillSequence(NamedTuple):
    """Compute tokens cached .. cached+new-1 of a row; `emits` if the last of them completes its prompt."""

    row: int
    cached: int
    new: int
    emits: int


@dataclass(frozen=True)
class PrefillTask:
    step: int
    updates: tuple[PageUpdate, ...]
    sequences: tuple[PrefillSequence, ...]
    token_ids: tuple[int, ...]  # of all sequences, end to end
    best: int = 0  # every rank gives its `best` best logits a sequence; 0: all of them
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # see COLUMNS; a value for each sequence

    @property
    def num_tokens(self) -> int:
        """Rows that the step feeds in."""
        return len(self.token_ids)

    @property
    def num_emitting(self) -> int:
        """Sequences that get a token out of this step."""
        return sum(s.emits for s in self.sequences)

    @property
    def scores(self) -> bool:
        """Are log-probabilities of prompt tokens asked for?"""
        return any(self.columns.get("scored", ()))


@dataclass(frozen=True)
class DecodeTask:
    """Feed the last token of each of `rows` in at its position."""

    step: int
    updates: tuple[PageUpdate, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    best: int = 0
    alike: tuple[Alike, ...] = ()
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    scores = False

    @property
    def num_tokens(self) -> int:
        return len(self.rows)

    @property
    def num_emitting(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class VerifyTask:
    """Feed in, for each of `rows`, its last token at its position and below it a tree of guesses, `nodes` tokens together, and draw
    a token at every node: which of them come out is what every rank finds by itself (common/draft_tree.py).

    guesses: the tokens of the nodes 1 .. nodes-1, sequence by sequence, and parents: the nodes that they follow, 0 being the last
    token. None: a drafter on every rank makes them.
    """

    step: int
    updates: tuple[PageUpdate, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    nodes: int
    guesses: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    best: int = 0
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    scores = False

    @property
    def num_tokens(self) -> int:
        return len(self.rows) * self.nodes

    @property
    def num_emitting(self) -> int:
        return len(self.rows) * self.nodes


@dataclass(frozen=True)
class ParallelTask:
    """A part for each data rank, None for one without work: every rank does its own, and knows from the others' how many rows
    they bring to the MLP. Rows, positions and pages of a part are its data rank's own."""

    step: int
    parts: tuple[PrefillTask | DecodeTask | None, ...]

    @property
    def num_emitting(self) -> int:
        return sum(part.num_emitting for part in self.parts if part)

    @property
    def scores(self) -> bool:
        return any(part.scores for part in self.parts if part)

    @property
    def best(self) -> int:
        """What is enough for every part that emits; 0 if one of them needs all logits."""
        wanted = [part.best for part in self.parts if part and part.num_emitting]
        return max(wanted) if all(wanted) else 0


@dataclass(frozen=True)
class StopTask:
    """No more work for now: back to whoever called `follow`. With step LEAVE: for good."""

    step: int

    @classmethod
    def leave(cls) -> "StopTask":
        return cls(LEAVE)


@dataclass(frozen=True)
class NoteTask:
    """No step: what every rank does by itself, such as to begin a profile (ControlPlane.notes). text: JSON."""

    step: int
    text: str


@dataclass(frozen=True)
class TokensTask:
    """No step: the tokens of an earlier one are drawn, `count` of them, and come next (pipelines only, to the first stage)."""

    step: int
    count: int


@dataclass(frozen=True)
class WingTask:
    """No step: what a wing has every rank do between two steps (ControlPlane.wings). wing: its number; words: its own to read."""

    step: int
    wing: int
    words: tuple[int, ...]


StepTask = PrefillTask | DecodeTask | VerifyTask | ParallelTask
Task = StepTask | StopTask | NoteTask | TokensTask | WingTask
KINDS = {
    StopTask: STOP, PrefillTask: PREFILL, DecodeTask: DECODE, NoteTask: NOTE, ParallelTask: PARALLEL, TokensTask: TOKENS,
    WingTask: WING, VerifyTask: VERIFY,
}  # fmt: skip


def encode(task: Task) -> np.ndarray:
    """Task -> int64 [length]."""
    if isinstance(task, ParallelTask):
        return _in_words(task, 0, (len(task.parts), 0, 0), 0, 0, _parts_in_words(task))
    updates, num_sequences, num_alike, best, tokens, sequences, columns = (), 0, 0, 0, (), (), {}
    if isinstance(task, NoteTask):
        tokens = tuple(task.text.encode())
    elif isinstance(task, TokensTask):
        num_sequences = task.count
    elif isinstance(task, WingTask):
        best, tokens = task.wing, task.words
    elif not isinstance(task, StopTask):
        updates, best, columns = task.updates, task.best, task.columns
    if isinstance(task, PrefillTask):
        num_sequences, sequences, tokens = len(task.sequences), chain(*task.sequences), task.token_ids
    elif isinstance(task, DecodeTask):
        num_sequences, num_alike = len(task.rows), len(task.alike)
        sequences = chain(task.rows, task.positions, *task.alike)
    elif isinstance(task, VerifyTask):
        num_sequences, num_alike, tokens = len(task.rows), task.nodes, (*task.guesses, *task.parents)
        sequences = chain(task.rows, task.positions)
    heads = ((u.row, u.first, len(u.pages), *u.pages) for u in updates)
    extra = ((COLUMNS[name], *values) for name, values in columns.items())
    body = np.fromiter(chain(*heads, sequences, tokens, *extra), dtype=np.int64)
    return _in_words(task, len(columns), (num_sequences, len(updates), len(tokens)), best, num_alike, body)


def _in_words(
    task: Task, num_columns: int, counts: tuple[int, int, int], best: int, num_alike: int, body: np.ndarray
) -> np.ndarray:
    kind = KINDS[type(task)] | num_columns << 8
    header = (MAGIC | VERSION, kind, task.step, HEADER + len(body), 0, *counts, best, num_alike)
    words = np.concatenate((np.array(header, dtype=np.int64), body))
    words[4] = _checksum(words)
    return words


def _parts_in_words(task: ParallelTask) -> np.ndarray:
    parts = [encode(part) if part else np.zeros(0, dtype=np.int64) for part in task.parts]
    return np.concatenate([words for part in parts for words in (np.array([len(part)]), part)])


def num_words(task: Task) -> int:
    """len(encode(task)), without the work."""
    if isinstance(task, ParallelTask):
        return HEADER + sum(1 + (num_words(part) if part else 0) for part in task.parts)
    if isinstance(task, StopTask | TokensTask):
        return HEADER
    if isinstance(task, NoteTask):
        return HEADER + len(task.text.encode())
    if isinstance(task, WingTask):
        return HEADER + len(task.words)
    updates = sum(3 + len(update.pages) for update in task.updates)
    columns = sum(1 + len(values) for values in task.columns.values())
    if isinstance(task, PrefillTask):
        return HEADER + updates + columns + 4 * len(task.sequences) + len(task.token_ids)
    more = len(task.guesses) + len(task.parents) if isinstance(task, VerifyTask) else 3 * len(task.alike)
    return HEADER + updates + columns + 2 * len(task.rows) + more


def _checksum(words: np.ndarray) -> int:
    """CRC-32 over everything but word 4, where it stands."""
    return crc32(words[5:].tobytes(), crc32(words[:4].tobytes()))


def decode(words: np.ndarray) -> Task:
    """int64 [length] -> Task. Raises ValueError for anything that `encode` did not write."""
    if len(words) < HEADER or int(words[0]) & ~0xFFFF != MAGIC:
        raise ValueError(f"not a task: {len(words)} words, the first {int(words[0]) if len(words) else None}")
    magic, kind, step, length, check, num_sequences, num_updates, num_tokens, best, num_alike = words[:HEADER].tolist()
    if magic & 0xFFFF != VERSION:
        raise ValueError(
            f"task version {magic & 0xFFFF}, this rank speaks {VERSION}; start all ranks from one checkout"
        )
    if length != len(words) or check != _checksum(words):
        raise ValueError(
            f"task of step {step} is damaged: {len(words)} words of {length}, CRC {_checksum(words)}, not {check}"
        )
    kind, num_columns = kind & 0xFF, kind >> 8
    if kind == PARALLEL:
        return _parallel(words[HEADER:], step, num_sequences)
    reader = _Reader(words[HEADER:].tolist())
    updates = tuple(PageUpdate(*reader.take(2), tuple(reader.take(reader.take(1)[0]))) for _ in range(num_updates))
    width = {STOP: 0, PREFILL: 4, DECODE: 2, NOTE: 0, TOKENS: 0, WING: 0, VERIFY: 2}.get(kind)
    if width is None:
        raise ValueError(f"task of step {step} has the unknown kind {kind}")
    sequences = reader.take(width * num_sequences)
    tokens = tuple(reader.take(num_tokens))
    alike = tuple(Alike(*reader.take(3)) for _ in range(num_alike if kind != VERIFY else 0))
    columns = dict(_column(reader, num_sequences, step) for _ in range(num_columns))
    if reader.left:
        raise ValueError(f"task of step {step} has {reader.left} words too many")
    if kind in (STOP, TOKENS, NOTE, WING):
        return _no_step(kind, step, num_sequences, best, tokens)
    rows, positions = tuple(sequences[:num_sequences]), tuple(sequences[num_sequences:])
    if kind == DECODE:
        return DecodeTask(step, updates, rows, positions, best, alike, columns)
    if kind == VERIFY:
        return _verify(step, updates, rows, positions, num_alike, tokens, best, columns)
    sequences = tuple(PrefillSequence(*sequences[i : i + width]) for i in range(0, len(sequences), width))
    task = PrefillTask(step, updates, sequences, tokens, best, columns)
    if sum(s.new for s in task.sequences) != num_tokens:
        raise ValueError(f"task of step {step}: {num_tokens} token ids for {sum(s.new for s in task.sequences)} tokens")
    return task


def _verify(step, updates, rows, positions, nodes: int, tokens: tuple[int, ...], best, columns) -> VerifyTask:
    """tokens: guesses, then their parents."""
    guesses, parents = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    wanted = len(rows) * (nodes - 1)
    if nodes < 1 or (tokens and len(tokens) != 2 * wanted):
        raise ValueError(f"task of step {step}: {len(tokens)} numbers for {wanted} guesses and as many parents")
    if any(not 0 <= parent <= i % (nodes - 1) for i, parent in enumerate(parents)):
        raise ValueError(f"task of step {step} has a guess that stands before its parent")
    return VerifyTask(step, updates, rows, positions, nodes, guesses, parents, best, columns)


def _no_step(kind: int, step: int, count: int, wing: int, tokens: tuple[int, ...]) -> Task:
    if kind == STOP:
        return StopTask(step)
    if kind == TOKENS:
        return TokensTask(step, count)
    return NoteTask(step, bytes(tokens).decode()) if kind == NOTE else WingTask(step, wing, tokens)


def _parallel(words: np.ndarray, step: int, num_parts: int) -> ParallelTask:
    parts, at = [], 0
    for _ in range(num_parts):
        if at >= len(words) or not 0 <= words[at] <= len(words) - at - 1:
            raise ValueError(f"task of step {step} ends before part {len(parts)} of {num_parts}")
        length = int(words[at])
        part = decode(words[at + 1 : at + 1 + length]) if length else None
        if not isinstance(part, PrefillTask | DecodeTask | None):
            raise ValueError(f"task of step {step}: part {len(parts)} is no step, but a {type(part).__name__}")
        parts.append(part)
        at += 1 + length
    if at < len(words):
        raise ValueError(f"task of step {step} has {len(words) - at} words too many")
    return ParallelTask(step, tuple(parts))


def _column(reader: "_Reader", num_sequences: int, step: int) -> tuple[str, tuple[int, ...]]:
    (number,) = reader.take(1)
    name = next((name for name, known in COLUMNS.items() if known == number), None)
    if name is None:
        raise ValueError(f"task of step {step} has the column {number}, which this rank does not know")
    return name, tuple(reader.take(num_sequences))


class _Reader:
    def __init__(self, words: list[int]):
        self._words, self._at = words, 0

    def take(self, n: int) -> list[int]:
        if n < 0 or self._at + n > len(self._words):
            raise ValueError(f"task ends at word {len(self._words)}, {n} more were announced at {self._at}")
        self._at += n
        return self._words[self._at - n : self._at]

    @property
    def left(self) -> int:
        return len(self._words) - self._at
