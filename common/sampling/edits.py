"""Edits: what changes a request's logits before its token is drawn.

A request has some, most have none. Before a step the edits of one kind, of all rows that have it, become one object
(`together`), which then changes the logits of its rows in place, step after step while the batch stays the same. Rows
without edits cost nothing, and nothing waits for a GPU.

    AllowedTokens   all other tokens to -inf
    BadWords        the token that would complete a forbidden sequence, to -inf
    MinNewTokens    the tokens that would end the answer, to -inf, until enough are out
    LogitBias       + bias
    Penalties       for tokens that were seen before: repetition, presence, frequency

in this order, which is vLLM's (V1, v1/sample/sampler.py, Sampler.apply_logits_processors, the logits processors there
being MinTokens and LogitBias). SGLang 0.5.23 penalizes first and adds the bias last (sampling/sampling_batch_info.py,
apply_logits_bias), presence and frequency before repetition, and has neither allowed tokens nor bad words: only
where a token has both a bias and a repetition penalty does it come to another number.

A capability with a mask of its own (a grammar) gives it to the request's rows: SamplingRow.edits. Such edits come
first, as vLLM's grammar mask does, so that a bias cannot bring back what a grammar forbids. Where guesses are verified they have
a `branch(output_ids)`: a copy that has read these and goes on by itself (nodes.py).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from common.distributed.transfer import upload, upload_all


class History(Protocol):
    """What an edit sees of its row (SamplingRow): the request's tokens, and how many it has drawn."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]  # grows while a batch lives
    end_ids: Collection[int]
    drawn: int


Member = tuple[int, Any, History]  # row of the batch, its edit, its tokens


class AppliedEdits(Protocol):
    """The edits of one kind in a batch."""

    def apply(self, logits: torch.Tensor, advanced: int) -> None:
        """Change logits [B, V] float32 in place; `advanced` tokens were drawn for each row since the batch was made."""


class LogitsEdit(Protocol):
    """An edit of one request.

    needs_last_token: its rows' output_ids must hold every token before the one that is drawn, so that no step may
    be queued before the one before it was looked at. What depends on the number of tokens alone does not need it.
    """

    needs_last_token: bool

    @classmethod
    def together(cls, members: Sequence[Member]) -> AppliedEdits:
        """The edits of this kind of a batch, in the order of its rows."""


@dataclass(frozen=True)
class AllowedTokens:
    token_ids: tuple[int, ...]
    needs_last_token: ClassVar[bool] = False

    @classmethod
    def together(cls, members: Sequence[Member]) -> AppliedEdits:
        return _Allowed(members)


class _Allowed:
    def __init__(self, members: Sequence[Member]):
        self._rows = np.array([row for row, _, _ in members])
        self._allowed = [(i, np.unique(edit.token_ids)) for i, (_, edit, _) in enumerate(members)]
        self._there: tuple[torch.Tensor, torch.Tensor] | None = None

    def apply(self, logits: torch.Tensor, advanced: int) -> None:
        if self._there is None:
            rows, *at = upload_all(logits.device, self._rows, *_flat(self._allowed))
            forbidden = torch.ones(len(rows), logits.shape[1], dtype=torch.bool, device=logits.device)
            forbidden[tuple(at)] = False
            self._there = rows, forbidden
        rows, forbidden = self._there
        logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)


@dataclass(frozen=True)
class BadWords:
    """Sequences of token ids that the output must not contain; the prompt does not count, as in vLLM."""

    sequences: tuple[tuple[int, ...], ...]

    @property
    def needs_last_token(self) -> bool:
        """A single token is forbidden at all times."""
        return any(len(sequence) > 1 for sequence in self.sequences)

    @classmethod
    def together(cls, members: Sequence[Member]) -> AppliedEdits:
        return _BadWords(members)


class _BadWords:
    def __init__(self, members: Sequence[Member]):
        self._members = []  # row, length of a beginning -> {beginning: tokens that would complete it}, tokens
        for row, edit, history in members:
            words = defaultdict(lambda: defaultdict(list))
            for *beginning, last in edit.sequences:
                words[len(beginning)][tuple(beginning)].append(last)
            self._members.append((row, dict(words), history.output_ids))

    def apply(self, logits: torch.Tensor, advanced: int) -> None:
        forbidden = []
        for row, words, output in self._members:
            ends = (tuple(output[len(output) - n :]) if n <= len(output) else None for n in words)
            tokens = {t for end, found in zip(ends, words.values(), strict=True) if end in found for t in found[end]}
            forbidden.append((row, sorted(tokens)))
        _forbid(logits, forbidden)


@dataclass(frozen=True)
class MinNewTokens:
    tokens: int
    needs_last_token: ClassVar[bool] = False

    @classmethod
    def together(cls, members: Sequence[Member]) -> AppliedEdits:
        return _MinNewTokens(members)


