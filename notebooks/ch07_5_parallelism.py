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
# # Chapter 7, notebook 5: who holds what, and who talks to whom
#
# Two real ranks serve four prompts (A to D, 72 tokens) with the bundled model, in six ways, one after the other
# ([record_layouts.py](../ch07_sglang_radix/benchmarks/record_layouts.py)). Each rank then counts what it has: numbers in its parameters, tokens in its
# pages, rows between two layers; and every message is in the ledger.
#
# | layout | what is cut |
# |---|---|
# | tp2 | every matrix, the heads |
# | tp2, sp | the same, and the rows between attention and MLP (sequence parallelism) |
# | tp2, attn-dp2 | the MLPs; attention is whole, for half of the requests (attention-data parallelism) |
# | tp2, cp2 | the MLPs; attention is whole, for half of the tokens (context parallelism) |
# | pp2 | the layers, into two stages |
# | dp2 | the requests, over two whole models |
#
# **Predict first:** in which of them does a rank hold the most numbers, and in which the fewest? Where does a rank hold a part that the other one lacks
# altogether?

# %%
import csv
import json
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

from ch07_sglang_radix.benchmarks.record_layouts import ALONE, LAYOUTS, NEW_TOKENS, PROMPTS
from common.distributed.cost_model import wire_bytes
from common.distributed.layout import Layout
from common.teaching.torchrun import torchrun
from common.tiny_qwen import TINY_QWEN_PATH

transformers.utils.logging.disable_progress_bar()
folder = Path(tempfile.mkdtemp())


def record(ranks: int) -> dict[str, list[dict]]:
    """{layout: [what each rank told]}"""
    torchrun(ranks, "ch07_sglang_radix.benchmarks.record_layouts", str(folder))
    files = {name: [folder / f"{name}.rank{rank}.json" for rank in range(ranks)] for name in LAYOUTS[ranks]}
    return {name: [json.loads(file.read_text(encoding="utf-8")) for file in those] for name, those in files.items()}


two = record(2)
whole = two["dp2"][0]  # a replica has everything
lines = [(name, rank, told[rank]) for name, told in two.items() for rank in (0, 1)]
LAYERS, KV_HEADS = len(whole["stage"]), len(whole["kv_heads"])
PARTS = ["embedding", *(f"{i} {part}" for i in range(LAYERS) for part in ("attention", "MLP")), "head"]
shares = np.array([[told["weights"].get(part, 0) / whole["weights"][part] for part in PARTS] for *_, told in lines])

figure, axis = plt.subplots(figsize=(10, 5))
axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
for (y, x), share in np.ndenumerate(shares):
    axis.text(x, y, {0: "", 0.5: "½", 1: "all"}[share], ha="center", va="center", fontsize=10)
for y, (*_, told) in enumerate(lines):
    axis.text(len(PARTS) - 0.35, y, f"{told['bytes'] / 1e6:5.1f} MB", va="center", fontsize=10)
for y in range(2, len(lines), 2):
    axis.axhline(y - 0.5, color="white", lw=5)
axis.set_yticks(range(len(lines)), [f"{name}    rank {rank}" for name, rank, _ in lines])
axis.set_xticks(range(len(PARTS)), [part.replace(" ", "\n") for part in PARTS], fontsize=9)
axis.tick_params(length=0)
axis.spines[:].set_visible(False)
axis.set_title("How much of each part of the model a rank holds; the number is the layer")
figure.subplots_adjust(left=0.22, right=0.9, top=0.93, bottom=0.1)
plt.show()


def by_part(name: str) -> list[int]:
    """Numbers of each part on both ranks together."""
    return [sum(told["weights"].get(part, 0) for told in two[name]) for part in PARTS]


everything = [whole["weights"][part] for part in PARTS]
assert by_part("tp2") == by_part("tp2, sp") == by_part("pp2") == everything
assert by_part("dp2") == [2 * n for n in everything]

