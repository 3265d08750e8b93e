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
# # Chapter 7, notebook 4: a server, seen from inside and from outside
#
# A server of the bundled model is started here, with its scheduler and its detokenizer in processes of their own. Between the processes sits a
# tap ([wiretap.py](../ch07_sglang_radix/serving/wiretap.py)) that hands every message on and writes down when it passed and how many bytes it had.
#
# Three clients ask for eight tokens each, a few milliseconds apart, streamed. **Predict first:** how many messages does the scheduler send to the
# detokenizer, if each of the 24 tokens is told? And where does a request spend most of its time?

# %%
import asyncio
import json
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np

from ch07_sglang_radix.serving.ask import GENERATE, Answer, stream
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.served import served
from ch07_sglang_radix.serving.wiretap import TappedServer
from common.models.config import ModelConfig
from common.sampling.grammar import GrammarCompiler, GrammarMask
from common.tiny_qwen import TINY_QWEN_PATH

QUESTIONS = ["What is a radix cache?", "What is a page table?", "What is tensor parallelism?"]


def post(url: str, body: dict, path: str = "/generate") -> bytes:
    """The body of the answer, all events of it if it streams."""
    with urllib.request.urlopen(url + path, json.dumps(body).encode(), timeout=60) as answer:
        return answer.read()


def body_of(text: str | list[str], tokens: int) -> dict:
    return {"text": text, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}, "stream": True}


server = TappedServer(("--device", "cpu"))
post(server.url, body_of("warm up", 4))  # the first request of a process is slower
server.clear()

clients = [threading.Thread(target=post, args=(server.url, body_of(text, 8))) for text in QUESTIONS]
for client in clients:
    client.start()
    time.sleep(0.004)
for client in clients:
    client.join()
seen = server.clear()

hops = Counter((one.sender, one.receiver) for one in seen)
for (sender, receiver), n in hops.items():
    size = sum(one.size for one in seen if (one.sender, one.receiver) == (sender, receiver))
    print(f"{sender:11s} -> {receiver:11s} {n:3d} messages, {size:6,d} bytes")
steps = [one.message for one in seen if one.name == "BatchTokenIDs"]
print(
    f"{sum(len(ids) for step in steps for ids in step.new_ids)} tokens in {len(steps)} messages of the scheduler, one a step"
)
assert hops["scheduler", "detokenizer"] == hops["detokenizer", "main"] == len({step.step for step in steps})

# %% [markdown]
# One message a step, whoever takes part in it. Now the same messages in time: each arrow is one, from the process that sent it to the one that
# it went to. **Predict:** does a step of the scheduler wait until the detokenizer has made text of the last one?

# %%
LANES = {"client": 0, "main": 1, "scheduler": 2, "detokenizer": 3}
COLOURS = {
    "request": "#4c72b0",
    "BatchTokenIDs": "#dd8452",
    "BatchStr": "#55a868",
    "event": "#8172b3",
}


def colour_of(name: str) -> str:
    return COLOURS["request"] if name.startswith("POST") or "Tokenized" in name else COLOURS.get(name, "0.5")


