"""A step on its way: all ranks have been told to do it, and nobody has looked at its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from common.sampling.logprobs import TokenLogprobs
from common.sampling.sampler import Drawn


class Drawing(Protocol):
    """A request that waits for a token."""

    pending: int  # tokens that are drawn, or being drawn, and that nobody has looked at

    @property
    def ended(self) -> bool: ...


R = TypeVar("R", bound=Drawing)


@dataclass(frozen=True)
class QueuedStep(Generic[R]):
    """Who gets a token out of it, in the order of the rows that emit, and the tokens; None if nobody does."""

    requests: Sequence[R] = ()
    drawn: Drawn | None = None

    def take(self) -> list[tuple[R, int, TokenLogprobs | None]]:
        """(request, token, its log-probabilities if asked for) of those who have not ended meanwhile. Waits for the device.

        A negative token is none: common.sampling.sampler.problem says why its row has no next one.

        A step that was queued before the last one's tokens were seen draws for requests that had come to their end: those
        tokens are thrown away here.
        """
        if self.drawn is None:
            return []
        taken = self.drawn.take()
        for request in self.requests:
            request.pending -= 1
        return [one for one in zip(self.requests, taken.tokens, taken.logprobs, strict=True) if not one[0].ended]
