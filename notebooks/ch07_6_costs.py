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
# # Chapter 7, notebook 6: what it costs to be many
#
# Every way of being many trades what a rank *holds and reads* for what it *says*. This notebook puts numbers on both. First a message is
# measured and modelled; then a token's time is put together from three numbers of a machine (bytes a second, operations a second, a
# link), and the layouts compete.
#
# **Predict first:** two processes on this machine add up their tensors (an all-reduce over gloo). One of 256 bytes takes some time t. How long
# does one of 64 KiB take, 256 times as much? And one of 4 MiB?

# %%
import matplotlib.pyplot as plt
import torch

from common.distributed.cost_model import Link, rounds, wire_bytes
from common.distributed.layout import Layout
from common.distributed.machines import Machine
from common.distributed.measure_links import OPS, measure_here
from common.models.decoder import CausalLM
from common.models.published_configs import model_shape
from common.parallel_state import TPGroup
from common.planner.bounds import bound
from common.planner.choice import all_bounds, room_of, why
from common.planner.holdings import holdings
from common.planner.plan import Load, Way

BLUE, ORANGE, GREEN, RED, GREY = "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#999999"
samples, _ = measure_here([2], turns=2, memory=())
took = {(s.op, s.nbytes): s.seconds for s in samples}
smallest = took["all_reduce", 256]
for nbytes in (256, 65_536, 4 << 20):
    seconds = took["all_reduce", nbytes]
    print(f"all-reduce of {nbytes:9,} bytes: {1e6 * seconds:7.0f} us, {seconds / smallest:5.1f} t")

# %% [markdown]
# A message costs a fixed time, and then so much a byte. `Link` has these two numbers, the *latency* and the *bandwidth*; an operation of R ranks
# is a chain of rounds (a ring all-reduce: 2 (R - 1), each of an R-th of the tensor). `Link.fit` takes them from all sizes at once: least
# squares of the relative error, because a microsecond is much of a small message and nothing of a large one.
#
# **Predict:** up to which size is an all-reduce all latency?

# %%
figure, axis = plt.subplots(figsize=(8, 4))
colours = dict(zip(OPS, (BLUE, ORANGE, GREEN, RED, GREY, "#8aa6d6", "#f0b992", "black"), strict=True))
for op in OPS:
    mine = [s for s in samples if s.op == op]
    link, sizes = Link.fit(mine), [s.nbytes for s in mine]
    axis.plot(sizes, [1e6 * s.seconds for s in mine], "o", color=colours[op], markersize=4)
    axis.plot(sizes, [1e6 * link.seconds(op, n, 2) for n in sizes], color=colours[op], linewidth=1, label=op)
    each = 2 if op in ("all_reduce", "reduce_scatter", "all_to_all") else 1  # parts that the tensor goes in
    print(
        f"{op:14s} {1e6 * link.latency_s:4.0f} us and {link.bytes_per_s / 1e9:4.2f} GB/s, off by {100 * link.error(mine):2.0f} %; "
        f"half is latency at {each * link.latency_s * link.bytes_per_s / 1024:6,.0f} KiB"
    )
