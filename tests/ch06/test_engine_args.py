"""Scripts that were written for vLLM: its defaults pass, what is not here is refused with a way out, values go through."""

import dataclasses

import pytest

from ch06_tp_vllm import LLM, EngineArgs, LLMEngine, SamplingParams, engine_args, sampling_params

SMALL = {"device": "cpu", "num_gpu_blocks_override": 8}


def test_vllm_s_defaults_spelled_out_make_the_engine_without_them():
    given = {
        "pipeline_parallel_size": 1,
        "hf_overrides": {},
        "swap_space": 4,
    }
    assert EngineArgs(**given) == EngineArgs()
    assert EngineArgs(**engine_args.IDLE) == EngineArgs()
    assert EngineArgs(**dict.fromkeys(engine_args.ELSEWHERE)) == EngineArgs()
    none = {"block_size": None, "max_num_seqs": None, "enable_prefix_caching": None, "enable_chunked_prefill": None}
    assert EngineArgs(**none) == EngineArgs()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pipeline_parallel_size": 2}, "^engine argument pipeline_parallel_size is not here: layers .* tensor_parallel_size=$"),
        ({"swap_space": 8, "foo": 1}, r"argument swap_space is not here: .*; unknown engine argument foo; help\(EngineArgs"),
        ({"tensor_paralel_size": 2}, r"^unknown engine argument tensor_paralel_size; did you mean tensor_parallel_size"),
        ({"served_model_name": "a"}, "nothing is served here"),
        ({"trust_remote_code": True}, "Python is never run here"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused_by_every_door(given, message):
    for door in (EngineArgs, lambda **given: EngineArgs.of(given), LLMEngine, LLM):
        with pytest.raises(ValueError, match=message):
            door(**given)


def test_no_name_is_both_here_and_elsewhere():
    for args, module in ((EngineArgs, engine_args), (SamplingParams, sampling_params)):
        assert not {field.name for field in dataclasses.fields(args)} & set(module.ELSEWHERE)
        assert set(module.IDLE) <= set(module.ELSEWHERE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 5}, "^sampling parameter max_new_tokens is not here: vLLM calls it max_tokens$"),
        ({"best_of": 3}, "^sampling parameter best_of is not here: use n, and keep the best by cumulative_logprob$"),
        ({"temprature": 1}, r"^unknown sampling parameter temprature; did you mean temperature\?$"),
        ({"colour": 1}, r"^unknown sampling parameter colour; help\(SamplingParams\) has them all$"),
    ],
)
def test_a_sampling_parameter_that_is_none_is_refused_with_a_way_out(given, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)
    assert SamplingParams(best_of=1, flat_logprobs=False, logits_processors=None) == SamplingParams()


def test_half_and_float_are_vllm_s_other_names_of_dtypes(checkpoint):
    for name, dtype in (("half", "torch.float16"), ("float", "torch.float32"), ("auto", "torch.float32")):
        engine = LLMEngine(str(checkpoint("qwen2")), dtype=name, kv_cache_dtype=name, **SMALL)
        assert (str(engine.runner.dtype), str(engine.runner.kv_dtype)) == (dtype, dtype)
    for name, more in (("dtype", ""), ("kv_cache_dtype", ", fp8_e4m3, fp8_e5m2, int8, int4")):
        with pytest.raises(
            ValueError, match=rf"^{name}='int3' is unknown; use auto, float32, bfloat16, float16{more}$"
        ):
            LLMEngine(**{name: "int3"}, **SMALL)


def test_no_memory_is_said_in_the_chapter_s_words():
    with pytest.raises(ValueError, match=r"single block of .* or a larger gpu_memory_utilization$"):
        LLM(gpu_memory_utilization=1e-6, device="cpu")


def test_an_engine_from_engine_args_answers_and_counts_what_is_unfinished():
    with LLM.from_engine_args(EngineArgs(**SMALL)) as llm:
        engine = llm.llm_engine
        assert llm.get_tokenizer() is engine.runner.tokenizer.hf
        engine.add_request("a", [1, 2], SamplingParams(max_tokens=1, n=2))
        assert engine.get_num_unfinished_requests() == 1
        while engine.has_unfinished_requests():
            engine.step()
        assert engine.get_num_unfinished_requests() == 0


@pytest.fixture(scope="module")
def llm():
    with LLM(**SMALL) as llm:
        yield llm


def test_generate_and_chat_take_vllm_s_arguments_that_ask_for_nothing(llm):
    params, chat = SamplingParams(temperature=0, max_tokens=2), [{"role": "user", "content": "Hi"}]
    idle = {"tokenization_kwargs": None, "mm_processor_kwargs": None}
    assert llm.generate("a", params, **idle)[0].finished
    assert llm.chat(chat, params, False, chat_template_content_format="auto", tools=None, **idle)[0].finished
    for call in (llm.generate, llm.chat):
        with pytest.raises(ValueError, match=r"^argument mm_processor_kwargs is not here: this engine reads text only"):
            call(chat, params, mm_processor_kwargs={})
        with pytest.raises(ValueError, match=r"^unknown argument sampling_param; known: .*sampling_params"):
            call(chat, sampling_param=params)


def test_chat_hands_the_template_what_vllm_s_chat_does(llm):
    chat, params = [{"role": "user", "content": "Hi"}], SamplingParams(temperature=0, max_tokens=1)
    tokenizer = llm.llm_engine.runner.tokenizer

    def prompt(messages, **more):
        return tokenizer.hf.decode(llm.chat(messages, params, **more)[0].prompt_token_ids)

    assert prompt(chat, add_generation_prompt=False) == tokenizer.render_chat(chat, add_generation_prompt=False)
    assert (
        prompt(chat, chat_template="{{ messages[0]['content'] }} {{ colour }}", chat_template_kwargs={"colour": "red"})
        == "Hi red"
    )
    assert prompt(chat, chat_template="{{ tools[0]['name'] }}", tools=[{"name": "look"}]) == "look"
    half = [*chat, {"role": "assistant", "content": "A block"}]
    assert prompt(half, add_generation_prompt=False, continue_final_message=True).endswith("A block")