# %% [markdown]
# tp2 and pp2 hold each number once between them: half of each part, or half of the parts. (Their bytes differ because embedding and head are one tied
# matrix, which tp2 stores once; a stage that has only one of the two stores it for itself, as does a rank on which they are cut differently.) dp2 holds everything twice. Where attention is cut by requests or by tokens, its weights are whole on
# each rank, and so is the embedding, which begins each request's rows: only the MLPs and the head are cut.
#
# Weights are there once for all requests, keys and values are there for each token. **Predict:** which layouts store the K and V of some token twice? Draw, for
# one of them, a rank's pages as a picture: tokens to the right, layers downwards.

# %%
COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#8172b3"]
NAMES = "ABCD"
starts = np.cumsum([0, *map(len, PROMPTS)])  # of each prompt among all tokens, end to end
rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS])
of_token = np.repeat(np.arange(len(PROMPTS)), list(map(len, PROMPTS)))  # which prompt


def kept(told: dict) -> np.ndarray:
    """[layers * KV heads, tokens]: what lies in this rank's pages, at its place in the whole."""
    there = np.zeros((LAYERS, KV_HEADS, starts[-1]), dtype=bool)
    for prompt, held in told["kv"].items():
        first = starts[int(prompt)]
        for position, layers in enumerate(held):
            there[np.ix_(told["stage"], told["kv_heads"], [first + position])] = np.array(layers)[..., None]
    return there.reshape(-1, starts[-1])


def picture(there: np.ndarray) -> np.ndarray:
    return np.where(there[..., None], rgb[of_token], 0.93)


def name_prompts(axis, y: float) -> None:
    for name, first, last, colour in zip(NAMES, starts[:-1], starts[1:], COLOURS, strict=True):
        axis.text((first + last - 1) / 2, y, name, color=colour, ha="center", va="bottom", fontsize=11, weight="bold")


figure, axes = plt.subplots(len(two), 2, figsize=(10, 8.5), sharex=True, sharey=True)
for row, (name, told) in zip(axes, two.items(), strict=True):
    for rank, axis in enumerate(row):
        axis.imshow(picture(kept(told[rank])), aspect="auto", interpolation="nearest")
        for y in range(1, LAYERS):
            axis.axhline(y * KV_HEADS - 0.5, color="white", lw=1.5)
        axis.set_yticks([KV_HEADS * (i + 0.5) - 0.5 for i in range(LAYERS)], range(LAYERS), fontsize=8)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=12)
for rank, axis in enumerate(axes[0]):
    axis.set_title(f"rank {rank}", pad=20)
    name_prompts(axis, -0.8)
figure.text(
    0.57,
    0.02,
    "tokens of the four prompts, left to right; layers 0 to 3 downwards, each with a line for each of its two KV heads",
    ha="center",
)
figure.subplots_adjust(left=0.17, right=0.98, top=0.93, bottom=0.06, hspace=0.25, wspace=0.08)
plt.show()

for name, told in two.items():
    times = kept(told[0]).astype(int) + kept(told[1])
    assert (times == 1).all(), name
print("in every layout each K and V of each token lies on exactly one of the two ranks")

# %% [markdown]
# None of them does. Cut by heads, by layers, by requests, or by pages, the pool is as large as both ranks' memory together. (tp4 would store them twice:
# this model has two KV heads, and four ranks need one each. There attention-data parallelism has room for more tokens.) With cp2 the stripes are pages of
# four tokens: page g of the pool lies on rank g mod 2.
#
# Two of the six pictures are alike, tp2 and sp, and two more are almost: attn-dp2 and dp2 deal requests out, by other rules. What distinguishes them is elsewhere.
# Between two layers a token is a row of 224 numbers. **Predict:** which rows does a rank have there, under each layout? (They are looked for after
# the first layer that a rank has, in the prefill step.)

# %%
RIGHT = [np.array(rows) for rows in two["tp2"][0]["rows"]]  # behind each layer; a rank of tp2 has them all


def rows_of(told: dict) -> np.ndarray:
    """[tokens]: is the row of this token among those that this rank had?"""
    right, mine = RIGHT[told["stage"][0]][: starts[-1]], np.array(told["rows"][0])
    return (np.abs(right[:, None] - mine[None]).max(-1) < 1e-4).any(1)


