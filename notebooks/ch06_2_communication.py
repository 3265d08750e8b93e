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
# # Chapter 6, notebook 2: who talks, and how much
#
# Two real ranks run one prefill step (three prompts, 48 tokens) and one decode step (three tokens) of the bundled model; the ledger writes
# down every collective. **Predict first:** the model has 4 layers. How many messages does a step take? Which of them grow with the
# length of the context?

# %%
import csv
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from common.distributed.cost_model import Link, rounds, wire_bytes
from common.teaching.torchrun import torchrun

out = Path(tempfile.mkdtemp()) / "messages.csv"
torchrun(2, "ch06_tp_vllm.record_messages", str(out))
steps = {}
for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines()):
    message = row | {"shape": json.loads(row["shape"]), "bytes": int(row["bytes"])}
    steps.setdefault(row["step"], []).append(message)
for name, entries in steps.items():
    print(f"\n{name}: {len(entries)} messages, {sum(entry['bytes'] for entry in entries):,} bytes")
    for entry in entries:
        print(
            f"  {entry['op']:11s} {entry['layer']:18s} {entry['shape']!s:10s} {entry['bytes']:7,d} bytes  {entry['why']}"
        )

# %% [markdown]
# One all-reduce for the embedding, two a layer, one gather of the logits: that is the whole of tensor parallelism. The other two are the
# control plane: what to do, and which tokens came out.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True)
colours = {"all_reduce": "#4c72b0", "gather": "#dd8452", "broadcast": "#55a868"}
for axis, (name, entries) in zip(axes, steps.items(), strict=True):
    labels = [entry["layer"] for entry in entries]
    axis.barh(
        range(len(entries)), [entry["bytes"] for entry in entries], color=[colours[entry["op"]] for entry in entries]
    )
    axis.set_yticks(range(len(entries)), labels)
    axis.set_xlabel("bytes of the tensor")
    axis.set_title(name)
axes[0].invert_yaxis()
figure.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()], colours, loc="lower center", ncol=3)
figure.tight_layout(rect=(0, 0.07, 1, 1))
plt.show()

# %%
layers = 4
for name, entries in steps.items():
    reduces = [entry for entry in entries if entry["op"] == "all_reduce"]
    assert len(reduces) == 1 + 2 * layers
    print(f"{name:8s} {len(reduces)} all-reduces of {reduces[0]['shape']}: 1 + 2 L")
tokens = [steps[name][1]["shape"][0] for name in ("prefill", "decode")]
ratio = steps["prefill"][1]["bytes"] / steps["decode"][1]["bytes"]
print(f"{tokens[0]} tokens against {tokens[1]}: the all-reduces are {ratio:.0f} times as large")
assert ratio == tokens[0] / tokens[1]

# %% [markdown]
# The tensor of an all-reduce is the same for any number of ranks, `[T, D]` on each. What crosses between them is not: a ring adds up
# a piece on its way round, and hands the sum round once more. **Predict:** how much more crosses on eight ranks than on two?

# %%
tensor = steps["decode"][1]["bytes"]
print(f"an all-reduce of a decode step: {tensor:,} bytes on each rank; latency 50 us, 1 GB/s")
for ranks in (2, 4, 8):
    crosses, longest = wire_bytes("all_reduce", tensor, ranks), rounds("all_reduce", ranks)
    took = Link(latency_s=50e-6, bytes_per_s=1e9).seconds("all_reduce", tensor, ranks)
    print(
        f"R = {ranks}: {crosses:7,} bytes on the wire, {longest:2} messages one after the other, {1e6 * took:5.0f} us"
    )

# %% [markdown]
# **Conclude.** An all-reduce has `T` rows, one a token of the step, and `D` columns: its tensor does not know how long the context is. What
# crosses the wire grows with the ranks, and so does the number of messages that wait for each other. The gather has a row for each
# sequence and this rank's share of the vocabulary. In a decode step of a few sequences each all-reduce is a few kilobytes: its cost is
# latency, 2L + 1 times a step. That is why engines write their own all-reduce for small messages
# ([common/distributed/symmetric_memory.py](../common/distributed/symmetric_memory.py)), which takes one round instead of 2 (R - 1).
#
# **Try it:** change `PROMPTS` in `ch06_tp_vllm/record_messages.py` to thirty prompts. Which bars move, and which do not?
