"""A trie of all that requests have said: what came after these words the last time?

Every piece of at most `depth` tokens of every prompt and answer is a path from the root. The last tokens of a request are looked up
in it, the longest suffix first, and the tokens that once followed are the guesses, as a tree: a suffix that is known from several
places has several of them. No model, no GPU, no page; what text repeats is guessed, and nothing else.

    depth 3, read "to be or not to be":  after "to be" came "or", so behind the second "to be" it is guessed again.

Children stand in the order in which they were last met. Where a text goes on, its suffixes of 1, 2, ... depth tokens are nodes
that are known already (`Place`), so that one more token costs one step below each of them.

Memory has a limit. There are two generations: what is read is written into the young one, and when that has half the capacity, it
becomes the old one and what was old is forgotten. Guesses come from both. What is said again and again is thus never forgotten.

SGLang 0.5.23: srt/speculative/ngram_worker.py and kernels/jit/csrc/ngram_corpus/trie.cpp (buildRecency, buildFrequency), whose
breadth rule and parameters these are. There each node has its place in a list by last use, and nodes go one by one; only the
last `depth` tokens of a prompt are read; namespaces are not kept apart.
"""

import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count, islice

MATCH_TYPES = ("BFS", "PROB")


class Node(dict):
    """Its children by token, the one that was met last at the end. times: how often it was met itself."""

    __slots__ = ("times",)


@dataclass
class Place:
    """Where a text stands: the nodes of its last 1, 2, ... tokens, in the young and in the old generation."""

    namespace: Hashable = None
    tail: list[int] = field(default_factory=list)  # its last depth - 1 tokens
    generation: int = -1  # of which the nodes are
    young: list[Node] = field(default_factory=list)
    old: list[Node] = field(default_factory=list)


class Guesses:
    """A tree that grows: node 0 is the last token, node i > 0 has tokens[i - 1] and stands below parents[i - 1]."""

    def __init__(self, most: int, breadth: int):
        self.most, self.breadth = most, breadth  # nodes; children of one
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: list[dict[int, int]] = [{}]

    @property
    def full(self) -> bool:
        return len(self.tokens) == self.most

    def child(self, parent: int, token: int) -> int | None:
        """The node of `token` below parent, made if it is not there; None if there is no room for it."""
        children = self._children[parent]
        if token not in children:
            if self.full or len(children) == self.breadth:
                return None
            self.tokens.append(token)
            self.parents.append(parent)
            self._children.append({})
            children[token] = len(self.tokens)
        return children[token]


