"""Every layout that an engine here runs, and every combination of two: the tokens are those of transformers.

What each layout does by itself (ledger, retraction, draws of options) is held in tests of its own; here they stand side by side.
"""

import pytest

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.replicas import answers_of_replicas
from tests.oracle import greedy, some_prompts
from tests.ranks import layout_of_the_pool

TP, PP = {}, {"pipeline_parallel_size": 2}
DATA, CONTEXT = {"attention_data_parallel_size": 2}, {"context_parallel_size": 2}
SEQUENCE = {"enable_layernorm_sp": True}
ALL = {"tp": TP, "pp": PP, "attn-dp": DATA, "cp": CONTEXT, "sp": SEQUENCE}
FAMILIES = ["qwen2", "qwen3", "llama"]


def answers(sizes: dict, folder, prompts, new: int, chunk: int | None = None):
    """Twice, so that the second time hits; the pool of every data rank is whole at the end of each step."""
    sizes = dict(sizes)
    sp = sizes.pop("enable_layernorm_sp", False)
    wrapper = TPRadixAttentionModelWrapper(
        str(folder), "cpu", 4, max_total_tokens=1024, parallel=layout_of_the_pool(None, **sizes), enable_layernorm_sp=sp
    )
    scheduler = TPScheduler(wrapper, check=True, chunked_prefill_size=chunk)
    for _ in range(2):
        for prompt in prompts:
            scheduler.add_request(input_ids=prompt, max_new_tokens=new)
    return [out.output_ids for out in scheduler.process_requests().values()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", [name for name in ALL if name != "tp"])
def test_tokens_equal_transformers_on_the_published_config(layout, checkpoint, ranks):
    """Qwen2.5-0.5B as published, random weights, on two ranks; cut by heads it is in tests/ch07/test_equality.py."""
    folder, prompts = checkpoint("qwen2.5-0.5b"), some_prompts(151_936, 4, shared=20, longest=6)
    expected = [greedy(folder, prompt, 4) for prompt in prompts] * 2
    for said in ranks(2).run(answers, ALL[layout], folder, prompts, 4):
        assert said == expected


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [4])
def test_four_ranks_cut_the_published_widths_both_ways(size, checkpoint, ranks):
    """tp x pp: each rank holds half of one of two layers, as wide as published."""
    folder, prompts = checkpoint("qwen2.5-0.5b of 2 layers"), some_prompts(151_936, 4, shared=20, longest=6)
    expected = [greedy(folder, prompt, 4) for prompt in prompts] * 2
    for said in ranks(size).run(answers, PP, folder, prompts, 4):
        assert said == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("size", [4])
def test_four_ranks_cut_it_both_ways(size, layout, family, checkpoint, ranks):
    """tp x pp, tp x attention-dp, cp x tp, tp x sp: two ranks of one kind times two that share the heads."""
    folder, prompts = checkpoint(family), some_prompts(1009, 5, shared=20, longest=12)
    expected = [greedy(folder, prompt, 6) for prompt in prompts] * 2
    for said in ranks(size).run(answers, ALL[layout], folder, prompts, 6, 16):
        assert said == expected


def test_replicas_of_every_kind_under_torchrun(tmp_path):
    """tp x dp, pp x dp, cp x dp, attention-dp x dp, sp x dp, on four ranks, one engine after the other."""
    ways = ({"tp_size": 2}, {"pp_size": 2}, {"cp_size": 2}, {"attn_dp_size": 2}, {"enable_layernorm_sp": True})
    layouts = [{"dp_size": 2} | way for way in ways]
    prompts = some_prompts(3584, 5, shared=20, longest=12)
    for flags, told in zip(layouts, answers_of_replicas(tmp_path, prompts, layouts), strict=True):
        assert [ids for ids, _ in told] == [greedy(TINY_QWEN_PATH, prompt, 8) for prompt in prompts], flags
        assert {rank for _, rank in told} == {0, 1}, flags
