"""A step before it is one: what one data rank's requests want done, decided but not yet told to any rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.tasks import DecodeTask, PrefillTask, VerifyTask
from common.sampling.batch import SamplingBatch


@dataclass(frozen=True)
class StepPlan:
    task: PrefillTask | DecodeTask | VerifyTask
    reqs: Sequence[Req]  # all that take part, in the task's order
    emitting: Sequence[Req]  # those that get tokens out of it, in the order of the rows of its logits
    counted: int  # tokens that come out of it for those that are no probes; a verify step counts them when it knows
    needs_last_token: bool  # one that emits must know its last token before the next is drawn
    launched: Callable[[], None]  # moves every length on, as if it were done: the next step is made from these
    sampling: Callable[[], SamplingBatch]  # how to draw the tokens; asked when the logits are there
