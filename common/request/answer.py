"""One answer while it grows: its tokens, what is told about them, its text, and how it comes to its end.

Both engines take tokens the same way and differ in the words for the end: vLLM has a status and a stop_reason, SGLang a
finish_reason object. `End` (end.py) is what they translate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.request.end import End, text_shown
from common.sampling.logprobs import TokenLogprobs
from common.sampling.params import SamplingParams
from common.text.answer import AnswerText


@dataclass(eq=False)
class Answer:
    """stops: tokens that end it."""

    params: SamplingParams
    stops: frozenset[int]
    text: AnswerText
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    end: End | None = None

    def __post_init__(self):
        self._watches, self._most = self.text.watches, self.params.max_new_tokens  # asked after every token

    def take(self, token: int, told: TokenLogprobs | None) -> None:
        """Append a sampled token and see whether it was the last."""
        self.output_ids.append(token)
        if told is not None:
            self.logprobs.append(told)
        if token in self.stops:
            self.end = End("stop", token)
        elif self._watches and self._finds_a_stop():
            pass
        elif len(self.output_ids) >= self._most:
            self.end = End("length")

    def goes_on_with(self, tokens: Sequence[int]) -> bool:
        """Append several tokens none of which can be the last; False, and nothing is done, if they must be looked at one by one."""
        if self._watches or self.params.logprobs or len(self.output_ids) + len(tokens) >= self._most:
            return False
        if min(tokens) < 0 or not self.stops.isdisjoint(tokens):
            return False
        self.output_ids += tokens
        return True

    def _finds_a_stop(self) -> bool:
        try:
            matched = self.text.catch_up(self.output_ids)
        except ValueError as error:  # a stop pattern that takes too long: this answer alone ends
            self.end = End("error", message=str(error))
            return True
        if matched is not None:
            self.end = End("stop", matched)
        return self.end is not None

    def shown(self) -> str:
        """The text that is certain; all of it once the answer has ended."""
        return text_shown(self.text, self.output_ids, self.end)
