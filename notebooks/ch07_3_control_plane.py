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
# # Chapter 7, notebook 3: one will, two ranks
#
# Two real ranks serve three prompts of 96, 40 and 20 tokens with the bundled model. While they are answered a fourth comes, of 88 tokens,
# whose first 64 are those of the first prompt. Both ranks write down what they do at what moment, and every message
# ([record_steps.py](../ch07_sglang_radix/benchmarks/record_steps.py)).
#
# **Predict first:** how many steps does it take until the fourth prompt is computed, and how many of its 88 tokens are fed in?

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.schedule_batch import ScheduleBatch
from ch07_sglang_radix.tasks import DecodeTask, PageUpdate, encode
from common.distributed.messages import FRAME
from common.models.published_configs import published_config
from common.sampling.params import SamplingParams
from common.teaching.torchrun import torchrun

folder = Path(tempfile.mkdtemp())
torchrun(2, "ch07_sglang_radix.benchmarks.record_steps", str(folder))
ranks = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]

# the same scene was played several times: the quickest is the one that other programs disturbed least
rounds = [round[-1]["spans"][-1][2] - round[0]["spans"][0][1] for round in ranks[0]["scene"]]
scene = [rank["scene"][int(np.argmin(rounds))] for rank in ranks]
for i, step in enumerate(scene[0]):
    print(
        f"step {i}: {step['kind']:8s} {step['new']:4d} tokens in, {step['emitting']} out, longest context {step['context']}"
    )
assert [step["step"] for step in scene[0]] == [step["step"] for step in scene[1]]

# %% [markdown]
# Step 3 is the prefill of the fourth prompt: 24 tokens are fed in, 64 were in the tree. Rank 1 has no tree and no queue, yet it did the same
# nine steps. **Predict:** who waits for whom in a step, and how often?

# %%
colours = {
    "schedule": "0.55",
    "task": "#55a868",
    "execute": "#4c72b0",
    "gather": "#dd8452",
    "sample": "#c44e52",
    "tokens": "#8172b3",
    "account": "0.8",
}
names = {
    "schedule": "schedule",
    "task": "broadcast: the task",
    "execute": "execute",
    "gather": "gather: logits",
    "sample": "sample",
    "tokens": "broadcast: tokens",
    "account": "account",
}
MESSAGES = ("task", "gather", "tokens")  # they take two: who comes first waits


def begins(step: dict, phase: str) -> float:
    return next(span[1] for span in step["spans"] if span[0] == phase)


def draw_rank(axis, rank: int, steps: range, zero: float) -> None:
    for i in steps:
        for phase, start, end in scene[rank][i]["spans"]:
            other = begins(scene[1 - rank][i], phase) if phase in MESSAGES else start
            left, middle, right = (1e3 * (at - zero) for at in (start, min(max(other, start), end), end))
            axis.barh(rank, middle - left, 0.55, left, color="white", edgecolor=colours[phase], hatch="////", lw=0)
            axis.barh(rank, right - middle, 0.55, middle, color=colours[phase], lw=0)


def legend(figure) -> None:
    boxes = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    boxes.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="0.4", hatch="////", lw=0))
    figure.legend(boxes, [*names.values(), "waits for the other rank"], loc="lower center", ncol=4, frameon=False)


def timeline(axis, steps: range) -> float:
    zero = scene[0][steps[0]]["spans"][0][1]
    for rank in (0, 1):
        draw_rank(axis, rank, steps, zero)
    axis.set_yticks([0, 1], ["rank 0", "rank 1"])
    axis.set_ylim(1.45, -0.75)
    axis.set_xlim(0, 1e3 * (max(scene[rank][steps[-1]]["spans"][-1][2] for rank in (0, 1)) - zero))
    axis.set_xlabel("ms")
    axis.spines[["top", "right", "left"]].set_visible(False)
    return zero


figure, axis = plt.subplots(figsize=(11, 3.6))
zero = timeline(axis, range(6))
for i in range(6):
    spans, step = scene[0][i]["spans"], scene[0][i]
    left, right = (1e3 * (at - zero) for at in (spans[0][1], spans[-1][2]))
    axis.text((left + right) / 2, -0.38, f"{step['kind']}\n{step['new']} tokens", ha="center", fontsize=9)
    axis.axvline(right, color="black", lw=0.8, ls=":")