def draw_lanes(axis, seen, zero: float, height: float = 0.0) -> None:
    for one in seen:
        at = 1e3 * (one.at - zero)
        arrow = {"arrowstyle": "-|>", "color": colour_of(one.name), "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (at, LANES[one.receiver]), (at, LANES[one.sender]), arrowprops=arrow)
    for name, lane in LANES.items():
        axis.axhline(lane, color="0.8", lw=6, zorder=0, solid_capstyle="butt")
        axis.text(-0.01, lane, name, ha="right", va="center", transform=axis.get_yaxis_transform())
    axis.set_xlim(-1, 1e3 * (seen[-1].at - zero) + 1)
    axis.set_ylim(3.4, -0.4)
    axis.set_yticks([])
    axis.set_xlabel("ms")
    axis.spines[["top", "right", "left"]].set_visible(False)


figure, axis = plt.subplots(figsize=(11, 4.2))
zero = seen[0].at
draw_lanes(axis, seen, zero)
for step in (one for one in seen if one.name == "BatchTokenIDs"):
    x = 1e3 * (step.at - zero)
    axis.text(x, 3.28, len(step.message.tickets), color=COLOURS["BatchTokenIDs"], fontsize=9, ha="center")
axis.set_title("Three requests of eight tokens. An arrow is a message; the numbers below: requests in it")
handles = [plt.Line2D([], [], color=colour, lw=2) for colour in COLOURS.values()]
names = ["a request", "BatchTokenIDs: new ids", "BatchStr: new text", "an event of a stream"]
figure.legend(handles, names, loc="lower center", ncol=4, frameon=False)
figure.tight_layout(rect=(0, 0.07, 1, 1))
plt.show()

# %% [markdown]
# It does not wait: it sends and takes the next step, and the processes work side by side. Where one has more to do than the others, arrows bunch up in
# front of it; on a machine with fewer cores than processes they all share the blame.
#
# The three requests ended in the same few milliseconds, so where did each spend them? A message that has left one process lies with the next.
# **Predict:** which share has the scheduler (with the model inside it), and which has all that this wing adds?

# %%
quiet = []
for text in QUESTIONS * 3:  # one at a time now: who has the request is then plain
    post(server.url, body_of(text, 16))
    quiet.append(server.clear())

phases: dict[str, list[float]] = {
    "text -> ids (main)": [],
    "a step (scheduler)": [],
    "ids -> text (detokenizer)": [],
    "-> event (main)": [],
}
for one_request in quiet:
    ids = [one for one in one_request if one.name == "BatchTokenIDs"]
    texts = {one.message.step: one.at for one in one_request if one.name == "BatchStr"}
    asked = next(one for one in one_request if one.name.startswith("POST"))
    sent = next(one for one in one_request if one.name == "TokenizedGenerate")
    events = [one.at for one in one_request if one.name == "event"]
    phases["text -> ids (main)"].append(sent.at - asked.at)
    phases["a step (scheduler)"] += list(np.diff([one.at for one in ids]))
    phases["ids -> text (detokenizer)"] += [texts[one.message.step] - one.at for one in ids]
    phases["-> event (main)"] += [min(at for at in events if at > text) - text for text in texts.values()]
for name, values in phases.items():
    print(
        f"{name:26s} median {1e3 * np.median(values):6.2f} ms, one in ten above {1e3 * np.quantile(values, 0.9):6.2f} ms"
    )

figure, axis = plt.subplots(figsize=(9, 2.8))
for row, values in enumerate(phases.values()):
    low, middle, high = (1e3 * np.quantile(values, q) for q in (0.1, 0.5, 0.9))
    axis.plot([low, high], [row, row], color="#4c72b0", lw=8, alpha=0.3, solid_capstyle="butt")
    axis.plot(middle, row, "o", color="#4c72b0")
axis.set_yticks(range(len(phases)), phases)
axis.set_ylim(len(phases) - 0.5, -0.5)
axis.set_xlim(left=0)
axis.set_xlabel("ms")
axis.set_title("A request alone: how long each process has a message: median, and eight of ten")
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# What follows the step is paid once a token in latency, and not in throughput, as the next step has begun meanwhile.
#
# The scheduler can also be told what an answer must look like. The bundled model has never seen JSON; under a schema it is asked for some. **Predict:** of
# 3,584 tokens, how many may come at each step? In how many of the steps has the model nothing to say?

# %%
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["tree", "table", "list"]},
        "shared": {"type": "boolean"},
        "why": {"type": "string", "maxLength": 24},
    },
    "required": ["kind", "shared", "why"],
    "additionalProperties": False,
}
written = json.dumps(SCHEMA)
asked = {"text": QUESTIONS[0], "sampling_params": {"max_new_tokens": 80, "json_schema": written}}
answer = json.loads(post(server.url, asked))
print(answer["text"], json.loads(answer["text"]).keys() == SCHEMA["properties"].keys())

tokenizer, config = server.manager.tokenizer, ModelConfig.from_folder(TINY_QWEN_PATH)
compiler = GrammarCompiler(tokenizer.inner, config.vocab_size, config.eos_token_ids)
mask, allowed = compiler.mask(compiler.compiled("json_schema", written), after_thinking=False), []
for n in range(len(answer["output_ids"])):  # the answer is walked again, to look at each mask
    mask.read(answer["output_ids"][:n])
    (bits,) = GrammarMask.fill([mask], config.vocab_size)
    allowed.append(int(np.unpackbits(bits.view(np.uint8)).sum()))
print(
    f"{allowed.count(1)} of {len(allowed)} steps allowed one token; the others from {min(n for n in allowed if n > 1)} to {max(allowed):,}"
)

figure, axis = plt.subplots(figsize=(11, 3))
at = range(len(allowed))
axis.bar(at, np.array(allowed) - 0.7, color=["#c44e52" if n == 1 else "#4c72b0" for n in allowed], bottom=0.7)
axis.set_yscale("log")
axis.set_ylim(0.7, 2 * config.vocab_size)
axis.axhline(config.vocab_size, color="0.5", lw=1, ls=":")
names = [tokenizer.special_text(token) or tokenizer.token_text(token) for token in answer["output_ids"]]
axis.set_xticks(at, [name if name.isascii() else "·" for name in names], rotation=90, fontsize=8, family="monospace")
axis.set_ylabel("tokens allowed")
axis.set_title(
    "Each step's mask, and the token that was taken. Red: there was no choice; dots: characters that are not ASCII"
)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Names, quotes and colons are the grammar's; the model speaks inside of the string, and where an enum leaves several beginnings. Towards the end of the
# string fewer and fewer tokens fit into the 24 characters. The end token is allowed where the text is complete: in the last step alone.
#
# **Predict:** sixteen requests run at once instead of one. How many bytes does a token cost on each of the hops then?

# %%
CONCURRENT = (1, 2, 4, 8, 16)
per_token: dict[str, list[float]] = {"scheduler -> detokenizer": [], "detokenizer -> main": [], "main -> client": []}
for n in CONCURRENT:
    post(server.url, body_of([f"Question {i}: what is a page?" for i in range(n)], 24))
    passed = server.clear()
    for hop, sizes in per_token.items():
        size = sum(one.size for one in passed if f"{one.sender} -> {one.receiver}" == hop)
        sizes.append(size / (24 * n))
