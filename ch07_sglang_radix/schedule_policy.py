"""Schedule policies: in which order do waiting requests try to get in?

    fcfs         as they came
    lpm          longest prefix match: what needs least computing first
    dfs-weight   depth first through the tree, into the subtree with most waiting requests first
    random       shuffled
    priority     higher Req.priority first
    dynamic      lpm while it can help, else fcfs (see below)

All but fcfs can pass a request over again and again; one that has been passed over STARVING times goes first. lpm
works with the tree as it is now: of waiting requests that share something which nobody has computed yet, one
should go ahead and the others follow and hit. So lpm puts those others at the back (SGLang's in-batch rule).

`dynamic` is the book's idea made concrete. Sorting by match pays if there is something to match and an order to choose:
it looks at the hit rate of what was admitted lately, at how many requests wait, and falls back to fcfs where
lpm would only cost. It starts with lpm, or nothing could ever be measured.
"""

import random
from collections import Counter
from collections.abc import Callable

import numpy as np

from ch07_sglang_radix.memory_pool import TokenToKVPool
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
    """`order(waiting)` gives the order in which to try; nothing is removed, the tree only counts as used."""

    def __init__(self, name: str, tree: RadixCache, seed: int = 0):
        if name not in POLICIES:
            raise ValueError(f"schedule_policy={name!r} is unknown; use {', '.join(POLICIES)}")
        self.name, self.tree = name, tree
        self._order = POLICIES[name]
        self._random = random.Random(seed)
        self._admitted: list[tuple[int, int]] = []  # (cached, prompt) tokens of the last admissions
        self._steps_of_fcfs = 0
        self.active = name  # what `dynamic` has chosen last
        self._last: tuple[tuple, list[Req]] = ((), [])  # what the last order was made from, and that order

    def order(self, waiting: list[Req]) -> list[Req]:
        if len(waiting) < 2 or self.name == "fcfs":
            return list(waiting)
        ordered = self._order(self, list(waiting))
        return sorted(ordered, key=lambda req: req.passed_over < STARVING)  # a stable sort: the starving in front

    def admitted(self, cached: int, prompt: int) -> None:
        """Tell it what an admitted request found: `dynamic` goes by that."""
        self._admitted = [*self._admitted[1 - DYNAMIC_WINDOW :], (cached, prompt)]

    @property
    def hit_rate(self) -> float:
        """Of the last admissions; 1 while they are too few to judge."""
        if len(self._admitted) < DYNAMIC_LEAST:
            return 1.0
        return sum(cached for cached, _ in self._admitted) / sum(prompt for _, prompt in self._admitted)

    def _match(self, req: Req) -> MatchResult:
        return self.tree.match_prefix(req.all_ids[:-1], req.extra_key)

    def _fcfs(self, waiting: list[Req]) -> list[Req]:
        return waiting

    def _lpm(self, waiting: list[Req]) -> list[Req]:
        if len(waiting) > LPM_QUEUE_LIMIT or self.tree.disable:
            return waiting
        state = (*(req.rid for req in waiting), self.tree.inserted, self.tree.evicted)
        if state == self._last[0]:  # steps go by in which nobody gets in
            return self._last[1]
        ahead = RadixCache(TokenToKVPool(page_size=self.tree.page_size))  # of requests that go before
        keys = []
        for req in waiting:
            ids, matched = req.all_ids[:-1], len(self._match(req).slots)
            follows = False
            if matched <= IN_BATCH_MATCH:
                follows = len(ahead.match_prefix(ids, req.extra_key).slots) >= IN_BATCH_PREFIX
                if not follows:
                    ahead.insert(ids, np.zeros(len(ids), dtype=np.int64), req.extra_key)
            keys.append((follows, -matched))
        ordered = [waiting[i] for i in sorted(range(len(waiting)), key=keys.__getitem__)]
        # what is needed first was used last: else looking at the queue would make LRU evict just that
        for req in reversed(ordered):
            self._match(req)
        self._last = state, ordered
        return ordered

    def _dfs_weight(self, waiting: list[Req]) -> list[Req]:
        """weight(node) = waiting requests that end there + those below; children by falling weight, then the node's own."""
        at: dict[TreeNode, list[Req]] = {}
        weight: Counter[TreeNode] = Counter()
        children: dict[TreeNode, dict[TreeNode, None]] = {}
        # all matches before any node is looked at: a match may split a node
        for req in waiting:
            self._match(req)
        roots: dict[TreeNode, None] = {}
        for req in waiting:
            node = self._match(req).last_node
            at.setdefault(node, []).append(req)
            while node.parent is not None:
                weight[node] += 1
                children.setdefault(node.parent, {})[node] = None
                node = node.parent
            roots[node] = None

        def visit(node: TreeNode) -> list[Req]:
            below = sorted(children.get(node, ()), key=lambda child: -weight[child])
            return [req for child in below for req in visit(child)] + at.get(node, [])

        return [req for root in roots for req in visit(root)]

    def _shuffle(self, waiting: list[Req]) -> list[Req]:
        self._random.shuffle(waiting)
        return waiting

    def _priority(self, waiting: list[Req]) -> list[Req]:
        return sorted(waiting, key=lambda req: -req.priority)

    def _dynamic(self, waiting: list[Req]) -> list[Req]:
        useful = self.hit_rate >= DYNAMIC_HIT_RATE and len(waiting) <= LPM_QUEUE_LIMIT
        if not useful and self._steps_of_fcfs < DYNAMIC_RETRY:
            self.active, self._steps_of_fcfs = "fcfs", self._steps_of_fcfs + 1
            return waiting
        self.active, self._steps_of_fcfs = "lpm", 0
        return self._lpm(waiting)


POLICIES: dict[str, Callable[[SchedulePolicy, list[Req]], list[Req]]] = {
    "fcfs": SchedulePolicy._fcfs,
    "lpm": SchedulePolicy._lpm,
    "dfs-weight": SchedulePolicy._dfs_weight,
    "random": SchedulePolicy._shuffle,
    "priority": SchedulePolicy._priority,
    "dynamic": SchedulePolicy._dynamic,
}
