"""enable_deterministic_inference: what a request gets, tokens and logprobs bit for bit, does not depend on anything but itself."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix import Engine
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from tests.oracle import greedy, some_prompts

KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 4},
    {"temperature": 0.8},  # no seed
)


def answers(
    folder, prompts, batches, dtype="float32", length=8, deterministic=True, pool=4096, page_size=1, kv="auto", **options
):  # fmt: skip
    """batches: which prompts are sent together, one batch behind the other -> {prompt: (tokens, logprobs)}, each time the same."""
    wrapper = TPRadixAttentionModelWrapper(
        str(folder), "cpu", page_size, max_total_tokens=pool, dtype=dtype, kv_cache_dtype=kv,
        enable_deterministic_inference=deterministic,
    )  # fmt: skip
    scheduler, told = TPScheduler(wrapper, check=True, **options), {}
    for batch in batches:
        rids = {
            i: scheduler.add_request(
                input_ids=prompts[i],
                sampling_params=SamplingParams(max_new_tokens=length, ignore_eos=True, logprobs=True, **KINDS[i % 4]),
            )
            for i in batch
        }
        results = scheduler.process_requests()
        for i, rid in rids.items():
            now = (results[rid].output_ids, results[rid].logprobs)
            assert told.setdefault(i, now) == now, f"prompt {i} got another answer before"
    return told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_and_in_any_company(dtype, checkpoint):
    folder, prompts = checkpoint("qwen2"), some_prompts(1009, 8, shared=24, longest=12)
    alone = answers(folder, prompts, [[i] for i in range(8)], dtype, disable_radix_cache=True)
    if dtype == "float32":
        assert [alone[i][0] for i in (0, 4)] == [greedy(folder, prompts[i], 8) for i in (0, 4)]

    @given(
        st.permutations(range(8)), st.integers(1, 8), st.sampled_from([8, 16, -1]), st.booleans(), st.sampled_from([1, 4]),
        st.booleans(), st.booleans(), st.sampled_from([4096, 120]),
    )  # fmt: skip
    @settings(max_examples=6 if dtype == "bfloat16" else 15, deadline=None)
    def check(order, size, chunk, mixed, page_size, cached, overlap, pool):
        batches = [order[i : i + size] for i in range(0, 8, size)]
        got = answers(
            folder, prompts, batches, dtype, chunked_prefill_size=chunk, enable_mixed_chunk=mixed, page_size=page_size,
            disable_radix_cache=not cached, overlap=overlap, pool=pool,
        )  # fmt: skip
        assert got == alone

    check()


def test_without_it_the_bits_differ(checkpoint):
    """The same comparison does see a difference."""
    folder, prompts = checkpoint("qwen2"), some_prompts(1009, 8, shared=24, longest=12)
    alone = answers(folder, prompts, [[i] for i in range(8)], deterministic=False, disable_radix_cache=True)
    assert answers(folder, prompts, [range(8)], deterministic=False) != alone


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_other_families(family, checkpoint):
    folder, prompts = checkpoint(family), some_prompts(1009, 5, shared=20, longest=30)
    alone = answers(folder, prompts, [[i] for i in range(5)], disable_radix_cache=True)
    assert answers(folder, prompts, [range(5)], chunked_prefill_size=16, page_size=4) == alone
    assert answers(folder, prompts, [range(5)], kv="int8") == answers(
        folder, prompts, [[i] for i in range(5)], kv="int8", disable_radix_cache=True
    )


def test_the_nth_of_several_answers_without_a_seed_is_always_the_same(checkpoint):
    prompt, params = [5, 6, 7], {"temperature": 1.5, "max_new_tokens": 12, "n": 3}
    options = {"device": "cpu", "enable_deterministic_inference": True, "max_total_tokens": 1024}
    with Engine(str(checkpoint("qwen2")), random_seed=5, **options) as engine:
        first, second = ([one["output_ids"] for one in engine.generate(None, params, prompt)] for _ in range(2))
        alone = engine.generate(None, params | {"n": 1}, prompt)["output_ids"]
    assert first == second
    assert first[0] == alone
    assert len(set(map(tuple, first))) == 3


def test_replicas_get_one_seed():
    """ServerArgs reach every replica as they stand."""
    drawn = ServerArgs.of({"enable_deterministic_inference": True, "random_seed": None})
    assert isinstance(drawn.one_seed, int)
    assert ServerArgs.of({"enable_deterministic_inference": True, "random_seed": 7}).one_seed == 7
    assert ServerArgs.of({"random_seed": 7}).one_seed is ServerArgs.of({"random_seed": None}).random_seed is None


def test_500_prompts_cold_and_from_the_tree(checkpoint):
    """As many beside each other as the pool holds, whole and without a tree; a few at a time in chunks; and all from the tree."""
    folder, prompts = checkpoint("qwen2"), some_prompts(1009, 500, shared=16, longest=12)
    cold = answers(
        folder, prompts, [range(500)], length=3, disable_radix_cache=True, chunked_prefill_size=-1, overlap=False
    )
    order = random.Random(0).sample(range(500), 500)
    batches = [*(order[i : i + 7] for i in range(0, 500, 7)), order]
    pool = 8192  # all of them stay in the tree
    assert cold == answers(
        folder, prompts, batches, length=3, pool=pool, chunked_prefill_size=32, enable_mixed_chunk=True, overlap=True
    )


def test_two_threads(checkpoint):
    """A library splits a product between them by its shape."""
    folder, prompts = checkpoint("qwen2"), some_prompts(1009, 6, shared=24, longest=12)
    torch.set_num_threads(2)
    try:
        alone = answers(folder, prompts, [[i] for i in range(6)], disable_radix_cache=True)
        assert answers(folder, prompts, [range(6)]) == alone
    finally:
        torch.set_num_threads(1)


def test_two_ranks(ranks, checkpoint):
    assert all(ranks(2).run(alike_on_two_ranks, str(checkpoint("qwen2"))))


def alike_on_two_ranks(folder) -> bool:
    prompts = some_prompts(1009, 6, shared=24, longest=12)
    alone = answers(folder, prompts, [[i] for i in range(6)], disable_radix_cache=True)
    return len(alone) == 6 and answers(folder, prompts, [range(6)], chunked_prefill_size=16) == alone


@pytest.mark.parametrize(
    "other",
    [
        {"speculative_algorithm": "NGRAM"}, {"enable_lora": True, "max_lora_rank": 8}, {"enable_layernorm_sp": True},
        {"enable_two_batch_overlap": True}, {"enable_all_reduce_fusion": True}, {"enable_torch_compile": True},
        {"attn_dp_size": 2}, {"cp_size": 2},
        {"ep_size": 2},
    ],
)  # fmt: skip
def test_what_has_another_order_is_refused_before_a_model_is_read(other):
    with pytest.raises(ValueError, match=f"enable_deterministic_inference with {next(iter(other))}"):
        ServerArgs.of({"enable_deterministic_inference": True} | other)


def test_models_with_another_order_are_refused(checkpoint):
    for family, said in (("qwen3_moe", "whose experts get as many rows"), ("deepseek_v2_lite", "latent rows|experts")):
        with pytest.raises(ValueError, match=said):
            Engine(str(checkpoint(family)), device="cpu", enable_deterministic_inference=True)
