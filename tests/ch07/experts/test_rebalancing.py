"""Experts change ranks while requests run, and no token notices: real ranks, a mixture with random weights.

pytest tests/ch07/experts/test_rebalancing.py
"""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from ch07_sglang_radix.experts.rebalancer import Rebalancer
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from tests.oracle import greedy, reference_model, some_prompts
from tests.ranks import layout_of_the_pool

EXPERTS, TOP_K, LAYERS, DENSE = 7, 2, 3, 1  # experts do not divide by ranks; one layer of three has none
NEW, EVERY = 9, 4
PROMPTS = some_prompts(503, 9, shared=20, longest=25, seed=3)


def make_mixture(folder):
    """A few experts are far more popular than others, and others in each layer."""
    torch.manual_seed(5)
    config = Qwen2MoeConfig(
        vocab_size=503, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        moe_intermediate_size=24, shared_expert_intermediate_size=40, norm_topk_prob=True, mlp_only_layers=[DENSE],
        decoder_sparse_step=1, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, param in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            param.data += 0.1 * torch.randn_like(param)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make_mixture(tmp_path_factory.mktemp("mixture"))


@cache
def wrapper(folder, redundant: int, algorithm: str, dispatch: str, layout: tuple) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(
        folder, "cpu", 4, max_total_tokens=1024, parallel=layout_of_the_pool(**dict(layout)), ep_dispatch=dispatch,
        ep_num_redundant_experts=redundant, ep_dispatch_algorithm=algorithm,
    )  # fmt: skip


def serve(folder, redundant: int, algorithm: str, dispatch: str, layout: tuple, reads: bool, **options) -> dict:
    """All prompts, some of them later than others, with experts that move every few steps; rank 0 says what it has seen."""
    model = wrapper(folder, redundant, algorithm, dispatch, layout)
    scheduler = TPScheduler(model, check=True, chunked_prefill_size=16, **options)
    rebalancer = Rebalancer(scheduler, every=EVERY, reads=reads)
    before = model.placement.physical_to_logical.clone()
    coming = list(enumerate(PROMPTS))

    def arrivals(step: int) -> bool:
        while coming and (coming[0][0] <= step or not scheduler.busy):
            scheduler.enqueue(None, coming.pop(0)[1], SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        return bool(coming)

    results = scheduler.process_requests(arrivals if scheduler.replica.rank == 0 else None)
    said = {
        "tokens": [one.output_ids for one in results.values()],
        "placement": model.placement.physical_to_logical.tolist(),
    }
    if scheduler.replica.rank == 0:
        load = rebalancer.load
        for rank in scheduler.data_ranks:
            assert rank.pool.free_slots + rank.tree.evictable_size == rank.pool.size
        said |= {
            "moved": load.moved, "rebalanced": load.rebalanced, "of_expert": load.of_expert.tolist(),
            "of_rank": load.of_rank.sum(1).tolist(), "fed": scheduler.work["inputs"],
            "changed": not torch.equal(before, model.placement.physical_to_logical),
        }  # fmt: skip
    return said


CASES = {  # ranks, redundant, algorithm, dispatch, layout, options
    "two": (2, 0, "static", "replicated", {"expert_parallel_size": 2}, {"disable_radix_cache": True}),
    "two, copies": (2, 2, "static", "replicated", {"expert_parallel_size": 2}, {"overlap": True}),
    "two, copies take turns": (2, 3, "dynamic", "replicated", {"expert_parallel_size": 2}, {"enable_mixed_chunk": True}),
    "two data ranks": (
        2, 1, "dynamic", "replicated", {"expert_parallel_size": 2, "attention_data_parallel_size": 2}, {"overlap": True},
    ),
    "rows travel": (
        2, 1, "static", "all_to_all", {"expert_parallel_size": 2, "attention_data_parallel_size": 2}, {"overlap": True},
    ),
    "three": (3, 0, "static", "replicated", {"expert_parallel_size": 3}, {"overlap": True}),
    "three, copies": (3, 2, "dynamic", "replicated", {"expert_parallel_size": 3}, {"disable_radix_cache": True}),
    "four, columns cut": (4, 1, "static", "replicated", {"expert_parallel_size": 2}, {}),
    "two stages": (4, 1, "static", "replicated", {"expert_parallel_size": 2, "pipeline_parallel_size": 2}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("size", "name"), [(case[0], name) for name, case in CASES.items()], ids=str)
def test_experts_move_in_the_middle_of_requests_and_no_token_notices(size, name, ranks, mixture):
    _, redundant, algorithm, dispatch, layout, options = CASES[name]
    layout = tuple(layout.items())
    told = ranks(size).run(serve_case, mixture, redundant, algorithm, dispatch, layout, options)
    for one in told:
        assert one["tokens"] == [greedy(mixture, prompt, NEW) for prompt in PROMPTS]
        assert one["placement"] == told[0]["placement"]
    first = told[0]
    assert first["rebalanced"] > 3
    assert first["moved"] > 0
    assert first["changed"]
    # every row of a step has TOP_K experts in each sparse layer, and each pair is computed by exactly one rank
    assert [sum(layer) for layer in first["of_expert"]] == first["of_rank"] == [first["fed"] * TOP_K] * (LAYERS - 1)
    if options.get("disable_radix_cache"):  # every token of every request was computed, once
        assert first["of_expert"] == counted_by_hand(mixture)


def counted_by_hand(folder) -> list[list[int]]:
    """How often each expert is chosen for the tokens that are fed in, all but the last of each answer: by transformers' routers."""
    model, counts = reference_model(folder), torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    sparse = [layer for layer in range(LAYERS) if layer != DENSE]
    hooks = []
    for layer in sparse:

        def count(gate, given, said, layer=layer) -> None:
            counts[layer] += said[2].flatten().bincount(minlength=EXPERTS)

        hooks.append(model.model.layers[layer].mlp.gate.register_forward_hook(count))
    with torch.inference_mode():
        for prompt in PROMPTS:
            model(torch.tensor([prompt + greedy(folder, prompt, NEW)[:-1]]))
    for hook in hooks:
        hook.remove()
    return counts[sparse].tolist()


def serve_case(folder, redundant, algorithm, dispatch, layout, options) -> dict:
    return serve(folder, redundant, algorithm, dispatch, layout, reads=True, **options)
