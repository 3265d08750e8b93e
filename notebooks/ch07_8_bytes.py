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
# # Chapter 7, notebook 8: fewer bytes
#
# A decode step reads every weight once, and does little with it: it takes as long as its bytes take to come. So a weight of half the bytes is
# nearly twice the speed, and the question is what the missing bits cost. Here is one row of the bundled model's weights, and what becomes of it
# in four bits.
#
# **Predict:** where on the scale of a group lie most of its numbers, near 0 or near its ends?

# %%
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import load_file

from ch07_sglang_radix import Engine
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme
from common.tiny_qwen import TINY_QWEN_PATH

BLUE, ORANGE, GREEN, RED, GREY = "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#999999"
weights = load_file(TINY_QWEN_PATH / "model.safetensors")
weight = weights["model.layers.1.mlp.up_proj.weight"].float()  # [608, 224]
int4 = Scheme("gptq", 4, "int", "group", group_size=32)
codes = round_to_nearest(weight, int4)
back = codes.dequantise()

row, group = 7, slice(0, 32)
figure, (numbers, shares) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=(3, 2))
for level in range(-8, 8):
    numbers.axhline(level * codes.scale[row, 0], color=GREY, lw=0.4, zorder=0)
numbers.plot(weight[row, group], "o", ms=4, color=BLUE, label="float32")
numbers.plot(back[row, group], "_", ms=10, mew=2, color=ORANGE, label="4 bits")
numbers.set(xlabel="column", ylabel="weight", title="32 numbers that share a scale, and the 16 they may become")
numbers.legend(frameon=False, ncols=2, loc="upper right")
levels, counts = np.unique(codes.q.numpy(), return_counts=True)
shares.bar(levels, counts / counts.sum(), color=BLUE)
shares.set(xlabel="code", title="how often each code is taken, the whole matrix")
shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
for axis in (numbers, shares):
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Weights lie in a bell, and the codes are evenly spaced. So the codes at the ends are seldom taken, and the largest number of a group decides how far
# apart they are for all others: that is why a scale covers few numbers.
#
# ## What a scale covers
#
# The same matrix in more and fewer bits, with scales that many or few numbers share. Bytes a number: its bits, and its part of the scales (2 bytes each, 1 of mxfp4's, which are powers of two).
#
# **Predict:** which is closer to the weights: 4 bits with a scale for 32 numbers, or 8 bits with one scale for all 136,192?

# %%
FORMS = {
    "int8, one for all": Scheme("w8a8_int8", 8, "int", "tensor"),
    "int8, a row": Scheme("w8a8_int8", 8, "int", "channel"),
    "fp8, one for all": Scheme("fp8", 8, "float", "tensor"),
    "fp8, a row": Scheme("fp8", 8, "float", "channel"),
    "fp8, 128 x 128": Scheme("fp8", 8, "float", "block", block=(128, 128)),
    "int4, a row": Scheme("gptq", 4, "int", "channel"),
    "int4, 128 numbers": Scheme("gptq", 4, "int", "group", group_size=128),
    "int4, 32 numbers": Scheme("gptq", 4, "int", "group", group_size=32),
    "int4, 32, zero points": Scheme("awq", 4, "int", "group", group_size=32, symmetric=False),
    "mxfp4, 32 numbers": Scheme("mxfp4", 4, "float", "group", group_size=32),
    "int3, 32 numbers": Scheme("gptq", 3, "int", "group", group_size=32),
    "int2, 32 numbers": Scheme("gptq", 2, "int", "group", group_size=32),
}
rows = {}
for name, scheme in FORMS.items():
    one = round_to_nearest(weight, scheme)
    scales = {"tensor": 1, "block": (-(-weight.shape[0] // 128)) * one.scale.shape[1]}.get(
        scheme.strategy, one.scale.numel()
    )
    zeros = 0 if one.zero is None else scales * scheme.bits / 8
    nbytes = (
        scheme.bits * weight.numel() / 8 + (1 if scheme.method == "mxfp4" else 2) * scales + zeros
    ) / weight.numel()
    error = (torch.linalg.norm(one.dequantise() - weight) / torch.linalg.norm(weight)).item()
    rows[name] = nbytes, error
    print(f"{name:22} {nbytes:.3f} bytes a number   error {error:.2%}")

figure, axis = plt.subplots(figsize=(8, 3.6))
of_bits = {8: BLUE, 4: ORANGE, 3: GREEN, 2: RED}
bars = axis.barh(list(rows), [error for _, error in rows.values()], color=[of_bits[FORMS[name].bits] for name in rows])
axis.bar_label(bars, [f"{nbytes:.3f} bytes" for nbytes, _ in rows.values()], padding=3, fontsize=8)
axis.set(xlabel="error, as a share of the weights", xscale="log", xlim=(5e-3, 2))
axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axis.invert_yaxis()
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()
assert rows["int8, a row"][1] < rows["fp8, a row"][1] < rows["int4, 32 numbers"][1] < rows["int4, a row"][1]

# %% [markdown]
# Evenly spaced codes beat floating-point ones of as many bits where the numbers lie in a bell: fp8 spends its codes near 0, where an error is small anyway.
# What fp8 is for is speed (GPUs multiply it as it is) and numbers of very different size, as activations have them.
#
# ## Where the scales lie
#
# The scale of each group of 32 columns, for 64 rows of the matrix: what a row cut (down_proj over ranks) takes apart, and a column cut (up_proj) does not.

# %%
figure, axis = plt.subplots(figsize=(7, 3))
shown = axis.imshow(codes.scale[:64], aspect="auto", cmap="viridis")
axis.set(xlabel="group of 32 columns", ylabel="row", title="scale [64, 7]; the line: where two ranks part")
axis.axvline(3, color="white", lw=2, ls="--")
figure.colorbar(shown)
plt.show()

# %% [markdown]
# 224 columns over two ranks are 112 each, and 112 is no multiple of 32. Whoever reads columns 112 .. 223 reads whole groups, and keeps of group 3 its
# second half: codes carry the number of their group with them (`Codes.group`).

# %%
half = codes.cut(columns=slice(112, 224))
print("groups of rank 1's columns:", half.group.unique_consecutive(return_counts=True)[1].tolist())
assert torch.equal(half.dequantise(), back[:, 112:])

# %% [markdown]
# ## K and V in fewer bytes
#
# Pages hold K and V of every token, and `--kv-cache-dtype` says in what. The same 4 MiB of pages, and how many tokens fit.
#
# **Predict:** int8 keeps a scale of 2 bytes for each head of each token, and heads have 16 numbers here. By how much does that shrink what fits?

# %%
question = "What is a radix cache?"
answers, fits = {}, {}
for name in ("auto", "bf16", "fp8_e4m3", "int8", "int4"):
    engine = Engine(device="cpu", kv_cache_dtype=name, max_total_tokens=4096)
    prompt = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": question}])
    answers[name] = engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 48})["text"]
    cache = engine.wrapper.kv_cache
    fits[name] = (4 << 20) * cache.num_pages * cache.page_size // sum(tensor.nbytes for tensor in cache.tensors)
    engine.shutdown()
