"""The radix tree as rows of the page's state: a number for each node, its text, who uses it, which pages it owns."""

from collections.abc import Iterator
from heapq import nlargest
from typing import NamedTuple

import numpy as np

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.serving.xray.events import State
from ch07_sglang_radix.tree_node import TreeNode
from common.vision.keys import readable

MOST_NODES = 800  # those used last, and the nodes above them; more cannot be read on any screen
TEXT_TOKENS = 96  # of a node: a longer one shows its beginning and its end
OTHER = (
    1 << 31
)  # the number of whatever owns a page and has none: nodes that are not shown, other owners than tree and requests


class Known(NamedTuple):
    """A node that has been told of. length: the text is made anew when a split has cut it."""

    number: int
    length: int
    text: str


class TreeRows:
    """rows: {number: row}, as events.py has them; owners [pages]: the number of the node that a page belongs to, 0 for none;
    left_out: nodes without a row. Numbers count up and are never used again.
    """

    def __init__(self, scheduler: TPScheduler):
        self.scheduler = scheduler
        self.rows: State = {}
        self.left_out = self._numbers = 0
        self._known: dict[TreeNode, Known] = {}
        self._is: tuple = ()
        self.refresh()

    @property
    def moved(self) -> bool:
        return self._is != self._moves()

    def refresh(self) -> None:
        """Read the tree, if anything in it may be different."""
        if self.moved:
            self._is = self._moves()
            self._read()

    def _moves(self) -> tuple:
        """As long as this is the same, so are the nodes, their locks and who uses them: through most decode steps."""
        s, tree = self.scheduler, self.scheduler.tree
        return (
            id(tree.root), tree.inserted, tree.evicted, tree.splits, s.steps["prefill"], s.num_finished, s.retractions,
            len(s.admitted),
        )  # fmt: skip

    def _read(self) -> None:
        tree, page_size = self.scheduler.tree, self.scheduler.page_size
        users = self._users()
        every = list(tree.nodes())  # parents first
        shown = self._shown(every)
        self.left_out = len(every) - len(shown)
        known, self.rows = self._known, {}
        self._known = {tree.root: Known(0, 0, "")}
        self.owners = np.zeros(self.scheduler.pool.num_pages, dtype=np.int64)
        for node in every:
            if node not in shown:
                self.owners[node.value[::page_size] // page_size] = OTHER
                continue
            one = known.get(node)
            if one is None:
                self._numbers += 1
            if one is None or one.length != len(node.key):
                one = Known(one.number if one else self._numbers, len(node.key), self._text_of(node))
            self._known[node] = one
            self.owners[node.value[::page_size] // page_size] = one.number
            self.rows[str(one.number)] = {
                "parent": self._known[node.parent].number, "text": one.text, "length": one.length,
                "lock": node.lock_ref, "users": users.get(node, []), "hits": node.hit_count,
                "used": node.last_access_time, "name": "" if node.extra_key is None else str(node.extra_key),
            }  # fmt: skip

    def _users(self) -> dict[TreeNode, list[int]]:
        users: dict[TreeNode, list[int]] = {}
        for req in sorted(self.scheduler.admitted, key=lambda req: req.rid):
            if req.probe:
                continue
            for node in _path(req.last_node):
                users.setdefault(node, []).append(req.rid)
        return users

    def _shown(self, every: list[TreeNode]) -> set[TreeNode]:
        if len(every) <= MOST_NODES:
            return set(every)
        shown: set[TreeNode] = set()
        for node in nlargest(MOST_NODES, every, key=lambda node: node.last_access_time):
            shown.update(_path(node))
        return shown

    def _text_of(self, node: TreeNode) -> str:
        ids, vision = node.key >> 32 if self.scheduler.tree.bigram else node.key, self.scheduler.wrapper.config.vision
        if vision:
            ids = readable(ids, vision.image_token_id)
        return self._text(ids.tolist())

    def _text(self, ids: list[int]) -> str:
        """As it is written, special tokens too; a long one without its middle. Without a tokenizer: the ids."""
        if len(ids) > TEXT_TOKENS:
            return f"{self._text(ids[: TEXT_TOKENS * 3 // 4])} … {self._text(ids[-TEXT_TOKENS // 4 :])}"
        tokenizer = self.scheduler.wrapper.tokenizer
        return tokenizer.decode(ids, False) if tokenizer else " ".join(map(str, ids))


def _path(node: TreeNode) -> Iterator[TreeNode]:
    """From a node up to, and without, the root."""
    while node.parent is not None:
        yield node
        node = node.parent
