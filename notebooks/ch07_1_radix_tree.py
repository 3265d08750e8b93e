# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chapter 7, notebook 1: the radix tree, drawn
#
# A pool of 16 slots and a tree over it, without a model: what a slot holds does not matter here, only who holds it. One token is one word. The
# pictures are drawn from what `RadixCache.nodes()` returns: a box is a node, each cell of it a word with its slot below; further right is further on in
# the prompt. Below the tree stand the slots of the pool.
#
# **Predict first:** three prompts are inserted, "what is a page table", "what is a radix tree", "what is a page". How many nodes does the tree
# have after each of them, and how many slots are taken?

# %%
import matplotlib.pyplot as plt
import numpy as np

from ch07_sglang_radix.benchmarks.clients import Clients
from ch07_sglang_radix.benchmarks.workloads import WORKLOADS, Source
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from ch07_sglang_radix.tree_node import TreeNode

FREE, EVICTABLE, LOCKED, OWN = "white", "#c6dbef", "#fdae6b", "#d9d9d9"
TOUCHED, NEVER = "#238b45", 1 << 62
RANKS = ("", "1st", "2nd", "3rd", "4th", "5th", "6th")
words: list[str] = []


def ids(sentence: str) -> list[int]:
    """A number for each word, the same one for the same word."""
    words.extend(word for word in dict.fromkeys(sentence.split()) if word not in words)
    return [words.index(word) for word in sentence.split()]


def put(tree: RadixCache, sentence: str) -> int:
    """What a prompt does: match, take slots for the rest, "compute" them, and insert only then. Returns the words found."""
    prompt = ids(sentence)
    known = tree.match_prefix(prompt).slots
    new = tree.pool.alloc((len(prompt) - len(known)) // tree.page_size)
    tree.insert(prompt, np.concatenate([known, new]))
    return len(known)


def places(tree: RadixCache) -> dict[TreeNode, tuple[int, float]]:
    """Node -> (tokens before it, row): leaves take a row each, a parent stands in the middle of its children."""
    at: dict[TreeNode, tuple[int, float]] = {}
    row = 0

    def visit(node: TreeNode, before: int) -> float:
        nonlocal row
        rows = [visit(child, before + len(node.key)) for child in node.children.values()]
        if not rows:
            rows, row = [row], row + 1
        at[node] = before, (rows[0] + rows[-1]) / 2
        return at[node][1]

    for node in list(tree.nodes()):
        if node.parent is tree.root:
            visit(node, 0)
    return at


def draw(axis, tree: RadixCache, since: int, title: str = "", own: tuple = (), order: dict | None = None) -> int:
    """Draw tree and pool; nodes used after the time `since` have a green frame. Returns the time of this picture."""
    at = places(tree)
    for node, (x, y) in at.items():
        if node.parent is not tree.root:
            px, py = at[node.parent]
            axis.plot([px + len(node.parent.key) - 0.04, x + 0.04], [py, y], color="0.4", lw=1.2, zorder=1)
        colour = LOCKED if node.lock_ref else EVICTABLE
        axis.add_patch(plt.Rectangle((x + 0.04, y - 0.36), len(node.key) - 0.08, 0.72, fc=colour, ec="0.4", zorder=2))
        for i, (token, slot) in enumerate(zip(node.key, node.value, strict=True)):
            axis.text(x + i + 0.5, y - 0.1, words[token], ha="center", va="center", fontsize=9, zorder=4)
            axis.text(x + i + 0.5, y + 0.2, str(slot), ha="center", va="center", fontsize=8, color="0.3", zorder=4)
        if node.last_access_time > since:
            frame = plt.Rectangle(
                (x + 0.04, y - 0.36), len(node.key) - 0.08, 0.72, fill=False, ec=TOUCHED, lw=2.5, zorder=3
            )
            axis.add_patch(frame)
        if node.lock_ref:
            axis.text(x + 0.08, y - 0.42, f"locked by {node.lock_ref}", fontsize=8, va="bottom", color="#a63603")
        if order and node in order:
            axis.text(
                x + len(node.key) - 0.1, y - 0.42, f"goes {RANKS[order[node]]}", fontsize=8, ha="right", va="bottom"
            )
    held = {int(slot): LOCKED if node.lock_ref else EVICTABLE for node in at for slot in node.value}
    held |= {int(slot): OWN for slot in own}
    bottom = max([y for _, y in at.values()], default=0) + 0.75
    for slot in range(tree.pool.size):
        left = slot * WIDTH / tree.pool.size
        axis.add_patch(
            plt.Rectangle((left, bottom), WIDTH / tree.pool.size, 0.3, fc=held.get(slot, FREE), ec="0.6", lw=0.6)
        )
        axis.text(left + WIDTH / tree.pool.size / 2, bottom + 0.16, str(slot), ha="center", va="center", fontsize=7)
    if not at:
        axis.text(0.04, 0.15, "(empty)", fontsize=9, color="0.4")
    axis.set_xlim(-0.05, WIDTH + 0.05)
    axis.set_ylim(bottom + 0.35, -0.62)
    axis.axis("off")
    axis.set_title(title, fontsize=10, loc="left")
    free = tree.pool.free_slots
    assert free + len(own) + tree.evictable_size + tree.protected_size == tree.pool.size, "a slot is lost"
    return max([node.last_access_time for node in at], default=since)


def legend(figure, *names: str) -> None:
    box = plt.Rectangle
    boxes = {
        "evictable": box((0, 0), 1, 1, fc=EVICTABLE, ec="0.4"),
        "locked": box((0, 0), 1, 1, fc=LOCKED, ec="0.4"),
        "just touched": box((0, 0), 1, 1, fc="white", ec=TOUCHED, lw=2.5),
        "a request's own": box((0, 0), 1, 1, fc=OWN, ec="0.6"),
        "free": box((0, 0), 1, 1, fc=FREE, ec="0.6"),
    }
    figure.legend([boxes[name] for name in names], names, loc="lower center", ncol=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))