print("requests at once           " + "".join(f"{n:8d}" for n in CONCURRENT))
for hop, sizes in per_token.items():
    print(f"{hop:26s} " + "".join(f"{size:8.1f}" for size in sizes) + "   bytes a token")
server.end()

figure, axis = plt.subplots(figsize=(8, 3.4))
for hop, colour in zip(per_token, ("#dd8452", "#55a868", "#8172b3"), strict=True):
    axis.plot(CONCURRENT, per_token[hop], "o-", color=colour, label=hop)
axis.set_xscale("log", base=2)
axis.set_yscale("log")
axis.set_xticks(CONCURRENT, CONCURRENT)
axis.set_yticks((20, 50, 100, 200), ("20", "50", "100", "200"))
axis.minorticks_off()
axis.set_xlabel("requests at once, 24 tokens each")
axis.set_ylabel("bytes a token")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Inside, the head of a message is shared by all rows in it, so a token gets cheaper. To the clients each token has an event of its own, and
# `/generate` repeats the whole answer in it: this is the one hop whose bytes a token grow with the length of an answer.
#
# Now from outside, with a server in processes of its own and nobody listening in. `n` clients ask, and each asks again as soon as it has its answer (a closed
# loop). TTFT is the time to the first token, ITL the time from token to token. **Predict:** from 1 client to 4, to 16, to 64: what do tokens a second do? What
# ITL, and what TTFT?

# %%
LOADS, TOKENS, SECONDS = (1, 4, 16, 64), 24, 2.5


async def one_client(client: Client, number: int, until: float, found: dict[str, list[float]]) -> int:
    tokens = turn = 0
    while time.perf_counter() < until:
        body = body_of(f"Client {number}, question {turn}: {QUESTIONS[turn % 3]}", TOKENS)
        asked = last = time.perf_counter()
        async for new in stream(client, GENERATE, body, Answer()):
            now = time.perf_counter()
            found["TTFT" if last == asked else "ITL"] += [now - asked] if last == asked else [(now - last) / new] * new
            last, tokens = now, tokens + new
        turn += 1
    return tokens


async def load(url: str, n: int) -> dict:
    found: dict[str, list[float]] = {"TTFT": [], "ITL": []}
    began = time.perf_counter()
    async with Client(url) as client:
        tokens = sum(await asyncio.gather(*(one_client(client, i, began + SECONDS, found) for i in range(n))))
    rate = tokens / (time.perf_counter() - began)
    return {
        "n": n,
        "rate": rate,
        **{f"{name} p{q}": 1e3 * np.percentile(found[name], q) for name in found for q in (50, 99)},
    }


def measure() -> list[dict]:
    with served("--device", "cpu") as (url, _):
        asyncio.run(load(url, 2))
        return [asyncio.run(load(url, n)) for n in LOADS]


rows = ThreadPoolExecutor().submit(measure).result()  # this notebook has an event loop already
print(f"{'clients':>8s}{'tokens/s':>10s}" + "".join(f"{name:>10s}" for name in rows[0] if "p" in name) + "   ms")
for row in rows:
    print(f"{row['n']:8d}{row['rate']:10,.0f}" + "".join(f"{row[name]:10.1f}" for name in row if "p" in name))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.plot(LOADS, [row["rate"] for row in rows], "o-", color="#4c72b0")
left.set_ylabel("tokens/s")
left.set_title("Throughput")
left.set_ylim(bottom=0)
for name, colour in (("TTFT", "#c44e52"), ("ITL", "#55a868")):
    right.fill_between(
        LOADS, [r[f"{name} p50"] for r in rows], [r[f"{name} p99"] for r in rows], color=colour, alpha=0.2, lw=0
    )
    right.plot(
        LOADS,
        [row[f"{name} p50"] for row in rows],
        "o-",
        color=colour,
        label=f"{name}: median, and up to one in a hundred",
    )
right.set_yscale("log")
right.set_ylabel("ms")
right.set_title("Latency")
right.legend(frameon=False, loc="upper left")
for axis in (left, right):
    axis.set_xscale("log", base=4)
    axis.set_xticks(LOADS, LOADS)
    axis.minorticks_off()
    axis.set_xlabel("clients at once")
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# A step of more requests takes longer, but not in proportion: so tokens a second rise, and every client pays with ITL, until the cores have nothing left to
# give. From there on more clients wait longer, and that is all. TTFT is the wait for the step that is being computed, then a prefill, in which other prompts take part.
#
# A closed loop asks less of a server that gets slower, so it never shows what a queue would do. Requests that come at moments of their own do
# ([bench_serving.py](../ch07_sglang_radix/benchmarks/bench_serving.py), `--request-rate`).
#
# **Try it:** `--single-process` in `served(...)`: the same loops, threads of one process. Which of the curves move, and why is it not all of them? Then
# `--tp-size 2`: on two cores the second rank competes with main and the detokenizer. Who loses?
