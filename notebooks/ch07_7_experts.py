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
# # Chapter 7, notebook 7: which expert, on which rank, and what a token leaves behind
#
# The bundled model has a sibling with experts, [mixture](../common/tiny_qwen/README.md#a-mixture-that-speaks). In each of its four layers there are
# eight experts in place of the MLP, of which a router chooses two for each token, and a small shared expert, which sees every token.
# It recites the same glossary. Here every answer, 180 in English and 180 in Chinese, goes through it once, and what the four routers
# said is written down.
#
# **Predict first:** if all experts were chosen as often, each would get one choice in eight, 12.5 %. How much does the hottest one get, and how much the coldest?
# Do English and Chinese go to different experts?

# %%
import random
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from matplotlib import font_manager
from matplotlib.colors import ListedColormap

from ch07_sglang_radix import Engine
from ch07_sglang_radix.experts.eplb import balancedness, place, rank_loads
from common.attention.kv_cache import PagedKVCache
from common.layers.expert_placement import shares as slots_of_ranks
from common.layers.heads import HeadLayout
from common.models.config import ModelConfig
from common.models.published_configs import published_shape
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.routing import glossary_routes, measure, shares
from common.tiny_qwen.upcycle import CHOSEN, EXPERTS, MIXTURE_PATH, tiny_mixture

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
LANGUAGES = {"en": "English", "zh": "Chinese"}

routes = glossary_routes(MIXTURE_PATH)
of_language = {
    lang: torch.cat([r.chosen for r in routes if r.language == lang], dim=1) for lang in LANGUAGES
}  # [L, T, k]
chosen = torch.cat(list(of_language.values()), dim=1)
LAYERS, TOKENS, _ = chosen.shape
got = {lang: np.array([shares(layer, EXPERTS).tolist() for layer in of]) for lang, of in of_language.items()}  # [L, E]

figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), gridspec_kw={"width_ratios": [1, 1, 1.05]}, layout="constrained")
pictures = {**{LANGUAGES[lang]: share for lang, share in got.items()}, "English less Chinese": got["en"] - got["zh"]}
for axis, (title, values) in zip(axes, pictures.items(), strict=True):
    apart = title not in LANGUAGES.values()
    limits = {"cmap": "PuOr", "vmin": -0.15, "vmax": 0.15} if apart else {"cmap": "Blues", "vmin": 0, "vmax": 0.35}
    axis.imshow(values, aspect="auto", **limits)
    for (y, x), value in np.ndenumerate(values):
        axis.text(x, y, f"{round(100 * value):{'+' if apart else ''}d}", ha="center", va="center", fontsize=10)
    axis.set_title(title)
    axis.set_xticks(range(EXPERTS))
    axis.set_xlabel("expert")
    axis.set_yticks(range(LAYERS), [f"layer {i}" for i in range(LAYERS)] if axis is axes[0] else [""] * LAYERS)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
figure.suptitle("Of 100 choices of a layer's router, how many each expert gets")
plt.show()

share = np.array([shares(layer, EXPERTS).tolist() for layer in chosen])
print(
    f"{TOKENS} tokens, {CHOSEN} choices each; hottest {share.max():.1%}, coldest {share.min():.1%}, all alike {1 / EXPERTS:.1%}"
)
assert all(np.allclose(of.sum(1), 1) for of in got.values())
assert share.min() < 0.85 / EXPERTS < 1.15 / EXPERTS < share.max()

# %% [markdown]
# In training a loss was added that is smallest if all get alike (the Switch Transformer's, with weight 0.01), and it holds: nobody idles, and the hottest expert of a
# layer has one and a half to two and a half times what the coldest has. The languages share all experts, with preferences. So "the Chinese expert" is not to be found here.
#
# What is it, then, that a router goes by? **Predict:** below are the tokens of one answer in both languages, and the first choice of each layer in colour. Will
# one token, say the full stop or `expert`, always get the same colour?