axis.set_title("Six steps on two ranks")
legend(figure)
figure.tight_layout(rect=(0, 0.13, 1, 1))
plt.show()

# %% [markdown]
# There are three messages a step, and at each of them whoever comes first waits for the other. At the tokens this is rank 1, while rank 0 samples; at the
# task it is rank 1 too, unless it was woken later than rank 0 needed to decide. Deciding, sampling and accounting are so short that they can hardly be
# seen: what takes the time is `execute`.
#
# Inside `execute` the ranks meet again and again. **Predict:** in a decode step of three tokens, at how many moments do both have to be there before
# either can go on?

# %%
figure, axis = plt.subplots(figsize=(11, 3.4))
zero = timeline(axis, range(2, 3))
for rank in (0, 1):
    at = [1e3 * (m["at"] - zero) for m in scene[rank][2]["messages"] if m["op"] == "all_reduce"]
    axis.plot(at, [rank] * len(at), "|", color="white", ms=26, mew=1.5)
meet = [message for message in scene[0][2]["messages"] if message["op"] == "all_reduce"]
axis.set_title(f"One decode step; white lines: a rank comes to one of the {len(meet)} all-reduces")
axis.set_ylim(1.45, -0.45)
legend(figure)
figure.tight_layout(rect=(0, 0.14, 1, 1))
plt.show()
for phase in colours:
    spent = [sum(end - start for name, start, end in scene[rank][2]["spans"] if name == phase) for rank in (0, 1)]
    print(f"{names[phase]:22s} rank 0 {1e3 * spent[0]:6.2f} ms   rank 1 {1e3 * spent[1]:6.2f} ms")

# %% [markdown]
# One all-reduce for the embedding and two a layer make nine in four layers. The control plane adds three moments: task, logits, tokens. (The
# times are of gloo and two processes on a small machine; the order is the same anywhere.)
#
# **Predict:** from the prefill of 156 tokens to the decode step of three tokens behind it, which messages become smaller, and which stay as they are?

# %%
shown = {"prefill, 156 tokens": 0, "decode, 3 sequences": 1, "prefill, 24 of 88 tokens": 3, "decode, 4 sequences": 4}
kinds = {"task": "task", "all-reduces": None, "logits": "logits", "tokens": "tokens"}


def bytes_of(step: dict) -> dict[str, int]:
    """Bytes of a step's messages as rank 0 handed them in."""
    size = {kind: sum(m["bytes"] for m in step["messages"] if m["label"] == label) for kind, label in kinds.items()}
    size["all-reduces"] = sum(m["bytes"] for m in step["messages"] if m["op"] == "all_reduce")
    assert sum(size.values()) == sum(m["bytes"] for m in step["messages"])
    return size


print(f"{'bytes':26s}" + "".join(f"{kind:>14s}" for kind in (*kinds, "in all")))
for name, i in shown.items():
    size = bytes_of(scene[0][i])
    print(f"{name:26s}" + "".join(f"{value:14,d}" for value in (*size.values(), sum(size.values()))))
for mine, other in zip(*scene, strict=True):
    assert [(m["label"], m["bytes"]) for m in mine["messages"]] == [(m["label"], m["bytes"]) for m in other["messages"]]

figure, axis = plt.subplots(figsize=(9, 3.4))
parts = dict(zip(kinds, ("task", "execute", "gather", "tokens"), strict=True))
for row, kind in enumerate(kinds):
    values = [bytes_of(scene[0][i])[kind] for i in shown.values()]
    at = np.arange(len(shown)) + 0.2 * (row - 1.5)
    axis.bar(at, values, 0.18, color=colours[parts[kind]], label=kind)
