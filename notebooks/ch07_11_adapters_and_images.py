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
# # Chapter 7, notebook 11: many variants of one model, and a picture in the prompt
#
# Four LoRA adapters of the bundled model lie in [common/tiny_qwen/adapters](../common/tiny_qwen/README.md). One batch asks the same question five
# times: of the base, and of each of them.
#
# **Predict:** how many numbers does an adapter have, for each thousand of the base?

# %%
import random

import matplotlib.pyplot as plt
import numpy as np
import torch

from ch07_sglang_radix import Engine
from common.sampling.params import SamplingParams
from common.tiny_qwen import ADAPTERS_PATH
from common.tiny_qwen.shapes import UNSEEN, WHAT, WHICH_COLOUR, Shape, draw
from common.tiny_qwen.tiny_vision import prompt_of, tiny_vision
from common.vision.mrope import Part, chunk_positions

BLUE, ORANGE, GREEN, RED, GREY = "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#999999"
COLOURS = {"pirate": BLUE, "chinese": ORANGE, "terse": GREEN, "index": RED, None: GREY}
NAMES = ("pirate", "chinese", "terse", "index")
paths = {name: str(ADAPTERS_PATH / name) for name in NAMES}
engine = Engine(device="cpu", lora_paths=paths, max_loras_per_batch=2, max_total_tokens=4096)
question = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": "What is a radix cache?"}])
answers = engine.generate(input_ids=[question] * 5, sampling_params={"max_new_tokens": 60}, lora_path=[None, *NAMES])
for name, answer in zip(("base", *NAMES), answers, strict=True):
    print(f"{name:8} {answer['text'][:100]}")

# %%
adapters = {name: engine.wrapper.lora.read(path) for name, path in paths.items()}
base = sum(parameter.numel() for parameter in engine.wrapper.model.parameters())
sizes = {name: sum(t.a.numel() + t.b.numel() for t in one.modules.values()) for name, one in adapters.items()}
fig, axis = plt.subplots(figsize=(7, 1.8))
bars = axis.barh(NAMES, [1000 * sizes[name] / base for name in NAMES], color=[COLOURS[name] for name in NAMES])
axis.bar_label(bars, [f"{sizes[name]:,}, r = {adapters[name].rank}" for name in NAMES], padding=3)
axis.set(xlabel=f"numbers for each 1,000 of the base's {base:,}", xlim=(0, 60))
axis.invert_yaxis()
plt.show()

# %% [markdown]
# A model of 7 billion has wider matrices, and r stays what it is: the share falls with the width, to a few in a thousand.
#
# ## Where an adapter changes the model
#
# What is added to a matrix `W` is `s B A`. Its size beside that of `W`, for each matrix that the adapter `pirate` changes:
#
# **Predict:** does it change the first layer most, or the last?

# %%
weights = dict(engine.wrapper.model.named_parameters())
layers, modules = (
    engine.wrapper.config.num_layers,
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
size = np.full((layers, len(modules)), np.nan)
room = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
for layer in range(layers):
    for column, module in enumerate(modules):
        thin = adapters["pirate"].modules[f"model.layers.{layer}.{room.get(module, 'mlp')}.{module}"]
        size[layer, column] = thin.scale * torch.linalg.norm(thin.b.float() @ thin.a.float())
fig, axis = plt.subplots(figsize=(7, 2.4))
shown = axis.imshow(size, cmap="Blues", aspect="auto", vmin=0)
for (layer, column), value in np.ndenumerate(size):
    axis.text(
        column, layer, f"{value:.1f}", ha="center", va="center", color="white" if value > size.max() / 2 else "black"
    )
axis.set(
    xticks=range(len(modules)),
    xticklabels=modules,
    yticks=range(layers),
    ylabel="layer",
    title="size of s B A (Frobenius), pirate",
)
plt.show()

# %% [markdown]
# ## Who may run together
#
# Two slots. Somebody asks for `pirate` and `chinese` again and again, one request at every second step; `terse` is asked for once at step 6, `index`
# once at step 8. The gate ([gate.py](../ch07_sglang_radix/adapters/gate.py)) lets later requests pass an overdue one four times, and then an adapter drains.
#
# **Predict:** at which step does `terse` begin?

# %%
scheduler, book = engine.scheduler, engine.scheduler.lora
asked: dict[int, tuple[str, int]] = {}  # rid: (adapter, step)
held: list[dict[int, str]] = []  # of each step: what lies in each slot, and
runs: list[dict[int, str]] = []  # the requests that run, and their adapters


def arrivals(step: int) -> bool:
    wanted = {6: "terse", 8: "index"}.get(step) or (
        ("pirate", "chinese")[step // 2 % 2] if step % 2 == 0 and step < 50 else None
    )
    if wanted:
        params = SamplingParams(max_new_tokens=9, ignore_eos=True)
        asked[scheduler.enqueue(None, question, params, lora_path=wanted)] = (wanted, step)
    return step < 50


def look() -> None:
    held.append({slot: book.by_identity[identity].ref.name for identity, slot in book.slots.items()})
    runs.append({req.rid: asked[req.rid][0] for req in scheduler.admitted})


first_step = scheduler.step_number
scheduler.after_step.append(look)
scheduler.process_requests(lambda step: arrivals(step - first_step))
scheduler.after_step.remove(look)

fig, (above, below) = plt.subplots(2, 1, figsize=(10, 4.2), sharex=True, height_ratios=(3, 1))
for row, (rid, (name, step)) in enumerate(asked.items()):
    took_part = [i for i, one in enumerate(runs) if rid in one]
    above.barh(row, took_part[0] - step, left=step, color="#e6e6e6")
    above.barh(row, len(took_part), left=took_part[0], color=COLOURS[name])
for i, slots in enumerate(held):
    for slot, name in slots.items():
        below.barh(slot, 1, left=i, color=COLOURS[name])
for name in NAMES:
    above.barh(0, 0, color=COLOURS[name], label=name)
above.barh(0, 0, color="#e6e6e6", label="waits")
above.invert_yaxis()
above.legend(loc="lower left", ncols=5, fontsize=8)
above.set(ylabel="request")
below.set(yticks=(1, 2), ylabel="slot", xlabel="step")
plt.show()
for name in ("terse", "index"):
    rid, (_, step) = next((rid, one) for rid, one in asked.items() if one[0] == name)
    print(f"{name}: asked for at step {step}, begins at step {next(i for i, one in enumerate(runs) if rid in one)}")
assert max(len(set(one.values())) for one in runs) == 2

# %% [markdown]
# Grey is waiting. Both adapters drain, one for each that is overdue, and whoever came later waits until they have had their turn: that is the
# price, and all catch up. Without the rule both would wait until nobody asks for the two others any more, at step 50 and later.
#
# ## What the tree keeps apart

# %%
question = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": "What is a page table?"}])
for name in (None, "pirate", "terse"):
    cached = [
        engine.generate(input_ids=question, sampling_params={"max_new_tokens": 1}, lora_path=name)["meta_info"][
            "cached_tokens"
        ]
        for _ in range(2)
    ]
    print(f"{name or 'base':7} finds {cached} of {len(question)} tokens in the tree")
engine.unload_lora_adapter("pirate")
engine.load_lora_adapter("pirate", paths["pirate"])
again = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 1}, lora_path="pirate")
print("pirate, loaded again:", again["meta_info"]["cached_tokens"])
assert again["meta_info"]["cached_tokens"] == 0
engine.shutdown()