# %%
tokenizer = transformers.AutoTokenizer.from_pretrained(MIXTURE_PATH)
PALETTE = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c"]
COLUMNS = 24
# A font for the Chinese tokens, if this machine has one; otherwise they are numbered, and stand below the picture
FONTS = ("NotoSansCJK", "NotoSansSC", "wqy-microhei", "PingFang", "Hiragino Sans GB", "msyh", "simhei")
font = next((path for path in font_manager.findSystemFonts() if Path(path).stem.startswith(FONTS)), None)
if font:
    font_manager.fontManager.addfont(font)
    plt.rcParams["font.family"] = ["DejaVu Sans", font_manager.FontProperties(fname=font).get_name()]


def written(token: int) -> str:
    """A token as text; one that is a part of a character only, as its bytes."""
    text = tokenizer.decode([token])
    return "·" if "\ufffd" in text else text.strip() or "␣"


def draw_tokens(axis, route, start: int) -> None:
    part = route.chosen[:, start : start + COLUMNS, 0]  # [L, tokens]
    axis.imshow(part, cmap=ListedColormap(PALETTE), vmin=0, vmax=EXPERTS - 1, aspect="auto")
    for (y, x), expert in np.ndenumerate(part.numpy()):
        axis.text(x, y, expert, ha="center", va="center", color="white", fontsize=9)
    for x, token in enumerate(route.ids[start : start + COLUMNS]):
        said = written(token) if font or written(token).isascii() else str(x)
        axis.text(x, -0.7, said, rotation=50, ha="left", va="bottom", fontsize=10, rotation_mode="anchor")
    axis.set_xlim(-0.5, COLUMNS - 0.5)
    axis.set_xticks([])
    axis.set_yticks(range(LAYERS), [f"layer {i}" for i in range(LAYERS)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def about(words: str):
    """The first English answer with these words, and the Chinese one of the same term behind it."""
    at = next(i for i, r in enumerate(routes) if r.language == "en" and words in tokenizer.decode(r.ids))
    return routes[at], routes[at + 1]


english, chinese = about("router")
figure, axes = plt.subplots(2, 1, figsize=(12, 5.2))
for axis, route in zip(axes, (english, chinese), strict=True):
    draw_tokens(axis, route, 0)
figure.suptitle("The first of the two experts of each token, in each layer", y=0.99)
figure.subplots_adjust(left=0.07, right=0.97, top=0.82, bottom=0.02, hspace=0.75)
plt.show()
print(tokenizer.decode(english.ids))
print(tokenizer.decode(chinese.ids))

# %% [markdown]
# Sometimes, most often in the first layer. A router sees the row of a token, in which the layers before have gathered what was said so far, so one token can go to different
# experts at different places. Four numbers a layer ([routing.py](../common/tiny_qwen/routing.py) says how they are counted): how different the shares of English
# and Chinese tokens are, and of first and second halves of answers (0: the same, 1: no expert in common; *chance* is what two random halves differ by), and
# how often a token's first expert is the one that the same token mostly gets elsewhere (*token*; one in eight if it says nothing).
#
# **Predict:** the same is measured for `tiny_mixture()`, whose routers are random numbers that nobody has trained. Which of the four do you expect to be far smaller
# there?

# %%
rows = {"trained": measure(routes, EXPERTS), "random": measure(glossary_routes(tiny_mixture()), EXPERTS)}
WHAT = ["language", "place", "chance", "token"]
figure, axes = plt.subplots(1, len(WHAT), figsize=(12, 3), sharey=True, layout="constrained")
for axis, what in zip(axes, WHAT, strict=True):
    for shift, (name, of) in zip((-0.2, 0.2), rows.items(), strict=True):
        values = [float(row[what]) for row in of]
        bars = axis.bar(
            np.arange(LAYERS) + shift,
            values,
            0.38,
            label=f"{name} routers",
            color={"trained": "#4c72b0", "random": "0.75"}[name],
        )
        axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
    axis.set_title(what)
    axis.set_xticks(range(LAYERS))
    axis.set_xlabel("layer")
    axis.spines[["top", "right"]].set_visible(False)
axes[2].legend(frameon=False)
plt.show()

for name, of in rows.items():
    print(f"{name:8s} entropy of the shares, of 3 bits: {', '.join(row['entropy'] for row in of)}")
assert all(float(row["token"]) > 2 / EXPERTS for of in rows.values() for row in of)
assert all(float(row["language"]) > 3 * float(row["chance"]) for of in rows.values() for row in of)

# %% [markdown]
# None of them. A random matrix already sends like rows to like experts: it cuts the space of rows into regions, and tokens, languages and places lie in
# different ones. It is balanced as well as the trained one, too. What training adds is that an expert becomes good at the rows of its
# region, and that router and experts fit each other. Proof: with the experts of a layer in another order the trained model would have the same load, numbered otherwise,
# and should say nothing sensible. **Predict:** and `tiny_mixture()`, whose experts are all equal?

# %%
QUESTIONS = ["What is a radix cache?", "什么是流水线并行？"]


@torch.inference_mode()
def answers(folder, shuffled: bool) -> list[str]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in model.model.layers if shuffled else ():
        layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.roll(1, 0))  # who was called 0 is called 1 now
    said = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
        said.append(tokenizer.decode(output, skip_special_tokens=True))
    return said


dense = answers(TINY_QWEN_PATH, False)
for name, folder in {"trained": MIXTURE_PATH, "equal experts": tiny_mixture()}.items():
    for shuffled in (False, True):
        said = answers(folder, shuffled)
        for text in said:
            print(f"{name:14s} {'shuffled' if shuffled else '        '}  {text[:96]}")
        assert (said == dense) == (name == "equal experts" or not shuffled)

# %% [markdown]
# ## Who computes
#
# Four ranks. Under tensor parallelism each has a quarter of the columns of all eight experts, and all have alike much to do, whatever the routers say. Under
# expert parallelism each has two whole experts. A layer is done when its slowest rank is done, so what counts is the mean over the maximum: the share of the ranks' time
# in which they compute (*balancedness*). With four redundant experts a rank has three slots, and EPLB chooses who lies in them, by the load that it has seen.
#
# **Predict:** balancedness under EP, with 2 and with 3 slots a rank. And if the load was seen with English questions, and then Chinese ones come?

# %%
RANKS, REDUNDANT = 4, 4
COLOURS = plt.cm.Blues(np.linspace(0.35, 0.9, LAYERS))


def load_of(of: torch.Tensor) -> list[list[int]]:
    """[L][E]: rows that each expert gets."""
    return [torch.bincount(layer.flatten(), minlength=EXPERTS).tolist() for layer in of]


def slots(redundant: int) -> list[int]:
    return [stop - first for first, stop in slots_of_ranks(EXPERTS + redundant, RANKS)]


def in_order() -> list[list[int]]:
    return [list(range(first, stop)) for first, stop in slots_of_ranks(EXPERTS, RANKS)]


everything, english_load, chinese_load = load_of(chosen), load_of(of_language["en"]), load_of(of_language["zh"])
by_eplb = [place(load, slots(REDUNDANT)) for load in everything]
by_english = [place(load, slots(REDUNDANT)) for load in english_load]
cases = {
    "TP: a quarter\nof each expert": [[sum(load) / RANKS] * RANKS for load in everything],
    "EP: two experts\na rank, in order": [rank_loads(load, in_order()) for load in everything],
    "EP, EPLB, no copies": [rank_loads(load, place(load, slots(0))) for load in everything],
    "EP, EPLB,\n4 redundant": [rank_loads(load, held) for load, held in zip(everything, by_eplb, strict=True)],
    "EP in order,\nChinese comes": [rank_loads(load, in_order()) for load in chinese_load],
    "EPLB of English load,\nChinese comes": [
        rank_loads(load, held) for load, held in zip(chinese_load, by_english, strict=True)
    ],
}
figure, axes = plt.subplots(1, len(cases), figsize=(12.5, 3.6), sharey=True, layout="constrained")
for axis, (name, of) in zip(axes, cases.items(), strict=True):
    for layer, loads in enumerate(of):
        at = np.arange(RANKS) + (layer - 1.5) * 0.2
        axis.bar(at, np.array(loads) / np.mean(loads), 0.19, color=COLOURS[layer], label=f"layer {layer}")
    axis.axhline(1, color="0.3", lw=0.8)
    balance = np.mean([balancedness(loads) for loads in of])
    axis.set_title(f"{name}\nbalancedness {balance:.2f}", fontsize=10)
    axis.set_xticks(range(RANKS), [f"rank {r}" for r in range(RANKS)], fontsize=9)
    axis.tick_params(length=0)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("rows, mean of ranks = 1")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=LAYERS, frameon=False)
