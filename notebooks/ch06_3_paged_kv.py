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
# # Chapter 6, notebook 3: blocks filling up, blocks shared, and who runs when
#
# The engine of chapter 6 on the bundled model, watched step by step. Five requests; the first three begin with the same 24 tokens. Blocks
# of 8 tokens, a pool of 20. **Predict first:** how many blocks do the first three prompts share once the first one is computed?

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ch06_tp_vllm import LLMEngine, SamplingParams

trace = Path(tempfile.mkdtemp()) / "steps.jsonl"
engine = LLMEngine(
    device="cpu", block_size=8, num_gpu_blocks_override=20, max_num_batched_tokens=24, max_num_seqs=4, trace=trace
)
shared = list(range(300, 324))
prompts = {"a": [*shared, 1, 2], "b": [*shared, 3, 4, 5], "c": [*shared, 6], "d": [7] * 30, "e": [8] * 11}
arrives = {"a": 1, "b": 2, "c": 2, "d": 3, "e": 5}  # before the step of that number
answers = {"a": 12, "b": 9, "c": 14, "d": 6, "e": 8}

step = 1
while step <= 5 or engine.has_unfinished_requests():
    for name, at in arrives.items():
        if at == step:
            params = SamplingParams(temperature=0, max_tokens=answers[name], ignore_eos=True)
            engine.add_request(name, prompts[name], params)
    engine.step()
    step += 1
lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
found = f"{engine.blocks.stats.hits} of {engine.blocks.stats.queries} prompt tokens were there"
print(f"{len(lines)} steps; prefix cache: {found}")
for line in lines[:3]:
    print(json.dumps({key: line[key] for key in ("step", "scheduled", "blocks", "free", "finished")}))

# %% [markdown]
# Each step leaves a line like these ([ch06_tp_vllm/trace.py](../ch06_tp_vllm/trace.py) has the format): who computed what, and which blocks
# each request got. Steps are counted from 1, here and in the pictures. The pictures below are drawn from them. A request is called "id/answer"; here each has one answer.

# %%
frames, tables = [], {}
for line in lines:
    for request in line["preempted"]:
        del tables[request]
    for request, blocks in line["blocks"].items():
        tables.setdefault(request, []).extend(blocks)
    for request in line["finished"]:
        del tables[request]
    frames.append({request[0]: list(table) for request, table in tables.items()})

# %%
colours = dict(zip(prompts, plt.cm.tab10.colors, strict=False))
grid = np.ones((20, len(frames), 3))
for at, tables in enumerate(frames):
    held = {}
    for name, table in tables.items():
        for block in table:
            held.setdefault(block, []).append(name)
    for block, names in held.items():
        grid[block, at] = (0.25, 0.25, 0.25) if len(names) > 1 else colours[names[0]][:3]
plt.figure(figsize=(9, 4.6))
plt.imshow(grid, aspect="auto", interpolation="nearest", extent=(0.5, len(frames) + 0.5, 19.5, -0.5))
plt.xlabel("step")
plt.ylabel("block")
plt.legend(
    [plt.Rectangle((0, 0), 1, 1, color=c) for c in [*colours.values()][:5]]
    + [plt.Rectangle((0, 0), 1, 1, color="0.25")],
    [*prompts, "shared"],
    loc="upper center",
    bbox_to_anchor=(0.5, -0.14),
    ncol=6,
    fontsize=8,
)
for edge in range(21):
    plt.axhline(edge - 0.5, color="0.9", linewidth=0.6)
plt.yticks(range(0, 20, 2))
plt.title("Who holds which block after each step")
plt.show()

# %% [markdown]
# `b` and `c` came when `a`'s first blocks had their names: they hold the same three blocks, and nobody copied them. Had all three come in the
# same step they would have shared as well, because blocks are named when a step is scheduled. (With
# `engine.blocks.name_blocks_at_allocation = False`, set before the first step, each would compute its own, and they would stay apart: vLLM
# merges nothing afterwards.) Freed blocks go white here, but their content stays until somebody needs the room.

# %%
plt.figure(figsize=(9, 2.6))
for line in lines:
    at = line["step"]
    for request, _, new, kind in line["scheduled"]:
        name = request[0]
        row = list(prompts).index(name)
        plt.barh(row, 0.9, left=at - 0.45, color=colours[name], alpha=1.0 if kind == "prefill" else 0.45)
        if kind == "prefill":
            plt.text(at, row, new, ha="center", va="center", fontsize=7, color="white")
for row, name in enumerate(prompts):
    begins = next(line["step"] for line in lines for ran in line["scheduled"] if ran[0][0] == name)
    plt.plot([arrives[name] - 0.5, begins - 0.5], [row, row], color="0.6", linewidth=1.5)  # waits
plt.xlim(0.5, len(lines) + 0.5)
plt.yticks(range(len(prompts)), [*prompts])
plt.gca().invert_yaxis()
plt.xlabel("step")
plt.title("Tokens computed: a number is part of a prompt, pale is one token of an answer, a line waits")
plt.show()
assert max(sum(new for _, _, new, _ in line["scheduled"]) for line in lines) <= 24

# %% [markdown]
# One step holds decodes and parts of prompts side by side, up to the budget of 24 tokens. **Predict:** what would `b`'s first bar show with
# `enable_prefix_caching=False`? Then run it.

# %%
lengths = [len(prompt) + answers[name] for name, prompt in prompts.items()]
rows = []
for size in (4, 8, 16, 32, 64):
    rows.append((size, sum(-n % size for n in lengths), sum(-(-n // size) for n in lengths)))
for size, empty, blocks in rows:
    print(
        f"blocks of {size:2d}: {blocks:3d} blocks, {empty:3d} slots empty at the end, {empty / (blocks * size):5.1%} of the memory held"
    )

# %% [markdown]
# **Conclude.** At most `P - 1` slots are empty a request, whatever its length. Small blocks waste less and share more; large ones need fewer
# table entries and longer reads. vLLM uses 16.
