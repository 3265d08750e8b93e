"""The checks of the exercises: which wrong answers they find.

Long because it is a list: each wrong answer is a small function, to be read by itself.
"""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ch07_sglang_radix.exercises.check import EXERCISES
from ch07_sglang_radix.exercises.checks.ex4_longest_prefix_match import wanted
from ch07_sglang_radix.exercises.checks.trees import a_req, tree_with
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.schedule_policy import SchedulePolicy
from ch07_sglang_radix.tasks import PageUpdate
from tests import anatomy

module_of, outcome = EXERCISES.module_of, EXERCISES.outcome


def test_the_first_exercise_is_checked_without_torch():
    """It is what a reader does first, and on a cold disk torch and transformers take a quarter of a minute."""
    code = (
        "import sys; from ch07_sglang_radix.exercises.check import EXERCISES as e;"
        "print(e.outcome(1, e.module_of(1, solutions=True)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=anatomy.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["passed", "False"]


def test_the_rule_of_exercise_4_is_the_product_s():
    rng = np.random.default_rng(0)
    for _ in range(30):
        heads = [[1000 * h + i for i in range(80)] for h in range(3)]
        cached = [heads[rng.integers(3)][: rng.choice((10, 32, 33, 50))] for _ in range(2)]
        heads_of = [heads[rng.integers(3)][: rng.choice((12, 32, 40, 64))] for _ in range(8)]
        prompts = [head + [int(rng.integers(9))] * int(rng.choice((0, 3))) for head in heads_of]
        tree = tree_with(*cached, tree=RadixCache(TokenToKVPool(num_pages=500)))
        waiting = [a_req(i, prompt) for i, prompt in enumerate(prompts)]
        assert [req.rid for req in SchedulePolicy("lpm", tree).order(waiting)] == wanted(prompts, cached)


def right(number):
    return module_of(number, solutions=True)


# --- 1: the tree


def new_node_below(node, n):
    """The old node becomes the upper half: who holds it as the end of its path has lost the rest."""
    lower = {"key": node["key"][n:], "slots": node["slots"][n:], "children": node["children"], "parent": node,
             "lock_ref": node["lock_ref"]}  # fmt: skip
    for child in lower["children"].values():
        child["parent"] = lower
    node["key"], node["slots"], node["children"] = node["key"][:n], node["slots"][:n], {lower["key"][0]: lower}
    return node


def no_lock_inherited(node, n):
    upper = right(1).split(node, n)
    upper["lock_ref"] = 0
    return upper


def whole_edges_only(root, tokens):
    node, slots = root, []
    while True:
        rest = tokens[len(slots) :]
        child = node["children"].get(rest[0]) if rest else None
        if child is None or rest[: len(child["key"])] != child["key"]:
            return slots, node
        node, slots = child, slots + child["slots"]


def no_split(root, tokens):
    slots, node = whole_edges_only(root, tokens)
    rest = tokens[len(slots) :]
    child = node["children"].get(rest[0]) if rest else None
    if child:
        n = next((i for i, (a, b) in enumerate(zip(rest, child["key"], strict=False)) if a != b), len(rest))
        slots = slots + child["slots"][:n]
    return slots, node


# --- 2: pages


def unfloored(a, b, page_size):
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).cumprod().sum())


# --- 3: eviction


def forgets_locks(nodes):
    return min((node for node in nodes if not node.children), key=right(3).lfu, default=None)


def forgets_children(nodes):
    return min((node for node in nodes if node.lock_ref == 0), key=right(3).lfu, default=None)


# --- 4: the queue


def by_match_only(waiting, tree):
    return sorted(waiting, key=lambda req: -len(tree.match_prefix(req.all_ids[:-1]).slots))


