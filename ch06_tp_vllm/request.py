"""A request, from the queue to its last token, with vLLM's names.

WAITING -> RUNNING -> FINISHED_*
    ^         |
    `- PREEMPTED: out of blocks; all its tokens are kept and computed again
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from common.sampling.batch import SamplingRow
from common.sampling.params import SamplingParams as RowParams
from common.text.tokenizer import IncrementalDetokenizer


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH_CAPPED = "length"
    FINISHED_ABORTED = "abort"

    def __init__(self, reason: str):
        self.finished = reason in ("stop", "length", "abort")  # asked of every request in every step


@dataclass(eq=False)
class Request:
    """Grouped by who fills it."""

    # the user
    group: str  # the user's request id
    index: int  # which of its n answers
    prompt_token_ids: list[int]
    params: RowParams
    seed: int
    priority: int = 0  # lower goes first, under the priority policy
    arrival: int = 0  # the n-th request
    extra_key: str | None = None  # keeps its blocks apart from those of other keys

    # sampling
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    stop_reason: int | str | None = None  # which of the user's stop tokens or texts ended it
    stops: frozenset[int] = frozenset()

    # the engine, when somebody looks, or after each token if a text may end it
    stop: tuple[str, ...] = ()
    text: str = ""
    detokenizer: IncrementalDetokenizer | None = None
    num_decoded: int = 0  # tokens of the answer that the detokenizer has seen
    told_logprobs: list[dict[int, Any]] = field(default_factory=list)  # `logprobs`, as the user sees them
    text_is_whole: bool = False  # nothing comes any more

    # the scheduler, each step
    row: int = -1  # of every rank's sequence table
    num_computed_tokens: int = 0  # K and V in the cache, or on their way there
    num_cached_tokens: int | None = None  # found in the prefix cache when it was first scheduled
    pending: int = 0  # tokens that are drawn, or being drawn, and not yet in output_token_ids
    drawn_here: bool = False  # its last token was drawn since it has this row: every rank's table knows it
    num_preemptions: int = 0

    # the block manager
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as anyone asked
    num_blocks_named: int = 0  # of its table, that others may find by their hash
    num_blocks_sent: int = 0  # that every rank's table knows

    @property
    def request_id(self) -> str:
        return f"{self.group}/{self.index}"

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    @property
    def num_tokens(self) -> int:
        """Those included whose values nobody has looked at yet."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.pending

    @property
    def max_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.params.max_new_tokens

    def sampling_row(self) -> SamplingRow:
        """For the newest of its pending tokens."""
        return SamplingRow(self.params, self.seed, self.prompt_token_ids, self.output_token_ids, self.pending - 1)

    def append(self, token: int, logprob: float | None) -> None:
        """Take a sampled token and see whether it was the last."""
        self.output_token_ids.append(token)
        if logprob is not None and self.params.logprobs:
            self.logprobs.append(logprob)
        if token in self.stops:
            self.status = RequestStatus.FINISHED_STOPPED
            self.stop_reason = token if token in self.params.stop_token_ids else None
        elif len(self.output_token_ids) >= self.params.max_new_tokens:
            self.status = RequestStatus.FINISHED_LENGTH_CAPPED

    def read(self, text: str) -> None:
        """Take the text of the newest tokens; a stop text ends the request, and the text before it."""
        start, self.text = len(self.text), self.text + text
        found = [(at, stop) for stop in self.stop if (at := self.text.find(stop, max(0, start - len(stop) + 1))) >= 0]
        if found:
            at, self.stop_reason = min(found)
            self.text, self.status = self.text[:at], RequestStatus.FINISHED_STOPPED
        self.text_is_whole = self.status.finished

    @property
    def shown(self) -> str:
        """The text that is certain: its end may be the beginning of a stop text."""
        hidden = 0 if self.status.finished else max(map(len, self.stop), default=1) - 1
        return self.text[: max(0, len(self.text) - hidden)]