for name, answer in answers.items():
    print(f"{name:9} {fits[name]:7,} tokens   {answer[:70]}")
figure, axis = plt.subplots(figsize=(7, 2))
bars = axis.barh(list(fits), list(fits.values()), color=[GREY, BLUE, GREEN, ORANGE, RED])
axis.bar_label(bars, [f"{count:,}" for count in fits.values()], padding=3)
axis.set(xlabel="tokens in 4 MiB of pages", xlim=(0, 1.2 * max(fits.values())))
axis.invert_yaxis()
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What was evicted comes back
#
# A pool of 512 tokens, and sixteen long prompts that do not fit together, asked one after the other, twice. Without a tier below, the second round finds
# nothing: each prompt has been evicted before it is asked again. With one, an evicted node stays in the tree, with its pages in the host's memory, or in files.
#
# **Predict:** the host holds one and a half times what the device holds, and not all of it. How much does the second round find there?


# %%
def two_rounds(**tiers) -> list[dict]:
    """cached_tokens_details of each request of the second round, and its prompt's length."""
    engine = Engine(device="cpu", max_total_tokens=512, page_size=16, **tiers)
    tokenizer = engine.wrapper.tokenizer
    prompts = [tokenizer.encode(f"{n} " * 60)[:120] for n in range(16)]
    for _ in range(2):
        found = []
        for prompt in prompts:
            told = engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 2})["meta_info"]
            found.append(
                {"device": told["cached_tokens"], **(told.get("cached_tokens_details") or {}), "prompt": len(prompt)}
            )
    engine.shutdown()
    return found


with tempfile.TemporaryDirectory() as folder:
    tiers = {"enable_hierarchical_cache": True, "hicache_ratio": 1.5, "hicache_write_policy": "write_through"}
    files = {"hicache_storage_backend": "file", "hicache_storage_dir": folder, "hicache_prefetch_threshold": 16}
    files["hicache_storage_prefetch_policy"] = "wait_complete"
    rounds = {
        "no tier below": two_rounds(),
        "host, 1.5 times": two_rounds(**tiers),
        "host, four times": two_rounds(**tiers | {"hicache_ratio": 4.0}),
        "host and files": two_rounds(**tiers, **files),
    }
figure, axis = plt.subplots(figsize=(8, 2.4))
for place, (name, found) in enumerate(rounds.items()):
    start, whole = 0.0, sum(one["prompt"] for one in found)
    for kind, colour in (("device", BLUE), ("host", ORANGE), ("storage", GREEN)):
        share = sum(one.get(kind, 0) for one in found) / whole
        axis.barh(place, share, left=start, color=colour, label=kind if place == 0 else None)
        start += share
    print(f"{name:17} {start:.0%} of the second round's tokens were not computed again")
axis.set_yticks(range(len(rounds)), list(rounds))
axis.set(xlim=(0, 1), xlabel="share of the second round's prompt tokens, by where their K and V were found")
axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axis.invert_yaxis()
axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Least recently used is the worst order for a round that begins again: what is needed next has just gone. It holds on the host as on the device, so a host that
# cannot hold all of it helps with nothing, and one that can helps with everything; so do files.
