"""Workloads in which requests share prefixes, each in its own way, and how much sharing the best cache could use.

The shapes are those on which RadixAttention was measured (Zheng et al. 2024, section 6). Token ids are random: a
page is shared because a program repeats it, and never by chance.

A program is a generator. It yields the calls that it wants answered, all of which may run at the same time, and
is sent their answers:

    calls = next(program)                        # turn 1
    calls = program.send([answer of each call])  # turn 2: its prompts hold the answers of turn 1
"""

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One request: a prompt, and an answer of exactly so many tokens."""

    ids: list[int]
    new_tokens: int
    temperature: float = 0.0


Program = Generator[list[Call], list[list[int]], None]
Served = tuple[Sequence[int], Sequence[int]]  # prompt and answer of a request


class Source:
    """Random texts in token ids; the same seed, the same texts."""

    def __init__(self, vocab_size: int, seed: int = 0):
        self.vocab_size, self.random = vocab_size, random.Random(seed)

    def text(self, low: int, high: int | None = None) -> list[int]:
        """low tokens, or some number of them from low to high."""
        count = self.random.randint(low, high or low)
        return [self.random.randrange(self.vocab_size) for _ in range(count)]


def chat(source: Source, scale: float) -> list[Program]:
    """Conversations behind one system prompt: a turn's prompt is the turn before, its answer and a new question."""

    def conversation(prompt: list[int], questions: list[list[int]]) -> Program:
        for question in questions:
            prompt = prompt + question
            (answer,) = yield [Call(prompt, 32)]
            prompt = prompt + answer

    system = source.text(64)
    return [conversation(system, [source.text(40, 90) for _ in range(4)]) for _ in range(_count(16, scale))]


def few_shot(source: Source, scale: float) -> list[Program]:
    """Questions of four tasks, mixed; each behind the worked examples of its task."""
    examples = [source.text(350, 450) for _ in range(4)]
    prompts = [examples[i % 4] + source.text(24, 48) for i in range(_count(40, scale))]
    return _one_call_each(source, prompts, 16)


def tree_of_thought(source: Source, scale: float) -> list[Program]:
    """Three thoughts on each problem, three on each of those, three on each of those."""

    def search(problem: list[int]) -> Program:
        paths = [problem]
        for _ in range(3):
            calls = [Call(path, 24, temperature=1.0) for path in paths for _ in range(3)]
            answers = yield calls
            paths = [call.ids + answer for call, answer in zip(calls, answers, strict=True)]

    return [search(source.text(200, 300)) for _ in range(_count(2, scale))]


def agents(source: Source, scale: float) -> list[Program]:
    """Agents with the same instructions: each prompt is the last one, the action chosen, and what came of it."""

    def loop(prompt: list[int], observations: list[list[int]]) -> Program:
        for observation in observations:
            (action,) = yield [Call(prompt, 20)]
            prompt = prompt + action + observation

    tools = source.text(256)
    return [
        loop(tools + source.text(40, 80), [source.text(30, 100) for _ in range(5)]) for _ in range(_count(10, scale))
    ]


def self_consistency(source: Source, scale: float) -> list[Program]:
    """Eight sampled answers to each question."""

    def vote(question: list[int]) -> Program:
        yield [Call(question, 40, temperature=1.0)] * 8

    return [vote(source.text(250, 400)) for _ in range(_count(6, scale))]


def document_qa(source: Source, scale: float) -> list[Program]:
    """Questions on four documents, mixed. A document is longer than a prefill step on a CPU."""
    documents = [source.text(1050, 1300) for _ in range(4)]
    prompts = [documents[i % 4] + source.text(16, 40) for i in range(_count(20, scale))]
    return _one_call_each(source, prompts, 16)


def unrelated(source: Source, scale: float) -> list[Program]:
    """Nothing is shared: what the cache costs where it cannot help."""
    return _one_call_each(source, [source.text(128, 512) for _ in range(_count(40, scale))], 32)


WORKLOADS: dict[str, Callable[[Source, float], list[Program]]] = {
    "multi-turn chat": chat,
    "few-shot": few_shot,
    "tree of thought": tree_of_thought,
    "agent loop": agents,
    "self-consistency": self_consistency,
    "document QA": document_qa,
    "unrelated": unrelated,
}


def best_cached(served: Iterable[Served], page_size: int | None = None) -> int:
    """Prompt tokens that need not be computed if nothing is ever evicted.

    Every distinct prefix is computed by one request, and not even by that if it is part of an answer. With a page_size it
    is what an engine can reach: whole pages are shared, a request computes at least the last token of its prompt, and the
    last token of an answer was never fed in.
    """
    size, last = (page_size, 1) if page_size else (1, 0)
    numbers: dict[tuple, int] = {}
    wanted: Counter[int] = Counter()  # prefix: requests that could find it
    brought: set[int] = set()  # prefixes that some request computes, whatever it finds
    for prompt, answer in served:
        prefixes = _prefixes([*prompt, *answer], size, numbers)
        usable = (len(prompt) - last) // size
        present = (len(prompt) + len(answer) - last) // size
        wanted.update(prefixes[:usable])
        brought.update(prefixes[usable:present])
    return size * (wanted.total() - len(wanted.keys() - brought))


def distinct_pages(served: Iterable[Served], page_size: int) -> int:
    """Pages that hold every prefix of prompts and answers once, and each request's begun page."""
    numbers: dict[tuple, int] = {}
    begun = 0
    for prompt, answer in served:
        _prefixes([*prompt, *answer], page_size, numbers)
        begun += (len(prompt) + len(answer)) % page_size > 0
    return len(numbers) + begun


def _prefixes(ids: list[int], size: int, numbers: dict[tuple, int]) -> list[int]:
    """A number for each prefix of whole pages, equal for equal ones: a plain trie, (prefix before, page) -> prefix."""
    path, number = [], 0
    for start in range(0, len(ids) // size * size, size):
        number = numbers.setdefault((number, *ids[start : start + size]), len(numbers) + 1)
        path.append(number)
    return path


def block_trace(source: Source, requests: int, blocks: int = 20) -> list[dict]:
    """A trace as traces.py reads it: conversations that grow, some behind a prefix that others have too.

    About so many blocks a request. Ids are numbered as they come: equal ids are equal prefixes.
    """
    fresh = iter(range(1 << 62))
    shared = [[next(fresh) for _ in range(blocks // 2)] for _ in range(8)]
    going: list[list[int]] = []
    trace = []
    for i in range(requests):
        if len(going) < 64 or source.random.random() < 0.2:
            going.append(list(source.random.choice(shared)) if source.random.random() < 0.5 else [])
        ids = source.random.choice(going[-256:])
        ids += [next(fresh) for _ in range(source.random.randint(1, max(blocks // 2, 1)))]
        trace.append({"timestamp": 100 * i, "input_length": 512 * len(ids), "output_length": 64, "hash_ids": [*ids]})
    return trace


def _one_call_each(source: Source, prompts: list[list[int]], new_tokens: int) -> list[Program]:
    """A program for each prompt, in random order."""

    def ask(prompt: list[int]) -> Program:
        yield [Call(prompt, new_tokens)]

    source.random.shuffle(prompts)
    return [ask(prompt) for prompt in prompts]


def _count(count: int, scale: float) -> int:
    return max(1, round(count * scale))
