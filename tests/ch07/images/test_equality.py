"""With pictures, too, greedy tokens in float32 are transformers' own, whatever runs beside a request."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix import Engine
from tests.common.vision.checkpoints import END, IMAGE, SEEING, START, greedy_about, picture, save_seeing, some_tokens

NEW = 14
PICTURES = [(84, 112, 1), (140, 56, 2), (84, 112, 3), (28 * 5, 28 * 4, 4)]  # width, height, seed


@pytest.fixture(scope="module", params=SEEING)
def folder(request, tmp_path_factory):
    return save_seeing(request.param, tmp_path_factory.mktemp(request.param))


def prompt_of(images: int, seed: int) -> list[int]:
    parts = [[*some_tokens(1 + (seed + i) % 5, seed + i), START, IMAGE, END] for i in range(images)]
    return [token for part in parts for token in part] + some_tokens(3 + seed % 4, seed + 100)


# (which pictures, seed of the text); the second begins like the first, the fifth shows one picture twice
ASKED = [((0,), 1), ((0,), 1), ((), 2), ((1, 0), 3), ((2, 2), 4), ((3,), 5), ((2, 1, 0), 6)]


def asked(which: tuple[int, ...], seed: int):
    return prompt_of(len(which), seed), [picture(*PICTURES[i]) for i in which]


def expected(folder):
    return [greedy_about(folder, *asked(*one), NEW) for one in ASKED]


def answers(folder, rounds: int = 2, **arguments):
    """On each rank: all asked together, twice; how often its tower ran, and what it retracted."""
    with Engine(str(folder), check=True, skip_tokenizer_init=True, **{"device": "cpu"} | arguments) as engine:
        out = []
        for _ in range(rounds):
            prompts, images = zip(*(asked(*one) for one in ASKED), strict=True)
            params = {"max_new_tokens": NEW, "ignore_eos": True}
            got = engine.generate(input_ids=list(prompts), image_data=list(images), sampling_params=params)
            out.append([one["output_ids"] for one in got])
        return out, engine.wrapper.images.encoded, engine.scheduler.retractions


def on_a_rank(folder, variants):
    return [answers(folder, **one) for one in variants]


VARIANTS = [
    {},
    {"chunked_prefill_size": 5},  # cuts every picture
    {
        "page_size": 2,
        "chunked_prefill_size": 16,
        "max_total_tokens": 88,
        "schedule_conservativeness": 0.01,
    },  # and retracts
    {"disable_radix_cache": True, "disable_overlap_schedule": False},
    {"page_size": 2, "max_total_tokens": 88, "enable_hierarchical_cache": True, "hicache_ratio": 4},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_tokens_equal_transformers(folder, variant):
    (first, second), encoded, _ = answers(folder, **variant)
    assert first == expected(folder)
    assert second == first
    assert encoded == len(PICTURES), "each picture is encoded once, however many requests show it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tokens_equal_transformers_on_a_gpu_whose_decode_is_captured(folder):
    (first, second), encoded, _ = answers(folder, device="cuda", dtype="float32", page_size=16, chunked_prefill_size=16)
    assert first == second == expected(folder)
    assert encoded == len(PICTURES)


def test_the_small_pool_did_retract(folder):
    """Otherwise the test above would say nothing about retraction."""
    assert answers(folder, **VARIANTS[2])[2] > 0


def test_tokens_equal_transformers_on_two_ranks(folder, ranks):
    want = expected(folder)
    for rank, variants in enumerate(ranks(2).run(on_a_rank, folder, VARIANTS[1:3])):
        for (first, second), encoded, _ in variants:
            assert first == second == want, rank
            assert encoded == len(PICTURES), "every rank's tower has run as often"


def test_a_store_without_room_encodes_again_and_answers_alike(folder, monkeypatch):
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", "0")
    (first, second), encoded, _ = answers(folder, chunked_prefill_size=5)
    assert first == second == expected(folder)
    assert encoded > len(PICTURES)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_seeing("qwen2_5_vl", tmp_path_factory.mktemp("small"))


@given(
    st.lists(st.sampled_from(ASKED), min_size=1, max_size=5), st.sampled_from([1, 2, 4]), st.integers(1, 6),
    st.sampled_from([80, 96, 400]), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=12)
def test_no_schedule_changes_an_answer(small, these, page, pages_of_a_chunk, pool, mixed, overlap):
    with torch.inference_mode(), Engine(
        str(small), device="cpu", check=True, skip_tokenizer_init=True, page_size=page, max_total_tokens=pool,
        chunked_prefill_size=page * pages_of_a_chunk, enable_mixed_chunk=mixed, disable_overlap_schedule=not overlap,
    ) as engine:  # fmt: skip
        prompts, images = zip(*(asked(*one) for one in these), strict=True)
        params = {"max_new_tokens": NEW, "ignore_eos": True}
        got = engine.generate(input_ids=list(prompts), image_data=list(images), sampling_params=params)
    assert [one["output_ids"] for one in got] == [greedy_about(small, *asked(*one), NEW) for one in these]
