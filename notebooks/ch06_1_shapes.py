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
# # Chapter 6, notebook 1: which rank holds what
#
# Everything here is asked of the project's own classes. Rank is an argument of every layer, so all ranks of a model fit into one
# process: no `torchrun`, no messages, only shapes.
#
# **Predict first.** Qwen2.5-0.5B has hidden size 896, 14 query heads and 2 KV heads of 64, an MLP of 4864, a vocabulary of 151,936. On two
# ranks, what is the shape of `qkv_proj.weight` on each? Of `o_proj.weight`? Of `down_proj.weight`?

# %%
import matplotlib.pyplot as plt
import torch

from common.layers.heads import HeadLayout
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.published_configs import published_config
from common.parallel_state import TPGroup

config = ModelConfig.from_dict(published_config("Qwen2.5-0.5B", architectures=["Qwen2ForCausalLM"]).to_dict())


def rank_of(size: int, rank: int = 0) -> CausalLM:
    """This rank's part of the model, without memory behind it."""
    with torch.device("meta"):
        return CausalLM(config, TPGroup(rank, size))


SIZES = (1, 2, 4)
names = [name for name, _ in rank_of(1).model.layers[0].named_parameters() if name.endswith("weight")]
print(f"{'layer 0':38s}" + "".join(f"R = {size}".ljust(16) for size in SIZES))
for name in names:
    shapes = [list(dict(rank_of(size).model.layers[0].named_parameters())[name].shape) for size in SIZES]
    print(f"{name:38s}" + "".join(str(shape).ljust(16) for shape in shapes))

# %% [markdown]
# Column-parallel weights (`qkv_proj`, `gate_up_proj`) lose rows: torch stores `[out, in]`, and their outputs are cut. Row-parallel ones
# (`o_proj`, `down_proj`) lose columns: their inputs are cut. Norms stay whole.
#
# On four ranks `qkv_proj` has not half of two ranks' rows. **Why?**

# %%
colours = ["#4c72b0", "#dd8452"]  # one a KV head
figure, axes = plt.subplots(5, 1, figsize=(9, 6))
for axis, size in zip(axes, (1, 2, 3, 4, 8), strict=True):
    x = 0
    for rank in range(size):
        layout = HeadLayout.of(14, 2, rank, size)
        for head in layout.q_heads:
            colour = "white" if head is None else colours[head // 7]
            axis.barh(0, 0.92, left=x, color=colour, edgecolor="grey", linewidth=0.6)
            axis.text(x + 0.46, 0, "" if head is None else head, ha="center", va="center", fontsize=7, color="white")
            x += 1
        middle = x - layout.num_q / 2
        axis.text(
            middle,
            -0.75,
            f"rank {rank}: KV {', '.join(map(str, layout.kv_heads))}",
            ha="center",
            va="center",
            fontsize=7,
        )
        if rank + 1 < size:
            axis.plot([x - 0.04] * 2, [-0.95, 0.5], color="black", linewidth=1.5)
    axis.set_yticks([0], [f"R = {size}"])
    axis.set_xlim(-0.2, 18.2)
    axis.set_ylim(-1, 0.6)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
figure.suptitle("14 query heads, by rank; colour: the KV head they share; white: a head of zeros")
figure.tight_layout()
plt.show()

# %% [markdown]
# A head is never cut, and a query head stays with its KV head. With more ranks than KV heads each KV head is held several times, and where
# seven query heads do not divide, zeros fill up. A padded head adds nothing, because its rows of `q_proj` and its columns of `o_proj` are
# zero: what its attention gives is multiplied by zero.

# %%
print("R   query heads held  of them zeros  KV heads held  of them copies")
for size in range(1, 9):
    layouts = [HeadLayout.of(14, 2, rank, size) for rank in range(size)]
    held, kv = sum(layout.num_q for layout in layouts), sum(layout.num_kv for layout in layouts)
    print(f"{size}   {held:16d}  {held - 14:13d}  {kv:13d}  {kv - 2:14d}")

# %%
kept = {size: sum(p.numel() for p in rank_of(size).parameters()) for size in range(1, 9)}
beyond = [
    100 * (size * count / kept[1] - 1) for size, count in kept.items()
]  # % of one copy that all ranks hold too much
figure, axis = plt.subplots(figsize=(6, 3.2))
bars = axis.bar(list(kept), beyond, color="#4c72b0")
axis.bar_label(bars, [f"{x:.1f} %" for x in beyond], fontsize=8)
axis.set_xlabel("R")
axis.set_ylabel("% more than one copy")
axis.set_title("What all ranks hold together, beyond the model once")
axis.spines[["top", "right"]].set_visible(False)
plt.show()
for size, count in kept.items():
    print(
        f"R = {size}: {count / 1e6:7.1f} million a rank, {size * count / kept[1] - 1:6.1%} more than one copy together"
    )
assert kept[2] < 0.51 * kept[1]

# %% [markdown]
# **Conclude.** What a rank holds is one R-th of every matrix, plus three things: the norms, whole on each rank; heads of zeros where the groups
# do not divide; and copies of KV heads where there are more ranks than those. With the table above: which of the three makes R = 7 expensive,
# and which R = 3?
