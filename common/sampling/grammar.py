"""Grammars: no token may be drawn after which the answer could not become valid any more.

A model that is asked for JSON mostly writes JSON. A grammar (a JSON schema, a regular expression, a Lark or GBNF grammar)
makes it certain, whatever the model and the temperature, and needs no training: before each draw the logits of all tokens
that cannot be continued to a valid text become -inf. What is left keeps its order and its ratios.

    grammar   {"ok":true} or {"ok":false}
    so far    {"ok":         allowed: t, tr, true, true}, f, fa ...   a token may end inside a word, or reach beyond it
                             not: trunk, " true", }, <|im_end|>
    so far    {"ok":tr       allowed: ue}, if there is such a token. Where one text alone can follow, llguidance leaves the one
                             token with which the tokenizer itself goes on, so that the model reads what it is used to
    so far    {"ok":true}    allowed: <|im_end|>, and nothing else

Three things are easy to get wrong:
- The end token is a token like any other. Allowed too early, half an object comes out; never, and the answer must go on
  where nothing may follow. So it is allowed exactly where the grammar accepts, whatever ignore_eos says.
- The mask for token n + 1 needs token n: a step may be queued ahead, its draw may not (`needs_last_token`).
- A mask without a single bit is an answer that cannot go on: its request ends with an error, and nobody else's.

A bitmask row has a bit for each token of the vocabulary, bit i of word w for token 32 w + i: 19 KB for 151,936 tokens, where
a row of float32 logits has 594 KB. The CPU fills it, since a parser is what computes it; it crosses to the device of the
logits as bits and is unpacked there.

The parser is llguidance's (1.9.1, github.com/guidance-ai/llguidance, docs/): Earley's algorithm over derivatives of regular
expressions, run along a trie of all tokens. SGLang 0.5.23 has it as one of its backends
(constrained/llguidance_backend.py), vLLM too (v1/structured_output/backend_guidance.py).
"""

import json
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from copy import copy
from functools import cache
from typing import Any, ClassVar

import llguidance.numpy
import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from common.bounded.process import BoundedProcess, OutOfTime
from common.distributed.transfer import upload
from common.sampling.edits import Member
from common.sampling.grammar_process import make_tokens, new_matcher, one_line
from common.values import several, shown, text

KINDS = ("json_schema", "regex", "ebnf")  # SGLang's names; ebnf is Lark's form or GBNF
MAX_BYTES = 1 << 16  # of a grammar; compiling takes time and memory in proportion at least
CACHED = 128  # grammars that stay compiled
SECONDS = 30.0  # for a grammar, with its time in line
QUICK_SECONDS = 0.5  # of them to try it out at first; most take some milliseconds
TRIAL_SECONDS = 5.0  # and once more, when nobody else is in line
TRIAL_BYTES = 1 << 30  # of memory; with 151,936 tokens it begins with a fifth of that
STACK_BYTES = 1 << 28  # of a thread that compiles: more than the process had that tried it out, whatever the system
THINK_END = b"</think>"  # closes a thought: Qwen3, DeepSeek-R1 and most others


def check_grammar(grammar: Any) -> tuple[str, str] | None:
    """(kind, text), or None for none. ValueError, in one line, for what can be seen to be wrong without compiling it."""
    if grammar is None:
        return None
    what = f"a kind ({', '.join(KINDS)}) and its text"
    pair = several("grammar", grammar, what)
    if len(pair) != 2 or not isinstance(pair[0], str) or pair[0] not in KINDS:
        raise ValueError(f"grammar={shown(grammar)} must be {what}")
    kind, written = str(pair[0]), text(str(pair[0]), pair[1], empty=False)
    size = len(written.encode())
    if size > MAX_BYTES:
        raise ValueError(f"{kind} has {size:,} bytes, and may have {MAX_BYTES:,}")
    if kind == "json_schema":
        _check_json(written)
    return kind, written


def _check_json(written: str) -> None:
    try:
        schema = json.loads(written)
    except RecursionError:
        raise ValueError("json_schema is nested too deeply for any parser") from None
    except ValueError as error:
        raise ValueError(f"json_schema={shown(written)} is no JSON: {one_line(str(error))}") from None
    if not isinstance(schema, dict):
        raise ValueError(f'json_schema={shown(written)} must be a JSON object, such as {{"type": "object"}}')


