"""Which of several replicas a request goes to.

    balancer = LoadBalancer("cache_aware", ["a", "b"])
    worker = balancer.choose(prompt)             # prompt: a text or token ids
    sent = balancer.sent(worker, prompt)
    balancer.finished(sent)

    policy           the next request goes to                                looks at
    round_robin      the next worker                                         nothing
    random           any                                                     nothing
    total_requests   who has the fewest requests                             loads
    total_tokens     who has the fewest tokens, then the fewest requests     loads
    power_of_two     the less loaded of two that are drawn                   two loads
    prefix_hash      whom the prompt's beginning belongs to, unless busy     256 tokens of the prompt
    cache_aware      who was sent the longest common prefix, unless busy     the prompt, and all prompts before

A worker is any name: the rank of a replica in one server, a URL in front of several. No clocks, no threads, and chance from a seed
alone: whoever asks the same questions in the same order gets the same answers, which is how the ranks of several replicas under
torchrun agree without a word.

SGLang 0.5.23 has the first, third and fourth in srt/managers/data_parallel_controller.py (LoadBalanceMethod); the others are its
router's, sgl-model-gateway/src/policies/.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from ch07_sglang_radix.parallelism.approximate_tree import MOST, ApproximateTree, Prompt
from common.values import choice


class NoWorker(Exception):
    """Nobody is there to take a request."""


@dataclass
class Load:
    """What a worker has now: requests that have not ended, and the tokens (or characters) of their prompts and answers."""

    requests: int = 0
    tokens: int = 0


Loads = Mapping[Any, Load]  # of those who may be chosen, in their order; never empty


class Policy(Protocol):
    def choose(self, prompt: Prompt, loads: Loads) -> Any: ...

    def sent(self, prompt: Prompt, worker: Any) -> None: ...

    def forget(self, worker: Any) -> None: ...


class _Stateless:
    """A policy that need not know what became of its advice."""

    def sent(self, prompt: Prompt, worker: Any) -> None:
        pass

    def forget(self, worker: Any) -> None:
        pass


class RoundRobin(_Stateless):
    def __init__(self, seed: int = 0):
        self._turn = 0

    def choose(self, prompt: Prompt, loads: Loads) -> Any:
        self._turn += 1
        return list(loads)[(self._turn - 1) % len(loads)]


class Random(_Stateless):
    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)

    def choose(self, prompt: Prompt, loads: Loads) -> Any:
        return self._random.choice(list(loads))


class TotalRequests(_Stateless):
    def __init__(self, seed: int = 0):
        pass

    def choose(self, prompt: Prompt, loads: Loads) -> Any:
        return least_loaded(loads)


class TotalTokens(_Stateless):
    def __init__(self, seed: int = 0):
        pass

    def choose(self, prompt: Prompt, loads: Loads) -> Any:
        return min(loads, key=lambda worker: (loads[worker].tokens, loads[worker].requests))


class PowerOfTwo(_Stateless):
    """Two are drawn and one is asked less than all, yet the fullest queue is short (Mitzenmacher 2001)."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)

    def choose(self, prompt: Prompt, loads: Loads) -> Any:
        drawn = self._random.sample(list(loads), min(2, len(loads)))
        return least_loaded({worker: loads[worker] for worker in drawn})


class PrefixHash(_Stateless):
    """The beginning of a prompt has an owner, the same for ever as long as that worker is there.

    Each worker and beginning make a number, the largest wins: if a worker goes, only its own beginnings move. SGLang places
    the workers on a hash ring, which does the same in log(n). Who has more than load_factor times its share gives way to the least
    loaded.
    """

    def __init__(self, seed: int = 0, prefix_length: int = 256, load_factor: float = 1.25):
        self.prefix_length, self.load_factor = prefix_length, load_factor

    def choose(self, prompt: Prompt, loads: Loads) -> Any:
        beginning = repr(prompt[: self.prefix_length])
        owner = max(loads, key=lambda worker: _number(f"{worker} {beginning}"))
        share = (sum(load.requests for load in loads.values()) + 1) / len(loads)
        return owner if loads[owner].requests <= self.load_factor * share else least_loaded(loads)


