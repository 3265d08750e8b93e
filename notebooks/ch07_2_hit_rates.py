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
# # Chapter 7, notebook 2: what decides the hit rate
#
# Four things: how much the requests share, how large the cache is, what is evicted, and who goes first. The first three are simulated with the radix
# tree alone ([simulate.py](../ch07_sglang_radix/benchmarks/simulate.py)); the fourth takes the real scheduler and the bundled model, at the end.
#
# The requests are those of [workloads.py](../ch07_sglang_radix/benchmarks/workloads.py), with made-up answers: all programs of a workload take turns. The hit
# rate is the share of prompt tokens that need not be computed. **Predict first:** 16 conversations of four turns behind one system prompt, questions
# behind long examples, eight answers to the same question: in which is the most shared?

# %%
import contextlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from ch07_sglang_radix.benchmarks.clients import Clients
from ch07_sglang_radix.benchmarks.simulate import simulate
from ch07_sglang_radix.benchmarks.workloads import WORKLOADS, Source, best_cached, block_trace, distinct_pages
from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.models.config import ModelConfig
from common.tiny_qwen import TINY_QWEN_PATH

V = ModelConfig.from_folder(TINY_QWEN_PATH).vocab_size


def play(name: str, scale: float = 1.0) -> list[tuple[list[int], list[int]]]:
    """[(prompt, answer)] of a workload in the order in which they come, the answers made up."""
    answers, served = Source(V, seed=1), []
    going = [(program, next(program)) for program in WORKLOADS[name](Source(V), scale)]
    while going:
        program, calls = going.pop(0)
        replies = [answers.text(call.new_tokens) for call in calls]
        served += zip([call.ids for call in calls], replies, strict=True)
        with contextlib.suppress(StopIteration):
            going.append((program, program.send(replies)))
    return served


print(f"{'':18s} requests   prompt tokens   different ones   could be hit   in pages of 16")
for name in WORKLOADS:
    served = play(name)
    tokens = sum(len(prompt) for prompt, _ in served)
    different = distinct_pages([(prompt, []) for prompt, _ in served], 1)
    best, in_pages = (best_cached(served, size) / tokens for size in (None, 16))
    print(f"{name:18s} {len(served):8d} {tokens:15,d} {different:16,d} {best:14.1%} {in_pages:16.1%}")

# %% [markdown]
# In all of them but the last most of the prompt tokens are repetitions; whole pages lose a few percent. That is what could be hit if nothing were ever
# forgotten. **Predict:** now the cache holds only so many tokens and forgets the least recently used. Which workload needs the largest cache, and
# which is content with one prompt?

# %%
sizes = [2**n for n in range(8, 14)]
rates = {}
for name in WORKLOADS:
    prompts = [prompt for prompt, _ in play(name)]
    rates[name] = [simulate(prompts, size, "lru").hit_rate for size in sizes]

figure, axis = plt.subplots(figsize=(9, 4.2))
for (name, rate), marker in zip(rates.items(), "osD^vPX", strict=True):
    axis.plot(sizes, [100 * part for part in rate], f"{marker}-", label=name, ms=6)
axis.set_xscale("log", base=2)
axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
axis.set_ylim(-3, 100)
axis.set_xlabel("tokens that the cache holds")
axis.set_ylabel("hit rate, %")
axis.set_title("Least recently used goes first")
axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# What counts is not how much is shared but how much comes in between. Eight answers to one question ask for the same prompt one behind the
# other: a cache of one prompt will do. Conversations in turn come back after all others have spoken, and until they all fit, only the system prompt is
# hit. (Answers count here from the next prompt on that contains them, so the curves end a little below the table.)
#
# **Predict:** three patterns of use: conversations in turn; questions behind examples, every second prompt unrelated to anything; conversations of
# which any may go on next. Which eviction strategy is best in each, and is one of them best in all?

# %%
strategies = [name for name in STRATEGIES if name != "priority"]  # it goes by what a caller says of a request


def mixed(share: float, count: int = 160) -> list[list[int]]:
    """So many prompts in random order; this share of them are few-shot prompts, the others share nothing."""
    few, lone = ([prompt for prompt, _ in play(name, scale=4)] for name in ("few-shot", "unrelated"))
    prompts = few[: round(share * count)] + lone[: count - round(share * count)]
    assert len(prompts) == count
    Source(V).random.shuffle(prompts)
    return prompts


def heat_map(axis, rates, rows: Sequence, columns: Sequence, title: str, frame: bool = True, **colours) -> None:
    """In percent; what is best in a column, or nearly so, has a frame."""
    values = 100 * np.array(rates)
    colours = {"cmap": "YlGnBu", "vmin": 0, "vmax": 100} | colours
    image = axis.imshow(values, aspect="auto", **colours)
    for (row, column), value in np.ndenumerate(values):
        light = np.mean(image.to_rgba(value)[:3]) > 0.55
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", color="black" if light else "white")
        others = values[:, column]
        if frame and value > others.max() - 0.5 and np.ptp(others) >= 1:
            axis.add_patch(plt.Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, ec="#e6550d", lw=2))
    axis.set_xticks(range(len(columns)), columns, fontsize=9)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=10)


patterns = {
    "conversations in turn": [prompt for prompt, _ in play("multi-turn chat")],
    "examples, and as many unrelated": mixed(0.5),
    "conversations at random": [request["hash_ids"] for request in block_trace(Source(V), 2000)],
}
parts = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.4), sharey=True)
table = {}
for axis, (name, requests) in zip(axes, patterns.items(), strict=True):
    everything = distinct_pages([(request, []) for request in requests], 1)
    table[name] = [
        [simulate(requests, round(part * everything), eviction).hit_rate for part in parts] for eviction in strategies
    ]
    heat_map(axis, table[name], strategies, [f"{part:.0%}" for part in parts], name)
