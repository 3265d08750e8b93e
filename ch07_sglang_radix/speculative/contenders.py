"""Who guesses, on what text: the engines and prompts that demo_5_who_guesses.py and bench_speculation.py compare.

All engines live side by side in one process and take turns, so that a busy moment of the machine meets all of them; the rule
that stands down is off, so that counts repeat and what does not pay is seen.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ch07_sglang_radix import Engine
from ch07_sglang_radix.speculative.ngram_worker import NgramWorker
from common.tiny_qwen.corpus import ask, definition, load_glossary
from common.tiny_qwen.phrasings import UNSEEN

PLAIN = "plain decode"
CONTENDERS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "prompt lookup": {
        "speculative_algorithm": "NGRAM", "speculative_ngram_match_type": "LOOKUP", "speculative_num_draft_tokens": 6,
    },
    "n-gram trie": {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 6},
    "draft model": {"speculative_algorithm": "STANDALONE"},
    "Medusa": {"speculative_algorithm": "MEDUSA"},
    "EAGLE": {"speculative_algorithm": "EAGLE", "speculative_num_steps": 8},
}  # fmt: skip
NEW = 40  # tokens of an answer at most
WORKLOADS = {
    "new": "questions in wordings that nothing here was trained with, and that nobody has asked yet",
    "quoted": "the answer stands in the conversation already, and is asked for again",
    "again": "the new questions once more: others have had these answers",
}


@dataclass
class Run:
    """Answers of one engine, and the seconds that this process computed for them.

    sequences: a verify step of b requests is counted b times. verified: tokens that these brought.
    """

    answers: list[list[int]]
    seconds: float
    sequences: int = 0
    verified: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def a_step(self) -> float:
        """Tokens that a verify step brings a request."""
        return self.verified / self.sequences if self.sequences else 1.0


def prompts(tokenizer, workload: str, count: int, seed: int = 0) -> list[list[int]]:
    """English and Chinese, each about another term."""
    rng, found = random.Random(seed), []
    entries = list(load_glossary().values())
    for i, entry in enumerate(rng.sample(entries, count)):
        language = ("en", "zh")[i % 2]
        question, again = (ask(wording, entry) for wording in rng.sample(UNSEEN[language], 2))
        turns = [{"role": "user", "content": question}]
        if workload == "quoted":
            turns += [
                {"role": "assistant", "content": definition(entry, language)},
                {"role": "user", "content": again},
            ]
        found.append(tokenizer.encode_chat(turns))
    return found


@contextmanager
def engines(names: Sequence[str], **more: Any) -> Iterator[dict[str, Engine]]:
    """{name: an engine}, all at once, each with a pool for 8,192 tokens."""
    common = {"device": "cpu", "max_total_tokens": 8192} | more
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Engine(**common, **CONTENDERS[name], **_counting(CONTENDERS[name])))
            for name in names
        }


def _counting(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"speculative_stand_down": False} if arguments else {}


def run(engine: Engine, ids: Sequence[list[int]], batch: int, forget: bool = True) -> Run:
    """All prompts, `batch` at a time, greedily. forget: first, what an n-gram trie has read of others."""
    speculation = engine.scheduler.speculation
    if forget and speculation and isinstance(speculation.guesser, NgramWorker):
        speculation.guesser.trie.forget()
    before = (speculation.sequences, speculation.tokens) if speculation else (0, 0)
    answers, start = [], time.process_time()
    for first in range(0, len(ids), batch):
        told = engine.generate(input_ids=list(ids[first : first + batch]), sampling_params={"max_new_tokens": NEW})
        answers += [one["output_ids"] for one in told]
    seconds = time.process_time() - start
    after = (speculation.sequences, speculation.tokens) if speculation else (0, 0)
    return Run(answers, seconds, *(now - then for now, then in zip(after, before, strict=True)))
