"""Adapters as vLLM's users ask for them: each request's tokens are those that peft in transformers gives for its adapter alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch06_tp_vllm import LLM, EngineArgs, LoRARequest, SamplingParams
from ch06_tp_vllm.lora_request import LoRASlotBook, lora_requests
from ch06_tp_vllm.model_runner import StepMetadata
from tests.adapters import greedy_with, save_adapter
from tests.ch06.test_equality import NEW_TOKENS, SMALL_POOL
from tests.oracle import greedy, some_prompts

PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
PROMPTS = some_prompts(1009, 8, shared=24, longest=16)
WHOSE = [1, 0, 2, 3, 2, 0, 3, 1]  # of each prompt; 0: nobody's
CONFIGS = ({"r": 4}, {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}, {"r": 2, "lora_alpha": 16})


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(base, root / f"{i}", seed=i, strength=0.3, **config) for i, config in enumerate(CONFIGS)]


def requests(folders):
    known = [None, *(LoRARequest(f"number {i}", i, str(folder)) for i, folder in enumerate(folders, 1))]
    return [known[i] for i in WHOSE]


def serve(base, folders):
    """On each rank: two adapters a step, of three; the second time what was computed is in the cache. And a bad folder."""
    told = []
    for options in (
        {"max_num_batched_tokens": 24, "block_size": 4},
        {"num_gpu_blocks_override": SMALL_POOL // 4, "block_size": 4, "async_scheduling": True},
    ):
        llm = LLM(str(base), device="cpu", enable_lora=True, max_loras=2, max_lora_rank=8, check=True, **options)
        scheduler, most = llm.llm_engine.scheduler, 0
        schedule = scheduler.schedule

        def look(schedule=schedule, scheduler=scheduler):
            nonlocal most
            output = schedule()
            most = max(most, len({request.adapter for request in scheduler.running} - {0}))
            return output

        scheduler.schedule = look
        rounds = [llm.generate(PROMPTS, PARAMS, lora_request=requests(folders), use_tqdm=False) for _ in range(2)]
        wrong = ""
        try:
            llm.generate(PROMPTS[:1], PARAMS, lora_request=LoRARequest("bad", 9, "nowhere"), use_tqdm=False)
        except ValueError as error:
            wrong = str(error)
        except FileNotFoundError as error:
            wrong = f"not told to all ranks: {error}"
        mine = LoRARequest("mine", 8, str(folders[llm.llm_engine.tp.rank]))
        if llm.llm_engine.tp.size > 1:
            try:
                llm.generate(PROMPTS[:1], PARAMS, lora_request=mine, use_tqdm=False)
            except ValueError as error:
                wrong += f" {error}"
        tokens = [[one.outputs[0].token_ids for one in outputs] for outputs in rounds]
        told.append((tokens, [one.num_cached_tokens for one in rounds[1]], wrong, scheduler.num_preemptions, most))
    return told


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_equal_peft_in_any_mix(size, base, folders, ranks):
    told = ranks(size).run(serve, base, folders) if size > 1 else [serve(base, folders)]
    right = [
        greedy_with(base, folders[who - 1], prompt, NEW_TOKENS) if who else greedy(base, prompt, NEW_TOKENS)
        for who, prompt in zip(WHOSE, PROMPTS, strict=True)
    ]
    plain = [greedy(base, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert [one != other for one, other in zip(right, plain, strict=True)] == [who > 0 for who in WHOSE]
    for rank in told:
        assert [tokens for tokens, *_ in rank] == [[right, right]] * 2
        assert all("nowhere" in wrong and "\n" not in wrong for _, _, wrong, *_ in rank)
        assert size == 1 or all("rank 1 has read another adapter than rank 0" in wrong for _, _, wrong, *_ in rank)
    (_, found, _, _, most), (*_, preempted, _) = told[0]
    assert found == [(len(prompt) - 1) // 4 * 4 for prompt in PROMPTS]
    assert most == 2
    assert preempted > 0


def test_blocks_of_one_adapter_are_found_by_no_other(base, folders):
    with LLM(str(base), device="cpu", enable_lora=True, max_loras=2, block_size=4) as llm:

        def cached(who, **more):
            one = LoRARequest("a", who, str(folders[who - 1])) if who else None
            prompt = {"prompt_token_ids": PROMPTS[0]} | more
            return llm.generate([prompt], PARAMS, lora_request=one, use_tqdm=False)[0].num_cached_tokens

        known = (len(PROMPTS[0]) - 1) // 4 * 4
        assert [cached(who) for who in (0, 1, 3)] == [0, 0, 0]
        assert [cached(who) for who in (0, 1, 3)] == [known] * 3
        assert [cached(1, cache_salt="s"), cached(1, cache_salt="s")] == [0, known]


def test_an_adapter_that_was_interrupted_on_its_way_is_placed_again(base, folders, monkeypatch):
    with LLM(str(base), device="cpu", enable_lora=True, max_loras=1) as llm:
        first, second = (LoRARequest(str(i), i, str(folders[i - 1])) for i in (1, 2))
        llm.generate(PROMPTS[:1], PARAMS, lora_request=first, use_tqdm=False)

        def interrupted(adapter, slot):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llm.llm_engine.runner.lora, "place", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS[:1], PARAMS, lora_request=second, use_tqdm=False)
        (told,) = llm.generate(PROMPTS[:1], PARAMS, lora_request=second, use_tqdm=False)
    assert told.outputs[0].token_ids == greedy_with(base, folders[1], PROMPTS[0], NEW_TOKENS)


def test_what_cannot_be_is_one_line_and_nothing_runs(base, folders):
    with LLM(str(base), device="cpu", enable_lora=True, max_lora_rank=4) as llm:
        a = LoRARequest("a", 1, str(folders[0]))
        llm.generate(PROMPTS[:1], PARAMS, lora_request=a, use_tqdm=False)
        for wrong, words in (
            (LoRARequest("b", 1, str(folders[2])), "^lora_int_id=1 is a from .*; give b a number of its own$"),
            (LoRARequest("b", 2, str(folders[1])), "has rank 8, more than max_lora_rank=4"),
            ("a", "^lora_request='a' must be a LoRARequest, or one for each prompt"),
            ([a], "^1 lora_request for 2 prompts"),
            ([a, "a"], "^lora_request holds 'a', which is no LoRARequest$"),
        ):
            with pytest.raises(ValueError, match=words) as error:
                llm.generate(PROMPTS[:2], PARAMS, lora_request=wrong, use_tqdm=False)
            assert "\n" not in str(error.value)
            assert not llm.llm_engine.has_unfinished_requests()
        assert list(llm.llm_engine.runner.lora.loaded) == [1]
    with (
        LLM(str(base), device="cpu") as llm,
        pytest.raises(
            ValueError, match=r"^lora_request asks for a, and there is no room for adapters; start with enable"
        ),
    ):
        llm.generate(PROMPTS[:1], PARAMS, lora_request=a)
    for values, words in (
        (("", 1, "x"), "lora_name"), (("a", 0, "x"), "lora_int_id=0 must be at least 1"), (("a", 1, ""), "lora_path"),
        (("a", 1, None), "lora_path=None must be a text"), (("a", 1, 5), "lora_path=5 must be a text"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            LoRARequest(*values)
    with pytest.raises(ValueError, match="a verify step knows no adapters here"):
        EngineArgs(enable_lora=True, speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    assert lora_requests(None, 2) == [None, None]


@given(steps=st.lists(st.sets(st.integers(1, 6), max_size=3), max_size=20), more=st.integers(0, 2))
def test_who_is_in_a_step_has_a_slot_of_its_own(steps, more):
    book, device = LoRASlotBook(3 + more), {}
    for wanted in steps:
        before = dict(book.slots)
        for adapter, slot in book.place(wanted):
            assert adapter not in before, "what lies there is not written again"
            device[slot] = adapter
        assert all(device[book.slots[one]] == one for one in wanted)
        assert all(1 <= slot <= book.max_loras for slot in book.slots.values())
        assert len(set(book.slots.values())) == len(book.slots)


def test_the_slots_of_a_step_travel_behind_its_tokens():
    columns = np.arange(10).reshape(5, 2)
    plain = StepMetadata([(0, 0, [7])], *columns, np.array([5, 6, 7]))
    with_slots = StepMetadata([(0, 0, [7])], *columns, np.array([5, 6, 7]), adapters=np.array([0, 2]))
    assert StepMetadata.decode(plain.encode()).adapters is None
    back = StepMetadata.decode(with_slots.encode())
    assert (back.token_ids.tolist(), back.adapters.tolist()) == ([5, 6, 7], [0, 2])
    with pytest.raises(ValueError, match="announces"):
        StepMetadata.decode(with_slots.encode()[:-1])