axis.set_yscale("log")
axis.set_ylabel("bytes")
axis.set_xticks(range(len(shown)), shown)
axis.legend(ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
axis.set_title("Messages of a step, by what they carry")
figure.tight_layout()
plt.show()

# %% [markdown]
# The all-reduces go with the tokens fed in, the logits with the sequences that get a token, the tokens are eight bytes each. The task is 2,048 bytes in
# all four: a message of 256 words, of which a step uses as many as it needs.
#
# The same run served prompts of 16, 128 and 1,000 tokens one by one. **Predict:** how many bytes more does the decode step take behind 1,000 tokens?

# %%
print("one sequence    context   words of the task   messages   bytes in all")
for step in ranks[0]["contexts"]:
    if step["kind"] == "decode":
        size = sum(message["bytes"] for message in step["messages"])
        print(f"  decode {step['context']:14,d} {step['words']:19d} {len(step['messages']):10d} {size:14,d}")
decodes = [step for step in ranks[0]["contexts"] if step["kind"] == "decode"]
assert len({sum(message["bytes"] for message in step["messages"]) for step in decodes}) == 1

# %% [markdown]
# None. A task of 16 words instead of 12 names a page that has just been added: four words, at every 16th token. The others were named when
# they were new, and every rank has kept them.
#
# **Predict:** sixteen sequences decode from 16 to 8,000 tokens of context. How large is the task at the end? How large would it be if it repeated
# the page tables, or, as a map from layer to pages, repeated them for each of 24 layers? No model is needed to find out: the tasks are
# made by the scheduler's own classes.

# %%
P, B, LONG = 16, 16, 8_000
LAYERS = published_config("Qwen2.5-0.5B").num_hidden_layers
pool, rows = TokenToKVPool(num_pages=B * (LONG // P + 2), page_size=P), ReqToTokenPool(B, LONG + 2 * P)
memory = RequestMemory(pool, rows, RadixCache(pool, rows))
reqs = [Req(i, None, [1] * (P + i), SamplingParams(max_new_tokens=LONG - P), seed=0) for i in range(B)]
for req in reqs:  # what a prefill does: a row, pages, and the ranks are told
    memory.admit(req, memory.tree.match_prefix([]))
    memory.grow(req, len(req.prompt_ids))
    req.kv_len = len(req.prompt_ids)
memory.page_updates(reqs)
batch = ScheduleBatch(memory, group=False)
batch.become(reqs)

context, sizes, looks = [], [], {}
for step in range(LONG - P):
    memory.grow_by_a_page([req for req in reqs if req.kv_len == req.allocated_len])
    at, positions = tuple(batch.rows.tolist()), tuple(batch.positions.tolist())
    context.append(1 + positions[0])
    sizes.append(encode(DecodeTask(step, memory.page_updates(reqs), at, positions)).nbytes)
    if context[-1] in (2**n for n in range(5, 13)) or context[-1] == LONG:
        tables = [
            PageUpdate(r.row, 0, (*(rows.req_to_token[r.row, : r.allocated_len : P] // P).tolist(),)) for r in reqs
        ]
        repeats = [encode(DecodeTask(step, (*(tables * times),), at, positions)).nbytes for times in (1, LAYERS)]
        looks[context[-1]] = [sizes[-1], *repeats]
    batch.advance()

print("context   this task   whole page tables   the same for each layer")
for tokens, (this, whole, layers) in looks.items():
    print(f"{tokens:7,d} {this:11,d} {whole:19,d} {layers:25,d}")
assert len(set(sizes)) == 1

plt.figure(figsize=(8, 3.8))
for column, (label, colour) in enumerate(
    {f"page tables, {LAYERS} times": "#c44e52", "page tables": "#dd8452", "this task": "#55a868"}.items()
):
    plt.plot(list(looks), [look[2 - column] for look in looks.values()], "o-", color=colour, label=label)
plt.axhline(8 * FRAME, color="grey", ls="--", lw=1)
plt.text(LONG, 8 * FRAME * 1.15, "one message", ha="right", fontsize=9, color="0.3")
plt.xscale("log", base=2)
plt.yscale("log")
ticks = list(looks)
plt.xticks(ticks, [f"{tokens:,}" for tokens in ticks], fontsize=9)
plt.minorticks_off()
plt.xlabel("tokens of context, each of 16 sequences")
plt.ylabel("bytes of a decode task")
plt.legend(loc="upper left", frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# **Conclude.** What changes from one decode step to the next is a position a sequence and now and then a page, and that is what rank 0 says. The
# pages said before lie in every rank's page table, the tokens came with the last broadcast, and one page number serves all layers, because
# their pools are numbered alike.
#
# **Try it:** in `record_steps.py` give the scheduler `gather_best=True`. Which row of the table of bytes changes, and does any answer?
