"""Through the balancer the greedy tokens are transformers', whatever the two halves' ranks and pages are; and nothing is left."""

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.disaggregation.local_pair import Pair
from ch07_sglang_radix.serving.watch import wait_until
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.disaggregation.halves import two_halves
from tests.ch07.serving.running import LEAN
from tests.ch07.serving.test_life_and_death import Client
from tests.oracle import greedy, some_prompts

NEW = 10
# ranks of prefill, of decode, page size, and how the two are served: processes and tokenizers as a reader has them, or LEAN
HALVES = [
    (1, 1, 1, ()), (1, 1, 16, LEAN), (2, 1, 1, LEAN), (2, 1, 16, LEAN), (1, 2, 1, LEAN), (1, 2, 16, LEAN), (2, 3, 1, LEAN),
    (2, 3, 16, LEAN),
]  # fmt: skip


def sampling(n=1, new=NEW):
    return {"max_new_tokens": new, "ignore_eos": True, "n": n, "temperature": 0}


@pytest.mark.parametrize(("prefill", "decode", "page", "served"), HALVES)
def test_tokens_equal_transformers_and_every_page_comes_back(prefill, decode, page, served):
    prompts = [*some_prompts(1000, 4, shared=40, longest=24), list(range(5, 5 + 100))]
    right = [greedy(TINY_QWEN_PATH, prompt, NEW) for prompt in prompts]
    chunks = ("--chunked-prefill-size", "32")
    with two_halves(
        "--page-size", str(page), *served,
        prefill=("--tp-size", str(prefill), *chunks), decode=("--tp-size", str(decode)),
    ) as halves:  # fmt: skip
        front = halves.front
        cached = []
        for _ in range(2):  # the second time both sides find them in their trees
            answers = front.generate(input_ids=prompts, sampling_params=sampling())
            assert [one["output_ids"] for one in answers] == right
            cached.append([one["meta_info"]["cached_tokens"] for one in answers])
            halves.at_rest()
        whole = [(len(prompt) - 1) // page * page for prompt in prompts]
        assert cached[1] == whole, "the prefill side's tree, all but the last token"

        moved = halves.decode.info()["kv_bytes_moved"]
        assert front.generate(input_ids=prompts[4], sampling_params=sampling())["output_ids"] == right[4]
        last_page = 0 if len(prompts[4]) % page == 0 else 1
        more = halves.decode.info()["kv_bytes_moved"] - moved
        assert (more > 0) == bool(last_page), "what decode's tree has does not travel"

        halves.prefill.call("/flush_cache", {})
        answer = front.generate(input_ids=prompts[4], sampling_params=sampling())
        assert (answer["output_ids"], answer["meta_info"]["cached_tokens"]) == (right[4], 0), "a hit on decode alone"
        halves.decode.call("/flush_cache", {})
        answer = front.generate(input_ids=prompts[4], sampling_params=sampling())
        assert (answer["output_ids"], answer["meta_info"]["cached_tokens"]) == (right[4], whole[4]), (
            "and on prefill alone"
        )

        several = front.generate(input_ids=prompts[0], sampling_params=sampling(n=3))
        assert [one["output_ids"] for one in several] == [right[0]] * 3
        events = front.stream(input_ids=prompts[1], sampling_params=sampling())
        assert events[-1]["output_ids"] == right[1]
        assert len(events) > 1
        gone = Client(front, stream=True, input_ids=prompts[2]).started()
        gone.hang_up()
        assert wait_until(lambda: not halves.decode.info()["running"], 100)
        halves.at_rest()
        assert front.generate(input_ids=prompts[2], sampling_params=sampling())["output_ids"] == right[2]
        halves.at_rest()


@pytest.mark.parametrize(("prefill", "decode", "page"), [(2, 1, 4), (1, 2, 1)])
def test_latent_pages_are_whole_on_every_rank_and_the_tokens_transformers_too(prefill, decode, page, checkpoint):
    folder = checkpoint("deepseek_v3")
    prompts = some_prompts(1000, 4, shared=20, longest=24)
    flags = ("--model-path", str(folder), "--page-size", str(page), *LEAN)
    with two_halves(*flags, prefill=("--tp-size", str(prefill)), decode=("--tp-size", str(decode))) as halves:
        for _ in range(2):
            answers = halves.front.generate(input_ids=prompts, sampling_params=sampling())
            assert [one["output_ids"] for one in answers] == [greedy(folder, prompt, NEW) for prompt in prompts]
            halves.at_rest()


@pytest.mark.parametrize(("dtype", "a_token"), [("fp8_e4m3", 256), ("int8", 288), ("int4", 160)])
def test_codes_travel_with_their_scales_and_the_tokens_are_those_of_one_engine(dtype, a_token):
    """Over a real link between two schedulers: raw bytes of pages, the scales of rows in a second tensor."""
    prompts = [*some_prompts(500, 4, shared=20, longest=24), list(range(5, 5 + 50))]
    with Engine(device="cpu", skip_tokenizer_init=True, page_size=4, kv_cache_dtype=dtype) as engine:
        answers = engine.generate(input_ids=prompts, sampling_params=sampling())
    right = [one["output_ids"] for one in answers]
    both = {"kv_cache_dtype": dtype}
    pair = Pair(prefill=both | {"chunked_prefill_size": 16}, decode=both)
    try:
        for _ in range(2):  # the second time what both trees have does not travel
            asked = [pair.ask(prompt, max_new_tokens=NEW) for prompt in prompts]
            assert [pair.answer(one).output_ids for one in asked] == right
            assert pair.at_rest()
        assert pair.prefill.scheduler.wrapper.kv_cache.nbytes == a_token * pair.prefill.scheduler.pool.size
    finally:
        pair.close()