WIDTH = 6  # words in the widest picture
tree = RadixCache(TokenToKVPool(num_pages=16))
sentences = ("what is a page table", "what is a radix tree", "what is a page")
figure, axes = plt.subplots(3, 1, figsize=(7.5, 6), height_ratios=(1.5, 2.5, 2.5))
now = 0
for axis, sentence in zip(axes, sentences, strict=True):
    known = put(tree, sentence)
    nodes, taken = len(list(tree.nodes())), tree.pool.size - tree.pool.free_slots
    title = f'insert "{sentence}": {known} words found; nodes: {nodes}, slots taken: {taken}'
    now = draw(axis, tree, now, title)
legend(figure, "evictable", "just touched", "free")
plt.show()
assert taken == 7

# %% [markdown]
# The second prompt leaves the first after three words: the node is split there, and the shared part is held once. The third one is there as a whole;
# it takes no slot, but it too cuts a node, because it ends in the middle of it.
#
# **Predict:** now only ask: `match_prefix("what is a radix cache")`. Does asking change the tree?

# %%
figure, axes = plt.subplots(2, 1, figsize=(7.5, 4.8))
match = tree.match_prefix(ids("what is a radix cache"))
now = draw(axes[0], tree, now, f'match "what is a radix cache": slots {match.slots.tolist()}')
tree.inc_lock_ref(match.last_node)
draw(axes[1], tree, now, "lock the node where the match ends")
legend(figure, "evictable", "locked", "just touched", "free")
plt.show()
assert tree.protected_size == 4

# %% [markdown]
# Twice: what it walked over counts as used now, and "radix tree" is cut, so that "radix" can be locked and "tree" cannot hinder anybody. A lock holds for the
# whole path to the root; what branches off stays evictable.
#
# **Predict:** the request runs and is computing "cache" in a slot of its own. Somebody needs room: `evict(1)`, and then `evict(16)`. What
# goes first, and what is left?

# %%
figure, axes = plt.subplots(3, 1, figsize=(7.5, 6.6), height_ratios=(3, 2.2, 1.5))
own = tree.pool.alloc(1)
draw(axes[0], tree, now, f'the request takes slot {own.tolist()} for "cache"', own)
freed = tree.evict(1)
draw(axes[1], tree, now, f"evict(1) gives back {freed} slot", own)
freed = tree.evict(16)
draw(axes[2], tree, now, f"evict(16) gives back {freed} slots", own)
legend(figure, "evictable", "locked", "a request's own", "free")
plt.show()
assert [len(node.key) for node in tree.nodes()] == [3, 1]

# %% [markdown]
# "table" was last used by the first prompt, "tree" by the second: "table" goes first. Then 16 slots are wanted, and the tree gives the two that no
# running request stands on: "page" became a leaf when "table" went.
#
# **Predict:** the request is computed, and so is a second one that began at the same time with the same words: it has computed "cache"
# in another slot. Both insert. Which slot stays, and which locks are there when the first one ends?

# %%
figure, axes = plt.subplots(3, 1, figsize=(7.5, 4.9))
prompt = ids("what is a radix cache")
nodes, since = [match.last_node] * 2, now
tree.inc_lock_ref(match.last_node)  # the second request's
slots = [own, tree.pool.alloc(1)]
for i, name in enumerate(("first", "second")):
    there = tree.insert(prompt, np.concatenate([match.slots, slots[i]]))
    tree.pool.free(slots[i][: there - len(match.slots)])  # duplicates are the caller's to free
    new = tree.match_prefix(prompt).last_node
    tree.inc_lock_ref(new)  # the lock moves on to the new node: the new one first
    tree.dec_lock_ref(nodes[i])
    nodes[i] = new
    left = tuple(int(slots[1][0]) for _ in range(1 - i))
    title = (
        f"the {name} one inserts: {there} of 5 words are there, slot {slots[i].tolist()} " + ("stays", "is freed")[i]
    )
    since = draw(axes[i], tree, since, title, left)
tree.dec_lock_ref(nodes[0])
draw(axes[2], tree, since, "the first one ends")
legend(figure, "locked", "just touched", "a request's own", "free")
plt.show()
tree.dec_lock_ref(nodes[1])
assert tree.protected_size == 0
assert tree.evictable_size == 5

