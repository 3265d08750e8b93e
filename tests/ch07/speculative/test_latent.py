"""Trees over latent rows, and with experts beside them: the tokens of transformers for each family of DeepSeek."""

import pytest

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from tests.ch07.speculative.adversaries import Adversary, options
from tests.oracle import greedy, some_prompts

NEW_TOKENS, NODES = 12, 6
VARIANTS = [{"page": 1, "tree": True}, {"page": 4, "tree": True, "chunk": 8, "pool": 128}, {"page": 16, "tree": False}]


def serve(folder, prompts, expected):
    """On each rank, for each variant: the answers; on rank 0 how many guesses were right."""
    answers, told = {tuple(p): answer for p, answer in zip(prompts, expected, strict=True)}, []
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for variant in VARIANTS:
        wrapper = TPRadixAttentionModelWrapper(
            str(folder), "cpu", variant["page"], max_total_tokens=variant.get("pool", 1024),
            speculative=options("NGRAM", NODES, variant["tree"]),
        )  # fmt: skip
        scheduler = TPScheduler(wrapper, check=True, chunked_prefill_size=variant.get("chunk"))
        brain = scheduler.speculation  # rank 0's
        if brain:
            brain.guesser = Adversary("mixed", answers, variant["tree"])
        ids = [scheduler.add_request(input_ids=prompt, sampling_params=params) for prompt in prompts]
        done = scheduler.process_requests()
        told.append(([done[i].output_ids for i in ids], brain and brain.correct))
    return told


@pytest.mark.parametrize(
    ("size", "name"), [(1, "deepseek_v2_lite"), (1, "deepseek_v2"), (1, "deepseek_v3"), (2, "deepseek_v3")]
)
def test_tokens_equal_transformers_whether_guesses_are_right_or_wrong(size, name, checkpoint, ranks):
    folder, prompts = checkpoint(name), some_prompts(1009, 5, shared=24, longest=16)
    expected = [greedy(folder, prompt, NEW_TOKENS) for prompt in prompts]
    by_rank = ranks(size).run(serve, folder, prompts, expected) if size > 1 else [serve(folder, prompts, expected)]
    for of_rank in by_rank:
        assert [answers for answers, _ in of_rank] == [expected] * len(VARIANTS)
    assert all(right > 5 for _, right in by_rank[0])
