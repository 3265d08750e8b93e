"""Answers on their way: what has come of each so far, and who is to be woken when more comes.

The wire carries what is new; SGLang's /generate shows what there is (cumulative). So each answer is added up here, and
whoever is slow to look finds the newest state, not a queue of old ones.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ch07_sglang_radix.generate_request import GenerateCall
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.serving.messages import BatchStr
from ch07_sglang_radix.serving.sessions import Node
from common.sampling.logprobs import TokenLogprobs
from common.text.reasoning import ThoughtTokens, opens_thought

LOOK_FOR_THE_CLIENT_S = 0.5
END_OF_PROMPT = 16  # tokens, in which an opening <think> lies whole
Pairs = tuple[tuple[int, float], ...]
read_logprobs = msgspec.msgpack.Decoder(list[tuple[int, float | None, int, Pairs, Pairs]]).decode


class News:
    """What one caller waits for: which of its answers have grown."""

    def __init__(self):
        self._grown: dict[int, None] = {}  # in order, each once
        self._event = asyncio.Event()
        self._look_at = time.monotonic() + LOOK_FOR_THE_CLIENT_S

    def put(self, index: int) -> None:
        self._grown[index] = None
        self._event.set()

    async def take(self, is_disconnected: Callable[[], Awaitable[bool]] | None) -> list[int]:
        """Waits until there is some; [] if the client has gone."""
        if is_disconnected is None:
            await self._event.wait()
        while not self._event.is_set() or (is_disconnected and time.monotonic() > self._look_at):
            if time.monotonic() > self._look_at:
                if await is_disconnected():
                    return []
                self._look_at = time.monotonic() + LOOK_FOR_THE_CLIENT_S
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._event.wait(), LOOK_FOR_THE_CLIENT_S)
        grown, self._grown = list(self._grown), {}
        self._event.clear()
        return grown


@dataclass(eq=False)
class InFlight:
    """One answer. ticket: what messages call it; rid: what its user does. index: which of its call's."""

    ticket: int
    rid: str
    index: int
    call: GenerateCall
    news: News
    streams: bool
    started: float  # time.monotonic()
    parser: str | None = None  # of --reasoning-parser
    begun: bool = False  # something has come: it no longer waits in the queue
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    cached_details: dict[str, int] | None = None  # in which tier they were, if there are several
    drafts: dict[str, int] | None = None
    dp_rank: int | None = None  # of the replica that answers, if there are several
    weight_version: str = "default"  # of the weights that gave the newest token
    finish_reason: dict[str, Any] | None = None
    node: Node | None = None  # its place in a session
    thought: ThoughtTokens | None = field(init=False, default=None)  # with a parser

    def __post_init__(self):
        if self.parser is not None:  # whether the prompt opens the thought is seen from its tokens, whoever rendered it
            end = self.call.requests[self.index].ids[-END_OF_PROMPT:]
            self.thought = ThoughtTokens(opens_thought(self.call.tokenizer.decode(end, False), self.parser))

    def take(self, batch: BatchStr, i: int) -> None:
        """Row i of a message is about this one."""
        self.begun, self.dp_rank, self.weight_version = True, batch.dp_rank, batch.weight_version
        self.text += batch.new_text[i]
        self.output_ids += batch.new_ids[i]
        if self.thought:
            self.thought.take(map(self.call.tokenizer.token_bytes, batch.new_ids[i]))
        self.cached_tokens = batch.cached_tokens[i]
        self.cached_details = batch.cached_details[i] if batch.cached_details else None
        self.drafts = batch.drafts[i] if batch.drafts else None
        if self.call.logprobs.wanted:
            self.logprobs += _told(batch.logprobs[i])
            self.prompt_logprobs += _told(batch.prompt_logprobs[i])
        self.end(batch.finished[i])

    def end(self, finish_reason: dict[str, Any] | None) -> None:
        """finish_reason None: not yet. Wakes the caller if it is to hear of it."""
        self.finish_reason = finish_reason
        if finish_reason is not None or self.streams:
            self.news.put(self.index)

    def answer(self) -> dict[str, Any]:
        """As Engine.generate would tell it, with the index."""
        request = self.call.requests[self.index]
        output = RequestOutput(
            self.rid, None, request.ids, self.text, list(self.output_ids), self.cached_tokens, self.finish_reason,
            self.logprobs, self.prompt_logprobs, self.drafts, self.weight_version, self.cached_details,
        )  # fmt: skip
        answer = self.call.result(output, self.index) | {"index": self.index}
        if self.dp_rank is not None:
            answer["meta_info"]["dp_rank"] = self.dp_rank
        if self.thought:
            answer["meta_info"]["reasoning_tokens"] = self.thought.count
        return answer


def _told(raw: msgspec.Raw) -> Sequence[TokenLogprobs]:
    return [TokenLogprobs(*one) for one in read_logprobs(raw)]
