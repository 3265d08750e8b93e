"""A request, from the queue to its last token.

waiting -> (prefill, perhaps in chunks) -> running -> finished
   ^                                          |
   `---------------- retracted ---------------'   out of pages: outputs kept, K and V computed again later
"""

from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.tree_node import TreeNode
from common.request.answer import Answer
from common.request.end import End
from common.sampling.batch import SamplingRow
from common.sampling.grammar import GrammarMask
from common.sampling.logprobs import TokenLogprobs
from common.sampling.params import SamplingParams
from common.text.answer import AnswerText
from common.vision.pictures import Pictures

# (HTTP's number, its name), which SGLang puts into finish_reason (managers/schedule_batch.py, FINISH_ABORT)
FAULTS = {"error": (500, "InternalServerError"), "refused": (400, "BadRequestError")}


@dataclass(eq=False)
class Req:
    """Grouped by who fills it."""

    # the user
    rid: int
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    extra_key: Hashable = None  # namespace in the tree
    priority: int = 0  # higher is sooner
    name: str | None = None  # the user's own
    routing_key: str | None = None  # for the policy of that name
    probe: bool = False  # it asks whether the engine lives: counted nowhere, cached nowhere
    session: str | None = None  # the streaming session whose turn it is, which gets its K and V at the end
    lora_id: str | None = None  # identity of its adapter (lora.py); None: the base model
    handoff: Handoff | None = (
        None  # its prompt's K and V go to another engine, or come from one; None once a wing has taken it
    )

    pictures: Pictures | None = None  # which tokens of the prompt are rows of pictures

    stops: frozenset[int] = frozenset()  # tokens that end it
    text: AnswerText | None = None  # what ends it as text; without it the answer has none
    held_back: frozenset[int] = frozenset()  # tokens that min_new_tokens forbids: all that could end an answer

    # sampling, one token a step
    output_ids: list[int] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    ended: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from params.logprob_start on, so far

    # admission: a row of req_to_token and a locked path in the tree
    row: int = -1
    last_node: TreeNode | None = None
    prefix_len: int = 0  # slots of the row that belong to the tree
    cache_inserted_len: int = 0  # tokens it has inserted into the tree itself
    committed_len: int = 0  # tokens that its session had kept: back to there if it is aborted
    cached_tokens: int | None = None  # prompt tokens found in the tree, or kept, when it was first admitted
    cached_below: dict[str, int] = field(default_factory=dict)  # how many of them came back from which lower tier

    grammar: GrammarMask | None = None  # once it is compiled (grammar_manager.py); a retraction leaves it as it is

    # each step
    pending: int = 0  # tokens that are drawn, or being drawn, and not yet in output_ids
    wanted: int = 0  # tokens that nobody has begun to draw yet
    kv_len: int = 0  # tokens whose K and V are in the pool, or on their way there
    allocated_len: int = 0  # slots the row has, a multiple of the page size
    sent_len: int = 0  # slots of the row that every rank's page table knows
    lane: int = 0  # the micro-batch it runs in (scheduler_state.py)
    data_rank: int = 0  # who has its pages, where attention is data-parallel
    verify_ct: int = 0  # verify steps that it took part in
    correct_drafts: int = 0  # guesses that came out of them
    proposed_drafts: int = 0  # and that were verified

    # while it waits
    passed_over: int = 0  # prefill steps that took later requests and not this one

    def __post_init__(self):
        self.answer = Answer(self.params, self.stops, self.text or AnswerText(None), self.output_ids)
        self._ids = np.zeros(self.max_len, dtype=np.int64)
        self._num_ids = len(self.prompt_ids)  # so many of them stand there
        self._ids[: self._num_ids] = self.pictures.named(self.prompt_ids) if self.pictures else self.prompt_ids

    @property
    def all_ids(self) -> np.ndarray:
        """Prompt and output [n]: what a prefill must cover, also after a retraction. Rows of pictures have numbers of their own
        here (common/vision/keys.py), which the tree and the ranks read; in prompt_ids they are placeholders."""
        length = len(self.prompt_ids) + len(self.output_ids)
        if self._num_ids < length:  # written when somebody reads, and not token by token
            self._ids[self._num_ids : length] = self.output_ids[self._num_ids - length :]
            self._num_ids = length
        return self._ids[:length]

    @property
    def matchable_ids(self) -> np.ndarray:
        """What the cache may give it: never the last token, which must be computed to have logits from."""
        ids = self.all_ids
        asks = self.first_scored < len(self.prompt_ids) - 1
        return ids[: self.first_scored] if asks else ids[:-1]

    @property
    def seq_len(self) -> int:
        """Tokens it has, those included whose values nobody has looked at yet."""
        return len(self.prompt_ids) + len(self.output_ids) + self.pending

    @property
    def max_len(self) -> int:
        """Tokens it will have at most."""
        return len(self.prompt_ids) + self.params.max_new_tokens

    @property
    def needs_last_token(self) -> bool:
        """Must its every token be known before the next one is drawn?"""
        return self.grammar is not None or self.params.needs_last_token

    def sampling_row(self, ahead: int = -1) -> SamplingRow:
        """For the newest of its pending tokens; ahead = 0: for the one behind these."""
        edits = (self.grammar,) if self.grammar else ()
        return SamplingRow(
            self.params, self.seed, self.prompt_ids, self.output_ids, self.pending + ahead, self.held_back, edits
        )

    def count_cached(self, tier: str, tokens: int) -> None:
        """So many of its prompt tokens come back from a lower tier. Not again after a retraction, as with cached_tokens."""
        if self.cached_tokens is None:
            self.cached_below[tier] = self.cached_below.get(tier, 0) + tokens

    @property
    def cached_tokens_details(self) -> dict[str, int] | None:
        """Where the cached tokens were found, in SGLang's words; None if there is one tier only."""
        if not self.cached_below:
            return None
        below = {"host": self.cached_below.get("host", 0), "storage": self.cached_below.get("storage", 0)}
        return {"device": max((self.cached_tokens or 0) - sum(below.values()), 0)} | below

    @property
    def drafts(self) -> dict[str, int] | None:
        """What became of guesses, in SGLang's words; None if none was verified."""
        if not self.verify_ct:
            return None
        return {
            "spec_verify_ct": self.verify_ct, "spec_num_correct_drafts": self.correct_drafts,
            "spec_num_proposed_drafts": self.proposed_drafts,
        }  # fmt: skip

    @property
    def first_scored(self) -> int:
        """The first prompt token whose next one's log-probability is still to be told: from here on the cache is no help."""
        if self.params.prompt_logprobs is None:
            return len(self.prompt_ids) - 1
        return min(max(self.params.logprob_start - 1, 0) + len(self.prompt_logprobs), len(self.prompt_ids) - 1)

    def take_token(self, token: int, told: TokenLogprobs | None = None) -> None:
        """Append a sampled token and see whether it was the last."""
        self.answer.take(token, told)
        if self.answer.end:
            self.finish(self.answer.end)

    def finish(self, end: End) -> None:
        """It has come to its end, in SGLang's words."""
        self.answer.end, self.ended = end, True
        if end.kind == "stop":
            self.finish_reason = {"type": "stop", "matched": end.matched}
        elif end.kind == "length":
            self.finish_reason = {"type": "length", "length": self.params.max_new_tokens}
        elif end.kind == "abort":
            self.finish_reason = {"type": "abort"}
        else:
            status, name = FAULTS[end.kind]
            self.finish_reason = {
                "type": "abort", "message": end.message, "status_code": status, "err_type": name,
            }  # fmt: skip


