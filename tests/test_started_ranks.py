"""tp_size=2 and tensor_parallel_size=2 without torchrun: rank 0 starts the other rank itself."""

import asyncio
import itertools

import pytest

from ch06_tp_vllm import LLM, LoRARequest, SamplingParams
from ch07_sglang_radix import Engine
from common.distributed import spawn
from common.layers.mlp import MLP
from common.parallel_state import RankFailure
from common.tiny_qwen import ADAPTERS_PATH, TINY_QWEN_PATH
from tests.adapters import greedy_with
from tests.oracle import greedy

PROMPTS = [[5, 6, 7], [8] * 40, [9, 10]]


def test_chapter_7_s_engine_starts_its_ranks_and_ends_them():
    for _ in range(2):
        with Engine(tp_size=2, device="cpu", check=True) as engine:
            ranks = engine.scheduler.tp.spawned.processes
            results = engine.generate(input_ids=PROMPTS, sampling_params={"max_new_tokens": 6})
            assert [r["output_ids"] for r in results] == [greedy(TINY_QWEN_PATH, p, 6) for p in PROMPTS]
            chunks = list(engine.generate(input_ids=PROMPTS[0], sampling_params={"max_new_tokens": 4}, stream=True))
            assert chunks[-1]["output_ids"] == greedy(TINY_QWEN_PATH, PROMPTS[0], 4)
            result = asyncio.run(engine.async_generate(input_ids=PROMPTS[1], sampling_params={"max_new_tokens": 4}))
            assert result["output_ids"] == greedy(TINY_QWEN_PATH, PROMPTS[1], 4)
            told = engine.generate(
                input_ids=PROMPTS[1], sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
            )["meta_info"]["input_token_logprobs"]
            assert [token for _, token, _ in told] == PROMPTS[1]
        assert all(process.poll() is not None for process in ranks)


def test_chapter_6_s_llm_starts_its_ranks_and_ends_them():
    with LLM(tensor_parallel_size=2, device="cpu", check=True, enable_lora=True) as llm:
        ranks = llm.llm_engine.tp.spawned.processes
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [greedy(TINY_QWEN_PATH, p, 6) for p in PROMPTS]
        with pytest.raises(ValueError, match="nowhere"):
            llm.generate(PROMPTS, lora_request=LoRARequest("a", 1, "nowhere"), use_tqdm=False)
        pirate = LoRARequest("pirate", 1, str(ADAPTERS_PATH / "pirate"))
        (output,) = llm.generate(
            PROMPTS[:1],
            SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
            lora_request=pirate,
            use_tqdm=False,
        )
        assert output.outputs[0].token_ids == greedy_with(TINY_QWEN_PATH, ADAPTERS_PATH / "pirate", PROMPTS[0], 6)
        engine = llm.llm_engine
        engine.add_request("a", PROMPTS[0], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        while engine.has_unfinished_requests():
            (last,) = engine.step()
        assert last.outputs[0].token_ids == greedy(TINY_QWEN_PATH, PROMPTS[0], 3)
    assert all(process.poll() is not None for process in ranks)


def break_off(monkeypatch) -> None:
    """From now on rank 0's next step ends between two sums; the other rank waits in the second."""
    calls, forward = itertools.count(), MLP.forward

    def fails(self, *args):
        if next(calls) == 2:
            raise MemoryError("not enough memory for 12 GB")
        return forward(self, *args)

    monkeypatch.setattr(MLP, "forward", fails)


@pytest.mark.parametrize(
    ("start", "ask", "end"),
    [
        (lambda: Engine(tp_size=2, device="cpu"), lambda e: e.generate(input_ids=PROMPTS), lambda e: e.shutdown()),
        (lambda: Engine(pp_size=2, device="cpu"), lambda e: e.generate(input_ids=PROMPTS), lambda e: e.shutdown()),
        (lambda: LLM(tensor_parallel_size=2, device="cpu"), lambda e: e.generate(PROMPTS), lambda e: e.shutdown()),
    ],
    ids=["chapter 7", "two stages", "chapter 6"],
)
def test_a_step_that_rank_0_breaks_off_is_an_error_at_once_and_the_last(monkeypatch, start, ask, end):
    engine = start()
    break_off(monkeypatch)
    with pytest.raises(
        RankFailure, match=r"^rank 0 broke a step off: MemoryError: not enough memory for 12 GB; make a new"
    ):
        ask(engine)
    with pytest.raises(RankFailure, match=r"out of step; make a new engine$"):
        ask(engine)
    end(engine)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Engine(tp_size=2, page_size=0), lambda: Engine(tp_size=2, schedule_policy="lru"),
        lambda: LLM(tensor_parallel_size=2, seed="x"), lambda: LLM(tensor_parallel_size=2, scheduling_policy="lru"),
    ],
)  # fmt: skip
def test_what_is_refused_starts_nobody(make, monkeypatch):
    monkeypatch.setattr(spawn.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=r"must be|is unknown"):
        make()
