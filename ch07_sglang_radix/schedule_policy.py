"""Schedule policies: in which order do waiting requests try to get in?

As in SGLang 0.5.23 (srt/managers/schedule_policy.py):

    fcfs                    first come, first served
    lof                     longest output first: the largest max_new_tokens
    random                  shuffled
    routing-key             requests whose routing_key most of the running ones have
    lpm                     longest prefix match: what has most tokens in the tree
    dfs-weight              depth first through the tree, into the subtree with most waiting requests first
    hrrn                    highest response ratio next: tokens computed since it came / tokens it has to compute
    shortest-prefill-first  what has fewest tokens to compute

Ours:

    priority                higher Req.priority first. SGLang has a switch for it, --enable-priority-scheduling, with fcfs
                            and lof (`priority` is on its command line's list, and refused by its class)
    dynamic                 lpm while it can help, else fcfs (see below)

The four that look into the tree work with it as it is now: of waiting requests that share something which nobody has
computed yet, one should go ahead and the others follow and hit. So lpm, hrrn and shortest-prefill-first put those others
at the back (SGLang's in-batch rule). Under lpm and hrrn all of them get the same last rank, and keep the order of the
queue.

lpm and its like can pass a request over again and again. One that has been passed over STARVING times goes first: that is
ours. SGLang has hrrn for it, which ages.

`dynamic` is the book's idea made concrete. Sorting by match pays if there is something to match and an order to choose:
it looks at the hit rate of what was admitted lately, at how many requests wait, and falls back to fcfs where
lpm would only cost. It starts with lpm, or nothing could ever be measured.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.policy_names import POLICY_NAMES, check_policy
from ch07_sglang_radix.radix_cache import MatchResult, RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.tree_node import TreeNode

LPM_QUEUE_LIMIT = 128  # SGLang: matching more than this many requests before every step costs more than it brings
IN_BATCH_MATCH = 32  # with more than this in the tree, a request need not wait for another to compute it
IN_BATCH_PREFIX = 32  # tokens shared with another waiting request that are worth waiting for
STARVING = 16  # prefill steps
DYNAMIC_HIT_RATE, DYNAMIC_WINDOW = 0.1, 64  # least hit rate of so many last admissions that lpm is worth
DYNAMIC_LEAST = 8  # admissions before it judges: the first ones find an empty tree
DYNAMIC_RETRY = 16  # steps of fcfs after which lpm gets another chance


class SchedulePolicy:
    """`order(waiting, running)` gives the order in which to try; nothing is removed, the tree only counts as used.

    Raises ValueError as `check_policy` does; without a tree the others that need one are fcfs, as in SGLang. Tell it
    what was admitted and computed: `dynamic` and `hrrn` go by that.
    """

    def __init__(self, name: str, tree: RadixCache, seed: int = 0):
        check_policy(name, tree.disable)
        name = "fcfs" if tree.disable and name in BY_MATCH else name
        self.name, self.tree = name, tree
        self._order = POLICIES[name]
        self._random = random.Random(seed)
        self._admitted: list[tuple[int, int]] = []  # (cached, prompt) tokens of the last admissions
        self._steps_of_fcfs = 0
        self.active = name  # what `dynamic` has chosen last
        self._last: tuple[tuple, list[Req]] = ((), [])  # what the last order was made from, and that order
        self._computed = 0  # prompt tokens, of all requests
        self._came_at: dict[int, int] = {}  # waiting request -> what was computed when it came

    def order(self, waiting: Sequence[Req], running: Sequence[Req] = ()) -> list[Req]:
        if self.name == "hrrn":
            self._came_at = {req.rid: self._came_at.get(req.rid, self._computed) for req in waiting}
        if len(waiting) < 2 or self.name == "fcfs":
            return list(waiting)
        ordered = self._order(self, list(waiting), running)
        return sorted(ordered, key=lambda req: req.passed_over < STARVING)  # a stable sort: the starving in front

    def admitted(self, cached: int, prompt: int) -> None:
        """What an admitted request found."""
        self._admitted = [*self._admitted[1 - DYNAMIC_WINDOW :], (cached, prompt)]

    def computed(self, tokens: int) -> None:
        """What a prefill step has computed."""
        self._computed += tokens

    def chunk_limit(self, chunked: Req, ordered: Sequence[Req], budget: int) -> int | None:
        """Of a step's budget, what the next part of a long prompt may take; None: all of it.

        shortest-prefill-first leaves room for those that have less to compute than the rest of that prompt, and a page
        for the prompt itself.
        """
        page_size = self.tree.page_size
        if self.name != "shortest-prefill-first" or budget < 2 * page_size:
            return None
        reserved = 0
        for req in ordered:
            work = req.seq_len - min(len(self._match(req).slots), req.seq_len - 1)
            charge = -(-work // page_size) * page_size
            if work >= chunked.seq_len - chunked.kv_len or reserved + charge > budget - page_size:
                break
            reserved += charge
        return (budget - reserved) // page_size * page_size if reserved else None

    @property
    def hit_rate(self) -> float:
        """Of the last admissions; 1 while they are too few to judge."""
        if len(self._admitted) < DYNAMIC_LEAST:
            return 1.0
        return sum(cached for cached, _ in self._admitted) / sum(prompt for _, prompt in self._admitted)

    # --- those that do not look into the tree

    def _fcfs(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        return waiting

    def _longest_output(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        return sorted(waiting, key=lambda req: -req.params.max_new_tokens)

    def _shuffle(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        self._random.shuffle(waiting)
        return waiting

    def _priority(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        return sorted(waiting, key=lambda req: -req.priority)

    def _routing_key(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        """Those with the commonest key of the running ones first, equal keys side by side."""
        often = Counter(req.routing_key for req in running if req.routing_key)
        if not often:
            return waiting
        return sorted(
            waiting, key=lambda req: (req.routing_key not in often, -often[req.routing_key], req.routing_key or "")
        )

    # --- those that do

    def _lpm(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        return self._by(waiting, lambda req, matched: -matched)

    def _highest_response_ratio(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        def rank(req: Req, matched: int) -> float:
            """1 + waited / own time is the response ratio; both are counted in prompt tokens, so that runs repeat."""
            new = len(req.prompt_ids) - matched
            return (self._came_at[req.rid] - self._computed) / new if new > 0 else -math.inf

        return self._by(waiting, rank, again=True)

    def _shortest_prefill(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        return self._by(waiting, lambda req, matched: req.seq_len - matched, limit=math.inf, sort_last=True)

    def _by(
        self, waiting: list[Req], rank: Callable[[Req, int], float], *, limit: float = LPM_QUEUE_LIMIT,
        again: bool = False, sort_last: bool = False,
    ) -> list[Req]:  # fmt: skip
        """Sorted by `rank(request, tokens in the tree)`, those that follow another one of the queue last.

        limit: a longer queue stays as it is. again: the rank changes although queue and tree have not. sort_last: those
        at the back are sorted too.
        """
        if len(waiting) > limit:
            return waiting
        state = (*(req.rid for req in waiting), self.tree.inserted, self.tree.evicted)
        if state == self._last[0] and not again:  # steps go by in which nobody gets in
            return self._last[1]
        ahead = RadixCache(TokenToKVPool(page_size=self.tree.page_size))  # of requests that go before
        ranks: dict[Req, tuple[bool, float]] = {}
        for req in waiting:
            ids, found = req.all_ids, len(self._match(req).slots)
            follows = False
            if found <= IN_BATCH_MATCH:
                follows = len(ahead.match_prefix(ids, req.extra_key).slots) >= IN_BATCH_PREFIX
                if not follows:
                    ahead.insert(ids, np.zeros(len(ids), dtype=np.int64), req.extra_key)
            matched = min(found, len(ids) - 1)  # one token at least is computed
            ranks[req] = follows, 0 if follows and not sort_last else rank(req, matched)
        ordered = sorted(waiting, key=ranks.__getitem__)  # a stable sort: equals as they came
        # what is needed first was used last: else looking at the queue would make LRU evict just that
        for req in reversed(ordered):
            self._match(req)
        self._last = state, ordered
        return ordered

    def _dfs_weight(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        """weight(node) = waiting requests that end there + those below; children by falling weight, then the node's own."""
        at: dict[TreeNode, list[Req]] = {}
        weight: Counter[TreeNode] = Counter()
        # all matches before any node is looked at: a match may split a node
        for req in waiting:
            self._match(req)
        for req in waiting:
            node = self._match(req).last_node
            at.setdefault(node, []).append(req)
            while node.parent is not None:
                weight[node] += 1
                node = node.parent
        ordered, stack = [], [(self.tree.root, False)]
        while stack:
            node, been_below = stack.pop()
            if been_below:
                ordered += at.get(node, [])
                continue
            below = sorted((c for c in node.children.values() if c in weight), key=lambda child: -weight[child])
            stack += [(node, True), *((child, False) for child in reversed(below))]
        return ordered

    def _dynamic(self, waiting: list[Req], running: Sequence[Req]) -> list[Req]:
        useful = self.hit_rate >= DYNAMIC_HIT_RATE and len(waiting) <= LPM_QUEUE_LIMIT
        if not useful and self._steps_of_fcfs < DYNAMIC_RETRY:
            self.active, self._steps_of_fcfs = "fcfs", self._steps_of_fcfs + 1
            return waiting
        self.active, self._steps_of_fcfs = "lpm", 0
        return self._lpm(waiting, running)

    def _match(self, req: Req) -> MatchResult:
        return self.tree.match_prefix(req.all_ids, req.extra_key)


POLICIES: dict[str, Callable[[SchedulePolicy, list[Req], Sequence[Req]], list[Req]]] = {
    "fcfs": SchedulePolicy._fcfs,
    "lof": SchedulePolicy._longest_output,
    "random": SchedulePolicy._shuffle,
    "routing-key": SchedulePolicy._routing_key,
    "lpm": SchedulePolicy._lpm,
    "dfs-weight": SchedulePolicy._dfs_weight,
    "hrrn": SchedulePolicy._highest_response_ratio,
    "shortest-prefill-first": SchedulePolicy._shortest_prefill,
    "priority": SchedulePolicy._priority,
    "dynamic": SchedulePolicy._dynamic,
}

BY_MATCH = ("lpm", "dfs-weight", "hrrn", "dynamic")  # what they order by is in the tree

assert tuple(POLICIES) == POLICY_NAMES