there = np.array([rows_of(told) for *_, told in lines])
figure, axis = plt.subplots(figsize=(10, 4.6))
axis.imshow(picture(there), aspect="auto", interpolation="nearest")
for y in range(1, len(lines)):
    axis.axhline(y - 0.5, color="white", lw=2 if y % 2 else 9)
for y, held in enumerate(there):
    axis.text(starts[-1], y, f"{held.sum()} rows", va="center", fontsize=10)
name_prompts(axis, -0.7)
axis.set_yticks(range(len(lines)), [f"{name}    rank {rank}" for name, rank, _ in lines])
axis.set_xticks([])
axis.tick_params(length=0)
axis.spines[:].set_visible(False)
figure.text(0.56, 0.03, "tokens of the four prompts: whose rows a rank has between two layers", ha="center")
figure.subplots_adjust(left=0.22, right=0.9, top=0.92, bottom=0.09)
plt.show()
for i, name in enumerate(two):  # how many ranks have each row
    assert set(there[2 * i : 2 * i + 2].sum(0)) == {2 if name in ("tp2", "pp2") else 1}

# %% [markdown]
# In tp2 both ranks have every row, and compute the same norms of them: what comes out of an all-reduce is equal everywhere. Sequence parallelism cuts
# the rows of a step in two, wherever that falls: here inside of C. With cp2 each prompt is cut by itself, in a zigzag, because a late token attends to
# more than an early one. (These are the rows that are *computed*; the pages in which K and V end up go by another rule.) In pp2 both have all rows,
# one after the other. In dp2 the first replica computes twice as many as the second one: requests were dealt out by turns, and not by their length.
#
# What a rank does not hold, it has to be told. Another prompt, of 24 tokens, ran alone, and rank 0's ledger was on. **Predict:** how many messages does one
# decode step take under each layout, in a model of four layers? Under which is there none at all?

# %%
DRAWN = {  # op -> colour
    "all_reduce": "#4c72b0", "reduce_scatter": "#64b5cd", "all_gather": "#8172b3", "gather": "#dd8452", "send": "#c44e52",
    "broadcast": "#55a868",
}  # fmt: skip


def steps_of(told: dict) -> list[list[dict]]:
    """Messages of the prefill step and of each decode step; a step begins with its task, and the last task is to stop."""
    begins = [i for i, message in enumerate(told["messages"]) if message["label"] == "task"]
    return [told["messages"][a:b] for a, b in pairwise(begins)]


def ways(message: dict) -> str:
    """Between lanes 0 (above) and 1, as rank 0 sees it."""
    return {"broadcast": "-|>", "send": "-|>", "receive": "<|-", "gather": "<|-"}.get(message["op"], "<|-|>")


