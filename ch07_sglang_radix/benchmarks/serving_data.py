"""What a serving benchmark sends: conversations of one turn or several, in token ids, of which every length is exact.

    random                    nothing is shared
    generated-shared-prefix   groups of prompts, each group behind a long system prompt of its own
    multi-turn                each turn's prompt is the conversation so far, with its answers, and something new
    mooncake                  a trace: when requests came, how long they were, which blocks of 512 tokens their prompts share

The names, and the shapes behind them, are those of SGLang's bench_serving (sglang/benchmark/datasets/). The same seed, the same
tokens; another seed shares nothing with it, so that a second run on a warm server finds no prompt of the first.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ch07_sglang_radix.benchmarks.traces import BLOCK, TraceRequest
from common.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """new tokens behind what was said before, and an answer of so many."""

    ids: list[int]
    output_len: int


@dataclass(frozen=True)
class Conversation:
    """at_s: when it begins, in seconds from the first; None: whenever the benchmark likes."""

    turns: list[Turn]
    at_s: float | None = None


class Words:
    """Random token ids out of `vocabulary`."""

    def __init__(self, vocabulary: Sequence[int], seed: int):
        self.vocabulary, self.random = vocabulary, random.Random(seed)

    def text(self, length: int) -> list[int]:
        return self.random.choices(self.vocabulary, k=length)

    def length(self, most: int, range_ratio: float) -> int:
        """From range_ratio * most to most; 1 is always most."""
        return self.random.randint(max(round(most * range_ratio), 1), most)


def plain_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a text by themselves: neither special nor a part of a character, so they also travel as text."""
    every = (i for i in range(len(tokenizer.inner)) if tokenizer.has_text(i))
    return [
        i for i in every if (text := tokenizer.token_text(i)).strip() and text.isprintable() and "\ufffd" not in text
    ]


def multi_turn(
    words: Words, count: int, turns: int, input_len: int, output_len: int, range_ratio: float
) -> list[Conversation]:
    def turn() -> Turn:
        return Turn(words.text(words.length(input_len, range_ratio)), words.length(output_len, range_ratio))

    return [Conversation([turn() for _ in range(turns)]) for _ in range(count)]


def shared_prefix(
    words: Words, groups: int, prompts_per_group: int, system_len: int, question_len: int, output_len: int
) -> list[Conversation]:
    """The groups are mixed, or the cache would have an easy time."""
    systems = [words.text(system_len) for _ in range(groups)]
    made = [
        Conversation([Turn(system + words.text(question_len), output_len)])
        for system in systems
        for _ in range(prompts_per_group)
    ]
    words.random.shuffle(made)
    return made


def from_trace(
    words: Words, requests: Sequence[TraceRequest], block: int = BLOCK, slowdown: float = 1.0
) -> list[Conversation]:
    """Each hash id becomes `block` tokens, the same wherever it appears. block = 512 is the trace as it was.

    A smaller block makes all lengths shorter alike: what is shared stays shared, and a small model can serve it.
    """
    blocks: dict[int, list[int]] = {}
    first = min((request.timestamp for request in requests), default=0.0)
    made = []
    for request in requests:
        ids: list[int] = []
        for number in request.hash_ids:
            if number not in blocks:
                blocks[number] = words.text(block)
            ids += blocks[number]
        length = max(round(request.input_length * block / BLOCK), 1)
        ids = ids[:length] + words.text(length - len(ids))  # the end of a prompt that fills no block is its own
        output_len = max(round(request.output_length * block / BLOCK), 1)
        made.append(Conversation([Turn(ids, output_len)], (request.timestamp - first) / 1000 * slowdown))
    return made


def sizes(conversations: Sequence[Conversation]) -> tuple[int, int, int]:
    """(requests, new prompt tokens, answer tokens) that are to be sent."""
    turns = [turn for one in conversations for turn in one.turns]
    return len(turns), sum(len(turn.ids) for turn in turns), sum(turn.output_len for turn in turns)
