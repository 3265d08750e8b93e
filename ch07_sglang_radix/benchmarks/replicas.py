"""Several replicas in one process, each a whole scheduler with a tree and a pool of its own, behind one policy.

    outcome = serve(replicas, programs, LoadBalancer("cache_aware", range(4)))

They step in turn, a step each a round, as if each had a machine of its own: what is counted (who got what, what was found in whose
tree, how much each computed) is that of real engines, and time is not measured here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ch07_sglang_radix.benchmarks.workloads import Program
from ch07_sglang_radix.parallelism.load_balancing import LoadBalancer
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams


@dataclass
class Answered:
    """A request: which program's, where it ran, and what of its prompt lay there."""

    program: int
    replica: int
    prompt_tokens: int
    cached_tokens: int
    output_ids: list[int]


@dataclass
class Outcome:
    """answered: in the order of their ends. rounds: until the last one."""

    replicas: int
    rounds: int = 0
    answered: list[Answered] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        return sum(one.cached_tokens for one in self.answered) / sum(one.prompt_tokens for one in self.answered)

    @property
    def computed(self) -> list[int]:
        """Tokens that each replica computed: prompts but for what was found, and answers."""
        counts = [0] * self.replicas
        for one in self.answered:
            counts[one.replica] += one.prompt_tokens - one.cached_tokens + len(one.output_ids)
        return counts

    @property
    def imbalance(self) -> float:
        """The fullest replica's work, in shares: 1 is even, `replicas` is all on one."""
        return max(self.computed) * self.replicas / sum(self.computed)


def make_replicas(count: int, max_total_tokens: int, page_size: int = 1) -> list[TPScheduler]:
    """Of the bundled model, on this process's CPU."""
    wrappers = (
        TPRadixAttentionModelWrapper(None, "cpu", page_size, max_total_tokens=max_total_tokens) for _ in range(count)
    )
    return [TPScheduler(wrapper, schedule_policy="lpm") for wrapper in wrappers]


def serve(replicas: Sequence[TPScheduler], programs: Sequence[Program], balancer: LoadBalancer) -> Outcome:
    """All programs begin at once; a program's next calls come when its last ones are answered."""
    outcome = Outcome(len(replicas))
    waits_for: list[dict[tuple[int, int], list[int] | None]] = [{} for _ in programs]  # (replica, rid) -> answer
    whose: dict[tuple[int, int], int] = {}
    sent = {}

    def go_on(number: int, answers: list[list[int]] | None) -> None:
        try:
            calls = programs[number].send(answers)
        except StopIteration:
            return
        waits_for[number] = {}
        for call in calls:
            rank = balancer.choose(call.ids)
            params = SamplingParams(call.new_tokens, call.temperature, seed=number, ignore_eos=True)
            key = rank, replicas[rank].enqueue(None, call.ids, params)
            sent[key] = balancer.sent(rank, call.ids)
            waits_for[number][key], whose[key] = None, number

    for number in range(len(programs)):
        go_on(number, None)
    busy = True
    while busy:
        busy = any([scheduler.step() for scheduler in replicas])  # a list: all step
        outcome.rounds += busy
        for rank, scheduler in enumerate(replicas):
            scheduler.grown = {}
            ended, scheduler.results = scheduler.results, {}
            for rid, output in ended.items():
                number = whose.pop((rank, rid))
                balancer.finished(sent.pop((rank, rid)))
                told = (output.prompt_tokens, output.cached_tokens, output.output_ids)
                outcome.answered.append(Answered(number, rank, *told))
                waits_for[number][rank, rid] = output.output_ids
                if None not in waits_for[number].values():
                    go_on(number, list(waits_for[number].values()))
                    busy = True
    return outcome
