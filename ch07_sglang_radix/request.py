"""A request, from the queue to its last token.

waiting -> (prefill, perhaps in chunks) -> running -> finished
   ^                                          |
   `---------------- retracted ---------------'   out of pages: outputs kept, K and V computed again later
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ch07_sglang_radix.tree_node import TreeNode
from common.sampling.batch import SamplingRow
from common.sampling.params import SamplingParams


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
    routing_key: str | None = None  # for the policy of that name

    # sampling, one token a step
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    stops: frozenset[int] = frozenset()  # tokens that end it
    stop_text: "StopText | None" = None  # strings that end it

    # admission: a row of req_to_token and a locked path in the tree
    row: int = -1
    last_node: TreeNode | None = None
    prefix_len: int = 0  # slots of the row that belong to the tree
    cache_inserted_len: int = 0  # tokens it has inserted into the tree itself
    cached_tokens: int | None = None  # prompt tokens found in the tree when it was first admitted

    # each step
    pending: int = 0  # tokens that are drawn, or being drawn, and not yet in output_ids
    wanted: int = 0  # tokens that nobody has begun to draw yet
    kv_len: int = 0  # tokens whose K and V are in the pool, or on their way there
    allocated_len: int = 0  # slots the row has, a multiple of the page size
    sent_len: int = 0  # slots of the row that every rank's page table knows

    # while it waits
    passed_over: int = 0  # prefill steps that took later requests and not this one

    def __post_init__(self):
        self._ids = np.zeros(self.max_len, dtype=np.int64)
        self._ids[: len(self.prompt_ids)] = self.prompt_ids

    @property
    def all_ids(self) -> np.ndarray:
        """Prompt and output [n]: what a prefill must cover, also after a retraction."""
        return self._ids[: len(self.prompt_ids) + len(self.output_ids)]

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def seq_len(self) -> int:
        """Tokens it has, those included whose values nobody has looked at yet."""
        return len(self.prompt_ids) + len(self.output_ids) + self.pending

    @property
    def max_len(self) -> int:
        """Tokens it will have at most."""
        return len(self.prompt_ids) + self.params.max_new_tokens

    def sampling_row(self) -> SamplingRow:
        """For the newest of its pending tokens."""
        return SamplingRow(self.params, self.seed, self.prompt_ids, self.output_ids, self.pending - 1)

    def take_token(self, token: int, logprob: float | None) -> None:
        """Append a sampled token and see whether it was the last."""
        self._ids[len(self.prompt_ids) + len(self.output_ids)] = token
        self.output_ids.append(token)
        if logprob is not None and self.params.logprobs:
            self.logprobs.append(logprob)
        if token in self.stops:
            self.finish_reason = {"type": "stop", "matched": token}
        elif self.stop_text and (matched := self.stop_text.found(self.output_ids)) is not None:
            self.finish_reason = {"type": "stop", "matched": matched}
        elif len(self.output_ids) >= self.params.max_new_tokens:
            self.finish_reason = {"type": "length", "length": self.params.max_new_tokens}


class StopText:
    """Strings that end an answer, wherever tokens cut them."""

    def __init__(self, strings: tuple[str, ...], decode: Callable[[Sequence[int]], str]):
        self.strings, self._decode = strings, decode
        # a token is at least a byte, a character at most four: so many tokens hold the longest of them, and one more
        self._window = 4 * max(map(len, strings)) + 1

    def found(self, output_ids: list[int]) -> str | None:
        """The string that the newest token has completed, if any."""
        text = self._decode(output_ids[-self._window :])
        return next((string for string in self.strings if string in text), None)

    def cut(self, text: str) -> str:
        """The answer without what ended it."""
        ends = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(ends)] if ends else text


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
    logprobs: list[float]

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.output_ids)
