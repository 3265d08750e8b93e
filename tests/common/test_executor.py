import random

import numpy as np
import pytest
import torch

from common.executor import SCORED_ROWS, Executor
from tests.oracle import reference_model

P, TOP, CLOSE = 16, 3, 1e-4


def told(folder, prompts, chunk, start, ids, parallel=None):
    """Prompts in steps of `chunk` tokens each, side by side -> (on rank 0) what is told of their tokens from `start` on."""
    executor = Executor(folder, "cpu", P, max_total_tokens=4096, max_running_requests=4, parallel=parallel)
    pages = 512 // P
    executor.table.set_pages([(row, 0, range(row * pages, (row + 1) * pages)) for row in range(len(prompts))])
    answers = [[] for _ in prompts]
    for first in range(0, max(map(len, prompts)), chunk):
        rows = np.array([row for row, prompt in enumerate(prompts) if len(prompt) > first])
        new = np.array([len(prompts[row][first : first + chunk]) for row in rows])
        emits = np.array([len(prompts[row]) <= first + chunk for row in rows])
        # of the token at position p, the one at p + 1 is asked about
        scored = [
            (row, at, first + i + 1)
            for row, at, n in zip(rows, np.cumsum(new) - new, new, strict=True)
            for i in range(n)
            if start <= first + i + 1 < len(prompts[row])
        ]
        executor.ragged(
            np.concatenate([prompts[row][first : first + chunk] for row in rows]), rows, 0 * rows + first, new, emits,
            np.array([at + position - 1 - first for _, at, position in scored], dtype=np.int64),
        )  # fmt: skip
        if scored:
            parts = executor.prompt_logprobs(
                [prompts[row][position] for row, _, position in scored], [TOP] * len(scored), [ids] * len(scored)
            )
            assert all(len(part.take()) <= SCORED_ROWS for part in parts)
            for (row, _, _), one in zip(scored, (one for part in parts for one in part.take()), strict=bool(parts)):
                answers[row].append((one.token, one.logprob, one.rank, one.top, one.wanted))
    return answers


def prompts_of(*lengths):
    rng = random.Random(1)
    return [[rng.randrange(1009) for _ in range(n)] for n in lengths]


def assert_told(answers, folder, prompts, start, ids):
    for prompt, got in zip(prompts, answers, strict=True):
        logprobs = reference_model(folder)(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
        assert [token for token, *_ in got] == prompt[max(start, 1) :]
        for p, (token, logprob, rank, top, wanted) in enumerate(got, max(start, 1)):
            own = logprobs[p - 1]
            for one, x in [(token, logprob), *top, *wanted]:
                assert x == pytest.approx(own[one].item(), abs=CLOSE)
            better = [1 + (own > own[token] + off).sum() for off in (CLOSE, -CLOSE)]  # rounding may swap neighbours
            assert better[0] <= rank <= better[1]
            assert [x for _, x in top] == pytest.approx(own.topk(TOP).values.tolist(), abs=CLOSE)
            assert [one for one, _ in wanted] == ids


@pytest.mark.parametrize(("chunk", "start"), [(1000, 0), (1000, 40), (7, 5), (64, 0)])
def test_prompt_log_probabilities_are_those_of_transformers(checkpoint, chunk, start):
    folder, prompts = checkpoint("qwen2"), prompts_of(20, SCORED_ROWS + 40, 1, 33)
    assert_told(told(folder, prompts, chunk, start, [5, 900]), folder, prompts, start, [5, 900])


def test_prompt_log_probabilities_on_two_ranks(checkpoint, ranks):
    folder, prompts = checkpoint("qwen2"), prompts_of(9, SCORED_ROWS + 3)
    first, second = ranks(2).run(told, folder, prompts, 100, 0, [7])
    assert_told(first, folder, prompts, 0, [7])
    assert second == [[], []]