axes[1].set_xlabel("size of the cache, as a part of all different tokens (or blocks)")
figure.suptitle("Hit rate in %; framed: the best strategies for this size", fontsize=11)
figure.tight_layout()
plt.show()
mean = {name: dict(zip(strategies, np.mean(rows, axis=1), strict=True)) for name, rows in table.items()}
for name, of in mean.items():
    print(f"{name:32s}" + "".join(f"{eviction}: {rate:5.1%}   " for eviction, rate in of.items()))
assert len({max(of, key=of.get) for of in mean.values()}) == 3

# %% [markdown]
# None is best in all. Taking turns is a loop: what was used last comes back last, so mru keeps the right ones. Among prompts that come once, lfu
# remembers which ones came often. Where what was used lately is used next, lru is right, and lfu holds on to what was popular once.
#
# **Why are lru and fifo so much alike?** In a radix tree a request leaves a leaf of its own behind: the last use of a leaf is mostly the time at which
# it was made. A shared beginning is no leaf, and under neither does it go before what hangs on it.
#
# **Predict:** sharing against size. Of 160 prompts a part has shared examples in front; the cache grows from 1,024 to 16,384 tokens. Where does it
# matter whether lru or lfu decides: where much is shared or little, in a large cache or a small one?

# %%
shares, sizes = (0.0, 0.25, 0.5, 0.75, 1.0), [2**n for n in range(10, 15)]
mixes = [mixed(share) for share in shares]
lru, lfu = (
    np.array([[simulate(mix, size, eviction).hit_rate for size in sizes] for mix in mixes])
    for eviction in ("lru", "lfu")
)
gain = lfu - lru
figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.4), sharey=True)
labels = [f"{share:.0%}" for share in shares], [f"{size:,}" for size in sizes]
heat_map(axes[0], lru, *labels, "lru: hit rate in %", frame=False)
heat_map(axes[1], lfu, *labels, "lfu: hit rate in %", frame=False)
heat_map(axes[2], gain, *labels, "lfu minus lru, in points", frame=False, cmap="PuOr", vmin=-25, vmax=25)
axes[0].set_ylabel("prompts that share")
axes[1].set_xlabel("tokens that the cache holds")
figure.tight_layout()
plt.show()
assert gain[0].max() == 0
assert np.abs(gain[:, -1]).max() < 0.01

# %% [markdown]
# In the middle. Without sharing there is nothing to gain; in a cache that is large enough nothing need be chosen; in one too small for the
# examples no choice helps much. The strategy matters where the shared part would fit, if only the rest did not push it out.
#
# Now the fourth thing. The real scheduler with the bundled model, at most four requests running, and all requests waiting from the start (a conversation's
# next one when its last is answered). Eviction is lru throughout. **Predict:** what does longest prefix match (lpm) gain over first come, first
# served (fcfs), in a pool for a third of the different tokens, for half of them, and for all?

# %%
policies, parts = ("fcfs", "random", "lpm", "dfs-weight"), (1 / 3, 1 / 2, 1)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for axis, (name, scale) in zip(axes, {"few-shot": 0.4, "multi-turn chat": 0.25}.items(), strict=True):
    rates, answers = np.zeros((len(policies), len(parts))), set()
    pages = [round(part * distinct_pages(play(name, scale), 16)) for part in parts]
    for column, tokens in enumerate(16 * number for number in pages):
        wrapper = TPRadixAttentionModelWrapper(device="cpu", max_total_tokens=tokens, max_running_requests=4)
        for row, policy in enumerate(policies):
            scheduler = TPScheduler(wrapper, schedule_policy=policy)
            outputs = Clients(scheduler, WORKLOADS[name](Source(V), scale)).run().values()
            prompt, cached = (sum(getattr(out, of) for out in outputs) for of in ("prompt_tokens", "cached_tokens"))
            rates[row, column] = cached / prompt
            answers.add(tuple(sorted((*out.prompt_ids, -1, *out.output_ids) for out in outputs)))
    assert len(answers) == 1, "order and size decide what is computed, not what is answered"
    best = best_cached([(out.prompt_ids, out.output_ids) for out in outputs], wrapper.page_size) / prompt
    heat_map(axis, rates, policies, [f"{16 * number:,}" for number in pages], f"{name}; reachable: {best:.0%}")
    axis.set_xlabel("tokens that the pool holds")
    fcfs, lpm = rates[policies.index("fcfs"), 0], rates[policies.index("lpm"), 0]
    print(f"{name}, smallest pool: fcfs computes {1 - fcfs:.0%} of {prompt:,} prompt tokens, lpm {1 - lpm:.0%}")
    assert lpm > fcfs + 0.1
    assert np.ptp(rates[:, -1]) < 0.01
figure.suptitle("Hit rate in % of the real scheduler; framed: the best policies for this size", fontsize=11)
figure.tight_layout()
plt.show()

# %% [markdown]
# **Conclude.** A good order does the work of a larger cache: lpm lets requests that share run next to each other, before what they share is evicted. So
# does dfs-weight, where many requests wait behind the same node; of a conversation only one is waiting at a time. In a pool that holds everything the
# order decides nothing, and no order and no size changes an answer.
#
# **Try it:** give `TPScheduler` another `radix_eviction_policy` in the last cell. Under which schedule policy does it change the most?