plt.show()

mean = {name: np.mean([balancedness(loads) for loads in of]) for name, of in cases.items()}
tp, plain, packed, copied, other, foreign = mean.values()
assert tp == 1 > copied > packed > plain
assert max(foreign, other) < copied
print("experts of layer 3 by rank, with copies:", by_eplb[3], "load", everything[3])

# %% [markdown]
# EP alone leaves ranks waiting, and packing hot with cold experts is most of the cure; copies are the rest. But a placement is made of yesterday's load: when the other language comes,
# it is no better than none. This is why engines rebalance while they run. (Here the load is of whole answers; one decode step has a
# few rows, and is never balanced.)
#
# Why then not always TP? Because of the widths (an expert of 136 columns in four is 34: nothing for a GPU), and because of the bytes. A decode step must read
# each expert that *any* of its rows chose. **Predict:** of the eight experts of a layer, how many do T = 1, 2, 4, 8, 16 tokens touch together? (k = 2.) How many would
# it be if choices were dice?

# %%
rng = random.Random(0)
SIZES = [1, 2, 4, 8, 16, 32]
touched = np.array([
    [np.mean([len(layer[torch.tensor(rng.sample(range(TOKENS), size))].unique()) for _ in range(400)]) for size in SIZES]
    for layer in chosen
])  # fmt: skip
dice = [EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** size) for size in SIZES]
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for layer, of in enumerate(touched):
    axis.plot(SIZES, of, "o-", color=COLOURS[layer], label=f"layer {layer}")
