"""Conservation: no page is lost and none has two owners.

free + cached (evictable + protected) + owned by requests = all pages
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ch07_sglang_radix.scheduler import TPScheduler


class InvariantError(AssertionError):
    """The pools and the tree contradict each other; the text names page and owners."""


def check_invariants(scheduler: "TPScheduler") -> None:
    """Walk over everything rank 0 keeps (rank 0 only; O(pages)). Raises InvariantError."""
    pool, tree, rows = scheduler.pool, scheduler.tree, scheduler.req_to_token.req_to_token
    page_size = pool.page_size
    owner: dict[int, str] = {}

    def claim(pages: np.ndarray, who: str) -> None:
        for page in pages.tolist():
            if page in owner:
                raise InvariantError(f"page {page} has two owners: {owner[page]} and {who}")
            owner[page] = who

    claim(pool.free_pages(), "the free list")
    locks: dict[int, int] = {}
    active = scheduler.running + ([scheduler.chunked] if scheduler.chunked else [])
    for req in active:
        claim(rows[req.row, req.prefix_len : req.allocated_len : page_size] // page_size, f"request {req.rid}")
        node = req.last_node
        while node.parent is not None:
            locks[id(node)] = locks.get(id(node), 0) + 1
            node = node.parent
    evictable = protected = 0
    for node in tree.nodes():
        name = f"node {node.key[:4].tolist()}..."
        if len(node.key) != len(node.value) or len(node.key) % page_size or not len(node.key):
            raise InvariantError(f"{name}: {len(node.key)} tokens, {len(node.value)} slots, page size {page_size}")
        if node.parent.children.get(tree.child_key(node.key)) is not node:
            raise InvariantError(f"{name} is not where its first page says")
        if node.lock_ref != locks.get(id(node), 0):
            raise InvariantError(
                f"{name} has lock_ref={node.lock_ref}, but {locks.get(id(node), 0)} requests run through it"
            )
        starts = node.value[::page_size]
        if (node.value.reshape(-1, page_size) != starts[:, None] + np.arange(page_size)).any() or (
            starts % page_size
        ).any():
            raise InvariantError(f"{name}: its slots are not whole pages")
        claim(starts // page_size, name)
        if node.lock_ref:
            protected += len(node.key)
        else:
            evictable += len(node.key)
    if (evictable, protected) != (tree.evictable_size, tree.protected_size):
        raise InvariantError(
            f"the tree counts {tree.evictable_size} evictable and {tree.protected_size} protected slots, "
            f"its nodes hold {evictable} and {protected}"
        )
    lost = sorted(set(range(pool.num_pages)) - owner.keys())
    if lost:
        raise InvariantError(f"{len(lost)} of {pool.num_pages} pages belong to nobody: {lost[:8]}")
    for req in active:
        _check_prefix(req, tree, rows)
    _check_rows(scheduler, active)


def _check_prefix(req, tree, rows) -> None:
    """The row's first prefix_len slots are the tree's, on the path that the request has locked."""
    path, node = [], req.last_node
    while node.parent is not None:
        path.append(node)
        node = node.parent
    none = np.zeros(0, dtype=np.int64)
    key = np.concatenate([none, *(n.key for n in reversed(path))])
    slots = np.concatenate([none, *(n.value for n in reversed(path))])
    if len(key) != req.prefix_len or not np.array_equal(key, tree.key(req.all_ids)[: len(key)]):
        raise InvariantError(f"request {req.rid} has locked {len(key)} tokens that are not its first {req.prefix_len}")
    wrong = np.nonzero(rows[req.row, : len(slots)] != slots)[0]
    if len(wrong):
        raise InvariantError(
            f"request {req.rid}: position {wrong[0]} points at slot {rows[req.row, wrong[0]]}, the tree has it at {slots[wrong[0]]}"
        )


def _check_rows(scheduler: "TPScheduler", active: list) -> None:
    used = [req.row for req in active]
    if len(set(used)) != len(used) or len(used) + scheduler.req_to_token.num_free != len(
        scheduler.req_to_token.req_to_token
    ):
        raise InvariantError(
            f"{len(used)} requests hold rows {sorted(used)[:8]}, {scheduler.req_to_token.num_free} are free"
        )
    for req in active:
        if not req.prefix_len <= req.kv_len <= req.allocated_len:
            raise InvariantError(
                f"request {req.rid}: prefix {req.prefix_len}, computed {req.kv_len}, allocated {req.allocated_len}"
            )
        row = scheduler.req_to_token.req_to_token[req.row]
        pages = row[: req.sent_len : scheduler.page_size] // scheduler.page_size
        known = scheduler.wrapper.table.page_table[req.row, : len(pages)].cpu().numpy()
        wrong = np.nonzero(known != pages)[0]
        if len(wrong):
            raise InvariantError(
                f"request {req.rid}: the ranks' page table says page {known[wrong[0]]} at {wrong[0]}, it is {pages[wrong[0]]}"
            )
