"""Pages of 8 and 4 bits change what attention reads, and nothing else: a row is rounded when it is written, whoever asks, and when.

pytest tests/ch07/test_kv_dtypes.py
"""

import pytest

from ch07_sglang_radix import Engine
from tests.ch07.test_latent_attention import FEW, LAYOUTS, SOME, prompts_and_answers, serve

CODED = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
WHOLE = {"page_size": 16, "pool": None, "chunk": False, "overlap": False, "mixed": False}


def answers(folder, dtype):
    """On one rank, each prompt whole: what all others must say."""
    prompts, _ = prompts_and_answers(folder)
    return prompts, serve(folder, prompts, [WHOLE], {}, {"kv_cache_dtype": dtype})[0][0][0]


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("name", ["qwen2", "deepseek_v2_lite"])
def test_pages_chunks_trees_and_retractions_change_nothing(name, dtype, checkpoint):
    prompts, expected = answers(checkpoint(name), dtype)
    for rounds, _ in serve(checkpoint(name), prompts, SOME[::2], {}, {"kv_cache_dtype": dtype}):
        assert rounds == [expected, expected]


@pytest.mark.parametrize(("dtype", "size"), [("fp8_e4m3", 2), ("fp8_e5m2", 4), ("int8", 3), ("int4", 2)])
def test_ranks_change_nothing(dtype, size, checkpoint, ranks):
    """Each rank scales its own heads; padded and replicated ones are rounded as those that they copy."""
    prompts, expected = answers(checkpoint("qwen2"), dtype)
    for by_variant in ranks(size).run(serve, checkpoint("qwen2"), prompts, FEW, {}, {"kv_cache_dtype": dtype}):
        assert all(rounds == [expected, expected] for rounds, _ in by_variant)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int4"])
@pytest.mark.parametrize("layout", ["pp2", "attn_dp2", "cp2"])
def test_layouts_change_nothing(layout, dtype, checkpoint, ranks):
    size, how, flags = (LAYOUTS | {"cp2": (2, {"context_parallel_size": 2}, {})})[layout]
    prompts, expected = answers(checkpoint("qwen2"), dtype)
    by_rank = ranks(size).run(serve, checkpoint("qwen2"), prompts, FEW[:1], how, flags | {"kv_cache_dtype": dtype})
    for by_variant in by_rank:
        assert all(rounds == [expected, expected] for rounds, _ in by_variant)


def test_a_smaller_dtype_holds_more_in_the_same_memory():
    held = {}
    for dtype in ("float32", *CODED):
        with Engine(
            device="cpu", page_size=16, kv_cache_dtype=dtype, mem_fraction_static=0.02, max_running_requests=4000
        ) as e:
            info = e.get_server_info()
            assert info["kv_cache_dtype"] == dtype
            held[dtype] = e.wrapper.kv_cache.nbytes / info["max_total_num_tokens"]
    assert held == {"float32": 1024, "fp8_e4m3": 256, "fp8_e5m2": 256, "int8": 288, "int4": 160}


@pytest.mark.parametrize("algorithm", ["NGRAM", "EAGLE"])
def test_guesses_are_verified_against_the_same_rows(algorithm):
    told = []
    for options in ({}, {"speculative_algorithm": algorithm}):
        with Engine(device="cpu", kv_cache_dtype="int8", **options) as engine:
            told.append([one["text"] for one in engine.generate(["What is a page?"] * 2, {"max_new_tokens": 24})])
    assert told[0] == told[1]
