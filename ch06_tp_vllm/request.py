"""A request, from the queue to its last token, with vLLM's names.

WAITING -> RUNNING -> FINISHED_*
    ^         |
    `- PREEMPTED: out of blocks; all its tokens are kept and computed again
"""

from dataclasses import dataclass, field
from enum import Enum

from common.request.answer import Answer
from common.request.end import End
from common.sampling.batch import SamplingRow
from common.sampling.grammar import GrammarMask
from common.sampling.logprobs import TokenLogprobs
from common.sampling.params import SamplingParams as RowParams
from common.text.answer import AnswerText


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH_CAPPED = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_ERROR = "error"

    def __init__(self, reason: str):
        self.finished = reason in ("stop", "length", "abort", "error")  # asked of every request in every step


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
    adapter: int = 0  # lora_int_id of its adapter, 0 for none
    stops: frozenset[int] = frozenset()
    text: AnswerText | None = None
    held_back: frozenset[int] = frozenset()  # tokens that min_tokens forbids: all that could end an answer
    grammar: GrammarMask | None = None  # what its text must be; a preemption leaves it as it is

    # sampling
    status: RequestStatus = RequestStatus.WAITING
    stop_reason: int | str | None = None  # which of the user's stop tokens or texts ended it
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt tokens but the first, so far

    # the scheduler, each step
    row: int = -1  # of every rank's sequence table
    num_computed_tokens: int = 0  # whose K and V are in the cache, or on their way there
    pending: int = 0  # tokens that are drawn, or being drawn, and not yet in output_token_ids
    drawn_here: bool = False  # the ranks have drawn a token of it since it was admitted, and know it
    num_cached_tokens: int | None = None  # found in the prefix cache when it was first admitted
    num_preemptions: int = 0

    # the block manager
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as somebody needed them
    num_blocks_named: int = 0  # of its table, that others may find by their hash
    num_blocks_sent: int = 0  # that every rank's table knows

    def __post_init__(self):
        self.answer = Answer(self.params, self.stops, self.text or AnswerText(None))
        self.output_token_ids = self.answer.output_ids  # the same list, under vLLM's name

    @property
    def request_id(self) -> str:
        return f"{self.group}/{self.index}"

    @property
    def ended(self) -> bool:
        return self.status.finished

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
        return SamplingRow(
            self.params,
            self.seed,
            self.prompt_token_ids,
            self.output_token_ids,
            self.pending - 1,
            self.held_back,
            (self.grammar,) if self.grammar else (),
        )

    def append(self, token: int, told: TokenLogprobs | None = None) -> None:
        """Take a sampled token and see whether it was the last."""
        self.answer.take(token, told)
        if self.answer.end:
            self.finish(self.answer.end)

    def finish(self, end: End) -> None:
        """It has come to its end. vLLM gives no stop_reason for the model's own end."""
        self.answer.end, self.status, self.error = end, RequestStatus(end.kind), end.message
        own = isinstance(end.matched, str) or end.matched in self.params.stop_token_ids
        self.stop_reason = end.matched if own else None