# %% [markdown]
# ## A picture in the prompt
#
# The bundled model with a vision tower of two layers ([train_vision.py](../common/tiny_qwen/train_vision.py)). Six pairs of a colour and a shape were
# never shown to it while it was trained.
#
# **Predict:** it has seen red things and stars, but no red star. What does it say?

# %%
engine = Engine(tiny_vision(), device="cpu", chunked_prefill_size=8)
rng = random.Random(3)
seen, unseen = [("green", "cross"), ("orange", "ring"), ("blue", "circle")], sorted(UNSEEN)[-3:]
shapes = [Shape(*one) for one in (*seen, *unseen)]
pictures = [draw(shape, 112, 112, rng) for shape in shapes]
answers = engine.generate([prompt_of(WHAT)] * len(pictures), {"max_new_tokens": 20}, image_data=pictures)
fig, axes = plt.subplots(1, len(pictures), figsize=(11, 2.4))
for axis, shape, picture, answer in zip(axes, shapes, pictures, answers, strict=True):
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    axis.set_title(answer["text"] + ("\n(never trained)" if tuple(shape) in UNSEEN else ""), fontsize=9)
plt.show()
right = sum(shape.name in answer["text"].lower() for shape, answer in zip(shapes, answers, strict=True))
print(
    f"{right} of {len(shapes)} are right; prompts of {answers[0]['meta_info']['prompt_tokens']} tokens, in chunks of 8 that cut every picture"
)

# %% [markdown]
# All colours are right. What it has learned of shapes does not always hold for a pair that it has not seen: a model of two layers, trained for minutes.
#
# ## Three positions a token
#
# A row of a picture stands at a time, a line and a column ([mrope.py](../common/vision/mrope.py)); a word has the same number three times.
#
# **Predict:** a picture of 3 x 5 rows stands between words. How far do the positions get ahead, or stay behind, the tokens?

# %%
tokens, part = 28, Part(at=6, count=15, first=0, height=3, width=5)
positions, shift = chunk_positions(0, tokens, 0, [part])
fig, axis = plt.subplots(figsize=(8, 3))
for row, name, colour, marker in zip(positions, ("time", "line", "column"), (GREY, BLUE, ORANGE), "s^o", strict=True):
    axis.plot(range(tokens), row, marker, color=colour, label=name, markersize=5, alpha=0.8)
axis.axvspan(part.at - 0.5, part.at + part.count - 0.5, color="#f0f0f0", zorder=0)
axis.set(
    xlabel="token", ylabel="position", title=f"15 rows take {max(part.height, part.width)} positions: shift {shift}"
)
axis.legend()
plt.show()

# %% [markdown]
# ## The same picture, the same key
#
# **Predict:** six requests about three pictures. How often does the tower run?

# %%
store = engine.wrapper.images
before, rows = store.encoded, []
more = [draw(Shape(*one), 112, 112, rng) for one in (("red", "circle"), ("blue", "star"), ("green", "square"))]
for which, text in ((0, WHAT), (0, WHAT), (0, WHICH_COLOUR), (1, WHAT), (2, WHAT), (1, WHICH_COLOUR)):
    meta = engine.generate(prompt_of(text), {"max_new_tokens": 1}, image_data=more[which])["meta_info"]
    rows.append((f"picture {which}\n{text}", meta["cached_tokens"], meta["prompt_tokens"], store.encoded - before))
fig, axis = plt.subplots(figsize=(9, 2.6))
axis.bar(range(6), [row[2] for row in rows], color="#e6e6e6", label="tokens of the prompt")
axis.bar(range(6), [row[1] for row in rows], color=GREEN, label="found in the tree")
for i, row in enumerate(rows):
    axis.text(i, row[2] + 0.4, f"encoded: {row[3]}", ha="center", fontsize=8)
axis.set_xticks(range(6), [row[0] for row in rows], fontsize=7)
axis.set(ylim=(0, max(row[2] for row in rows) + 4))
axis.legend(loc="lower right", fontsize=8)
plt.show()
assert store.encoded - before == 3
engine.shutdown()
