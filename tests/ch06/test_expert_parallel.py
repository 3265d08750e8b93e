"""enable_expert_parallel of vLLM: experts are dealt out over the ranks that otherwise cut each of them."""

import pytest

from ch06_tp_vllm import LLM, SamplingParams
from tests.mixtures import save_mixture
from tests.oracle import greedy


def test_tokens_equal_transformers_and_each_rank_holds_its_own_experts(tmp_path):
    folder, prompts = save_mixture("one each", tmp_path), [[5, 6, 7, 8], [9] * 20]
    llm = LLM(str(folder), tensor_parallel_size=2, enable_expert_parallel=True, device="cpu", check=True)
    greedily = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": p} for p in prompts], greedily)
    assert [answer.outputs[0].token_ids for answer in answers] == [greedy(folder, p, 6) for p in prompts]
    placement = llm.llm_engine.runner.placement
    assert [placement.held(0, rank) for rank in range(2)] == [[0, 1, 2, None], [3, 4, 5, 6]]


def test_a_dense_model_has_none_to_deal_out_and_no_rank_is_started_to_find_out(monkeypatch):
    monkeypatch.setattr("ch06_tp_vllm.llm_engine.initialize_tensor_parallel", None)
    with pytest.raises(ValueError, match=r"has no experts to deal out over ep_size=2 \(vLLM: enable_expert_parallel\)"):
        LLM(tensor_parallel_size=2, enable_expert_parallel=True, device="cpu")