class CacheAware:
    """Where the longest common prefix lies, as long as nobody has far too much to do.

        most - least requests > balance_abs_threshold, and most > balance_rel_threshold * least  ->  the least loaded
        matched / length > cache_threshold                                                      ->  who was sent it
        else                                                                                    ->  the least loaded

    Whatever was chosen is remembered. The numbers are those of SGLang's router: sgl-model-gateway/bindings/python, router_args.py.
    The rule is in src/policies/cache_aware.rs there, whose comment says "smallest tree" for the last line; its code compares loads.
    """

    def __init__(
        self, seed: int = 0, cache_threshold: float = 0.3, balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5, max_tree_size: int = MOST,
    ):  # fmt: skip
        self.cache_threshold = cache_threshold
        self.balance_abs_threshold, self.balance_rel_threshold = balance_abs_threshold, balance_rel_threshold
        self.tree = ApproximateTree(max_tree_size)

    def choose(self, prompt: Prompt, loads: Loads) -> Any:
        requests = [load.requests for load in loads.values()]
        most, least = max(requests), min(requests)
        if most - least > self.balance_abs_threshold and most > self.balance_rel_threshold * least:
            return least_loaded(loads)
        matched, worker = self.tree.match(prompt)
        if worker in loads and matched > self.cache_threshold * len(prompt):
            return worker
        return least_loaded(loads)

    def sent(self, prompt: Prompt, worker: Any) -> None:
        self.tree.insert(prompt, worker)

    def forget(self, worker: Any) -> None:
        self.tree.forget(worker)


POLICIES: dict[str, type] = {
    "round_robin": RoundRobin,
    "random": Random,
    "total_requests": TotalRequests,
    "total_tokens": TotalTokens,
    "power_of_two": PowerOfTwo,
    "prefix_hash": PrefixHash,
    "cache_aware": CacheAware,
}


def least_loaded(loads: Loads) -> Any:
    """The first of those with the fewest requests."""
    return min(loads, key=lambda worker: loads[worker].requests)


@dataclass
class Sent:
    """A request that has not ended, and where it counts."""

    load: Load
    tokens: int


class LoadBalancer:
    """A policy, who is there, and how much each has to do. options: of the policy."""

    def __init__(self, method: str, workers: Iterable[Any] = (), seed: int = 0, **options: Any):
        choice("load_balance_method", method, tuple(POLICIES))
        self.method, self.policy = method, POLICIES[method](seed, **options)
        self.loads: dict[Any, Load] = {worker: Load() for worker in workers}

    def choose(self, prompt: Prompt, among: Iterable[Any] | None = None) -> Any:
        """among: those who may be chosen now; all, if it is not given. Raises NoWorker."""
        loads = self.loads if among is None else {worker: self.loads[worker] for worker in among}
        if not loads:
            raise NoWorker("no worker is alive")
        return self.policy.choose(prompt, loads)

    def sent(self, worker: Any, prompt: Prompt) -> Sent:
        if worker not in self.loads:  # it was removed between choice and sending
            return Sent(Load(), 0)
        self.policy.sent(prompt, worker)
        load = self.loads[worker]
        load.requests += 1
        load.tokens += len(prompt)
        return Sent(load, len(prompt))

    def grown(self, sent: Sent, tokens: int) -> None:
        """Its answer has so many tokens more."""
        sent.tokens += tokens
        sent.load.tokens += tokens

    def finished(self, sent: Sent) -> None:
        """Once for each. A worker that has gone meanwhile is counted nowhere."""
        sent.load.requests -= 1
        sent.load.tokens -= sent.tokens

    def add(self, worker: Any) -> None:
        self.loads[worker] = Load()

    def remove(self, worker: Any) -> None:
        """Its cache has gone with it."""
        self.loads.pop(worker, None)
        self.policy.forget(worker)


def _number(text: str) -> bytes:
    """The same in every process, where hash() of a text is not."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