class _MinNewTokens:
    def __init__(self, members: Sequence[Member]):
        self._members = [(row, edit.tokens - history.drawn, sorted(history.end_ids)) for row, edit, history in members]

    def apply(self, logits: torch.Tensor, advanced: int) -> None:
        _forbid(logits, [(row, ends) for row, missing, ends in self._members if missing > advanced])


@dataclass(frozen=True)
class LogitBias:
    biases: tuple[tuple[int, float], ...]
    needs_last_token: ClassVar[bool] = False

    @classmethod
    def together(cls, members: Sequence[Member]) -> AppliedEdits:
        return _LogitBias(members)


class _LogitBias:
    def __init__(self, members: Sequence[Member]):
        self._at = _flat([(row, [token for token, _ in edit.biases]) for row, edit, _ in members])
        self._bias = np.array([bias for _, edit, _ in members for _, bias in edit.biases], dtype=np.float32)
        self._there: tuple[torch.Tensor, ...] | None = None

    def apply(self, logits: torch.Tensor, advanced: int) -> None:
        if self._there is None:
            self._there = *upload_all(logits.device, *self._at), upload(self._bias, logits.device)
        rows, tokens, bias = self._there
        logits[rows, tokens] += bias


@dataclass(frozen=True)
class Penalties:
    """Repetition over prompt and output (Keskar et al. 2019), presence and frequency over the output."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    needs_last_token: ClassVar[bool] = True

    @classmethod
    def together(cls, members: Sequence[Member]) -> AppliedEdits:
        return _Penalties(members)


class _Penalties:
    def __init__(self, members: Sequence[Member]):
        self._rows = [row for row, _, _ in members]
        self._outputs = [history.output_ids for _, _, history in members]
        self._seen = [_Seen(history.prompt_ids if edit.repetition != 1 else ()) for _, edit, history in members]
        self._factors = np.array([(e.repetition, e.presence, e.frequency) for _, e, _ in members], dtype=np.float32)

    def apply(self, logits: torch.Tensor, advanced: int) -> None:
        for seen, output in zip(self._seen, self._outputs, strict=True):
            seen.read(output)
        at = _flat([(row, seen.ids) for row, seen in zip(self._rows, self._seen, strict=True)])
        factors = self._factors.repeat([len(seen.ids) for seen in self._seen], axis=0).T
        times = np.concatenate([seen.times for seen in self._seen])
        rows, tokens = upload_all(logits.device, *at)
        repetition, presence, frequency, times = upload(np.stack((*factors, times)), logits.device)
        x = logits[rows, tokens]
        x = torch.where(x > 0, x / repetition, x * repetition)
        logits[rows, tokens] = x - torch.where(times > 0, presence + frequency * times, 0)


class _Seen:
    """The tokens of one request, each once (ids [n]), and how often it was put out (times [n]). It reads a token once."""

    def __init__(self, prompt_ids: Sequence[int]):
        self.ids = np.unique(np.array(prompt_ids, dtype=np.int64))
        self.times = np.zeros(len(self.ids), dtype=np.float32)
        self._place = {token: place for place, token in enumerate(self.ids.tolist())}
        self._num_read = 0

    def read(self, output_ids: Sequence[int]) -> None:
        new = output_ids[self._num_read :]
        self._num_read += len(new)
        places = [self._place.setdefault(token, len(self._place)) for token in new]
        if missing := len(self._place) - len(self.ids):
            self.ids = np.concatenate((self.ids, list(self._place)[-missing:]))
            self.times = np.concatenate((self.times, np.zeros(missing, dtype=np.float32)))
        np.add.at(self.times, places, 1)


def gather_edits(rows: Iterable[tuple[int, Sequence[LogitsEdit], History]]) -> list[AppliedEdits]:
    """The edits of a batch's rows, those of one kind as one; own kinds of capabilities first."""
    members: dict[type, list[Member]] = {kind: [] for kind in BUILT_IN}
    for row, edits, history in rows:
        for edit in edits:
            members.setdefault(type(edit), []).append((row, edit, history))
    own = [kind for kind in members if kind not in BUILT_IN]
    return [kind.together(members[kind]) for kind in (*own, *BUILT_IN) if members[kind]]


BUILT_IN = (AllowedTokens, BadWords, MinNewTokens, LogitBias, Penalties)


def _flat(pieces: Sequence[tuple[int, Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """[(row, token ids)] -> rows [n], token ids [n], for logits[rows, ids]."""
    ids = [np.asarray(own, dtype=np.int64) for _, own in pieces]
    rows = np.array([row for row, _ in pieces], dtype=np.int64).repeat([len(own) for own in ids])
    return rows, np.concatenate(ids)


def _forbid(logits: torch.Tensor, pieces: Sequence[tuple[int, Sequence[int]]]) -> None:
    """To -inf: the token ids of each row."""
    rows, tokens = _flat(pieces) if pieces else ((), ())
    if len(rows):
        logits[tuple(upload_all(logits.device, rows, tokens))] = -torch.inf
