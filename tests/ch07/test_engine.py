"""The outer API: Engine with SGLang's names, and the calls of the chapter's first listing."""

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import get_tensor_parallel, initialize_tensor_parallel
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy


@pytest.fixture(scope="module")
def engine():
    return Engine(device="cpu", check=True)


def test_one_prompt_one_result(engine):
    result = engine.generate("What is a radix cache?", {"max_new_tokens": 8})
    ids = engine.wrapper.tokenizer.encode("What is a radix cache?")
    assert result["output_ids"] == greedy(TINY_QWEN_PATH, ids, 8)
    assert result["text"] == engine.wrapper.tokenizer.decode(result["output_ids"])
    meta = result["meta_info"]
    assert meta["prompt_tokens"] == len(ids)
    assert meta["completion_tokens"] == 8
    assert meta["finish_reason"] == {"type": "length", "length": 8}


def test_a_list_keeps_its_order_and_its_own_parameters(engine):
    results = engine.generate(["What is a page?", "What is a rank?"], [{"max_new_tokens": 3}, {"max_new_tokens": 5}])
    assert [r["meta_info"]["completion_tokens"] for r in results] == [3, 5]
    assert engine.generate(["What is a page?"], {"max_new_tokens": 3})[0]["output_ids"] == results[0]["output_ids"]


def test_a_repeat_is_cached(engine):
    ids = list(range(100, 164))
    first, second = (engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 2}) for _ in range(2))
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == 63  # one token is always computed


def test_the_first_experiment_shows_the_cache():
    with Engine(device="cpu") as engine:
        first, second = (
            engine.generate("What is a radix cache?", {"max_new_tokens": 2})["meta_info"] for _ in range(2)
        )
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == second["prompt_tokens"] - 1


def test_pages_of_sixteen_are_shared_whole():
    ids = list(range(100, 164))
    with Engine(device="cpu", page_size=16) as engine:
        second = [engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 2}) for _ in range(2)][1]
    assert second["meta_info"]["cached_tokens"] == 48  # 64 tokens, capped at 63, floored to pages of 16


def test_a_thousand_requests_run_together():
    """And are answered as they are alone: pool, rows, task and tables have room for 1,024 at once."""
    prompts = [[100 + i, 5] for i in range(1024)]
    params = {"max_new_tokens": 2, "ignore_eos": True}
    with Engine(device="cpu", max_running_requests=1024, chunked_prefill_size=2048, max_total_tokens=8192) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=params)
        assert engine.scheduler.steps == {"prefill": 1, "decode": 1}
    for i in (0, 511, 1023):
        assert results[i]["output_ids"] == greedy(TINY_QWEN_PATH, prompts[i], 2)


def test_a_shorter_context_makes_shorter_rows():
    with Engine(device="cpu", max_running_requests=4, context_length=100, page_size=16) as engine:
        assert engine.scheduler.req_to_token.req_to_token.shape == (4, 100 + 16)
        assert engine.wrapper.table.page_table.shape == (4, 7)
        with pytest.raises(ValueError, match="prompt 90 \\+ max_new_tokens 11 = 101 tokens, but context_length is 100"):
            engine.generate(input_ids=[5] * 90, sampling_params={"max_new_tokens": 11})
    with pytest.raises(ValueError, match="a context of 4097 tokens is asked for, but the model has positions for"):
        Engine(device="cpu", context_length=4097)


def test_logprobs_come_with_their_tokens(engine):
    result = engine.generate("What is a page?", {"max_new_tokens": 4}, return_logprob=True)
    told = result["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in told] == result["output_ids"]
    assert all(logprob <= 0 for logprob, _, _ in told)


def test_sampling_seed_repeats(engine):
    def text(seed):
        return engine.generate("What is", {"temperature": 1.5, "sampling_seed": seed, "max_new_tokens": 12})[
            "output_ids"
        ]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_an_end_of_text_stops_and_has_no_text(engine):
    chat = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": "What is a radix cache?"}])
    result = engine.generate(input_ids=chat, sampling_params={"max_new_tokens": 128})
    assert result["meta_info"]["finish_reason"]["type"] == "stop"
    assert result["output_ids"][-1] in engine.wrapper.config.eos_token_ids
    assert "<|" not in result["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt": "a", "sampling_params": {"temperture": 1}},
            r"^unknown sampling parameter temperture; did you mean temperature\?$",
        ),
        ({"prompt": "a", "sampling_params": {"temperature": -1}}, r"temperature=-1 must be in \[0, 1000\]"),
        ({"prompt": "a", "sampling_params": {"top_p": 0}}, r"top_p=0 must be in \(0, 1\]"),
        ({"prompt": ["a", "b"], "sampling_params": [{}]}, "1 sampling_params for 2 prompts"),
        ({"prompt": ["a", ""]}, "prompt is empty"),
        ({"input_ids": []}, "prompt is empty"),
        ({}, "either prompt or input_ids"),
    ],
)
def test_refusals_run_nothing(engine, arguments, message):
    steps = engine.scheduler.step_number
    with pytest.raises(ValueError, match=message):
        engine.generate(**arguments)
    assert engine.scheduler.step_number == steps
    assert engine.generate("What is a page?", {"max_new_tokens": 1})["meta_info"]["completion_tokens"] == 1


def first_listing(size):
    initialize_tensor_parallel(tensor_parallel_size=size)
    model_wrapper = TPRadixAttentionModelWrapper(model_name=str(TINY_QWEN_PATH), device="cpu", page_size=16)
    scheduler = TPScheduler(model_wrapper)
    request_id = scheduler.add_request("What is AI?", max_new_tokens=20)
    results = scheduler.process_requests()
    return results[request_id].output_ids, get_tensor_parallel().size


@pytest.mark.parametrize("size", [1, 2])
def test_the_chapter_s_first_listing_gives_every_rank_the_same(size, ranks):
    answers = ranks(size).run(first_listing, size)
    assert len(answers) == size
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][1] == size
    assert 1 <= len(answers[0][0]) <= 20
