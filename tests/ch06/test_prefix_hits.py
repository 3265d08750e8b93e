"""Prefix hits, to the token, against simulations that know only the rules: full blocks, capped at n - 1, named when their
step is scheduled, the nameless overwritten first and then the least recently used."""

import random

import pytest

from ch06_tp_vllm import LLM, SamplingParams
from tests.oracle import greedy


class Simulation:
    """What a cache of unlimited size holds: every beginning, in whole blocks, of what was computed."""

    def __init__(self, block_size):
        self.size, self.known = block_size, set()

    def hits(self, prompt):
        n = 0
        while (n + 1) * self.size < len(prompt) and tuple(prompt[: (n + 1) * self.size]) in self.known:
            n += 1
        return n * self.size

    def learn(self, computed):
        for end in range(self.size, len(computed) + 1, self.size):
            self.known.add(tuple(computed[:end]))


def play(folder, waves, block_size, new_tokens):
    """Each wave starts in one step. Returns (hits of the engine, hits of the simulation), a list of lists each."""
    llm = LLM(str(folder), device="cpu", block_size=block_size, num_gpu_blocks_override=4096 // block_size, check=True)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    simulation, got, expected = Simulation(block_size), [], []
    history: dict[int, list[int]] = {}  # conversation -> everything said so far
    for wave in waves:
        prompts = [history.get(conversation, []) + tokens for conversation, tokens in wave]
        expected.append([])
        for prompt in prompts:  # all start in one step, in order, and each finds what those before it compute there
            expected[-1].append(simulation.hits(prompt))
            simulation.learn(prompt)
        outputs = llm.generate(prompts, params)
        got.append([output.num_cached_tokens for output in outputs])
        for (conversation, _), prompt, output in zip(wave, prompts, outputs, strict=True):
            answer = output.outputs[0].token_ids
            simulation.learn(prompt + answer[:-1])  # the last token was never fed in
            history[conversation] = prompt + answer
    return got, expected


def ids(rng, n):
    return [rng.randrange(1009) for _ in range(n)]


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_multi_turn(block_size, checkpoint):
    """Four conversations with one system prompt, five turns each; every turn finds all that was said."""
    rng = random.Random(0)
    system = ids(rng, 37)
    waves = [[(0, [*system, 5])]]  # somebody was there before
    waves += [
        [(c, (system if turn == 0 else []) + ids(rng, rng.randint(3, 20))) for c in range(1, 5)] for turn in range(5)
    ]
    got, expected = play(checkpoint("qwen2"), waves, block_size, 6)
    assert got == expected
    asked = sum(hits > 0 for wave in got[1:] for hits in wave)
    assert asked == 20, "every turn hits, the first ones the system prompt"


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_few_shot(block_size, checkpoint):
    """The same examples before every question: the very first one computes them, the others of its step share them."""
    rng = random.Random(1)
    examples = ids(rng, 90)
    waves = [[(10 * wave + i, examples + ids(rng, rng.randint(1, 12))) for i in range(4)] for wave in range(4)]
    got, expected = play(checkpoint("qwen2"), waves, block_size, 3)
    assert got == expected
    assert got[0][0] == 0
    assert all(hits >= 90 // block_size * block_size for wave in got for hits in wave[wave is got[0] :])


class SmallPool:
    """A pool whose blocks are overwritten, one request at a time: a list of what lies in the free blocks, the next first."""

    def __init__(self, num_blocks, block_size):
        self.size, self.free, self.named = block_size, [(None, 0)] * num_blocks, 0

    def serve(self, prompt, answer):
        """Tokens of the prompt that were found."""
        table = []
        while (len(table) + 1) * self.size < len(prompt):
            same = [block for block in self.free if block[0] == tuple(prompt[: (len(table) + 1) * self.size])]
            if not same:
                break
            table.append(min(same, key=lambda block: block[1]))  # the one that had the name first
            self.free.remove(table[-1])
        hits, computed = len(table) * self.size, prompt + answer[:-1]
        for i in range(len(table), -(-len(computed) // self.size)):
            self.free.pop(0)
            end = (i + 1) * self.size
            self.named += 1
            table.append((tuple(computed[:end]) if end <= len(computed) else None, self.named))
        freed = table[::-1]
        self.free = [b for b in freed if b[0] is None] + self.free + [b for b in freed if b[0] is not None]
        return hits


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_hits_in_a_pool_that_overwrites_the_least_recently_used(block_size, checkpoint):
    """Conversations take turns in a pool that holds two of them, so that what is found is often half of what was said."""
    rng, blocks = random.Random(3), 160 // block_size
    llm = LLM(str(checkpoint("qwen2")), device="cpu", block_size=block_size, num_gpu_blocks_override=blocks, check=True)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    pool, history, rows = SmallPool(blocks, block_size), {}, []
    for _ in range(40):
        conversation = rng.randrange(5)
        said = history.get(conversation, [])
        prompt = (said if len(said) < 100 else []) + ids(rng, rng.randint(5, 30))
        (output,) = llm.generate([prompt], params)
        answer = output.outputs[0].token_ids
        rows.append((output.num_cached_tokens, pool.serve(prompt, answer), len(said)))
        history[conversation] = prompt + answer
    assert [got for got, *_ in rows] == [expected for _, expected, _ in rows]
    assert any(0 < got < said - block_size for got, _, said in rows), "a part was overwritten"


def test_answers_are_not_changed_by_what_they_find(checkpoint):
    folder, rng = checkpoint("qwen2"), random.Random(2)
    start = ids(rng, 24)
    llm = LLM(str(folder), device="cpu", block_size=4, num_gpu_blocks_override=256)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for tail in (1, 5, 9):
        prompt = start + ids(rng, tail)
        assert llm.generate([prompt], params)[0].outputs[0].token_ids == greedy(folder, prompt, 8)