class Trial(BoundedProcess):
    """Where a grammar is compiled first: some take for ever, or all memory, or end the process (multipleOf: 123456789 does the
    first two, a chain of 6,000 Lark rules the third). One that is no such thing is then compiled in the engine, too.
    """

    def __init__(self, tokens: dict[str, Any]):
        super().__init__("common.sampling.grammar_process", "compiling it", "tries it out")
        self.tokens = tokens

    def grammar(self, kind: str, written: str, seconds: float) -> str:
        """In the form that a matcher takes. Raises ValueError, in one line; OutOfTime after so many seconds."""
        line = json.dumps({"kind": kind, "written": written}).encode() + b"\n"
        return self._answer(line, seconds, TRIAL_BYTES)["grammar"]

    def _first_lines(self) -> list[bytes]:
        return [json.dumps(self.tokens).encode() + b"\n"]


class GrammarCompiler:
    """Grammar texts -> matchers, made in a thread and kept. One for an engine: the tokens' trie is made once, with the first.

    They are compiled one after the other: 20 new schemas at once, of 3 to 40 fields, are all there after 0.04 to 0.16 s with the
    bundled model, 2 to 8 ms each (2 cores that others used as well, 2026-11-26), so a second process with a trie of its own
    would gain little. The first grammar of all waits 0.4 s for the process. One that takes longer than QUICK_SECONDS goes to the
    end of a second line, which is served with TRIAL_SECONDS when the first is empty: a hostile one holds those who came behind
    it up for QUICK_SECONDS and a new process, and who comes while it is tried again for TRIAL_SECONDS at most.
    tokenizer: a fast one of Hugging Face. vocab_size V: width of the logits; ids beyond the tokenizer's have no text and are
    never allowed. end_ids: tokens that end an answer; without any the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]):
        self._hf, self._vocab_size = tokenizer, vocab_size
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_ids = tuple(i for i in end_ids or own if i < vocab_size)
        self._trial: Trial | None = None
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], Future[LLMatcher]] = (
            OrderedDict()
        )  # the one asked for last at the end
        self._new: deque[tuple[str, str, Future[LLMatcher]]] = deque()
        self._slow: deque[tuple[str, str, Future[LLMatcher]]] = deque()  # QUICK_SECONDS were not enough
        self._working, self._lock = False, threading.Lock()

    def start(self, kind: str, written: str) -> "Future[LLMatcher]":
        """Compile it, unless that was done before. The future brings a matcher to copy, or a ValueError in one line."""
        key = (kind, written)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = Future()
                self._new.append((*key, self._compiled[key]))
                if not self._working:
                    self._working = True
                    _start_thread(self._work)
            self._compiled.move_to_end(key)
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)  # who waits for it has it
            return self._compiled[key]

    def compiled(self, kind: str, written: str) -> LLMatcher:
        """`start`, for who waits here until it is done."""
        try:
            return self.start(kind, written).result(SECONDS)
        except NotInTime:
            raise ValueError(too_slow(kind)) from None

    def mask(self, matcher: LLMatcher, after_thinking: bool) -> "GrammarMask":
        """A request's own: of n answers with one grammar each is somewhere else in it."""
        return GrammarMask(matcher.deep_copy(), self._tokens, THINK_END if after_thinking else b"")

    def _work(self) -> None:
        """The thread's life: one grammar after the other, as long as there are some."""
        while True:
            with self._lock:
                line = self._new or self._slow
                if not line:
                    self._working = False
                    return
                kind, written, future = job = line.popleft()
                quick = line is self._new
            try:
                future.set_result(self._compile(kind, written, QUICK_SECONDS if quick else TRIAL_SECONDS))
            except OutOfTime as error:
                if quick:
                    self._slow.append(job)
                else:
                    future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)

    def _compile(self, kind: str, written: str, seconds: float) -> LLMatcher:
        if self._trial is None:
            self._trial = Trial(self._tokens_as_json())
        grammar = self._trial.grammar(kind, written, seconds)
        if self._tokens is None:  # not before the trial has shown that it can be made
            self._tokens = make_tokens(**self._trial.tokens)
        matcher = new_matcher(self._tokens, grammar)
        if matcher.is_error():  # it had none a moment ago, in the other process
            raise ValueError(f"{kind} cannot be compiled: {one_line(matcher.get_error())}")
        return matcher

    def _tokens_as_json(self) -> dict[str, Any]:
        """make_tokens' arguments. Raises ValueError if this model's answers cannot follow a grammar."""
        if not self.end_ids:
            raise ValueError("this model has no end token, so no answer under a grammar could come to its end")
        if not getattr(self._hf, "is_fast", False):
            raise ValueError(
                "this checkpoint's tokenizer cannot follow a grammar: it is not of Hugging Face's Rust library"
            )
        backend = copy(self._hf.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return {"tokenizer": backend.to_str(), "vocab_size": self._vocab_size, "end_ids": list(self.end_ids)}


def too_slow(kind: str) -> str:
    return f"{kind} is not compiled after {SECONDS:g} s; make it simpler"


def _start_thread(call: Callable[[], None]) -> None:
    """With a large stack; nobody waits for it when the program ends."""
    before = threading.stack_size(STACK_BYTES)
    try:
        threading.Thread(target=call, name="grammar", daemon=True).start()
    finally:
        threading.stack_size(before)


class GrammarMask:
    """The grammar of one request, and how far its answer has come in it: an edit of its logits (edits.py).

    It lives as long as the request. A retraction takes nothing from it: the output tokens that it has read stay as well.

    after: where the answer begins with a thought, the text that closes it; the grammar holds from the next token on.
    error: why no token may follow any more. A matcher that has once refused a token, or become too complex, stays so.
    """

    needs_last_token: ClassVar[bool] = True

    def __init__(self, matcher: LLMatcher, tokens: LLTokenizer, after: bytes = b""):
        self.matcher, self.error = matcher, ""
        self.holds = not after  # whether the grammar says what comes next
        self._tokens, self._after, self._thought = tokens, after, b""
        self._num_read = 0

    def branch(self, output_ids: Sequence[int]) -> "GrammarMask":
        """Another one, which has read these as this one now has, and goes its own way: of a node in a tree of guesses."""
        self.read(output_ids)  # here, or every branch of every step would read the answer from its beginning
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    @classmethod
    def together(cls, members: Sequence[Member]) -> "_GrammarMasks":
        return _GrammarMasks(members)

    def read(self, output_ids: Sequence[int]) -> None:
        """Move on by what is new in the output tokens (all of them are given)."""
        new = output_ids[self._num_read :]
        self._num_read += len(new)
        for token in new:
            if self.holds:
                self.matcher.consume_token(token)
            else:
                self._thought = self._thought[-len(self._after) :] + self._tokens.decode_bytes([token])
                self.holds = self._after in self._thought

    @staticmethod
    def fill(masks: Sequence["GrammarMask"], vocab_size: int) -> np.ndarray:
        """What may follow each, as a bitmask [n, V / 32] int32. All zero for one with an `error`."""
        bits = np.full((len(masks), -(-vocab_size // 32)), -1, dtype=np.int32)
        holding = [(mask.matcher, i) for i, mask in enumerate(masks) if mask.holds]
        if holding:
            llguidance.numpy.fill_next_token_bitmask_par(_executor(), holding, bits)
        for mask, row in zip(masks, bits, strict=True):
            if mask.matcher.is_error():  # llguidance then allows the end token, as if the answer were complete
                row[:] = 0
                mask.error = f"the grammar of this request has come to a dead end: {one_line(mask.matcher.get_error())}"
        return bits


class _GrammarMasks:
    def __init__(self, members: Sequence[Member]):
        self._members = members

    def apply(self, logits: torch.Tensor, advanced: int) -> None:
        for _, mask, history in self._members:
            mask.read(history.output_ids)
        held = [(row, mask) for row, mask, _ in self._members if mask.holds]
        if held:
            rows, masks = zip(*held, strict=True)
            forbid_unset(logits, rows, GrammarMask.fill(masks, logits.shape[1]))


def forbid_unset(logits: torch.Tensor, rows: Sequence[int], bits: np.ndarray) -> None:
    """-inf where a bit is 0, in place. logits [B, V]; rows: n of the B; bits [n, V / 32] int32, on the CPU.

    The bytes of a word are in the order of its tokens on every machine that torch runs on (the least significant one first),
    so a byte is unpacked like a word: bit i of byte b is token 8 b + i. The last ones may reach beyond the vocabulary.
    """
    size, packed = logits.shape[1], bits.view(np.uint8)  # [n, V / 8]
    if logits.device.type == "cpu":  # row by row: with 151,936 tokens ten times as fast as all rows at once
        here, unset = logits.numpy(), np.unpackbits(~packed, axis=1, count=size, bitorder="little").view(bool)
        for row, forbidden in zip(rows, unset, strict=True):
            here[row][forbidden] = -np.inf
        return
    there = upload(packed, logits.device).unsqueeze(-1)  # [n, V / 8, 1]; nothing here waits for the GPU
    unset = there >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1 == 0  # [n, V / 8, 8]
    where = upload(np.array(rows, dtype=np.int64), logits.device)
    logits[where] = logits[where].masked_fill(unset.flatten(1)[:, :size], -torch.inf)


@cache
def _executor() -> LLExecutor:
    """Threads that fill the rows of a step side by side. A row takes 16 us of a string in JSON and up to 200 us where a new part
    of the grammar begins, with 151,936 made-up words as tokens on a CPU of 2026-11: of 256 requests in turn, too long.
    """
    return LLExecutor()
