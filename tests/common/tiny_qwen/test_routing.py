"""What is said of a router is counted rightly; the trained mixture speaks, and its routers choose."""

import random

import pytest
import torch

from ch07_sglang_radix import Engine
from common.tiny_qwen.corpus import LANGUAGES, ask, definition, load_glossary
from common.tiny_qwen.phrasings import SYSTEM_PROMPT, TRAINED
from common.tiny_qwen.routing import (
    chosen_experts,
    difference,
    entropy,
    glossary_routes,
    measure,
    shares,
    told_by_the_token,
)
from common.tiny_qwen.upcycle import CHOSEN, EXPERTS, MIXTURE_PATH
from tests.oracle import reference_model

ENTRIES = random.Random(0).sample(list(load_glossary().values()), 30)


def test_shares_entropy_and_difference_of_known_choices():
    chosen = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    assert shares(chosen, 8).tolist() == [0.25] * 4 + [0] * 4
    assert entropy(shares(chosen, 8)) == pytest.approx(2)
    assert entropy(shares(torch.zeros(5, 1, dtype=torch.int64), 8)) == 0
    assert difference(chosen, torch.tensor([True, True, False, False]), 8) == pytest.approx(1)
    assert difference(chosen, torch.tensor([True, False, True, False]), 8) == pytest.approx(0)
    assert difference(torch.tensor([[0, 1], [0, 2]]), torch.tensor([True, False]), 8) == pytest.approx(0.5)


def test_a_token_is_guessed_from_its_other_occurrences_and_never_from_itself():
    assert told_by_the_token([3, 3, 5, 5], [7, 7, 9, 9]) == 1
    assert told_by_the_token([3, 4], [7, 7]) == 0, "the other one says the other expert"
    assert told_by_the_token([3, 3, 4, 1], [7, 7, 7, 8]) == pytest.approx(2 / 3), "8 occurs once and does not count"


def test_chosen_experts_are_those_of_transformers_router_logits():
    model = reference_model(MIXTURE_PATH)
    ids = [5, 900, 17, 2000, 2000]
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits  # L times [T, E]
    best = torch.stack([of_layer.topk(CHOSEN).indices for of_layer in logits])
    assert torch.equal(chosen_experts(model, ids), best)
    assert chosen_experts(model, ids).shape == (4, len(ids), CHOSEN)


def test_the_trained_routers_use_every_expert_and_choose_by_the_token():
    rows = measure(glossary_routes(MIXTURE_PATH, ENTRIES), EXPERTS)
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert 0.9 / EXPERTS > float(row["coldest"]) > 0.3 / EXPERTS, "not uniform, and nobody idles"
        assert 3 / EXPERTS > float(row["hottest"]) > 1.1 / EXPERTS
        assert float(row["token"]) > 0.3, "1/8 if nothing told"
    for row in rows[1:]:  # the first router sees a token before any of its neighbours
        assert max(float(row["language"]), float(row["place"])) > 1.5 * float(row["chance"])


def test_the_trained_mixture_answers():
    """A sample; `python -m common.tiny_qwen.upcycle` asks every question."""
    engine = Engine(str(MIXTURE_PATH), device="cpu", dtype="float32")
    rng = random.Random(0)
    cases = [
        (ask(rng.choice(TRAINED[lang]), entry), definition(entry, lang)) for entry in ENTRIES for lang in LANGUAGES
    ]
    messages = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": q}] for q, _ in cases]
    ids = [engine.wrapper.tokenizer.encode_chat(m) for m in messages]
    results = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 120})
    exact = [r["text"] == answer for r, (_, answer) in zip(results, cases, strict=True)]
    assert sum(exact) / len(exact) >= 0.95
