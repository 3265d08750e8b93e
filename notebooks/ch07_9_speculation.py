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
# # Chapter 7, notebook 9: what is guessed, what is kept, and when it pays
#
# A verify step feeds a tree of guesses to the model and draws a token at every node. Where a guess is what was drawn, the step goes on below it. Here the trees of real
# steps are drawn, as an engine's trace has them: EAGLE, whose one layer reads the model's own hidden states and guesses what it is about to write.
#
# **Predict first:** the same question is answered twice, greedily, and with temperature 1.6. The drafter guesses the likeliest tokens both times. In which of the
# two does the path lead further down, and how far at least in any step?

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

from ch07_sglang_radix import Engine
from ch07_sglang_radix.speculative.contenders import PLAIN, engines, prompts, run
from common.models.published_configs import published_shape
from common.tiny_qwen import DRAFTER_PATHS
from common.tiny_qwen.acceptance import CHAINS, measure

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
BLUE, GREY, ORANGE = "#4c72b0", "0.75", "#dd8452"
QUESTION = [{"role": "user", "content": "Help me understand the idea of radix cache."}]
TREE = {"speculative_num_steps": 5, "speculative_eagle_topk": 3, "speculative_num_draft_tokens": 12}


def steps_of(params: dict) -> tuple[list[dict], str]:
    """The trees of all verify steps of one answer, and the answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        with Engine(
            device="cpu", speculative_algorithm="EAGLE", speculative_stand_down=False, trace=path, random_seed=1, **TREE
        ) as engine:
            ids = engine.wrapper.tokenizer.encode_chat(QUESTION)
            said = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 48, **params})
            write = engine.wrapper.tokenizer.decode
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    trees = [tree for line in lines for tree in line.get("verified", [])]
    for tree in trees:
        tree["words"] = [write([token]) for token in tree["tokens"]]
    return trees, said["text"]


def draw_tree(axis, tree: dict) -> None:
    """Depth to the right, the path that was kept in orange."""
    parents, kept = tree["parents"], set(tree["path"])
    depth, children = [0] * len(parents), [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        depth[node] = depth[parent] + 1
        children[parent].append(node)
    place, free = {}, iter(range(len(parents)))

    def put(node: int) -> float:  # leaves one below the other, a parent in the middle of its children
        own = [put(child) for child in children[node]]
        place[node] = sum(own) / len(own) if own else float(next(free))
        return place[node]

    put(0)
    for node, parent in enumerate(parents[1:], 1):
        colour = ORANGE if node in kept else GREY
        axis.plot([depth[parent], depth[node]], [-place[parent], -place[node]], color=colour, lw=2, zorder=1)
    for node, word in enumerate(tree["words"]):
        text = word.replace("\n", "\\n").strip() or "␣"
        axis.text(
            depth[node], -place[node], text if text.isascii() else "·", ha="center", va="center", fontsize=9, zorder=2,
            bbox={"boxstyle": "round,pad=0.25", "fc": "#fbe3d2" if node in kept else "white", "ec": ORANGE if node in kept else GREY},
        )  # fmt: skip
    axis.set_xlim(-0.5, TREE["speculative_num_steps"] + 0.5)
    axis.margins(y=0.12)
    axis.axis("off")


answered = {"greedy": steps_of({}), "temperature 1.6": steps_of({"temperature": 1.6, "sampling_seed": 2})}
SHOWN = 3
figure, axes = plt.subplots(len(answered), SHOWN, figsize=(13, 7.5), layout="constrained")
for row, (name, (trees, _)) in zip(axes, answered.items(), strict=True):
    for number, (axis, tree) in enumerate(zip(row, trees, strict=False)):
        draw_tree(axis, tree)
        axis.set_title(f"{name}, step {number + 1}: {len(tree['path'])} out", fontsize=11)
figure.suptitle(
    "The first verify steps of an answer: what was guessed, and the path that was kept (the root is the last known token)"
)
plt.show()

for name, (trees, text) in answered.items():
    brought = [len(tree["path"]) for tree in trees]
    print(f"{name}: {brought} tokens a step, {np.mean(brought):.2f} on average\n  {text!r}")
    assert min(brought) >= 1
assert np.mean([len(t["path"]) for t in answered["greedy"][0]]) > np.mean(
    [len(t["path"]) for t in answered["temperature 1.6"][0]]
)

# %% [markdown]
# Greedily the answer is what the drafter has learned to foresee, and most paths reach the last level. With temperature the model says what is unlikely, now and then, and
# then what it says is in none of the branches: the step brings the one token that a plain decode step would have brought. It never brings less.
#
# ## Right, by place in the chain
#
# A guess counts only if all before it were right, so what matters is how the share of right ones goes on. **Predict:** for EAGLE, whose later guesses stand on its own
# earlier ones and not on what the model computed, should the eighth guess be worse than the first? And Medusa's third head, which guesses three tokens ahead at once?

# %%
QUESTIONS = 24  # of each kind; common/tiny_qwen/acceptance.csv has all 360
there = {name: folder for name, folder in DRAFTER_PATHS.items() if folder.exists()}
shares = {name: measure(name, folder, QUESTIONS) for name, folder in there.items()}
figure, axes = plt.subplots(1, len(shares), figsize=(13, 3.4), sharey=True, layout="constrained")
for axis, (name, rows) in zip(axes, shares.items(), strict=True):
    places = np.arange(1, CHAINS[name] + 1)
    for row, shift, colour in zip(rows, (-0.2, 0.2), (GREY, BLUE), strict=True):
        right = [float(row[f"right_{n}"] or "nan") for n in places]
        axis.bar(places + shift, right, 0.38, color=colour, label=f"{row['split']} wordings")
    axis.set_title(f"{name}\n{rows[0]['tokens']} and {rows[1]['tokens']} tokens a step", fontsize=10)
    axis.set_xticks(places)
    axis.set_xlabel("place in the chain")
    axis.set_ylim(0, 1.05)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("right, if all before were")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=2, frameon=False)
plt.show()
assert all(float(row["tokens"]) > 1.5 for rows in shares.values() for row in rows)

# %% [markdown]
# For three of them hardly any difference, because the bundled model recites: 180 definitions in two languages are few, a drafter can know them by heart, and once it is
# on the rails of a sentence nothing is left to guess. Where wordings were never trained on, what may be missed is mostly the first token, at which the sentence is chosen.
# EAGLE-3, whose features nobody tells to be like the model's, learns more slowly here, and shows more: it is about as good at each of the first places, and falls behind the
# sixth. Its training fed it its own guesses for six steps ([train_eagle.py](../common/tiny_qwen/train_eagle.py)); what it reads behind them is of a kind that it has never met. On
# open chat all of this is harder: EAGLE's authors speak of about 0.8 for theirs and 0.6 for Medusa's (Li et al. 2024, section 1).
#
# ## What temperature does
#
# The guesses are the likeliest tokens, and a guess x is kept with the probability p(x) with which the model draws it. **Predict** the tokens a step at temperature 0.5, 1, 1.5, 2
# for a chain of eight that is nearly always right greedily.

# %%
TEMPERATURES = [0, 0.5, 1.0, 1.5, 2.0]
with engines(["EAGLE", PLAIN]) as both:
    ids = prompts(both["EAGLE"].wrapper.tokenizer, "new", 12, seed=2)
    brought = []
    for temperature in TEMPERATURES:
        told = both["EAGLE"].scheduler.speculation
        before = told.sequences, told.tokens
        params = {"max_new_tokens": 40, "temperature": temperature, "sampling_seed": 1}
        said = {
            name: [one["output_ids"] for one in engine.generate(input_ids=ids, sampling_params=params)]
            for name, engine in both.items()
        }
        assert said["EAGLE"] == said[PLAIN]  # with a seed even what is drawn is the same
        brought.append((told.tokens - before[1]) / (told.sequences - before[0]))

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(TEMPERATURES, brought, "o-", color=BLUE)
for temperature, tokens in zip(TEMPERATURES, brought, strict=True):
    axis.annotate(f"{tokens:.1f}", (temperature, tokens), textcoords="offset points", xytext=(0, 7), ha="center")
axis.set_ylim(0, max(brought) + 1)
axis.set_xticks(TEMPERATURES)
axis.set_xlabel("temperature")
axis.set_ylabel("tokens a verify step")
axis.spines[["top", "right"]].set_visible(False)
plt.show()
assert brought[0] > brought[-1] >= 1

# %% [markdown]
# The texts were the same as plain decoding's at every temperature, token for token: each node's random number is the one that its position would have had.
#
# ## Speed against batch
#
# A verify step of four guesses computes five rows for each sequence. On a CPU a few rows more cost little while the time goes into calls and into reading weights; then they cost as
# what they are. **Predict** at which batch the bundled model stops getting faster.

# %%
BATCHES = [1, 4, 16, 32]
NAMES = [PLAIN, "EAGLE", "Medusa", "draft model"]
speed = {name: [] for name in NAMES}
with engines(NAMES) as contenders:
    ids = prompts(contenders[PLAIN].wrapper.tokenizer, "new", max(BATCHES), seed=3)
    for engine in contenders.values():
        run(engine, ids[:1], 1)
    for batch in BATCHES:
        some = ids[: max(8, batch)]
        for name, engine in contenders.items():
            one = run(engine, some, batch)
            speed[name].append(one.tokens / one.seconds)
gain = {name: np.array(of) / np.array(speed[PLAIN]) for name, of in speed.items() if name != PLAIN}

figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for (name, of), colour in zip(gain.items(), (BLUE, ORANGE, "#55a868"), strict=True):
    axis.plot(BATCHES, of, "o-", color=colour, label=name)
axis.axhline(1, color="0.4", lw=0.8)
axis.set_xscale("log", base=2)
axis.set_xticks(BATCHES, BATCHES)
axis.set_ylim(bottom=0)
axis.set_xlabel("requests at once")
axis.set_ylabel("times plain decoding")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()
for name, of in speed.items():
    print(f"{name:12s} tokens/s at batch {', '.join(f'{b}: {s:.0f}' for b, s in zip(BATCHES, of, strict=True))}")

# %% [markdown]
# The times are those of the machine that ran this, beside whatever else it did; the engine measures its own and stands down where plain steps are faster
# ([stand_down.py](../ch07_sglang_radix/speculative/stand_down.py)).
#
# ## The same on a GPU, as arithmetic
#
# A step cannot be shorter than reading all weights once, nor than multiplying all rows by them. Qwen2.5-7B in bfloat16 on a GPU that reads 3.35 TB/s and multiplies
# 990 TFLOP/s (an H100's data sheet). A chain of n guesses of which each is right with probability a brings (1 - a^(n+1)) / (1 - a) tokens; the drafter is taken to cost a tenth of
# a reading step for each guess. **Predict:** at which batch is plain decoding the faster one, with a = 0.7 and four guesses?

# %%
config = published_shape("Qwen2.5-7B")
layer = (
    config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    + 3 * config.hidden_size * config.intermediate_size
)
weights = config.num_layers * layer + config.vocab_size * config.hidden_size
READ, COMPUTE = 2 * weights / 3.35e12, 2 * weights / 990e12  # seconds of a step, and of each of its rows


def times_plain(batch: np.ndarray, guesses: int, right: float, draft: float = 0.1) -> np.ndarray:
    plain = np.maximum(READ, batch * COMPUTE)
    step = np.maximum(READ, batch * (guesses + 1) * COMPUTE) + guesses * draft * plain
    return (1 - right ** (guesses + 1)) / (1 - right) * plain / step


batch = np.geomspace(1, 512, 200)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True, layout="constrained")
for guesses, colour in ((2, GREY), (4, BLUE), (8, ORANGE)):
    axes[0].plot(batch, times_plain(batch, guesses, 0.7), color=colour, label=f"{guesses} guesses, each right in 0.7")
for right, colour in ((0.5, GREY), (0.7, BLUE), (0.9, ORANGE)):
    axes[1].plot(batch, times_plain(batch, 4, right), color=colour, label=f"4 guesses, each right in {right}")
for axis in axes:
    axis.axhline(1, color="0.4", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(2 ** np.arange(0, 10), 2 ** np.arange(0, 10))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests at once")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("times plain decoding")
plt.show()
ends = {n: int(batch[times_plain(batch, n, 0.7) > 1].max()) for n in (2, 4, 8)}
print(f"a step reads for {1e3 * READ:.2f} ms; it computes as long at {READ / COMPUTE:.0f} rows. Plain decoding is faster above "
      f"{', '.join(f'{b} requests with {n} guesses' for n, b in ends.items())}")  # fmt: skip
assert ends[8] < ends[4] < ends[2]

# %% [markdown]
# Rows are free up to some three hundred of them, and guesses use them up: with eight guesses nine times as fast as the requests do. Long chains are for few requests, and
# for many none is best. So an engine for both has to know when to stop, and that is a measurement, not a constant.