def _lpm(
    waiting,
    tree,
    *,
    most=33,
    least=32,
    cut=0,
    less=1,
    limit=129,
    leader_waits=False,
    sort_those_who_wait=False,
    wait=True,
):
    """most: in the tree to wait, and a token more; least: shared to be waited for; limit: of the queue, and one more."""
    if len(waiting) >= limit:
        return list(waiting)
    ids = [req.all_ids[: len(req.all_ids) + cut] for req in waiting]
    matched = [len(tree.match_prefix(one).slots) for one in ids]
    found = [min(n, len(one) - less) for n, one in zip(matched, ids, strict=True)]
    follows = [False] * len(waiting)
    for i in range(len(waiting)) if wait else ():
        for j in range(len(waiting) if leader_waits else i):
            alike = right(4).shared_length(ids[i], ids[j]) >= least and i != j
            follows[i] |= alike and max(matched[i], matched[j]) < most and (leader_waits or not follows[j])
    keys = [(follows[i], -found[i] if sort_those_who_wait or not follows[i] else 0) for i in range(len(waiting))]
    return [waiting[i] for i in sorted(range(len(waiting)), key=keys.__getitem__)]


def sorts_the_queue_itself(waiting, tree):
    waiting[:] = right(4).lpm(waiting, tree)
    return waiting


def drops_those_who_wait(waiting, tree):
    ordered = right(4).lpm(waiting, tree)
    return [req for req in ordered if req in ordered[: len(ordered) - 1] or len(ordered) < 3]


# --- 5: admission


def _fits(memory, req, match, promised):
    return memory.whole_pages(req.max_len) - len(match.slots) <= memory.obtainable_slots() - promised


def count_then_lock(memory, req, match, promised):
    if not _fits(memory, req, match, promised):
        return False
    memory.tree.inc_lock_ref(match.last_node)
    memory.admit(req, match)
    return True


def never_lock(memory, req, match, promised):
    memory.tree.inc_lock_ref(match.last_node)
    fits = _fits(memory, req, match, promised)
    memory.tree.dec_lock_ref(match.last_node)
    if fits:
        memory.admit(req, match)
    return fits


def keeps_the_lock(memory, req, match, promised):
    memory.tree.inc_lock_ref(match.last_node)
    if not _fits(memory, req, match, promised):
        return False
    memory.admit(req, match)
    return True


# --- 6: the hand-over


def forgets_the_page_tables(tree, req):
    sent = req.sent_len
    right(6).cache_unfinished_req(tree, req)
    req.sent_len = sent


def _hand_over(tree, req, *, free="duplicates", rewrite=True, move_lock=True):
    ids, row = req.all_ids[: req.kv_len], tree.req_to_token.req_to_token[req.row]
    known = tree.insert(ids, row)
    match = tree.match_prefix(ids)
    first = 0 if free == "all known" else req.prefix_len
    if free == "after rewriting":
        row[: len(match.slots)] = match.slots
    if known > req.prefix_len and free != "nothing":
        tree.pool.free(row[first:known])
        req.sent_len = min(req.sent_len, req.prefix_len)
    if rewrite:
        row[: len(match.slots)] = match.slots
    tree.inc_lock_ref(match.last_node)
    if move_lock:
        tree.dec_lock_ref(req.last_node)
    req.last_node, req.prefix_len = match.last_node, len(match.slots)


# --- 7: the fully cached prompt


def no_cap(tree, prompt):
    slots = tree.match_prefix(prompt).slots
    return slots, prompt[len(slots) :]


def cap_after_the_match(tree, prompt):
    slots = tree.match_prefix(prompt).slots[: len(prompt) - 1]
    return slots, prompt[len(slots) :]


def all_again(tree, prompt):
    slots, tokens = no_cap(tree, prompt)
    return (slots, tokens) if tokens else (slots[:0], prompt)


# --- 8: overlap


def ends_twice(reqs, tokens, finish):
    for req, token in zip(reqs, tokens, strict=True):
        if not req.finish_reason:
            req.take_token(token, None)
        if req.finish_reason:
            req.kv_len = len(req.all_ids) - 1
            finish(req)


def takes_the_token_too_many(reqs, tokens, finish):
    for req, token in zip(reqs, tokens, strict=True):
        had_ended = req.finish_reason
        req.take_token(token, None)
        if req.finish_reason and not had_ended:
            req.kv_len = len(req.all_ids) - 1
            finish(req)


def counts_the_step_on_its_way(reqs, tokens, finish):
    def with_the_old_length(req):
        req.kv_len = before[req]
        finish(req)

    before = {req: req.kv_len for req in reqs}
    right(8).settle(reqs, tokens, with_the_old_length)


def tokens_of_the_wrong_requests(reqs, tokens, finish):
    still = [req for req in reqs if not req.finish_reason]
    right(8).settle(still, tokens[: len(still)], finish)


