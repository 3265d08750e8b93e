"""Conservation: no page is lost and none has two owners.

free + cached (evictable + protected) + owned by requests = all pages
"""

import numpy as np

from ch07_sglang_radix.schedule_batch import ScheduleBatch
from ch07_sglang_radix.scheduler_state import SchedulerState


class InvariantError(AssertionError):
    """The pools and the tree contradict each other; the text names page and owners."""


def check_invariants(state: SchedulerState) -> None:
    """Walk over everything rank 0 keeps (rank 0 only; O(pages)). Raises InvariantError."""
    _check_nodes(state)
    owner: dict[int, str] = {}
    for who, pages in state.owners():
        for page in pages.tolist():
            if page in owner:
                raise InvariantError(f"page {page} has two owners: {owner[page]} and {who}")
            owner[page] = who
    lost = sorted(set(range(state.pool.num_pages)) - owner.keys())
    if lost:
        raise InvariantError(f"{len(lost)} of {state.pool.num_pages} pages belong to nobody: {lost[:8]}")
    for req in state.admitted:
        _check_prefix(req, state.tree, state.req_to_token.req_to_token)
    _check_rows(state, state.admitted)
    for batch in state.batches:
        _check_batch(batch)


def _check_nodes(state: SchedulerState) -> None:
    """Every node holds whole pages, is found where it should be, and is locked by those who run through it."""
    tree, page_size = state.tree, state.pool.page_size
    locks: dict[int, int] = {}
    for user in [*state.admitted, *(user for more in state.more_users for user in more())]:
        node = user.last_node
        while node.parent is not None:
            locks[id(node)] = locks.get(id(node), 0) + 1
            node = node.parent
    evictable = protected = 0
    for node in tree.nodes():
        name = f"node {node.key[:4].tolist()}..."
        if not tree.sound(node) or len(node.key) % page_size or not len(node.key):
            raise InvariantError(f"{name}: {len(node.key)} tokens, {len(node.value)} slots, page size {page_size}")
        if node.parent.children.get(tree.name_of(node)) is not node:
            raise InvariantError(f"{name} is not where its first page says")
        if node.lock_ref != locks.get(id(node), 0):
            raise InvariantError(
                f"{name} has lock_ref={node.lock_ref}, but {locks.get(id(node), 0)} requests and sessions run through it"
            )
        starts = node.value[::page_size]
        if (node.value.reshape(-1, page_size) != starts[:, None] + np.arange(page_size)).any() or (
            starts % page_size
        ).any():
            raise InvariantError(f"{name}: its slots are not whole pages")
        if node.lock_ref:
            protected += len(node.value)
        else:
            evictable += len(node.value)
    if (evictable, protected) != (tree.evictable_size, tree.protected_size):
        raise InvariantError(
            f"the tree counts {tree.evictable_size} evictable and {tree.protected_size} protected slots, "
            f"its nodes hold {evictable} and {protected}"
        )


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


def _check_batch(batch: ScheduleBatch) -> None:
    """The arrays of a decode batch say what its requests say; of those that have ended nobody asks it any more."""
    for i, req in enumerate(batch.reqs):
        told = tuple(x[i] for x in (batch.rows, batch.positions, batch.ends))
        if not req.ended and told != (req.row, req.kv_len, req.allocated_len):
            raise InvariantError(
                f"request {req.rid}: its batch has row, position and end of its pages {told}, it has "
                f"{(req.row, req.kv_len, req.allocated_len)}"
            )
        if not req.ended and req.wanted < batch.steps_left:
            raise InvariantError(
                f"request {req.rid} wants {req.wanted} tokens more, its batch believes {batch.steps_left} of all"
            )


def _check_rows(state: SchedulerState, active: list) -> None:
    used = [req.row for req in active]
    if len(set(used)) != len(used) or len(used) + state.req_to_token.num_free != len(state.req_to_token.req_to_token):
        raise InvariantError(
            f"{len(used)} requests hold rows {sorted(used)[:8]}, {state.req_to_token.num_free} are free"
        )
    for req in active:
        if not req.prefix_len <= req.kv_len <= req.allocated_len:
            raise InvariantError(
                f"request {req.rid}: prefix {req.prefix_len}, computed {req.kv_len}, allocated {req.allocated_len}"
            )
        if state.number:  # the page table that knows it lies on ranks of its own
            continue
        row = state.req_to_token.req_to_token[req.row]
        pages = row[: req.sent_len : state.page_size] // state.page_size
        known = state.wrapper.table.page_table[req.row, : len(pages)].cpu().numpy()
        wrong = np.nonzero(known != pages)[0]
        if len(wrong):
            raise InvariantError(
                f"request {req.rid}: the ranks' page table says page {known[wrong[0]]} at {wrong[0]}, it is {pages[wrong[0]]}"
            )
