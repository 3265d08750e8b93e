"""What the glossary's answers are to a model: how many it would write, and how sure it is of each of their tokens.

An answer is exact if at each of its tokens the model finds the glossary's own one most likely: greedy decoding then writes it. So
one pass over prompt and answer tells what generating would, and gives the distributions to compare as well.
"""

from typing import NamedTuple

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.executor import Executor
from common.tiny_qwen.corpus import LANGUAGES, ask, definition, load_glossary
from common.tiny_qwen.phrasings import SYSTEM_PROMPT, TRAINED

PAGE, BATCH = 16, 20


class Case(NamedTuple):
    """prompt and answer in token ids, the end of the turn included."""

    prompt: list[int]
    answer: list[int]


def questions(executor: Executor, count: int) -> list[Case]:
    tokenizer, cases = executor.tokenizer, []
    for i, entry in enumerate(load_glossary().values()):
        for language in LANGUAGES:
            asked = ask(TRAINED[language][i % len(TRAINED[language])], entry)
            messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": asked}]
            answer = [*tokenizer.encode(definition(entry, language)), executor.config.eos_token_ids[0]]
            cases.append(Case(tokenizer.encode_chat(messages), answer))
    return cases[:: max(len(cases) // count, 1)][:count]


def answers(executor: Executor, cases: list[Case], dtype: torch.dtype) -> tuple[int, torch.Tensor]:
    """(how many are exact, log-probabilities [answer tokens, V] at each token of the answers); dtype: of the pages."""
    longest = max(len(case.prompt) + len(case.answer) for case in cases)
    width = pages(longest)
    cache = PagedKVCache(*shape_of(executor, (BATCH + 1) * width), dtype)
    rows = SequenceTable(BATCH, width, PAGE, torch.device("cpu"))
    known = _common(cases) // PAGE  # pages of the system prompt: written once, then read as codes by everybody
    forward(executor, cache, rows, [cases[0].prompt[: known * PAGE]], [list(range(known))])
    exact, told = 0, []
    for first in range(0, len(cases), BATCH):
        some = cases[first : first + BATCH]
        own = [[*range(known), *range((b + 1) * width, (b + 2) * width - known)] for b in range(len(some))]
        tokens = [[*case.prompt, *case.answer[:-1]] for case in some]
        logits = forward(executor, cache, rows, tokens, own, known * PAGE)
        ends = np.cumsum([len(t) - known * PAGE for t in tokens])
        for case, end in zip(some, ends, strict=True):
            mine = logits[end - len(case.answer) : end].float()
            exact += mine.argmax(-1).tolist() == case.answer
            told.append(mine.log_softmax(-1))
    return exact, torch.cat(told)


@torch.inference_mode()
def forward(executor: Executor, cache: PagedKVCache, rows: SequenceTable, tokens, page_ids, cached: int = 0):
    """Sequences whose first `cached` tokens lie in the pages already -> logits [T, V] of all others."""
    count = len(tokens)
    rows.set_pages([(b, 0, own) for b, own in enumerate(page_ids)])
    new = [own[cached:] for own in tokens]
    each = np.array([len(own) for own in new])
    step = rows.prefill(np.concatenate(new), np.arange(count), np.full(count, cached), each)
    hidden = executor.model(step.input_ids, step.positions, executor.attention(cache, step.meta))
    return executor.model.compute_logits(hidden)[:, : executor.config.vocab_size]


def _common(cases: list[Case]) -> int:
    """Tokens that all prompts begin with."""
    first, *others = (case.prompt for case in cases)
    return min(next((i for i, pair in enumerate(zip(first, p, strict=False)) if len(set(pair)) > 1), 1) for p in others)


def pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def shape_of(executor: Executor, num_pages: int) -> tuple[int, int, int, int, int]:
    config = executor.config
    return config.num_layers, num_pages, PAGE, config.num_kv_heads, config.head_dim
