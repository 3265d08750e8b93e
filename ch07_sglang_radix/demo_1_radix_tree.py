"""The radix tree, printed after every change. One token is one word.

    python ch07_sglang_radix/demo_1_radix_tree.py

A pool of 20 slots of one token each, and no model: what a slot holds does not matter here, only who holds it. Insert,
split, match, lock, evict, and two requests that compute the same; each line is an edge with its words and its slots.
"""

import numpy as np

from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from common.distributed.launch import run_main
from common.teaching.show import check, heading

WORDS: dict[str, int] = {}


def main() -> None:
    pool = TokenToKVPool(num_pages=20)
    tree = RadixCache(pool)

    heading("Insert: the first prompt is one edge")
    put(tree, "what is a page table")
    show(tree)

    heading("Split: the second one leaves it after three words")
    put(tree, "what is a radix tree")
    show(tree)
    check("7 slots hold 10 words: three of them are shared", pool.size - pool.free_slots == 7)

    heading("Match: what of a third one is there already?")
    match = tree.match_prefix(ids("what is a radix cache"))
    print(f"  'what is a radix cache': {said(tree, match)} has slots {match.slots.tolist()}")
    show(tree)
    check("a match in the middle of an edge cuts it, or its end could not be locked", tree.splits == 2)
    nothing = tree.match_prefix(ids("define radix tree"))
    check("only a beginning counts: words further on match nothing", len(nothing.slots) == 0)

    heading("Lock: a running request protects its path to the root")
    before = tree.evictable_size
    tree.inc_lock_ref(match.last_node)
    show(tree)
    left = tree.evictable_size
    check(f"{before} slots could be evicted, {left} can now: those of 'page table' and 'tree'", left == 3)

    heading("Evict: leaves go, the least recently used first; a parent only when its last child has gone")
    freed = tree.evict(1)
    print(f"  1 slot wanted, {freed} freed: a leaf goes as a whole")
    show(tree)
    freed = tree.evict(20)
    print(f"  20 slots wanted, {freed} freed: the rest is in use")
    show(tree)
    check("what is locked is still there", len(tree.match_prefix(ids("what is a radix cache")).slots) == 4)

    heading("Two requests compute the same words at the same time: one copy is enough")
    computed = ids("what is a radix cache")
    for name in ("first", "second"):
        known = len(match.slots)  # both found so much when they began
        own = pool.alloc(len(computed) - known)
        there = tree.insert(computed, np.concatenate([match.slots, own]))
        print(f"  the {name} one computes a word into slot {own.tolist()}; at its insert {there} of 5 are there")
        pool.free(own[: there - known])  # the duplicates are the caller's to free
    show(tree)
    check("nothing is held twice", pool.free_slots == pool.size - 5)

    heading("The request ends: unlocked, all of it may go")
    tree.dec_lock_ref(match.last_node)
    show(tree)
    tree.evict(5)
    show(tree)
    check("leaf, then its parent: all 20 slots are free again", pool.free_slots == 20)

    heading("Another name, another tree: extra_key keeps equal words apart")
    put(tree, "what is a page", extra_key="adapter 1")
    page, names = ids("what is a page"), ("adapter 1", "adapter 2", None)
    found = {name: len(tree.match_prefix(page, name).slots) for name in names}
    show(tree)
    check("only the adapter that computed the words finds them", found == {"adapter 1": 4, "adapter 2": 0, None: 0})


def ids(sentence: str) -> list[int]:
    return [WORDS.setdefault(word, len(WORDS)) for word in sentence.split()]


def put(tree: RadixCache, sentence: str, extra_key: str | None = None) -> None:
    """What a prompt does: match, take slots for the rest, "compute" them, and insert only then."""
    prompt = ids(sentence)
    known = tree.match_prefix(prompt, extra_key).slots
    slots = np.concatenate([known, tree.pool.alloc(len(prompt) - len(known))])
    tree.insert(prompt, slots, extra_key)
    print(f"  '{sentence}': {len(known)} of {len(prompt)} words found, slots {slots.tolist()}")


def words(key: np.ndarray) -> str:
    names = list(WORDS)
    return " ".join(names[token] for token in key)


def said(tree: RadixCache, match) -> str:
    """The words on the path from the root to the node that a match has found."""
    path, node = [], match.last_node
    while node.parent is not None:
        path.append(words(node.key))
        node = node.parent
    return "'" + " ".join(reversed(path)) + "'"


def show(tree: RadixCache) -> None:
    for line in tree.pretty(words).splitlines():
        print(f"    {line}")
    pool, free = tree.pool, tree.pool.free_slots
    print(f"  {free} free + {tree.evictable_size} evictable + {tree.protected_size} protected = {pool.size} slots")
    if free + tree.evictable_size + tree.protected_size != pool.size:
        raise SystemExit("check failed: a slot is lost or has two owners")


if __name__ == "__main__":
    run_main(main)
