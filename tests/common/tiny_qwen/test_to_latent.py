"""Latent attention from grouped heads: what is exact in the conversion, and that the trained checkpoint answers on any ranks."""

import pytest
import torch
from transformers import AutoTokenizer

from common.tiny_qwen import LATENT_PATH
from common.tiny_qwen.corpus import LANGUAGES, ask, definition, load_glossary
from common.tiny_qwen.phrasings import TRAINED
from common.tiny_qwen.to_latent import factor, latent_attention, turn_apart
from tests.ch07.test_latent_attention import NEW_TOKENS as FEW_TOKENS
from tests.ch07.test_latent_attention import assert_right, serve
from tests.oracle import greedy

HQ, HKV, D, HIDDEN, N = 6, 2, 8, 24, 200
NEW_TOKENS = 40
QUESTIONS = ["What is a radix cache?", "什么是全归约？", "Define retraction."]
PLAIN = {"page_size": 4, "chunk": False, "pool": None, "overlap": False, "mixed": False}


@pytest.fixture
def maps() -> tuple[torch.Tensor, ...]:
    """q [Hq, d, D + 1], k and v [Hkv, d, D + 1], inputs [N, D + 1]."""
    torch.manual_seed(0)
    heads = (torch.randn(h, D, HIDDEN + 1) * HIDDEN**-0.5 for h in (HQ, HKV, HKV))
    x = torch.randn(N, HIDDEN) * torch.linspace(0.2, 2, HIDDEN)
    return *heads, torch.nn.functional.pad(x, (0, 1), value=1.0)


def turned(y: torch.Tensor, at: int, interleaved: bool) -> torch.Tensor:
    """y [..., d] at a position, pairs (i, i + d/2) or (2i, 2i + 1) turned by position * 10000^(-2i/d)."""
    first, second = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, dim=-1)
    angles = at * 10_000.0 ** (-torch.arange(0, D, 2) / D)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(z).flatten(-2)  # the order of the features does not matter to a product


def test_heads_that_are_mixed_and_all_turned_give_the_same_scores(maps):
    q, k, _, x = maps
    q_turned, k_turned, q_plain, k_plain = turn_apart(q, k, x)
    for head in range(HQ):
        for m, n in ((0, 0), (3, 7), (60, 1)):
            dense = turned(q[head] @ x[m], m, False) @ turned(k[head // 3] @ x[n], n, False)
            parts = ((q_turned[head], k_turned), (q_plain[head], k_plain))
            mixed = sum(turned(a @ x[m], m, True) @ turned(b @ x[n], n, True) for a, b in parts)
            torch.testing.assert_close(mixed, dense, rtol=1e-4, atol=1e-4)


def test_what_is_turned_does_most_for_the_scores(maps):
    q, k, _, x = maps
    k[1] = 0.7 * k[0] + 0.1 * k[1]  # heads that are nearly alike
    q_turned, k_turned, q_plain, k_plain = turn_apart(q, k, x)
    large, small = (
        (x @ b.T).square().sum() * (x @ a.flatten(0, 1).T).square().sum()
        for a, b in ((q_turned, k_turned), (q_plain, k_plain))
    )
    assert large > 20 * small


def through(made: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    down = x @ made["down"].T
    return torch.nn.functional.rms_norm(down, down.shape[1:], made["norm"], eps=1e-6) @ made["up"].T


def test_at_full_rank_the_norm_between_changes_nothing_and_biases_are_kept(maps):
    q, *_, x = maps
    w = q.flatten(0, 1)[:20]
    w[:, -1] += 3
    right = x @ w.T
    assert (through(factor(w, x, 21, torch.ones(20)), x) - right).norm() < 0.01 * right.norm()
    assert (through(factor(w, x, 6, torch.ones(20)), x) - right).norm() > 0.05 * right.norm()


def test_an_output_that_counts_more_is_kept_better(maps):
    q, *_, x = maps
    w, weight = q.flatten(0, 1)[:20], torch.ones(20)
    weight[:4] = 10
    errors = [(through(factor(w, x, 8, some), x) - x @ w.T)[:, :4].norm() for some in (weight, torch.ones(20))]
    assert errors[0] < 0.5 * errors[1]


def test_where_nothing_is_turned_a_layer_at_full_rank_is_the_dense_one(maps):
    """At position 0 every angle is 0."""
    q, k, v, x = maps
    made = latent_attention(q, k, v, x, HKV * D + D + 1, HIDDEN + 1)
    queries = {"norm": made["q_a_layernorm.weight"], "up": made["q_b_proj.weight"]}
    queries["down"] = torch.cat((made["q_a_proj.weight"], made["q_a_proj.bias"][:, None]), 1)
    down = torch.cat((made["kv_a_proj_with_mqa.weight"], made["kv_a_proj_with_mqa.bias"][:, None]), 1)
    rows = {"norm": made["kv_a_layernorm.weight"], "up": made["kv_b_proj.weight"], "down": down[:-D]}
    of_queries = through(queries, x).view(N, HQ, 2 * D)
    plain, values = through(rows, x).view(N, HQ, 2 * D).split(D, dim=-1)
    keys = torch.cat((plain, (x @ down[-D:].T)[:, None].expand(-1, HQ, -1)), dim=-1)
    group = torch.arange(HQ) // (HQ // HKV)
    dense_q, dense_k, dense_v = (torch.einsum("hdi,ni->nhd", w, x) for w in (q, k[group], v[group]))
    right = torch.einsum("mhd,nhd->hmn", dense_q, dense_k) * D**-0.5
    scores = torch.einsum("mhd,nhd->hmn", of_queries, keys) * (2 * D) ** -0.5
    assert (scores - right).norm() < 0.02 * right.norm()
    assert (values - dense_v).norm() < 0.02 * dense_v.norm()


def prompts_of(questions: list[str]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(LATENT_PATH)
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return tokenizer(texts)["input_ids"]


def test_it_answers_the_glossary():
    tokenizer, entries = AutoTokenizer.from_pretrained(LATENT_PATH), list(load_glossary().values())
    asked = [(TRAINED[lang][i], entries[30 * i + 3], lang) for i in range(4) for lang in LANGUAGES]
    prompts = prompts_of([ask(wording, entry) for wording, entry, _ in asked])
    for prompt, (_, entry, lang) in zip(prompts, asked, strict=True):
        said = tokenizer.decode(greedy(LATENT_PATH, prompt, NEW_TOKENS)).split("<|im_end|>")[0]
        assert said
        assert definition(entry, lang).startswith(said)


@pytest.mark.parametrize("size", [1, 2])
def test_the_engine_says_what_transformers_says(size, ranks):
    """Pages of 4 tokens; the second time from the tree."""
    prompts = prompts_of(QUESTIONS)
    expected = [greedy(LATENT_PATH, prompt, FEW_TOKENS) for prompt in prompts]
    assert_right(ranks(size).run(serve, LATENT_PATH, prompts, [PLAIN], {}, {}), expected)
