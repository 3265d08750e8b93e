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
# # Chapter 7, notebook 10: a prompt that changes engines
#
# Two engines in this process, one that computes prompts and one that writes answers, and a real TCP link between them
# ([local_pair.py](../ch07_sglang_radix/disaggregation/local_pair.py)). A prompt of 256 tokens is computed in chunks of 32; pages have 4
# tokens. After each step it is written down how many pages are computed, how many were told to leave, and how many have landed.
#
# **Predict:** how many pages have landed at the moment at which the last chunk is computed?

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

from ch07_sglang_radix.disaggregation.head_slices import head_slices
from ch07_sglang_radix.disaggregation.local_pair import Pair
from ch07_sglang_radix.disaggregation.messages import Reserve, Write
from ch07_sglang_radix.disaggregation.rooms import State
from common.layers.heads import HeadLayout

BLUE, ORANGE, GREEN, RED, GREY = "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#999999"
PAGE, TOKENS, CHUNK = 4, 256, 32
both = Pair(prefill={"page_size": PAGE, "chunked_prefill_size": CHUNK}, decode={"page_size": PAGE})


def watch(held: bool) -> list[tuple[float, int, int, int]]:
    """(ms, pages computed, told to leave, landed) after each step; held: nothing leaves before all is computed."""
    for half in both.halves.values():
        half.scheduler.memory.flush()
    if held:
        both.gate.clear()
    asked, began, seen = both.ask(range(5, 5 + TOKENS)), time.perf_counter(), []
    while asked[1]["decode"] not in both.decode.results:
        both.step()
        one = both.prefill.side.passages.get(asked[0])
        rooms = both.decode.manager.rooms()
        landed = len(rooms[0].got.get(0, ())) if rooms else TOKENS // PAGE
        if one and one.stage != "bootstrap":
            computed = one.req.kv_len if one.stage == "waiting" else TOKENS
            seen.append((1000 * (time.perf_counter() - began), computed // PAGE, one.sent, landed))
            if one.stage == "inflight":
                both.gate.set()
    both.at_rest()
    return seen


free, held = watch(held=False), watch(held=True)
fig, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
for axis, seen, title in zip(axes, (free, held), ("the link is open", "nothing leaves before the end"), strict=True):
    t, computed, sent, landed = zip(*seen, strict=True)
    for values, name, colour in (
        (computed, "computed", BLUE),
        (sent, "told to leave", ORANGE),
        (landed, "landed", GREEN),
    ):
        axis.step(t, values, where="post", color=colour, label=name, ls="--" if name == "landed" else "-")
    axis.set(title=title, xlabel="ms since it was asked")
axes[0].set_ylabel("pages")
axes[0].legend()
plt.show()
before = [landed for _, computed, _, landed in free if computed < TOKENS // PAGE]
print(f"landed before the last chunk was computed: {max(before)} of {TOKENS // PAGE} pages")

# %% [markdown]
# The three lines run one behind the other: a chunk is computed, in the next step its pages are told to leave, and they land while that step is still
# being computed. So at the end the pages of the last two chunks are missing, 16 of 64 here: one that has just been told to leave, and one that
# is being computed. On the right the same link was held shut until the prompt was
# computed: everything travels at the end, and the first token waits for all of it.
#
# Who owned the pages meanwhile? On the decode side they were reserved before the first was computed:

# %%
kinds = [type(message).__name__ for _, message in both.decode.manager.log]
first = kinds.index("Reserve")
print("messages of the first room:", kinds[first : kinds.index("Metadata") + 1])
reserve = next(message for _, message in both.decode.manager.log if isinstance(message, Reserve))
writes = [
    message for _, message in both.decode.manager.log if isinstance(message, Write) and message.room == reserve.room
]
assert sorted(page for write in writes for page in write.pages) == sorted(reserve.pages)
print(f"{len(reserve.pages)} pages were reserved, and exactly these were written to, in {len(writes)} messages")
print("states, of which a side is in the least of its ranks':", ", ".join(f"{state.name} {state}" for state in State))

# %% [markdown]
# ## Heads re-cut
#
# **Predict:** prefill on 2 ranks, decode on 3, 2 KV heads. How many of the 6 pairs of ranks talk to each other?

# %%
fig, axes = plt.subplots(1, 4, figsize=(11, 2.6))
for axis, (heads, prefill, decode) in zip(axes, ((2, 1, 2), (2, 2, 3), (8, 4, 2), (8, 2, 8)), strict=True):
    sent = np.zeros((prefill, decode), dtype=int)
    for rank in range(decode):
        for source, which, _ in head_slices(heads, prefill, rank, decode):
            sent[source, rank] = len(which)
    axis.imshow(sent, cmap="Blues", vmin=0, vmax=4, aspect="auto")
    for (i, j), n in np.ndenumerate(sent):
        axis.text(j, i, n or "", ha="center", va="center")
    axis.set(
        xticks=range(decode),
        yticks=range(prefill),
        xlabel="decode rank",
        title=f"{heads} KV heads, {prefill} to {decode}",
    )
axes[0].set_ylabel("prefill rank")
fig.tight_layout()
plt.show()
held_by = [HeadLayout.of(2, 2, rank, 3).kv_heads for rank in range(3)]
print("what three ranks hold of 2 KV heads:", held_by, "- a head that a rank holds twice travels once")

# %% [markdown]
# Four of six: rank 1 of the decode side holds both heads and has to ask both. The number in a field is how many heads of each page travel on that link;
# a column adds up to the heads that the rank needs, each once.
#
# ## A death, and the books
#
# **Predict:** pages travel, and the prefill engine dies. How many of the decode side's pages are free a moment later?

# %%
free_before = both.decode.scheduler.pool.free_slots + both.decode.scheduler.tree.evictable_size
both.gate.clear()
asked = both.ask(range(300, 400))
both.in_transfer(asked)
reserved = sum(len(pages) for _, pages in both.decode.side.held.owners())
both.prefill.half.close()
both.gate.set()
both.until(lambda: asked[1]["decode"] in both.decode.results)
print("while pages travel:", reserved, "pages are the room's")
print("the client is told:", both.ended(asked, "decode").finish_reason["message"])
both.until(lambda: not both.decode.busy)
assert both.decode.at_rest()
free_after = both.decode.scheduler.pool.free_slots + both.decode.scheduler.tree.evictable_size
print(f"free or evictable before: {free_before} slots, after: {free_after}")
both.close()
