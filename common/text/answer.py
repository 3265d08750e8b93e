"""The text of one answer while its tokens come: what it is so far, what of it is certain, and what ends it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy
from typing import NamedTuple

import regex

from common.text.detokenizer import IncrementalDetokenizer
from common.text.tokenizer import Tokenizer

PATTERN_SECONDS = 1.0  # a pattern can take exponential time, and every request of the batch waits for it


class AnswerText:
    """One request's text, for an engine that looks after each token or only now and then.

    The engine hands over all output tokens that it has; those that are new are read:

        if answer.watches and answer.catch_up(req.output_ids) is not None:   # after each token
            ...                                                              # a stop: req ends here
        answer.catch_up(req.output_ids); show(answer.certain)                # when somebody looks
        answer.finish(req.output_ids, by_stop_token=...); answer.text        # when it has ended

    `stop`: texts that end the answer, wherever tokens cut them. The one that is complete first wins, of two that are
    complete at the same character the first in the list, so that nothing depends on how a text is cut into tokens or how
    many come in a step (vLLM `v1/engine/detokenizer.py` check_stop_strings, since its pull request 49391 of July 2026;
    SGLang's `managers/schedule_batch.py` _check_str_based_finish takes the first in the list of those that the last
    token completed). A special token's text counts although it is not shown, as in SGLang, which decodes the last tokens
    with them; vLLM looks at the shown text alone and does not find it.
    `stop_regex` (SGLang): patterns, tried after the texts; the whole answer is searched after each token. `matched` is the
    pattern, as in SGLang 0.5.23, whose detokenizer looks for that text in the answer (managers/detokenizer_manager.py,
    trim_matched_stop) and so cuts nothing unless the pattern is plain text; here the answer is cut where the match begins.

    `include_stop`: what ended the answer is part of its text (vLLM include_stop_str_in_output, SGLang no_stop_trim).
    `not_before`: no stop is complete within so many tokens (vLLM min_tokens).
    `tokenizer` may be None: the text is empty.

    Raises ValueError for stops without a tokenizer and for patterns that are none or match the empty text; later only
    from catch_up, if a pattern takes longer than PATTERN_SECONDS: this answer must end, and has the text it had.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int] = (), *, stop: Sequence[str] = (),
        stop_regex: Sequence[str] = (), include_stop: bool = False, not_before: int = 0,
        skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True,
    ):  # fmt: skip
        if tokenizer is None and (stop or stop_regex):
            raise ValueError("without a tokenizer there is no text to stop at; use stop_token_ids")
        self.matched: str | None = None  # the stop that ended it: the text, or the pattern
        self.num_tokens = 0  # read so far; after a match, up to and with the token that completed it
        self._tokenizer, self._include_stop, self._not_before = tokenizer, include_stop, not_before
        self._skip = skip_special_tokens
        self._detokenizer = tokenizer and IncrementalDetokenizer(
            tokenizer, prompt_ids, skip_special_tokens, spaces_between_special_tokens
        )
        self._pieces: list[str] = []
        self._length = 0  # characters of the text
        self._whole = tokenizer is None  # nothing comes any more
        self._shown = _StopSearch(tuple(stop), tuple(map(compiled, stop_regex)))
        self._written: _StopSearch | None = None  # the same, special tokens written out, once there was one
        self._special: list[tuple[int, int]] = []  # where they are written and how long they are

    @property
    def watches(self) -> bool:
        """Whether a text can end it, so that each token must be looked at."""
        return self._shown.has_stops

    def catch_up(self, output_ids: Sequence[int]) -> str | None:
        """Read what is new in the output tokens (all of them are given); returns the stop that was found, if any."""
        if self._whole:
            return self.matched
        new = output_ids[self.num_tokens :]
        if not self.watches:
            self.num_tokens += len(new)
            self._extend(self._detokenizer.add(*new))
            return None
        try:
            for token in new:
                self.num_tokens += 1
                special = self._tokenizer.special_text(token) if self._skip else ""
                if self._extend(self._detokenizer.add(token), special):
                    break
        except TimeoutError:
            self._whole = True
            raise ValueError(
                f"stop_regex took more than {PATTERN_SECONDS:g} s over {self._length} characters; "
                "patterns with repetitions inside repetitions, like (a+)+, do"
            ) from None
        return self.matched

    def finish(self, output_ids: Sequence[int], by_stop_token: bool = False) -> str | None:
        """Nothing comes any more. A stop token is among the tokens, and in the text only with include_stop."""
        self.catch_up(output_ids[:-1] if by_stop_token and not self._include_stop else output_ids)
        if not self._whole:
            with suppress(TimeoutError):  # it ends anyway
                self._extend(self._detokenizer.finish())
            self._whole = True
        return self.matched

    @property
    def text(self) -> str:
        """All so far; its end may still turn out to be the beginning of a stop."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    @property
    def certain(self) -> str:
        """What may be shown: each value begins with the one before, and the last is `text`."""
        if self._whole or self._include_stop or not self.watches:
            return self.text
        end = self._length - self._shown.held
        if self._written:
            end = min(end, self._shown_at(self._written.length - self._written.held))
        return self.text[:end]

    def _extend(self, piece: str, special: str = "") -> bool:
        """Take the text of a token; a special token has one that is not shown. True if this was the end."""
        self._pieces.append(piece)
        self._length += len(piece)
        if not self.watches:
            return False
        active = self.num_tokens > self._not_before
        found = self._shown.feed(piece, active)
        if special and not self._written:
            self._written = copy(self._shown)  # until now they were the same
        elif self._written:
            found += self._as_shown(self._written.feed(piece, active))
        if special:
            self._special.append((self._written.length, len(special)))
            found += self._as_shown(self._written.feed(special, active))
        if found:
            first = min(found)
            self.matched = first.stop
            self._pieces = [self.text[: first.end if self._include_stop else first.start]]
            self._whole = True
        return self._whole

    def _as_shown(self, found: list["_Found"]) -> list["_Found"]:
        return [_Found(self._shown_at(f.end), f.rank, self._shown_at(f.start), f.stop) for f in found]

    def _shown_at(self, written_at: int) -> int:
        """A place in the text with special tokens -> the place in the text without."""
        return written_at - sum(min(length, written_at - at) for at, length in self._special if at < written_at)


class _Found(NamedTuple):
    """A stop in a text. The smallest is the one that counts."""

    end: int
    rank: int
    start: int
    stop: str


class _StopSearch:
    """Finds stops in a text that grows, looking at each character of it about once."""

    def __init__(self, texts: tuple[str, ...], patterns: tuple[regex.Pattern, ...]):
        self.has_stops = bool(texts or patterns)
        self.length = 0  # characters so far
        self._texts, self._patterns = texts, patterns
        self._tail = ""  # its end, which may be the beginning of a stop
        self._keep = max(map(len, texts), default=1) - 1

    def feed(self, piece: str, active: bool) -> list[_Found]:
        """The stops that end in the new piece, each where it does so first."""
        old, text, base = len(self._tail), self._tail + piece, self.length - len(self._tail)
        self.length += len(piece)
        self._tail = text if self._patterns else text[max(0, len(text) - self._keep) :]
        if not active or not piece:
            return []
        found = [
            _Found(base + at + len(stop), rank, base + at, stop)
            for rank, stop in enumerate(self._texts)
            if (at := text.find(stop, max(0, old - len(stop) + 1))) >= 0
        ]
        for pattern in () if found else self._patterns:
            match = next((m for m in self._matches(pattern, text) if m.end() > old), None)
            if match:
                return [_Found(base + match.end(), 0, base + match.start(), pattern.pattern)]
        return found

    @property
    def held(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        starts = [
            len(self._tail) - size
            for stop in self._texts
            if (size := next((n for n in range(len(stop) - 1, 0, -1) if self._tail.endswith(stop[:n])), 0))
        ]
        for pattern in self._patterns:
            try:
                starts += [m.start() for m in self._matches(pattern, self._tail, partial=True) if m.partial]
            except TimeoutError:  # nobody knows
                return len(self._tail)
        return len(self._tail) - min(starts, default=len(self._tail))

    @staticmethod
    def _matches(pattern: regex.Pattern, text: str, partial: bool = False) -> Iterator[regex.Match]:
        return pattern.finditer(text, partial=partial, timeout=PATTERN_SECONDS)


def compiled(pattern: str) -> regex.Pattern:
    """A stop_regex, ready to search with. Raises ValueError for what is none, or would end every answer at once."""
    try:
        ready = regex.compile(pattern)
    except (regex.error, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"stop_regex={pattern!r:.80} is no regular expression: {error}") from None
    if ready.search("", timeout=PATTERN_SECONDS):
        raise ValueError(f"stop_regex={pattern!r:.80} matches the empty text: no answer could begin")
    return ready