# %% [markdown]
# The slot of the one that inserted first stays; the other's is freed, and the second request goes on with the tree's. Locks are counted: the path stays
# locked until the last one lets go. (`cache_unfinished_req` does these steps for a real request.)
#
# **Predict:** five prompts, some of them used again later. Nothing is locked; `evict` is called until nothing is left. In which order do
# the nodes go under lru, lfu, fifo and mru? Which rule holds for all four?

# %%
WIDTH = 3
history = ("ask a cat", "ask a cat", "ask a dog", "tell a cat", "ask a cat", "tell a bird", "ask a dog", "tell a cat")
print("history: " + ", ".join(history))


def grown(eviction: str) -> RadixCache:
    tree = RadixCache(TokenToKVPool(num_pages=10), eviction=eviction)
    for sentence in history:
        put(tree, sentence)
    return tree


figure, axes = plt.subplots(2, 2, figsize=(10, 6.6))
orders = {}
for axis, eviction in zip(axes.flat, ("lru", "lfu", "fifo", "mru"), strict=True):
    tree, twin = grown(eviction), grown(eviction)
    left = dict(zip(twin.nodes(), tree.nodes(), strict=True))  # the twin is evicted, the tree is drawn
    order: dict[TreeNode, int] = {}
    while left:
        twin.evict(1)
        (gone,) = left.keys() - set(twin.nodes())
        order[left.pop(gone)] = len(order) + 1
    draw(axis, tree, since=NEVER, title=eviction, order=order)
    orders[eviction] = [" ".join(words[token] for token in node.key) for node in order]
legend(figure, "evictable", "free")
plt.show()
for eviction, order in orders.items():
    print(f"{eviction:5s}" + ", ".join(order))

# %% [markdown]
# A parent goes after its last child, in any order: whoever is below it needs it. Besides that, lru looks at the last use, fifo at when a node came to
# be (the upper half of a cut is a new node), lfu at how many requests have come by, and mru turns lru round. (`ask a` goes third under fifo, before
# younger leaves: once it has no child, it is a leaf like any other.)
#
# **Predict:** pages of two words, and the prompts "what is a page table now" and "what is a radix tree now". How many words are shared?

# %%
WIDTH = 6
figure, axes = plt.subplots(2, 1, figsize=(7.5, 4.4), height_ratios=(1.5, 2.5))
tree, now = RadixCache(TokenToKVPool(num_pages=8, page_size=2)), 0
for axis, sentence in zip(axes, ("what is a page table now", "what is a radix tree now"), strict=True):
    known = put(tree, sentence)
    now = draw(axis, tree, now, f'pages of 2: insert "{sentence}", {known} words found')
legend(figure, "evictable", "just touched", "free")
plt.show()
assert known == 2

# %% [markdown]
# Two: "a" stands on a page with what comes after it, and a page is shared as a whole or not at all.
#
# Now trees that the real scheduler has left, with the bundled model and four of the workloads of [workloads.py](../ch07_sglang_radix/benchmarks/workloads.py). A
# bar is a node, as long as it has tokens. **Predict:** what does the tree look like after conversations behind one system prompt, after questions
# behind the worked examples of four tasks, after a search that tries three ways at each of three levels, after eight answers to each question?

# %%
wrapper = TPRadixAttentionModelWrapper(device="cpu", max_total_tokens=8192)
scales = {"multi-turn chat": 0.25, "few-shot": 0.33, "tree of thought": 0.5, "self-consistency": 0.33}
figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True)
for axis, (name, scale) in zip(axes.flat, scales.items(), strict=True):
    scheduler = TPScheduler(wrapper)
    outputs = Clients(scheduler, WORKLOADS[name](Source(wrapper.config.vocab_size), scale)).run().values()
    tree = scheduler.tree
    for node, (x, y) in places(tree).items():
        deep = plt.cm.Blues(0.75 if node.children else 0.4)
        axis.barh(y, len(node.key), 0.8, left=x, color=deep, edgecolor="white", lw=0.8)
        for child in node.children.values():
            axis.plot([x + len(node.key)] * 2, [y, places(tree)[child][1]], color="0.5", lw=0.6, zorder=0)
    axis.invert_yaxis()
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)
    prompt, cached = (sum(getattr(out, what) for out in outputs) for what in ("prompt_tokens", "cached_tokens"))
    axis.set_title(
        f"{name}: {len(outputs)} requests, {cached / prompt:.0%} of {prompt:,} prompt tokens hit", fontsize=10
    )
    assert tree.evicted == 0
for axis in axes[1]:
    axis.set_xlabel("tokens from the beginning of the prompt")
figure.tight_layout()
plt.show()

# %% [markdown]
# **Conclude.** Dark bars are nodes with something behind them: computed once, used by all that follow. A cut without a branch is where a prompt or an
# answer ended, or where the match of a later one did. Nobody told the tree about chats or searches; it has the shape of what was asked.
#
# **Try it:** take `TokenToKVPool(num_pages=8)` in the first cell. Which insert fails, and what has to happen before it?