@dataclass(frozen=True)
class RequestOutput:
    """What became of a request; the same on every rank. `text` leaves special tokens out, `output_ids` keeps them."""

    request_id: int
    prompt: str | None  # None if it came as token ids
    prompt_ids: list[int]
    text: str
    output_ids: list[int]
    cached_tokens: int
    finish_reason: dict[str, Any] | None  # None while it runs
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    drafts: dict[str, int] | None = None  # Req.drafts
    weight_version: str = "default"  # of the weights that gave its newest token
    cached_tokens_details: dict[str, int] | None = None  # Req.cached_tokens_details

    def to_json(self) -> dict[str, Any]:
        told = {name: [asdict(one) for one in getattr(self, name)] for name in ("logprobs", "prompt_logprobs")}
        return vars(self) | told

    @staticmethod
    def from_json(value: dict[str, Any]) -> "RequestOutput":
        told = {name: [_told(one) for one in value[name]] for name in ("logprobs", "prompt_logprobs")}
        return RequestOutput(**value | told)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.output_ids)


def _told(one: dict[str, Any]) -> TokenLogprobs:
    """Behind a trip through JSON: its tuples are lists."""
    pairs = {name: tuple(tuple(pair) for pair in one[name]) for name in ("top", "wanted")}
    return TokenLogprobs(**one | pairs)
