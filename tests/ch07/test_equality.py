"""The main test: in float32 the greedy tokens are transformers' own, one request at a time, whatever runs beside it."""

import itertools

import pytest
import torch

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import PageUpdate, PrefillSequence, PrefillTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.layers.vocab import gather_logits
from common.parallel_state import get_tensor_parallel
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, reference_model, some_prompts

NEW_TOKENS = 12
SMALL_POOL = 96  # tokens; holds one request comfortably, all of them by no means
CHUNK = {1: 7, 4: 8, 16: 16}  # by page size: 7 tokens, or the next whole pages
VARIANTS = [
    # overlap in one half of them and best-only logits in another, such that every pair of values occurs
    {"page_size": page, "chunk": chunk, "pool": pool, "cache": cache,
     "overlap": (page == 4) ^ chunk ^ bool(pool) ^ cache, "best": (page == 16) ^ chunk ^ cache}
    for page, chunk, pool, cache in itertools.product((1, 4, 16), (False, True), (None, SMALL_POOL), (True, False))
]  # fmt: skip
# every value and most pairs, not the whole product (test_product.py draws from a larger one)
FEWER = [VARIANTS[i] for i in (6, 8, 19, 23)]


def prompts_and_answers(folder, count=7):
    prompts = some_prompts(1009, count, shared=24, longest=16)
    return prompts, [greedy(folder, p, NEW_TOKENS) for p in prompts]


def serve(folder, prompts, variants, new_tokens):
    """On each rank: every variant, the prompts twice (the second time they are in the tree)."""
    answers = []
    for v in variants:
        wrapper = TPRadixAttentionModelWrapper(str(folder), "cpu", v["page_size"], max_total_tokens=v["pool"])
        chunk = CHUNK[v["page_size"]] if v["chunk"] else -1
        scheduler = TPScheduler(
            wrapper, chunked_prefill_size=chunk, disable_radix_cache=not v["cache"], overlap=v["overlap"],
            gather_best=v["best"], check=True,
        )  # fmt: skip
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        out = []
        for _ in range(2):
            ids = [scheduler.add_request(input_ids=p, sampling_params=params) for p in prompts]
            results = scheduler.process_requests()
            out.append([results[i].output_ids for i in ids])
        answers.append((out, scheduler.retractions))
    return answers


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_tokens_equal_transformers(name, size, checkpoint, ranks):
    # the whole product on one model and one rank; three and four ranks on two cores are slow, and get two variants each
    folder, variants = (
        checkpoint(name),
        VARIANTS if (size, name) == (1, "qwen2") else FEWER if size <= 2 else FEWER[1:3],
    )
    prompts, expected = prompts_and_answers(folder)
    assert len({tuple(e) for e in expected}) == len(prompts) - 1, "the model must not say the same to everything"
    by_rank = ranks(size).run(serve, folder, prompts, variants, NEW_TOKENS)
    for rank, answers in enumerate(by_rank):
        for variant, (rounds, _) in zip(variants, answers, strict=True):
            assert rounds == [expected, expected], (rank, variant)


def test_the_small_pool_did_retract(checkpoint, ranks):
    """Otherwise the test above would say nothing about retraction."""
    variants = [v for v in VARIANTS if v["pool"]]
    prompts, _ = prompts_and_answers(checkpoint("qwen2"))
    answers = ranks(1).run(serve, checkpoint("qwen2"), prompts, variants, NEW_TOKENS)[0]
    assert sum(retractions for _, retractions in answers) > 0


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_tokens_equal_transformers_on_the_bundled_model(size, ranks):
    prompts, expected = prompts_and_answers(TINY_QWEN_PATH)
    variants = FEWER if size <= 2 else FEWER[1:3]
    for answers in ranks(size).run(serve, TINY_QWEN_PATH, prompts, variants, NEW_TOKENS):
        assert all(rounds == [expected, expected] for rounds, _ in answers)


@pytest.mark.timeout(1200)
def test_tokens_equal_transformers_on_the_real_config(checkpoint, ranks):
    """Qwen2.5-0.5B as published, random weights: 14 heads on 4 ranks, 151,936 tokens of vocabulary on 3."""
    folder = checkpoint("qwen2.5-0.5b")
    prompts = some_prompts(151_936, 4, shared=20, longest=6)
    expected = [greedy(folder, p, 5) for p in prompts]
    variants = [{"page_size": 4, "chunk": True, "pool": 256, "cache": True, "overlap": True, "best": False}]
    for size in (4, 3, 2, 1):
        for answers in ranks(size).run(serve, folder, prompts, variants, 5):
            assert answers[0][0] == [expected, expected], size


def prefill_logits(folder, prompt):
    """The full logits behind a prompt, through the executor, on rank 0."""
    wrapper = TPRadixAttentionModelWrapper(str(folder), "cpu", page_size=4, max_total_tokens=128)
    pages = tuple(range(7, 7 + -(-len(prompt) // 4)))
    task = PrefillTask(0, (PageUpdate(2, 0, pages),), (PrefillSequence(2, 0, len(prompt), 1),), tuple(prompt))
    return gather_logits(wrapper.execute_prefill_task(task), wrapper.config.vocab_size, get_tensor_parallel())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_logits_within_1e_4(name, size, checkpoint, ranks):
    folder, prompt = checkpoint(name), some_prompts(1009, 4)[0]
    with torch.inference_mode():
        expected = reference_model(folder)(torch.tensor([prompt])).logits[0, -1]
    logits = ranks(size).run(prefill_logits, folder, prompt)
    assert all(other is None for other in logits[1:])
    assert ((logits[0][0] - expected).abs().max() / expected.abs().max()).item() < 1e-4
