"""Replicas under torchrun: every rank makes the same calls, each replica answers its share, all have all answers.

    torchrun, 4 ranks: Engine(dp_size=2, tp_size=2).generate(prompts) on each
        ranks 0, 1   replica 0   prompts 0, 2, 4, ...   one will, rank 0's
        ranks 2, 3   replica 1   prompts 1, 3, 5, ...   another one, rank 2's
    then ranks 0 and 2, and 1 and 3, tell each other what they have: JSON, once a call

Who gets which prompt is decided on every rank by a policy of its own, and nobody asks anybody: a policy is a function of the
questions, its seed and what was asked before (load_balancing.py), and all ranks are asked the same. So no message goes between
replicas while they compute; the slowest one is waited for at the end of the call.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ch07_sglang_radix.generate_request import GenerateCall, GenerateRequest
from ch07_sglang_radix.lora import one_voice
from ch07_sglang_radix.parallelism.load_balancing import LoadBalancer
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from common.distributed.messages import share_all
from common.parallel_state import ParallelState


class ReplicaRanks:
    """This rank's replica among those of its world."""

    def __init__(self, parallel: ParallelState, method: str):
        self.group, self.dp_rank = parallel.dp, parallel.place.dp
        self.balancer = LoadBalancer(method, range(parallel.layout.dp))

    @property
    def facts(self) -> dict[str, int]:
        return {"dp_size": self.group.size, "dp_rank": self.dp_rank}

    def refuse(self, what: str) -> None:
        raise ValueError(
            f"{what}: dp_size={self.group.size} under torchrun answers whole calls; start Engine(dp_size=...) without torchrun"
        )

    def place(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The replica of each prompt of a call, the same on every rank. Nothing of an earlier call runs any more."""
        ranks, sent = [], []
        for ids in prompts:
            ranks.append(self.balancer.choose(ids))
            sent.append(self.balancer.sent(ranks[-1], ids))
        for one in sent:
            self.balancer.finished(one)
        return ranks

    def share(self, mine: dict[int, RequestOutput]) -> dict[int, RequestOutput]:
        """{number in the call: output} of this replica -> of all replicas, in order, on every rank."""
        told = share_all([[number, output.to_json()] for number, output in mine.items()], self.group)
        outputs = {number: RequestOutput.from_json(value) for part in told for number, value in part}
        return dict(sorted(outputs.items()))

    def one_voice(self, said: dict[str, Any]) -> dict[str, Any]:
        """What this replica has said of a load or an unload of an adapter -> what all have, the same on every rank."""
        return one_voice(dict(enumerate(share_all(said, self.group))))

    def generate(
        self, scheduler: TPScheduler, call: GenerateCall, enqueue: Callable[[GenerateRequest], int], stream: bool
    ) -> Any:
        """What Engine.generate returns."""
        if stream:
            self.refuse("stream")
        ranks = self.place([request.ids for request in call.requests])
        rids = {i: enqueue(request) for i, request in enumerate(call.requests) if ranks[i] == self.dp_rank}
        outputs = scheduler.process_requests()
        everything = self.share({i: outputs[rid] for i, rid in rids.items()})
        answers = [call.result(output, i) for i, output in everything.items()]
        for answer, rank in zip(answers, ranks, strict=True):
            answer["meta_info"]["dp_rank"] = rank
        return answers[0] if call.single else answers
