"""What must come out: transformers' greedy tokens, one prompt at a time; and our engine with a reader's part in it."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import torch
import transformers

from ch06_tp_vllm import llm_engine
from ch06_tp_vllm.llm_engine import LLMEngine
from ch06_tp_vllm.sampling_params import SamplingParams
from common.teaching.expect import expect
from common.tiny_qwen import TINY_QWEN_PATH

MAX_STEPS = 2000


@cache
def _model() -> torch.nn.Module:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval()


@cache
def _greedy(prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = _model().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def transformers_tokens(requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """requests: (prompt, tokens to put out)."""
    return [_greedy(tuple(prompt), count) for prompt, count in requests]


def random_ids(count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(300, 3000) for _ in range(count)]


def engine_with(scheduler: type | None = None, blocks: type | None = None, **options) -> LLMEngine:
    """The bundled tiny model on one CPU rank, conservation tested after each step, and a reader's classes inside."""
    with ExitStack() as stack:
        for name, mine in (("Scheduler", scheduler), ("BlockManager", blocks)):
            if mine is not None:
                stack.enter_context(patch.object(llm_engine, name, mine))
        return LLMEngine(device="cpu", **{"check": True, "async_scheduling": False} | options)


def add_all(engine: LLMEngine, requests: Sequence[tuple[list[int], int]], first: int = 0) -> None:
    for i, (prompt, count) in enumerate(requests, first):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))


def run_to_the_end(engine: LLMEngine) -> dict[str, list[int]]:
    """{request id: tokens}."""
    answers, last = {}, engine.num_steps + MAX_STEPS
    while engine.has_unfinished_requests():
        assert engine.num_steps < last, f"the engine: got no end after {MAX_STEPS} steps, wanted all answers"
        for output in engine.step():
            answers[output.request_id] = output.outputs[0].token_ids
    return answers


def judge_answers(engine: LLMEngine, requests: Sequence[tuple[list[int], int]]) -> str:
    """Have the engine answer; the tokens must be transformers'."""
    add_all(engine, requests)
    answers = run_to_the_end(engine)
    want = transformers_tokens(requests)
    wrong = [i for i, tokens in enumerate(want) if answers.get(str(i)) != tokens]
    if wrong:
        i = wrong[0]
        expect(
            f"{len(wrong)} of {len(want)} answers are not transformers'; tokens of request {i}",
            answers.get(str(i)),
            want[i],
        )
    return f"{len(want)} answers, token for token transformers', in {engine.num_steps} steps"
