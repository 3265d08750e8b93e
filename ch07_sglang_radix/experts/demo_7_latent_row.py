"""A row for all heads: the same attention expanded and absorbed, on paper and through real pages.

    python ch07_sglang_radix/experts/demo_7_latent_row.py

First three tokens and two heads with numbers for pencil and paper: scores from keys that are made of the cached rows, and the
same scores from the rows themselves, because the matrix has moved to the query. Then what a turn between the two would break.
Then a layer with the sizes of DeepSeek-V2-Lite writes its pages in one prompt, expanded, and reads them for the next token,
absorbed. Then how many multiplications either form costs: why a prompt takes the one and a decode the other. Last, the bundled
model answers from rows of 32 + 16 numbers, and what it says without the 16 that are turned.
"""

import math

import torch

from ch07_sglang_radix import Engine
from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.latent import LatentNativeAttention, absorb, expand, multiplications
from common.distributed.launch import run_main
from common.layers.mla import LatentAttention
from common.layers.rotary import RotaryEmbedding
from common.models.published_configs import published_shape
from common.models.weights import TensorSource
from common.parallel_state import TPGroup
from common.teaching.show import check, heading, matrix, mistake, table
from common.tiny_qwen import LATENT_PATH, TINY_QWEN_PATH

LATENTS = torch.tensor([[1.0, 0], [2, 1], [0, 3]])  # of three tokens [3, c]
TURNED = torch.tensor([[1.0, 0], [0, 1], [1, 1]])  # the part of their keys that knows the position [3, r]
KV_B = torch.tensor([[[1.0, 1], [0, 2], [1, -1]], [[2, 0], [1, 1], [0, 1]]])  # of each head Wk [dn, c] above Wv [dv, c]
QUERY = torch.tensor([[1.0, 1, 1, 2], [2, -1, 0, 1]])  # of the third token [H, dn + r]
SCALE, DN, C = 0.1, 2, 2
PAGE, PROMPT = 4, 10
QUESTION, WORDS = "What is a radix cache?", 24


def main() -> None:
    torch.manual_seed(0)
    on_paper()
    what_a_turn_would_break()
    through_pages()
    what_either_costs()
    in_words()


def on_paper() -> None:
    heading("Three tokens, two heads: c = 2, dn = 2, r = 2, dv = 1")
    rows = torch.cat((LATENTS, TURNED), dim=1)
    matrix("cached rows: latent | turned part", rows.numpy(), cut=C)
    matrix("queries of the third token, by head: plain | turned", QUERY.numpy(), cut=DN)
    keys, values = expand(rows, KV_B, DN + 2)
    absorbed = absorb(QUERY[None], KV_B, DN)[0]
    told = []
    for head in range(2):
        wk, wv = KV_B[head, :DN], KV_B[head, DN:]
        print(f"\n  head {head}:  Wk {wk.int().tolist()}, Wv {wv.int().tolist()}")
        matrix("expanded: keys = Wk latent | turned part", keys[head].numpy(), cut=DN, indent="    ")
        matrix("absorbed: query = q Wk | turned part", absorbed[head : head + 1].numpy(), cut=C, indent="    ")
        scores, same = keys[head] @ QUERY[head], rows @ absorbed[head]
        shares = (SCALE * scores).softmax(dim=0)
        out, mean = shares @ values[head], shares @ LATENTS
        print(f"    query . keys = {scores.int().tolist()}; absorbed query . rows = {same.int().tolist()}")
        print(f"    mean of values = {_few(out)}; Wv (mean of latents = {_few(mean)}) = {_few(wv @ mean)}")
        told += [torch.equal(scores, same), torch.allclose(out, wv @ mean)]
    check("both forms give the same scores and the same outputs", all(told))
    print(
        "  Expanded, each head has keys and values of its own. Absorbed, both heads read one row, and nothing else is made."
    )


def what_a_turn_would_break() -> None:
    heading("Why the position has numbers of its own")
    wk, q = KV_B[0, :DN], QUERY[0, :DN]
    angles = torch.arange(3) * 0.5
    turns = torch.stack([torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]) for a in angles])
    right = torch.stack([(turns[2] @ q) @ (turns[n] @ wk @ LATENTS[n]) for n in range(3)])
    moved = ((turns[2] @ q) @ wk) @ LATENTS.T  # one absorbed query for all: it cannot know the turn of each key
    mistake(
        "head 0, had its whole key been turned by the position: scores by one absorbed query for all tokens",
        moved,
        right,
    )
    own = [(turns[2 - n].T @ q) @ wk for n in range(3)]
    print(f"  the absorbed query would have to be another for each position: {', '.join(_few(x) for x in own)}")
    print(
        "  So dn numbers of a key are never turned, and r numbers that are turned never pass Wk: they are cached as they are."
    )


