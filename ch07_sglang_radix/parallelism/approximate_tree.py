"""Who was sent which prompts: one radix tree for all workers, as the router remembers it.

    tree.insert("You are a poet. Rain", "a")          "You are a " (a, b)
    tree.insert("You are a cook. Soup", "b")             +- "poet. Rain" (a)
    tree.match("You are a poet. Snow")                   +- "cook. Soup" (b)
    -> (16, "a")

A worker's own tree (radix_cache.py) knows which pages lie there. This one knows what was sent, and nobody tells it what has been
evicted since: it is right as long as the worker's pool is large, and a wrong guess costs time and no answer. It takes texts as well
as token ids, since a router in front of several servers has no tokenizer: a character costs less to compare than a text to cut.

SGLang 0.5.x: sgl-model-gateway/src/policies/tree.rs. It matches the tenant that a node remembers, here the one that was last
sent through it; it evicts every 60 to 120 s, here when a worker has too much.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

Prompt = Sequence[Any]  # a text or token ids, and always the same of both
MOST = 1 << 26  # characters or ids a worker, SGLang's max_tree_size
KEEP = 3 / 4  # of MOST is left by an eviction, so that the walk through the tree is rare


class _Node:
    def __init__(self, key: Prompt, parent: "_Node | None"):
        self.key, self.parent = key, parent
        self.children: dict[Any, _Node] = {}  # by the first element of their keys
        self.used: dict[Any, int] = {}  # worker: when it was last sent a prompt through here; oldest first


class ApproximateTree:
    """most: elements of all prompts of a worker, shared ones once; above it the least recently used ends of its prompts go."""

    def __init__(self, most: int = MOST):
        self.most = most
        self.size: dict[Any, int] = {}  # of each worker
        self._root = _Node((), None)
        self._now = 0

    def match(self, prompt: Prompt) -> tuple[int, Any]:
        """(how many elements some worker was sent before, which worker that was; None if nobody was sent anything like it)."""
        node, at = self._root, 0
        while (child := self._child(node, prompt, at)) is not None:
            common = common_prefix(child.key, prompt[at : at + len(child.key)])
            node, at = child, at + common
            if common < len(child.key):
                break
        return at, next(reversed(node.used), None) if at else None

    def insert(self, prompt: Prompt, worker: Any) -> None:
        """`worker` was sent `prompt`."""
        self._now += 1
        self.size.setdefault(worker, 0)
        node, at = self._root, 0
        while at < len(prompt):
            child = self._child(node, prompt, at)
            if child is None:
                child = node.children[prompt[at]] = _Node(prompt[at:], node)
            common = common_prefix(child.key, prompt[at : at + len(child.key)])
            if common < len(child.key):
                child = self._split(child, common)
            self._use(child, worker)
            node, at = child, at + common
        if self.size[worker] > self.most:
            self._evict(worker)

    def forget(self, worker: Any) -> None:
        """It has gone, and its cache with it."""
        for node in list(self._nodes()):
            node.used.pop(worker, None)
        for node in reversed(list(self._nodes())):
            self._drop_if_unused(node)
        self.size.pop(worker, None)

    # --- inside

    @staticmethod
    def _child(node: _Node, prompt: Prompt, at: int) -> _Node | None:
        return node.children.get(prompt[at]) if at < len(prompt) else None

    def _use(self, node: _Node, worker: Any) -> None:
        if node.used.pop(worker, None) is None:
            self.size[worker] += len(node.key)
        node.used[worker] = self._now

    @staticmethod
    def _split(node: _Node, at: int) -> _Node:
        """Cut a node in two; returns the upper one. Both were sent to the same workers, so no size changes."""
        upper = _Node(node.key[:at], node.parent)
        upper.used = dict(node.used)
        node.parent.children[node.key[0]] = upper
        upper.children[node.key[at]] = node
        node.key, node.parent = node.key[at:], upper
        return upper

    def _evict(self, worker: Any) -> None:
        leaves = [(node.used[worker], i, node) for i, node in enumerate(self._nodes()) if self._ends_here(node, worker)]
        heapq.heapify(leaves)
        while leaves and self.size[worker] > self.most * KEEP:
            _, i, node = heapq.heappop(leaves)
            del node.used[worker]
            self.size[worker] -= len(node.key)
            parent = node.parent
            self._drop_if_unused(node)
            if parent is not self._root and self._ends_here(parent, worker):
                heapq.heappush(leaves, (parent.used[worker], i, parent))

    @staticmethod
    def _ends_here(node: _Node, worker: Any) -> bool:
        return worker in node.used and all(worker not in child.used for child in node.children.values())

    @staticmethod
    def _drop_if_unused(node: _Node) -> None:
        """Whoever was sent a longer prompt was sent this one, so a node that nobody uses has no children in use."""
        if not node.used:
            del node.parent.children[node.key[0]]

    def _nodes(self) -> Iterator[_Node]:
        """All but the root, parents first."""
        left = list(self._root.children.values())
        while left:
            node = left.pop()
            yield node
            left += node.children.values()


def common_prefix(a: Prompt, b: Prompt) -> int:
    """How many elements are equal from the front. Whole slices are compared, so Python's loop turns log(n) times and not n."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