class NgramTrie:
    """depth: tokens of a path at most, of which the last is always a guess. capacity: nodes at most, at about 220 bytes each.

    min_breadth, max_breadth: how many guesses stand beside each other, of which the more the shorter the suffix is that they are
    known from, and the fewer the further below the root; no node has more than max_breadth children, so that 1 makes a chain.
    match_type: BFS takes what was met last, PROB what was met most often.
    Raises ValueError for what cannot be.
    """

    def __init__(self, depth: int = 18, capacity: int = 1_000_000, min_breadth: int = 1, max_breadth: int = 10,
                 match_type: str = "BFS"):  # fmt: skip
        if depth < 2:
            raise ValueError(f"speculative_ngram_max_trie_depth={depth}: a token to know it by and one to guess are 2")
        if not 1 <= min_breadth <= max_breadth:
            raise ValueError(
                f"speculative_ngram_min_bfs_breadth={min_breadth} must be from 1 to "
                f"speculative_ngram_max_bfs_breadth={max_breadth}"
            )
        if capacity < 2 * depth + 2:
            raise ValueError(
                f"speculative_ngram_capacity={capacity} nodes hold no path of "
                f"speculative_ngram_max_trie_depth={depth} tokens twice; use {2 * depth + 2} or more"
            )
        if match_type not in MATCH_TYPES:
            raise ValueError(f"speculative_ngram_match_type={match_type!r} is unknown; use {' or '.join(MATCH_TYPES)}")
        self.depth, self.capacity = depth, capacity
        self.min_breadth, self.max_breadth, self.match_type = min_breadth, max_breadth, match_type
        self.forget()

    def forget(self) -> None:
        """All of it."""
        self.generation = getattr(self, "generation", 0) + 1
        self.young: dict[Hashable, Node] = {}  # the root of each namespace
        self.old: dict[Hashable, Node] = {}
        self.young_nodes = self.old_nodes = 0

    @property
    def nodes(self) -> int:
        return self.young_nodes + self.old_nodes

    # --- reading

    def read(self, place: Place, tokens: Iterable[int]) -> None:
        """A text that stands at `place` goes on with these tokens."""
        for token in tokens:
            if self.young_nodes + self.depth + 1 > self.capacity // 2:
                self._grow_old()
            self._find(place)
            root = self.young.get(place.namespace)
            if root is None:
                root = self.young[place.namespace] = Node()
                self.young_nodes += 1
            place.young = [self._met(node, token) for node in (root, *place.young[: self.depth - 1])]
            place.old = self._below(self.old, place.namespace, place.old, token)
            place.tail = [*place.tail, token][-self.depth + 1 :]

    def _met(self, node: Node, token: int) -> Node:
        child = node.pop(token, None)
        if child is None:
            child = Node()
            child.times = 0
            self.young_nodes += 1
        child.times += 1
        node[token] = child  # the last one now
        return child

    def _below(self, roots: dict[Hashable, Node], namespace: Hashable, nodes: list[Node], token: int) -> list[Node]:
        """The nodes one token on. Where a text is known, each of its suffixes is: what is not known is at the end."""
        root = roots.get(namespace)
        if root is None:
            return []
        found = (node.get(token) for node in (root, *nodes[: self.depth - 1]))
        return [node for node in found if node is not None]

    def _grow_old(self) -> None:
        self.old, self.old_nodes = self.young, self.young_nodes
        self.young, self.young_nodes = {}, 0
        self.generation += 1

    def _find(self, place: Place) -> None:
        """Its nodes, if they are of generations that are gone."""
        if place.generation != self.generation:
            place.generation, place.young, place.old = self.generation, [], []
            for token in place.tail:
                place.young = self._below(self.young, place.namespace, place.young, token)
                place.old = self._below(self.old, place.namespace, place.old, token)

    # --- guessing

    def guess(self, place: Place, most: int) -> Guesses:
        """At most so many nodes below the last token of the text that stands there."""
        self._find(place)
        grow = self._by_recency if self.match_type == "BFS" else self._by_frequency
        guesses = Guesses(most, self.max_breadth)
        for length in range(max(len(place.young), len(place.old)), 0, -1):  # the longest suffix says most
            for nodes in (place.young, place.old):
                if length <= len(nodes) and nodes[length - 1] and not guesses.full:
                    grow(guesses, nodes[length - 1], length)
        return guesses

    def _by_recency(self, guesses: Guesses, node: Node, length: int) -> None:
        longest = max(1, self.depth - 1)
        slope = (self.max_breadth - self.min_breadth) / longest
        level = [(0, self.min_breadth + (longest - length) * slope, node)]
        while level and not guesses.full:
            below = []
            for parent, breadth, of in level:
                for token in islice(reversed(of), max(1, int(breadth))):
                    at = guesses.child(parent, token)
                    if at is not None:
                        below.append((at, breadth - slope, of[token]))
            level = below

    def _by_frequency(self, guesses: Guesses, node: Node, length: int) -> None:
        number = count()  # of two that are equally likely, the one that was found first
        heap: list[tuple] = []

        def add(parent: int, of: Node, chance: float) -> None:
            best = sorted(of.items(), key=lambda item: (-item[1].times, item[0]))[: self.max_breadth]
            met = sum(child.times for _, child in best)
            for token, child in best:
                heapq.heappush(heap, (-chance * child.times / met, next(number), parent, token, child))

        add(0, node, 1.0)
        while heap and not guesses.full:
            chance, _, parent, token, child = heapq.heappop(heap)
            at = guesses.child(parent, token)
            if at is not None:
                add(at, child, -chance)