axis.plot(SIZES, dice, "k--", lw=1, label="dice: E (1 - (1 - k/E)^T)")
axis.set_xscale("log", base=2)
axis.set_xticks(SIZES, SIZES)
axis.set_ylim(0, EXPERTS + 0.3)
axis.set_xlabel("T, tokens of a decode step, each from another answer")
axis.set_ylabel("experts touched, of 8")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()
assert (touched[:, 0] == CHOSEN).all()
assert np.abs(touched - dice).max() < 0.5

# %% [markdown]
# Almost as dice. One token reads a quarter of the experts, eight tokens nine tenths: from there on a mixture's decode step reads all of its
# weights, and *computes* like a small model. So a mixture needs large batches, and many cards that each hold few experts, to be cheap.
#
# ## What a token leaves behind
#
# Attention caches K and V: 2 Hkv d numbers a layer, and with as many KV heads as query heads (MHA) it would be 2 Hq d. Grouped heads (GQA) share them.
# Latent attention (MLA) keeps one row of c + r numbers, from which all heads make theirs. The bundled model has a form of this kind that answers from rows of
# 32 + 16 numbers ([latent](../common/tiny_qwen/README.md#latent-attention-that-speaks)). **Predict:** which of these models has the smallest row, and
# which keeps the smallest share of what MHA would?

# %%
NAMES = [
    "Qwen2.5-0.5B",
    "Llama-3.1-8B",
    "Mixtral-8x7B",
    "Qwen3-30B-A3B",
    "Qwen3-235B-A22B",
    "DeepSeek-V2-Lite",
    "DeepSeek-V3",
]
models = {"tiny_qwen": ModelConfig.from_folder(TINY_QWEN_PATH), **{name: published_shape(name) for name in NAMES}}


def row_bytes(config: ModelConfig, ranks: int = 1) -> int:
    """Of a token and layer on one rank, in bfloat16."""
    heads = (
        config.num_kv_heads
        if config.latent
        else len(HeadLayout.of(config.num_heads, config.num_kv_heads, 0, ranks).kv_heads)
    )
    return PagedKVCache.bytes_per_page(1, 1, heads, dtype=torch.bfloat16, **config.kv_row)


def of_every_head(config: ModelConfig) -> int:
    """The same if every query head had a K and a V of its own."""
    value = config.latent.v_dim if config.latent else config.head_dim
    return config.num_heads * (config.head_dim + value) * torch.bfloat16.itemsize


figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
mha, kept = ([of(config) for config in models.values()] for of in (of_every_head, row_bytes))
for shift, values, label, colour in (
    (-0.2, mha, "if each head had its own (MHA)", "0.8"),
    (0.2, kept, "cached", "#4c72b0"),
):
    bars = axis.bar(np.arange(len(models)) + shift, values, 0.38, color=colour, label=label)
    axis.bar_label(bars, [f"{value:,}" for value in values], fontsize=8)
for bar, config in zip(bars, models.values(), strict=True):
    if config.latent:
        bar.set_color("#dd8452")
axis.set_yscale("log")
axis.set_xticks(
    range(len(models)),
    [f"{name}\n{'MLA' if config.latent else f'GQA {config.num_heads}:{config.num_kv_heads}'}\n1/{a / b:.0f}"
     for (name, config), a, b in zip(models.items(), mha, kept, strict=True)],
    fontsize=8,
)  # fmt: skip
axis.set_ylabel("bytes a token and layer")
axis.legend(frameon=False, loc="upper left")
axis.spines[["top", "right"]].set_visible(False)
plt.show()
v3 = models["DeepSeek-V3"]
assert (v3.latent.row, row_bytes(v3), of_every_head(v3)) == (576, 1152, 81_920)

# %% [markdown]
# V3's 128 heads would leave 81,920 bytes a layer, its row has 1,152. It is not the smallest there is: with one KV head in seven and small heads Qwen2.5-0.5B has
# fewer. But for 128 heads of 192 it is 1/71, where GQA reaches 1/16, and all heads may look at different things.
#
# Tensor parallelism deals KV heads out, until each rank has one. **Predict:** what does a rank hold of a latent row, at 2, 4 and 8 ranks?

# %%
SHOWN = ["Llama-3.1-8B", "Qwen3-235B-A22B", "DeepSeek-V3"]
WORLD = [1, 2, 4, 8, 16]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), sharex=True, layout="constrained")
for name in SHOWN:
    config = models[name]
    one = np.array([row_bytes(config, ranks) for ranks in WORLD])
    left.plot(WORLD, one, "o-", label=name)
    right.plot(WORLD, np.array(WORLD) * one / one[0], "o-", label=name)
for axis, title in ((left, "bytes a token and layer on one rank"), (right, "copies of each row on all ranks together")):
    axis.set_title(title, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(WORLD, WORLD)
    axis.set_xlabel("tensor-parallel ranks")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False)
plt.show()
assert [row_bytes(v3, ranks) for ranks in WORLD] == [1152] * len(WORLD)

# %% [markdown]
# The whole row: there is one "head", which every rank needs, so R ranks hold R copies, and more ranks make no room for more tokens. GQA meets the same end later,
# when ranks outnumber KV heads. Attention-data parallelism repairs it ([notebook 5](ch07_5_parallelism.ipynb)): each rank
# caches the rows of its own requests, and the experts are dealt out over all ranks. Then rows must travel to experts, which is the part's
# [step 4](../ch07_sglang_radix/experts/README.md#4-tokens-travel).
#
# ## It is the same model
#
# **Predict:** in how many of the answers below does the project's engine write another token than `transformers`, in float32?

# %%
for name, folder in {"trained": MIXTURE_PATH, "equal experts": tiny_mixture()}.items():
    engine = Engine(str(folder), device="cpu", dtype="float32")
    ids = [engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    texts = [result["text"] for result in engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 60})]
    assert texts == answers(folder, False), name
    print(f"{name:14s} {len(texts)} answers: equal to transformers")

# %% [markdown]
# **Conclude.** A router cuts the space of rows into regions, and training makes an expert for each. Tokens of all kinds meet all experts, in shares that are
# uneven enough to make ranks wait; copies and a good placement mend that, as long as tomorrow is like yesterday. A token computes with a part of the weights, a
# batch reads all of them. And what a token leaves in the cache is a choice of its own: a row a KV head, which ranks can share out, or one row for all
# heads, which they cannot.
#
# **Try it:** set `REDUNDANT = 0`, 1, 2, 8: from where on does another copy help little? Then train another mixture, `python -m common.tiny_qwen.upcycle --out
# mixture_0`, with `BALANCE = 0`, and draw the first picture of it.