# --- 9: page updates


def says_everything(reqs, table, page_size):
    for req in reqs:
        req.sent_len = 0
    return right(9).page_updates(reqs, table, page_size)


def _updates(reqs, table, page_size, *, step=None, first=1, remember=True, empty=False):
    updates = []
    for req in reqs:
        slots = table[req.row, req.sent_len : req.allocated_len : page_size]
        if empty or len(slots):
            updates.append(PageUpdate(req.row, req.sent_len // (page_size * first) if first else req.sent_len,
                                      tuple((slots // (step or page_size)).tolist())))  # fmt: skip
        if remember:
            req.sent_len = req.allocated_len
    return tuple(updates)


# --- 10: retraction


def _retract(running, lacks_room, release, *, key, stay=1, ask_once=False):
    order, gone = sorted(running, key=key), []
    lacks = lacks_room()
    while len(running) > stay and lacks:
        req = order.pop(0)
        running.remove(req)
        release(req)
        gone.append(req)
        lacks = ask_once or lacks_room()
    return gone


def _loss(req):
    return len(req.output_ids), -len(req.prompt_ids)


def forgets_the_list(running, lacks_room, release):
    return right(10).retract(list(running), lacks_room, release)


def _with(function, **options):
    return lambda *args: function(*args, **options)


# --- 1, 2, 3: more of the tree


def lock_of_one(node, n):
    upper = right(1).split(node, n)
    upper["lock_ref"] = 1
    return upper


def not_filed(node, n):
    parent, first = node["parent"], node["key"][0]
    upper = right(1).split(node, n)
    parent["children"][first] = node
    return upper


def forgets_the_parent(node, n):
    upper = right(1).split(node, n)
    node["parent"] = upper["parent"]
    return upper


def cuts_one_late(node, n):
    return right(1).split(node, min(n + 1, len(node["key"]) - 1))


def new_upper_without_slots(node, n):
    upper = right(1).split(node, n)
    upper["slots"] = []
    return upper


def pops_the_tokens(root, tokens):
    found = right(1).match_prefix(root, tokens)
    del tokens[: len(found[0])]
    return found


def node_above(root, tokens):
    slots, node = right(1).match_prefix(root, tokens)
    return slots, node["parent"] or node


def slots_only(root, tokens):
    return right(1).match_prefix(root, tokens)[0]


def fails_on_nothing(root, tokens):
    return right(1).match_prefix(root, tokens) if tokens[0] >= 0 else None


def most_recent_of_equals(node):
    return node.hit_count, -node.last_access_time


def as_text(node):
    return f"{node.hit_count} {node.last_access_time}"


def the_first_leaf(nodes):
    return next((node for node in nodes if not node.children and not node.lock_ref), None)


def without_default(nodes):
    return min((node for node in nodes if not node.children and not node.lock_ref), key=right(3).lfu)


# --- 5, 6, 7, 8: more of a request's life


def _reserve(memory, req, match, promised, *, whole=True, length=None, strict=False):
    memory.tree.inc_lock_ref(match.last_node)
    tokens = req.max_len if length is None else length(req)
    needed = (memory.whole_pages(tokens) if whole else tokens) - len(match.slots)
    room = memory.obtainable_slots() - promised
    if needed > room or (strict and needed == room):
        memory.tree.dec_lock_ref(match.last_node)
        return False
    memory.admit(req, match)
    return True


def free_pages_only(memory, req, match, promised):
    if memory.whole_pages(req.max_len) - len(match.slots) > memory.pool.free_slots - promised:
        return False
    return right(5).reserve(memory, req, match, promised)


def twice_locked(memory, req, match, promised):
    got_in = right(5).reserve(memory, req, match, promised)
    if got_in:
        memory.tree.inc_lock_ref(match.last_node)
    return got_in


def forgets_to_admit(memory, req, match, promised):
    memory.tree.inc_lock_ref(match.last_node)
    if _fits(memory, req, match, promised):
        return True
    memory.tree.dec_lock_ref(match.last_node)
    return False


def forgets_prefix_len(tree, req):
    before = req.prefix_len
    right(6).cache_unfinished_req(tree, req)
    req.prefix_len = before


def does_nothing(tree, req):
    pass


def one_less(tree, prompt):
    slots = tree.match_prefix(prompt).slots
    slots = slots[: max(0, len(slots) - tree.page_size)]
    return slots, prompt[len(slots) :]


def tokens_of_the_cached_part(tree, prompt):
    slots, _ = right(7).split_prompt(tree, prompt)
    return slots, prompt[: len(slots)]


def last_token_only(tree, prompt):
    slots = tree.match_prefix(prompt[:-1]).slots
    return slots, prompt[-1:]


def never_finishes(reqs, tokens, finish):
    for req, token in zip(reqs, tokens, strict=True):
        if not req.finish_reason:
            req.take_token(token, None)


def counts_the_stop_token(reqs, tokens, finish):
    def with_one_more(req):
        req.kv_len += 1
        finish(req)

    right(8).settle(reqs, tokens, with_one_more)


def finishes_all(reqs, tokens, finish):
    for req, token in zip(reqs, tokens, strict=True):
        if not req.finish_reason:
            req.take_token(token, None)
            req.kv_len = len(req.all_ids) - 1
            finish(req)


def one_update_for_all(reqs, table, page_size):
    updates = right(9).page_updates(reqs, table, page_size)
    return updates[:1]


def to_the_end_of_the_row(reqs, table, page_size):
    updates = []
    for req in reqs:
        pages = table[req.row, req.sent_len :: page_size] // page_size
        updates.append(PageUpdate(req.row, req.sent_len // page_size, tuple(pages.tolist())))
        req.sent_len = req.allocated_len
    return tuple(updates)


def reverses_the_rest(running, lacks_room, release):
    gone = right(10).retract(running, lacks_room, release)
    running.reverse()
    return gone


def forgets_to_release(running, lacks_room, release):
    return right(10).retract(running, lacks_room, lambda req: None)


def without_the_last_stays(running, lacks_room, release):
    gone = []
    while lacks_room():
        req = min(running, key=_loss)
        running.remove(req)
        release(req)
        gone.append(req)
    return gone


def returns_nothing(running, lacks_room, release):
    right(10).retract(running, lacks_room, release)


# --- 11: pages


def _attend(q, k, v, pages, length, *, order=None, cut="before", tile=False, scale=True, shift=0, all_pages=False):
    size, group = k.shape[1], len(q) // k.shape[2]
    held = pages if all_pages else pages[: -(-length // size)]
    held = np.sort(held) if order == "sorted" else np.arange(len(held)) if order == "side by side" else held
    keys, values = (x[held].reshape(-1, *x.shape[2:]) for x in (k, v))
    stop = length + shift
    if cut == "before":
        keys, values = keys[:stop], values[:stop]
    spread = (lambda x: np.tile(x, (1, group, 1))) if tile else (lambda x: x.repeat(group, axis=1))
    keys, values = spread(keys), spread(values)
    scores = np.einsum("hd,shd->hs", q, keys) / (np.sqrt(q.shape[1]) if scale else 1)
    if cut == "masked":
        scores[:, stop:] = -np.inf
    weights = np.exp(scores - np.nan_to_num(scores).max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), values)


def values_of_the_keys(q, k, v, pages, length):
    return right(11).attend(q, k, k, pages, length)


# --- 12: the cut vocabulary


def _offer(logits, rank, vocab, *, padding=True, local=False, last=False, first=None):
    start = rank * logits.shape[1] if first is None else first
    own = logits[:, : max(0, vocab - rank * logits.shape[1])] if padding else logits
    if own.shape[1] == 0:
        return [(-np.inf, start)] * len(logits)
    at = [own.shape[1] - 1 - row[::-1].argmax() if last else row.argmax() for row in own]
    return [(row[i], int(i) + (0 if local else start)) for row, i in zip(own, at, strict=True)]


def no_offer_of_an_empty_share(logits, rank, vocab):
    own = logits[:, : max(0, vocab - rank * logits.shape[1])]
    return [(row.max(), rank * logits.shape[1] + row.argmax()) for row in own]


def of_the_last_row(offers):
    return [max((pair for rank in offers for pair in rank[-1:]), key=lambda p: (p[0], -p[1]))[1]] * len(offers[0])


# --- 13: draws


def _draw(weights, u, *, dtype=np.float64, side="right", total="line", by_weight=False):
    order = np.argsort(-weights, kind="stable") if by_weight else np.arange(len(weights))
    ends = np.cumsum(weights[order], dtype=dtype)
    length = {
        "line": ends[-1],
        "1": 1.0,
        "sum": weights.sum(),
        "float32": np.nextafter(np.float32(ends[-1]), np.float32(1e9)),
    }
    at = int(np.searchsorted(ends, u * length[total], side=side))
    return int(order[at]) if by_weight else at


def _numbers(weights, seeds, outputs, random, *, seed=lambda b, s: s, n=lambda b, n: n):
    return [right(13).draw(row, random(seed(b, s), n(b, k))) for b, (row, s, k) in
            enumerate(zip(weights, seeds, outputs, strict=True))]  # fmt: skip


def argmax(weights, u):
    return int(np.argmax(weights))


# --- 14: a step ahead


def _queue(reqs, *, position=lambda r: r.kv_len, token=None, ends=lambda r: len(r.output_ids) + r.pending, stopped=True,
           count=True, kv=True, waits=False):  # fmt: skip
    step = []
    for req in reqs:
        if (stopped and req.finish_reason) or ends(req) >= req.params.max_new_tokens or (waits and req.pending):
            continue
        fed = token(req) if token else -1 if req.pending else req.output_ids[-1]
        step.append((req, position(req), fed))
        req.pending += count
        req.kv_len += kv
    return step


# (exercise, what is wrong in the answer, words of the complaint)
WRONG = [
    (1, {"split": new_node_below}, "is the lower half; its key: got [1, 2, 3], wanted [4]"),
    (1, {"split": no_lock_inherited}, "lock_ref of the upper half"),
    (1, {"split": lock_of_one}, "lock_ref of the upper half"),
    (1, {"split": not_filed}, "is the upper half a child of the root: got False"),
    (1, {"split": forgets_the_parent}, "is its parent the node whose child it is"),
    (1, {"split": cuts_one_late}, "keys of the two halves"),
    (1, {"split": new_upper_without_slots}, "its slots: got [], wanted [40, 41, 42]"),
    (1, {"match_prefix": whole_edges_only}, "an edge that matches in part"),
    (1, {"match_prefix": no_split}, "tokens from the root to the node returned for [1, 2, 9]"),
    (1, {"match_prefix": pops_the_tokens}, "the caller's tokens"),
    (1, {"match_prefix": node_above}, "tokens from the root to the node returned"),
    (1, {"match_prefix": slots_only}, "returns two things"),
    (1, {"match_prefix": fails_on_nothing}, "got IndexError"),
    (2, {"aligned": lambda ids, page_size: ids}, "aligned: of 0 .. 6"),
    (2, {"aligned": lambda ids, page_size: ids[: (len(ids) - 1) // page_size * page_size]}, "aligned: of 0 .. 7"),
    (2, {"child_key": lambda key, page_size: int(key[0])}, "[1, 2, 3, 4] and [1, 2, 3, 5] have the same child_key"),
    (2, {"child_key": lambda key, page_size: tuple(key.tolist())}, "[1, 2, 3, 4] and [1, 2, 9, 9] have the same child_key"),
    (2, {"child_key": lambda key, page_size: frozenset(key[:page_size].tolist())}, "[1, 2] and [2, 1]"),
    (2, {"child_key": lambda key, page_size: "".join(map(str, key[:page_size].tolist()))}, "[1, 23] and [12, 3]"),
    (2, {"child_key": lambda key, page_size: int(key[:page_size].sum())}, "[1, 2] and [2, 1]"),
    (2, {"child_key": lambda key, page_size: int(np.bitwise_xor.reduce(key[:page_size]))}, "have the same child_key"),
    (2, {"child_key": lambda key, page_size: key[:page_size].tolist()}, "a child_key that can be a key of a dict"),
    (2, {"common_length": unfloored}, "with pages of 2: got 3, wanted 2"),
    (2, {"common_length": lambda a, b, page_size: min(len(a), len(b))}, "with pages of 1: got 4, wanted 3"),
    (2, {"common_length": lambda a, b, page_size: int((a[: len(b)] == b[: len(a)]).sum()) // page_size * page_size},
     "[1, 2, 3, 4] and [1, 9, 3, 4] share with pages of 2: got 2, wanted 0"),
    (3, {"lfu": lambda node: node.last_access_time}, "fewer uses go first"),
    (3, {"lfu": lambda node: node.hit_count}, "the one that was used longest ago goes first"),
    (3, {"lfu": lambda node: (-node.hit_count, node.last_access_time)}, "fewer uses go first"),
    (3, {"lfu": most_recent_of_equals}, "the one that was used longest ago goes first"),
    (3, {"lfu": as_text}, "2 uses go before 10"),
    (3, {"victim": forgets_locks}, "lock_ref of"),
    (3, {"victim": forgets_children}, "children of"),
    (3, {"victim": the_first_leaf}, "victim: (hit_count, last_access_time)"),
    (3, {"victim": without_default}, "got ValueError"),
    (3, {"victim": lambda nodes: None}, "victim: got None"),
    (4, {"lpm": by_match_only}, "one computes what two share, one waits"),
    (4, {"lpm": _with(_lpm, leader_waits=True)}, "one computes what two share, one waits"),
    (4, {"lpm": _with(_lpm, most=999)}, "33 of 70 tokens are in the tree"),
    (4, {"lpm": _with(_lpm, most=34)}, "33 of 70 tokens are in the tree"),
    (4, {"lpm": _with(_lpm, most=32)}, "32 of 70 tokens are in the tree: one waits"),
    (4, {"lpm": _with(_lpm, most=1)}, "32 of 70 tokens are in the tree: one waits"),
    (4, {"lpm": _with(_lpm, least=33)}, "32 shared tokens are"),
    (4, {"lpm": _with(_lpm, least=31)}, "31 shared tokens are not worth a wait"),
    (4, {"lpm": _with(_lpm, cut=-1)}, "equal prompts of 32 tokens share 32"),
    (4, {"lpm": _with(_lpm, less=0)}, "has found one token less"),
    (4, {"lpm": _with(_lpm, limit=999)}, "129 requests wait: as they came"),
    (4, {"lpm": _with(_lpm, limit=128)}, "128 requests wait: the longest match first"),
    (4, {"lpm": _with(_lpm, sort_those_who_wait=True)}, "those who wait keep the order of the queue"),
    (4, {"lpm": sorts_the_queue_itself}, "the queue itself stays as it is"),
    (4, {"lpm": drops_those_who_wait}, "got [0, 1], wanted [0, 1, 2]"),
    (5, {"reserve": count_then_lock}, "the 8 of its own prefix cannot be evicted for it: does it get in: got True"),
    (5, {"reserve": never_lock}, "slots that are locked: its path"),
    (5, {"reserve": keeps_the_lock}, "leaves no lock behind"),
    (5, {"reserve": lambda memory, req, match, promised: right(5).reserve(memory, req, match, 0)}, "5 of them promised"),
    (5, {"reserve": _with(_reserve, whole=False)}, "9 more tokens take whole pages"),
    (5, {"reserve": _with(_reserve, strict=True)}, "it fits exactly"),
    (5, {"reserve": _with(_reserve, length=lambda req: req.seq_len)}, "does it get in: got True, wanted False"),
    (5, {"reserve": _with(_reserve, length=lambda req: req.params.max_new_tokens)}, "does it get in: got True"),
    (5, {"reserve": free_pages_only}, "6 can be evicted: does it get in: got False"),
    (5, {"reserve": twice_locked}, "locked once: got 2"),
    (5, {"reserve": forgets_to_admit}, "memory.admit gives it a row"),
    (5, {"reserve": lambda *args: None}, "does it get in: got None, wanted False"),
    (6, {"cache_unfinished_req": forgets_the_page_tables}, "pages that the ranks go on reading"),
    (6, {"cache_unfinished_req": _with(_hand_over, free="all known")}, "got ValueError"),
    (6, {"cache_unfinished_req": _with(_hand_over, free="nothing")}, "free pages after request 1"),
    (6, {"cache_unfinished_req": _with(_hand_over, free="after rewriting")}, "are freed twice"),
    (6, {"cache_unfinished_req": _with(_hand_over, rewrite=False)}, "the row of request 1: the tree's slots"),
    (6, {"cache_unfinished_req": _with(_hand_over, move_lock=False)}, "slots that are locked at the end"),
    (6, {"cache_unfinished_req": forgets_prefix_len}, "prefix_len of request 0"),
    (6, {"cache_unfinished_req": does_nothing}, "tokens of request 0 that are in the tree"),
    (7, {"split_prompt": no_cap}, "is a token computed, to take logits from"),
    (7, {"split_prompt": cap_after_the_match}, "that are no whole page"),
    (7, {"split_prompt": all_again}, "tokens from the cache: got 0, wanted 11"),
    (7, {"split_prompt": one_less}, "tokens from the cache: got 11, wanted 12"),
    (7, {"split_prompt": tokens_of_the_cached_part}, "tokens that are computed"),
    (7, {"split_prompt": last_token_only}, "tokens that are computed"),
    (7, {"split_prompt": lambda tree, prompt: (np.zeros(0, dtype=np.int64), prompt)}, "tokens from the cache: got 0"),
    (8, {"settle": ends_twice}, "once each"),
    (8, {"settle": takes_the_token_too_many}, "its output: got [4, 7, 8]"),
    (8, {"settle": counts_the_step_on_its_way}, "all tokens but the newest"),
    (8, {"settle": tokens_of_the_wrong_requests}, "its output: got [4, 5, 8]"),
    (8, {"settle": never_finishes}, "finish was called for"),
    (8, {"settle": counts_the_stop_token}, "all tokens but the newest"),
    (8, {"settle": finishes_all}, "finish was called for"),
    (9, {"page_updates": says_everything}, "row 1 has one new page"),
    (9, {"page_updates": _with(_updates, remember=False)}, "what was sent once is known"),
    (9, {"page_updates": _with(_updates, step=1)}, "row 1 has one new page"),
    (9, {"page_updates": _with(_updates, first=0)}, "row 1 has one new page"),
    (9, {"page_updates": _with(_updates, empty=True)}, "what was sent once is known"),
    (9, {"page_updates": one_update_for_all}, "row 3 two"),
    (9, {"page_updates": to_the_end_of_the_row}, "row 1 has one new page"),
    (9, {"page_updates": lambda reqs, table, page_size: None}, "wanted a tuple of updates, got None"),
    (10, {"retract": _with(_retract, key=lambda req: -req.rid)}, "3 and 1 have the fewest outputs"),
    (10, {"retract": _with(_retract, key=lambda req: -len(req.output_ids))}, "3 and 1 have the fewest outputs"),
    (10, {"retract": _with(_retract, key=lambda req: (len(req.output_ids), len(req.prompt_ids)))}, "3 the longer prompt"),
    (10, {"retract": _with(_retract, key=_loss, stay=0)}, "the last one stays in any case"),
    (10, {"retract": without_the_last_stays}, "wanted [3, 1, 2, 0] go: there is never room: the last one stays in any case, got V"),
    (10, {"retract": without_the_last_stays}, "the last one stays in any case"),
    (10, {"retract": _with(_retract, key=_loss, ask_once=True)}, "then there is room"),
    (10, {"retract": forgets_the_list}, "requests left in `running`"),
    (10, {"retract": reverses_the_rest}, "in their order"),
    (10, {"retract": forgets_to_release}, "requests released"),
    (10, {"retract": returns_nothing}, "requests returned"),
    (11, {"attend": _with(_attend, order="sorted")}, "two pages, the last one not full"),
    (11, {"attend": _with(_attend, order="side by side")}, "NaN"),
    (11, {"attend": _with(_attend, cut="masked")}, "two pages, the last one not full"),
    (11, {"attend": _with(_attend, cut="nothing")}, "two pages, the last one not full"),
    (11, {"attend": _with(_attend, tile=True)}, "heads that are not softmax"),
    (11, {"attend": _with(_attend, scale=False)}, "heads that are not softmax"),
    (11, {"attend": _with(_attend, shift=-1)}, "heads that are not softmax"),
    (11, {"attend": _with(_attend, all_pages=True, cut="masked")}, "NaN"),
    (11, {"attend": values_of_the_keys}, "heads that are not softmax"),
    (11, {"attend": lambda q, k, v, pages, length: right(11).attend(q, k, v, pages, length).ravel()}, "shape"),
    (12, {"offer": _with(_offer, padding=False)}, "all logits are negative, and padding is zero"),
    (12, {"offer": _with(_offer, local=True)}, "rank 1 offers the tokens"),
    (12, {"offer": _with(_offer, last=True)}, "equal logits on one rank"),
    (12, {"offer": no_offer_of_an_empty_share}, "got ValueError"),
    (12, {"offer": lambda logits, rank, vocab: right(12).offer(logits[:1], rank, vocab)}, "three rows of random logits"),
    (12, {"choose": lambda offers: [max(row)[1] for row in zip(*offers, strict=True)]}, "equal logits on two ranks"),
    (12, {"choose": lambda offers: [row[0][1] for row in zip(*offers, strict=True)]}, "the tokens: got [1], wanted [3]"),
    (12, {"choose": lambda offers: [max(row, key=lambda p: p[1])[1] for row in zip(*offers, strict=True)]}, "the tokens"),
    (12, {"choose": of_the_last_row}, "three rows of random logits"),
    (13, {"draw": _with(_draw, dtype=np.float32)}, "150000 tokens, all equal"),
    (13, {"draw": _with(_draw, dtype=np.float32, total="1")}, "weights [1, 0, 3], u = 0.25"),
    (13, {"draw": _with(_draw, side="left")}, "belongs to the second: weights [1, 0, 3], u = 0.25: got 0, wanted 2"),
    (13, {"draw": _with(_draw, total="1")}, "got 0, wanted 2"),
    (13, {"draw": _with(_draw, dtype=np.float32, total="sum")}, "150000 tokens, all equal"),
    (13, {"draw": _with(_draw, total="float32")}, "the last tokens have no weight"),
    (13, {"draw": _with(_draw, by_weight=True)}, "got"),
    (13, {"draw": argmax}, "the first piece"),
    (13, {"draw": lambda weights, u: right(13).draw(weights, 1 - u)}, "got"),
    (13, {"draw_batch": _with(_numbers, seed=lambda b, s: 0)}, "six requests"),
    (13, {"draw_batch": _with(_numbers, n=lambda b, n: 0)}, "six requests"),
    (13, {"draw_batch": _with(_numbers, n=lambda b, n: n + b)}, "six requests"),
    (13, {"draw_batch": _with(_numbers, n=lambda b, n: n + 1)}, "six requests"),
    (13, {"draw_batch": _with(_numbers, seed=lambda b, s: s + b)}, "six requests"),
    (14, {"queue_decode": _with(_queue, position=lambda r: len(r.prompt_ids) + len(r.output_ids) - 1)},
     "its last token is on its way"),
    (14, {"queue_decode": _with(_queue, position=lambda r: len(r.prompt_ids) + len(r.output_ids) + r.pending)},
     "(position, token)"),
    (14, {"queue_decode": _with(_queue, token=lambda r: -1)}, "its last token is known"),
    (14, {"queue_decode": _with(_queue, token=lambda r: (r.output_ids or [0])[-1])}, "its last token is on its way"),
    (14, {"queue_decode": _with(_queue, ends=lambda r: len(r.output_ids))}, "one token is missing, and it is on its way"),
    (14, {"queue_decode": _with(_queue, ends=lambda r: len(r.output_ids) + r.pending + 1)}, "two tokens are missing"),
    (14, {"queue_decode": _with(_queue, stopped=False)}, "it has ended"),
    (14, {"queue_decode": _with(_queue, waits=True)}, "its last token is on its way"),
    (14, {"queue_decode": _with(_queue, count=False)}, "pending and kv_len afterwards"),
    (14, {"queue_decode": _with(_queue, kv=False)}, "pending and kv_len afterwards"),
    (14, {"queue_decode": lambda reqs: [one[1:] for one in right(14).queue_decode(reqs)]}, "got"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "instead", "words"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead, words):
    answer = SimpleNamespace(
        **{name: value for name, value in vars(right(number)).items() if callable(value)} | instead
    )
    said = outcome(number, answer)
    assert said.startswith("not yet: ")
    assert words in said
    assert "got " in said
    assert "\n" not in said


def test_every_exercise_has_wrong_answers_that_are_caught():
    assert all(sum(number == n for number, *_ in WRONG) >= 5 for n in EXERCISES.numbers)