def through_pages() -> None:
    config = published_shape("DeepSeek-V2-Lite", hidden_size=256)
    latent, rotary = config.latent, RotaryEmbedding(**{**config.rotary, "max_positions": 64})
    heading(
        f"A layer of {config.num_heads} heads with a row of {latent.kv_rank} + {latent.rope_dim} numbers, through real pages"
    )
    layer = LatentAttention(config.hidden_size, config.num_heads, latent, TPGroup(), layer=0, place=0)
    for param in layer.parameters():
        shape = param.shard_shapes[None]
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[1] ** -0.5
        param.weight_loader(TensorSource(values))
    x, pages = torch.randn(PROMPT + 1, config.hidden_size), torch.tensor([[5, 0, 3]])

    def step(cache: PagedKVCache, first: int, stop: int) -> torch.Tensor:
        at = torch.arange(first, stop)
        slots = pages[0, at // PAGE] * PAGE + at % PAGE
        meta = AttentionMetadata(
            slots, pages, torch.tensor([0, stop - first]), torch.tensor([stop]), PAGE, stop - first
        )
        return layer(x[first:stop], rotary(at, x.dtype), LatentNativeAttention(cache, meta))

    with torch.inference_mode():
        cache, other = (PagedKVCache(1, 8, PAGE, 1, **config.kv_row) for _ in range(2))
        cache.kv.fill_(math.nan)  # what former owners may have left
        step(cache, 0, PROMPT)
        decoded = step(cache, PROMPT, PROMPT + 1)[0]
        whole = step(other, 0, PROMPT + 1)[-1]
    written = ["".join(".#"[bool(row[0].isfinite())] for row in page[:, 0]) for page in cache.k[0]]
    print(
        f"  {PROMPT} tokens in one step (expanded), then one more (absorbed); pages {pages[0].tolist()} of 8, slots written:"
    )
    print(f"    {' '.join(f'{i}:{slots}' for i, slots in enumerate(written))}")
    print(f"  token 10, absorbed, from pages that were written by the prompt    {_few(decoded[:4])} ...")
    print(f"  token 10, expanded, all eleven tokens in one step                 {_few(whole[:4])} ...")
    check("they are the same but for rounding", torch.allclose(decoded, whole, atol=1e-5))
    a_row, heads = cache.kv[0, 0, 0, 0].numel(), config.num_heads
    made = heads * (latent.nope_dim + latent.rope_dim + latent.v_dim)
    print(f"  cached for a token: {a_row} numbers; its K and V, had they been cached: {made:,}")


def what_either_costs() -> None:
    latent = published_shape("DeepSeek-V3").latent
    c, r, dn, dv = latent.kv_rank, latent.rope_dim, latent.nope_dim, latent.v_dim
    heading("Multiplications of one head of DeepSeek-V3, n new tokens and 4,096 in all, in millions")
    length, rows = 4096, []
    for n in (1, 16, 128, 256, 1024, 4096):
        expanded, absorbed = multiplications(n, length, c, r, dn, dv)
        better = "absorbed" if absorbed < expanded else "expanded"
        rows.append((n, round(expanded / 1e6), round(absorbed / 1e6), better))
    table(("new tokens", "expanded", "absorbed", "fewer"), rows)
    print(
        f"  Expanded: every row costs c (dn + dv) = {c * (dn + dv):,} first, then a pair costs dn + r + dv = {dn + r + dv}."
    )
    print(f"  Absorbed: every query costs {c * (dn + dv):,} first, then a pair costs 2 c + r = {2 * c + r:,}.")
    print(
        "  A decode has one query and thousands of rows, a prompt as many queries as rows. The engine takes the lesser."
    )


def in_words() -> None:
    with (
        Engine(TINY_QWEN_PATH, device="cpu", tp_size=1) as dense,
        Engine(LATENT_PATH, device="cpu", tp_size=1) as engine,
    ):
        heading(f"The bundled model, asked: {QUESTION}")
        config, latent = dense.wrapper.config, engine.wrapper.config.latent
        rows = [(f"2 x {config.num_kv_heads} x {config.head_dim}, K and V", said(dense))]
        rows += [(f"{latent.kv_rank} + {latent.rope_dim}, a row for all heads", said(engine))]
        for layer in engine.wrapper.model.model.layers:
            down = layer.self_attn.kv_a_proj_with_mqa
            down.weight.data[latent.kv_rank :] = 0
            down.bias.data[latent.kv_rank :] = 0
        engine.flush_cache()
        rows += [(f"{latent.kv_rank} + {latent.rope_dim} zeros", said(engine))]
    table(("cached in each layer", "answer"), rows)
    print(
        "  The latent says what stands in the context. Only the turned part says where, and without it words come in no order."
    )


def said(engine: Engine) -> str:
    text = engine.generate(QUESTION, sampling_params={"temperature": 0, "max_new_tokens": WORDS})["text"]
    return " ".join(text.split())


def _few(x: torch.Tensor) -> str:
    return " ".join(f"{float(value):.3f}" for value in x)


if __name__ == "__main__":
    run_main(main)