figure, axes = plt.subplots(len(two), 1, figsize=(11, 7.8), sharex=True)
for axis, (name, told) in zip(axes, two.items(), strict=True):
    steps = steps_of(told[0])
    decode = steps[1] if steps else []
    for x, message in enumerate(decode):
        colour = DRAWN["send" if message["op"] == "receive" else message["op"]]
        arrow = {"arrowstyle": ways(message), "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (x, 1), (x, 0), arrowprops=arrow)
        axis.text(x + 0.1, 0.5, f"{message['bytes']:,}", rotation=90, va="center", ha="left", fontsize=8, color=colour)
    for rank in (0, 1):
        axis.axhline(rank, color="0.85", lw=5, zorder=0)
        axis.text(-0.6, rank, f"rank {rank}", ha="right", va="center", fontsize=9)
    axis.text(-2.4, 0.5, name, ha="right", va="center", fontsize=10)
    total = sum(message["bytes"] for message in decode)
    axis.text(
        21.2, 0.5, f"{len(decode)} messages\n{total:,} bytes" if decode else "no message", va="center", fontsize=9
    )
    axis.set_xlim(-0.5, 21)
    axis.set_ylim(1.15, -0.15)
    axis.axis("off")
figure.suptitle("One decode step of one request: every message in order, with the bytes of rank 0's tensor", y=0.98)
handles = [plt.Line2D([], [], color=colour, lw=2) for colour in DRAWN.values()]
figure.legend(handles, [op.replace("_", "-") for op in DRAWN], loc="lower center", ncol=6, frameon=False)
figure.subplots_adjust(left=0.2, right=0.87, top=0.94, bottom=0.06, hspace=0.35)
plt.show()


def on_the_wire(of_ranks: list[list[dict]]) -> int:
    """Bytes of one step between the ranks. What each hands in to a collective is its share of it: shares may be unequal."""
    wire = 0.0
    for message in (message for step in of_ranks for message in step):
        op, ranks = message["op"], len(message["ranks"])
        shares = 1 if op in ("send", "receive") else ranks
        wire += wire_bytes(op, message["bytes"], ranks) / shares
    return round(wire)


print(f"{'':15s}{'prefill, 24 tokens':^36s}   {'decode, 1 token':^36s}")
print(f"{'':15s}" + "   ".join(2 * [f"{'messages':>8s} {'bytes':>12s} {'on the wire':>14s}"]))
for name, told in two.items():
    by_rank = [steps_of(one)[:2] or [[], []] for one in told]
    cells = []
    for of_ranks in zip(*by_rank, strict=True):
        size = sum(message["bytes"] for message in of_ranks[0])
        cells.append(f"{len(of_ranks[0]):8d} {size:12,d} {on_the_wire(of_ranks):14,d}")
    print(f"{name:15s}" + "   ".join(cells))
print("bytes: of rank 0's tensors; on the wire: between both ranks (common/distributed/cost_model.py)")

count = {name: Counter(m["op"] for m in steps[1]) for name, told in two.items() if (steps := steps_of(told[0]))}
assert count["tp2"] == {"broadcast": 2, "all_reduce": 1 + 2 * LAYERS, "gather": 1}
assert count["tp2, sp"] == {"broadcast": 2, "reduce_scatter": 1 + 2 * LAYERS, "all_gather": 1 + 2 * LAYERS, "gather": 1}
assert count["tp2, attn-dp2"] == {"broadcast": 2, "reduce_scatter": LAYERS, "all_gather": 1 + LAYERS, "gather": 1}
assert count["tp2, cp2"] == {"broadcast": 2, "all_reduce": LAYERS, "all_gather": LAYERS, "gather": 1}
assert count["pp2"] == {"send": 2, "receive": 1}
assert "dp2" not in count

# %% [markdown]
# A broadcast of 2,048 bytes in front (the task) and the logits at the end belong to the one will, and are there wherever two ranks serve a request
# together. Between them:
#
# - tp2 sums once after the embedding and twice a layer; sp says the same in two halves each time. A single row cannot be cut in two, so it is padded: in a
#   decode step of one request sp only costs. In the prefill step the halves hand in more bytes than the sums, but put no more on the wire: a sum of n
#   bytes is 2 n there, and so are a reduce-scatter of n and an all-gather of n/2. It is even less, because of the last layer only the row that emits is gathered.
# - attn-dp2 and cp2 have whole attention weights, so there is no sum after o_proj. With attn-dp2 the request is rank 0's, and rank 1, which has none, takes
#   part in every message all the same. With cp2 both hold some of the keys, and merge what they found.
# - pp2 says one thing in the middle of a step: a row of 896 bytes. (Its logits are larger than tp2's because one rank has all of them.)
# - dp2: nothing. Replicas meet when the answers are handed over.
#
# Four ranks now, two ways at once. **Predict:** under tp2 x pp2 and under tp2 x dp2, which pairs of ranks never talk to each other? And under tp4 with
# attn-dp2 or cp2?

# %%
four = record(4)


def pairs_of(told: list[dict]) -> dict[tuple[int, int], list[int]]:
    """{(a, b): [messages, bytes]}. A collective counts for every two that take part in it, a direct message for its two ends: of
    logits the sender knows them, of anything else the receiver. Answers that are handed over at the end are left out."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for rank, one in enumerate(told):
        for message in one["messages"]:
            op, label, group = message["op"], message["label"], message["ranks"]
            if op == "send":
                others = [0] if label == "logits" else []
            elif op == "receive":
                others = {"task": [0], "logits": []}.get(label, [other for other in group if other != rank])
            else:
                others = [other for other in group if other > rank]
            for other in others if label != "results" else ():
                said = pairs.setdefault((min(rank, other), max(rank, other)), [0, 0])
                said[0] += 1
                said[1] += message["bytes"]
    return pairs


AT = {0: (0, 1), 1: (1, 1), 2: (0, 0), 3: (1, 0)}
talk = {name: pairs_of(told) for name, told in four.items()}
most = max(size for pairs in talk.values() for _, size in pairs.values())
figure, axes = plt.subplots(2, 2, figsize=(10, 9))
for axis, (name, pairs) in zip(axes.flat, talk.items(), strict=True):
    for (a, b), (n, size) in pairs.items():
        start, end = np.array(AT[a]), np.array(AT[b])
        arrow = {"arrowstyle": "<|-|>", "color": "#4c72b0", "lw": 0.8 + 5 * size / most, "shrinkA": 15, "shrinkB": 15}
        axis.annotate("", end, start, arrowprops={**arrow, "mutation_scale": 12})
        x, y = start + (end - start) * (0.5 if a + b != 3 else 0.28)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axis.text(
            x,
            y,
            f"{n} message{'s' if n > 1 else ''}\n{size / 1e3:,.0f} kB",
            ha="center",
            va="center",
            fontsize=9,
            bbox=box,
        )
    for rank, place in AT.items():
        axis.text(*place, rank, ha="center", va="center", fontsize=13, color="white", weight="bold",
                  bbox={"boxstyle": "circle,pad=0.4", "facecolor": "#dd8452", "edgecolor": "none"})  # fmt: skip
    axis.set_title(name, fontsize=12)
    axis.set_xlim(-0.3, 1.3)
    axis.set_ylim(-0.15, 1.15)
    axis.axis("off")
figure.suptitle(
    "24 tokens in, 5 tokens out: messages between four ranks, and the bytes of the lower rank's tensors", y=0.97
)
figure.subplots_adjust(left=0.02, right=0.98, top=0.89, bottom=0.02, hspace=0.12, wspace=0.04)
plt.show()

for name, sizes in {"tp2 x pp2": Layout.of(2, pp=2), "tp2 x dp2": Layout.of(2, dp=2)}.items():
    assert {pair for pair in talk[name] if list(pair) not in sizes.groups("tp")} <= {(0, 2), (0, 3), (1, 3)}
assert talk["tp2 x dp2"].keys() == {(0, 1), (2, 3)}
assert len(talk["tp4, attn-dp2"]) == len(talk["tp4, cp2"]) == 6
hidden = [
    m["bytes"] for told in four["tp2 x pp2"] for m in told["messages"] if (m["op"], m["label"]) == ("send", "hidden")
]
row = 4 * whole["weights"]["norm"]  # float32, as wide as the last norm
assert sum(hidden) == 2 * row * (len(ALONE) + NEW_TOKENS - 1), "from each of two ranks, a row a token that is fed in"

# %% [markdown]
# Under tp2 x pp2 the sums stay inside a stage, and ranks 1 and 2 never talk. Between the stages goes one row a token; rank 0 also sends its will to everybody,
# and gets the logits from ranks 2 and 3. Under tp2 x dp2 there are two islands (2 and 3 are only told to stop: this prompt was the other
# replica's). Under the last two everybody talks to everybody, because the MLP is cut over all four; attention is cut over pairs.
# (With attn-dp2 ranks 2 and 3 have no request: they take part as often, with rows of padding or none.) This is why a
# layout is placed on hosts in this order: what talks most shares a host, and stages or replicas may be a network apart.
#
# ## Stages in time
#
# A stage waits until the one before it has something for it. With one batch of prompts, stage 1 idles while stage 0 computes, and then the other way
# round: bubbles. Cut into m micro-batches both can work at once. **Predict:** four prompts of 256 tokens go through two stages as m = 1, 2 and 4 micro-batches.
# What share of the stages' time is bubbles? And who has to be equally fast for that?

# %%
torchrun(2, "ch07_sglang_radix.parallelism.demo_3_pipeline_timeline", "--csv", str(folder / "pipeline.csv"))
spans: dict[int, list[tuple[int, int, float, float]]] = {}
for line in csv.DictReader((folder / "pipeline.csv").read_text(encoding="utf-8").splitlines()):
    if line["kind"] == "measured":
        span = int(line["stage"]), int(line["micro_batch"]), float(line["start"]), float(line["end"])
        spans.setdefault(int(line["micro-batches"]), []).append(span)

figure, axes = plt.subplots(len(spans), 1, figsize=(10, 5), sharex=True)
for axis, (m, found) in zip(axes, spans.items(), strict=True):
    for stage, micro_batch, start, end in found:
        axis.barh(stage, end - start, 0.7, start, color=COLOURS[micro_batch], edgecolor="white", lw=1.5)
        axis.text((start + end) / 2, stage, micro_batch, ha="center", va="center", color="white", fontsize=10)
    length = max(end for *_, end in found)
    bubble = 1 - sum(end - start for *_, start, end in found) / (2 * length)
    said = f"m = {m}: bubbles are {bubble:.0%} of the stages' time; (N-1)/(m+N-1) = {1 / (m + 1):.0%}"
    axis.set_title(said, loc="left", fontsize=10)
    axis.set_yticks([0, 1], ["stage 0", "stage 1"])
    axis.set_ylim(1.5, -0.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    in_order = [[i for s, i, *_ in sorted(found, key=lambda span: span[2]) if s == stage] for stage in (0, 1)]
    assert in_order == [list(range(m))] * 2
    ends = {(stage, micro_batch): end for stage, micro_batch, _, end in found}
    assert all(start >= ends[0, i] for stage, i, start, _ in found if stage == 1), (
        "stage 1 needs what stage 0 has computed"
    )
axes[-1].set_xlabel("ms; the clock of both ranks is the machine's")
figure.tight_layout()
plt.show()

# %% [markdown]
# The formula counts equal micro-batches, equally fast stages, and messages that take no time. Here rank 0 also schedules and samples between two
# bars, rank 1 computes logits there, and both share a machine's memory and cores with whatever else runs on it. Equal work with
# bars of unequal length is time that another program had. (The demo plays each m fifteen times and shows the round with the smallest bubble, which need not
# be the quickest.)
#
# ## It is the same model
#
# **Predict:** in float32, in how many of the ten layouts is a greedy token another one than `transformers` gives?

# %%
reference = transformers.AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy(ids: list[int]) -> list[int]:
    for _ in range(NEW_TOKENS):
        ids = [*ids, int(reference(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-NEW_TOKENS:]


expected = [greedy(ids) for ids in [*PROMPTS, ALONE]]
for name, told in {**two, **four}.items():
    assert all(one["answers"] == expected for one in told), name
    print(f"{name:16s} {len(expected)} answers on each of {len(told)} ranks: equal to transformers")

# %% [markdown]
# **Conclude.** A layout is a choice of what to cut: matrices, rows, requests, tokens, layers, or nothing. What is cut is held once; what is not is held by
# everybody. For what was cut a rank needs the others, in every layer (tensor, sequence, context parallelism, the MLPs under attention-data parallelism), once
# a step (pipeline), or never (replicas). Who talks most has to be near. What it costs in time is the next notebook's question,
# [ch07_6_costs](ch07_6_costs.ipynb).
#
# **Try it:** add `{"pp_size": 4}` to `LAYOUTS[4]` in record_layouts.py: which pairs are left? Then make prompt D 200 tokens long: which of the pictures
# shows first that a rank has more to do than the other one?