axis.set_xscale("log", base=2)
axis.set_yscale("log")
axis.set_xticks([2**k for k in (8, 12, 16, 20)], ["256 B", "4 KiB", "64 KiB", "1 MiB"])
axis.set_yticks([100, 200, 500, 1000, 2000, 5000], ["100", "200", "500", "1,000", "2,000", "5,000"])
axis.minorticks_off()
axis.set_xlabel("bytes of a rank's tensor")
axis.set_ylabel("us: measured (dots), modelled (lines)")
axis.legend(fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
plt.show()
assert took["all_reduce", 4 << 20] > took["all_reduce", 256]

# %% [markdown]
# A decode step of a small model sends kilobytes: it pays latencies, and nothing else matters. (Dots that lie off a line say what the model leaves
# out: caches, other programs, a change of algorithm with the size.)
#
# ## Bytes of the tensor, bytes on the wire
#
# **Predict:** each of R ranks has a tensor of n bytes. Which operation moves most between them as R grows: all-reduce, all-gather (n is a rank's
# shard), all-to-all?

# %%
sizes = range(2, 9)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
for op in OPS:
    left.plot(sizes, [wire_bytes(op, 840, r) / 840 for r in sizes], "o-", color=colours[op], markersize=3, label=op)
    right.plot(sizes, [rounds(op, r) for r in sizes], "o-", color=colours[op], markersize=3)
left.set_ylabel("bytes on the wire, in n")
right.set_ylabel("messages one after the other")
for axis in (left, right):
    axis.set_xlabel("ranks")
    axis.spines[["top", "right"]].set_visible(False)
left.legend(fontsize=7)
figure.tight_layout()
plt.show()
for ranks in sizes:  # sequence parallelism cuts an all-reduce in two: the same bytes, the same rounds
    assert (
        wire_bytes("all_reduce", 840, ranks)
        == wire_bytes("reduce_scatter", 840, ranks) + wire_bytes("all_gather", 840 // ranks, ranks)
        or 840 % ranks
    )

# %% [markdown]
# ## A token's time
#
# To give every request a token, a rank reads its weights once, and the keys and values of all its requests; it multiplies; it talks. It cannot be
# quicker than `max(read, compute) + messages`. All three are counted, not guessed: bytes from the same formulas as the model's own parameters
# and pages, messages from the ledger's list.
#
# Two H100, Qwen2.5-7B, requests of 512 tokens. Three ways: cut every layer (tp2), two stages (pp2), two copies (dp2). **Predict:** which is the
# quickest for one request, and which for 2,000? Does NVLink or PCIe between the two change that?

# %%
config, ways = model_shape("Qwen2.5-7B"), {"tp2": Way(Layout(2)), "pp2": Way(Layout(1, 2)), "dp2": Way(Layout(1, 1, 2))}
batches = [2**k for k in range(12)]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
turning = {}
for axis, interconnect in zip(axes, ("nvlink", "pcie"), strict=True):
    machine = Machine.of_gpus("H100", interconnect)
    times = {
        name: [1e3 * bound(config, way, Load(512, b), machine, machine.memory).seconds for b in batches]
        for name, way in ways.items()
    }
    for (name, ms), colour in zip(times.items(), (BLUE, GREEN, ORANGE), strict=True):
        axis.plot(batches, ms, "o-", color=colour, markersize=3, label=name)
    turning[interconnect] = next(b for b, tp, dp in zip(batches, times["tp2"], times["dp2"], strict=True) if dp < tp)
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
    axis.set_title(f"{interconnect}: copies win from {turning[interconnect]:,} requests on", fontsize=10)
    axis.set_xlabel("requests")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("ms a token, at best")
axes[0].legend()
figure.tight_layout()
plt.show()
assert turning["pcie"] < turning["nvlink"]

# %% [markdown]
# tp2 reads each half of the weights once and pays 57 sums; their bytes grow with the requests, what they save does not. dp2 says nothing and reads
# the whole model on both GPUs. pp2 is two halves too, but one request passes both, one after the other, and two groups of requests read each half
# twice: in decode it is never quicker than a copy. Its case is another one: a model that does not fit, and a link that is slow.
#
# ## Sixteen GPUs
#
# Qwen2.5-72B, 64 requests of 8,192 tokens, two hosts with eight H100 of 80 GB each. **Predict:** which of tp16, tp8 x dp2, tp8 x pp2, tp4 x dp4,
# pp16, dp16 fit at all? Which is the quickest, and what does the slowest lose?

# %%
config, load, h100 = model_shape("Qwen2.5-72B"), Load(8192, 64), Machine.of_gpus("H100")
room = room_of(h100, 16, None, 0.9)
found = {str(b.way): b for b in all_bounds(config, 16, load, h100, room)}
names = ["tp8 x dp2", "tp8 x pp2", "tp16", "tp4 x dp4", "tp4 x pp4", "pp16", "tp2 x dp8", "dp16"]
parts = {"weights": BLUE, "kv": GREEN, "compute": RED, "messages": ORANGE, "waiting": GREY}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for y, name in enumerate(names):
    b, at = found[name], 0.0
    for what, nbytes, colour in zip(("weights", "KV", "activations"), b.held, (BLUE, GREEN, GREY), strict=True):
        left.barh(y, nbytes / 1e9, left=at, color=colour, label=what if y == 0 else None)
        at += nbytes / 1e9
    at = 0.0
    for part, colour in parts.items():
        right.barh(
            y, 1e3 * b.parts[part], left=at, color=colour, label=part if y == 0 else None, alpha=1 if b.fits else 0.3
        )
        at += 1e3 * b.parts[part]
    right.text(at + 0.5, y, f"{b.tokens_per_s:,.0f} tokens/s" if b.fits else "does not fit", va="center", fontsize=8)
left.axvline(room / 1e9, color=RED, linewidth=1)
left.text(room / 1e9 + 1, -0.3, "90 % of 80 GB", fontsize=8, color=RED)
left.set_yticks(range(len(names)), names)
left.invert_yaxis()
left.set_xlabel("GB a GPU")
right.set_xlabel("ms a token, at best")
right.set_xlim(0, 75)
for axis in (left, right):
    axis.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()
quickest = min((b for b in found.values() if b.fits), key=lambda b: b.seconds)
assert quickest.way.layout.tp == 8, "as many as a host has"

# %%
print(why(list(found.values()), load, 16))

# %% [markdown]
# tp16 would read the least weights, but its ring leaves the host, and Qwen2.5-72B has 8 KV heads: on 16 ranks each is held twice, so that a GPU
# reads twice the keys and values that it reads under tp8 x dp2. dp16 and tp2 x dp8 do not fit: copies multiply the weights. pp16 fits easily and reads its weights sixteen times,
# once for each group of requests in flight.
#
# **Predict:** the requests become shorter: 512 tokens. And then there is only one. Which part shrinks, and does the choice change?

# %%
for context, batch in ((8192, 64), (512, 64), (512, 1)):
    first, *others = all_bounds(config, 16, Load(context, batch), h100, room)
    shares = ", ".join(
        f"{100 * s / first.seconds:.0f} % {part}" for part, s in first.parts.items() if s > 0.005 * first.seconds
    )
    print(f"{batch:2d} x {context:5,} tokens: {first.way!s:10s} {1e3 * first.seconds:6.2f} ms a token ({shares})")
    print(f"                    then {others[0].way} with {1e3 * others[0].seconds:.2f} ms")

# %% [markdown]
# **What a rank holds is exact**, what it needs is a bound: kernels do not reach the peak, and starting them takes time. How far off that is on this
# machine, `python -m common.distributed.check_plan` measures. The memory formula is the model's own:

# %%
small = model_shape("Qwen2.5-0.5B")
for ranks in (1, 2, 3, 4):
    with torch.device("meta"):  # shapes without numbers
        real = sum(p.numel() for p in CausalLM(small, TPGroup(ranks - 1, ranks)).parameters())
    planned = holdings(small, Way(Layout(ranks)), Load(512, 1)).weights
    print(f"Qwen2.5-0.5B on {ranks} rank(s): {planned:13,} bytes planned, {2 * real:13,} in the model's last rank")
    assert planned == 2 * real

# %% [markdown]
# **Conclude.** A small message costs latency, a large one bandwidth; decode sends small ones. Cutting layers saves reading and pays in sums: it
# wins where links are fast and requests few. Copies say nothing and hold everything. Stages hold little and say little, and make nobody wait less. What
# wins is decided by numbers that anybody can look up: bytes, bandwidths, latencies.
#
# **Try it:** give `Machine.of_gpus("L4")` the 7B model on 4 GPUs (no NVLink). Plan for `Llama-3.1-405B` on 8 H200. Which number of the
# machine would you double first?
