"""The parts of the project `same_step_sharing`."""

import random
from types import ModuleType

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.projects.oracle import (
    add_all,
    engine_with,
    judge_answers,
    random_ids,
    run_to_the_end,
    transformers_tokens,
)
from ch06_tp_vllm.projects.play import Play
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.scheduler import Scheduler
from common.sampling.params import SamplingParams
from common.teaching.expect import ask, expect
from common.teaching.grading import Found, Part
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

QUESTIONS = (  # demo 9's
    "What is a block table?", "What is tensor parallelism?", "Explain continuous batching.", "什么是全归约？",
    "What does chunked prefill mean?", "What is the KV cache?",
)  # fmt: skip


def a_request(prompt: list[int], output: tuple[int, ...] = (), pending: int = 0, computed: int = 0) -> Request:
    """Its first `computed` tokens were computed by steps that have run."""
    request = Request("r", 0, list(prompt), SamplingParams(max_new_tokens=50), seed=0)
    request.output_token_ids, request.pending, request.num_computed_tokens = list(output), pending, computed
    return request


def found(blocks: BlockManager, tokens: list[int]) -> int:
    """Tokens that a newcomer with this prompt, and one more token, finds."""
    return blocks.block_size * len(blocks.get_computed_blocks(a_request([*tokens, 999])))


def named_at_allocation(m: ModuleType) -> Found:
    blocks, prompt = m.SharingBlockManager(16, 4), list(range(10))
    first = a_request(prompt)
    expect("allocate_slots for a prompt of 10 in an empty pool", ask(blocks.allocate_slots, first, 10), True)
    expect("tokens that another finds before the step has run, blocks of 4", found(blocks, prompt), 8)
    second = a_request(prompt)
    computed = blocks.get_computed_blocks(second)
    expect("allocate_slots for the same prompt behind them", ask(blocks.allocate_slots, second, 10, computed), True)
    expect("blocks that both hold", second.block_table[:2], first.block_table[:2])
    expect("does each have its own block for the rest", second.block_table[2] != first.block_table[2], True)
    for request in (first, second):
        request.num_computed_tokens = 10
    blocks.check([first, second])
    longer = list(range(12))
    expect(
        "allocate_slots when two tokens more fill the third block",
        ask(blocks.allocate_slots, _grown(first, [10, 11]), 12),
        True,
    )
    expect("tokens that a newcomer finds then", found(blocks, longer), 12)
    return "full blocks are found in the step that fills them"


def _grown(request: Request, output: list[int]) -> Request:
    request.output_token_ids += output
    return request


def nothing_has_changed(m: ModuleType) -> Found:
    blocks = m.SharingBlockManager(3, 4)
    other, request = a_request([7] * 8), a_request(list(range(12)))
    ask(blocks.allocate_slots, other, 8)
    expect("allocate_slots for 12 tokens, 1 of 3 blocks is free", ask(blocks.allocate_slots, request, 12), False)
    expect("block_table, num_blocks_named of the request", (request.block_table, request.num_blocks_named), ([], 0))
    expect("tokens that another finds of it", found(blocks, list(range(12))), 0)
    return "who gets no slots leaves no names"


def only_what_the_step_computes(m: ModuleType) -> Found:
    blocks, request = m.SharingBlockManager(16, 4), a_request(list(range(20)))
    for chunk, want in ((6, 4), (16, 16), (19, 16), (20, 20)):
        ask(blocks.allocate_slots, request, chunk)
        expect(
            f"a prompt of 20 in chunks, slots for {chunk}: tokens that another finds",
            found(blocks, list(range(20))),
            want,
        )
        request.num_computed_tokens = chunk
    off = m.SharingBlockManager(16, 4, enable_prefix_caching=False)
    ask(off.allocate_slots, a_request(list(range(20))), 20)
    expect(
        "blocks with a name where prefix caching is off", sum(block.block_hash is not None for block in off.blocks), 0
    )
    return "a chunk names the blocks it fills, and none where prefix caching is off"


def tokens_being_drawn(m: ModuleType) -> Found:
    blocks, prompt = m.SharingBlockManager(16, 4), list(range(6))
    request = a_request(prompt)
    ask(blocks.allocate_slots, request, 6)
    request.num_computed_tokens, request.output_token_ids, request.pending = 7, [50], 1
    ask(blocks.allocate_slots, request, 8)  # the eighth is fed in without anybody having seen it
    expect(
        "tokens found of 6 known, one put out and one still being drawn, blocks of 4",
        found(blocks, [*prompt, 50, 0]),
        4,
    )
    request.output_token_ids, request.pending, request.num_computed_tokens = [50, 51], 0, 8
    blocks.cache_full_blocks(request, 8)
    expect(
        "tokens found when it is known, and the engine has called cache_full_blocks",
        found(blocks, [*prompt, 50, 51]),
        8,
    )
    blocks.check([request])
    return "no block has a name before its tokens are known"


def names_taken_back(m: ModuleType) -> Found:
    prompt = list(range(12))
    blocks = m.SharingBlockManager(16, 4)
    leaves = a_request(prompt)
    ask(blocks.allocate_slots, leaves, 12)
    ask(blocks.free, leaves)
    expect("tokens found of a request that left before its step ran", found(blocks, prompt), 0)
    expect("free blocks of 16", blocks.num_free_blocks, 16)
    blocks.check([])

    stays = a_request(prompt)
    ask(blocks.allocate_slots, stays, 8)
    stays.num_computed_tokens = 8
    ask(blocks.allocate_slots, stays, 12)
    ask(blocks.free, stays)
    expect("tokens found of one that left with 8 of 12 computed", found(blocks, prompt), 8)

    starts = a_request([*range(8), 70, 71, 72, 73])
    ask(blocks.allocate_slots, starts, 12, blocks.get_computed_blocks(starts))
    starts.num_computed_tokens = 8
    ask(blocks.free, starts)
    expect("tokens found of what it had started behind: that was computed", found(blocks, prompt), 8)
    expect("tokens found of its own", found(blocks, [*range(8), 70, 71, 72, 73]), 8)
    blocks.check([])

    holder, sharer = a_request(prompt), a_request([*range(8), 90])
    blocks = m.SharingBlockManager(16, 4)
    ask(blocks.allocate_slots, holder, 12)
    ask(blocks.allocate_slots, sharer, 9, blocks.get_computed_blocks(sharer))
    ask(blocks.free, holder)
    expect("tokens found of a block that is held by another too, but will never be filled", found(blocks, prompt), 0)
    return "whoever leaves before its step has run takes the names back, and no others"


def random_lives(m: ModuleType) -> Found:
    rng, shared, preempted = random.Random(0), 0, 0
    for _ in range(120):
        size, longest = rng.choice((1, 2, 4)), rng.choice((12, 40))
        blocks = m.SharingBlockManager(-(-(longest + 12) // size) + rng.randint(0, 20), size)
        policy = rng.choice(("fcfs", "priority"))
        p = Play(
            Scheduler,
            blocks,
            budget=rng.choice((5, 16, 64)),
            rows=rng.randint(2, 6),
            late=rng.random() < 0.5,
            policy=policy,
        )
        heads = [random_ids(rng.randint(0, longest - 3), rng) for _ in range(2)]
        arrivals = sorted(rng.randint(0, 12) for _ in range(rng.randint(2, 9)))
        while arrivals or p.busy:
            while arrivals and (arrivals[0] <= p.steps or not p.busy):
                arrivals.pop(0)
                p.add(rng.choice(heads) + random_ids(rng.randint(1, 3), rng), rng.randint(1, 12), rng.randrange(3))
            p.step()
            assert p.steps < 3000, f"got no end after 3000 steps, wanted {len(p.requests)} answers"
        shared, preempted = shared + blocks.stats.hits, preempted + p.scheduler.num_preemptions
    return f"120 random lives, {shared} tokens shared, {preempted} preemptions: everybody found its own tokens where it attended"


def alike(rng: random.Random) -> list[tuple[list[int], int]]:
    heads = [random_ids(40, rng) for _ in range(2)]
    return [(rng.choice(heads) + random_ids(rng.randint(1, 20), rng), rng.randint(4, 20)) for _ in range(10)]


def judge_tokens(**options):
    def judge(m: ModuleType) -> Found:
        return judge_answers(
            engine_with(blocks=m.SharingBlockManager, block_size=4, **options), alike(random.Random(1))
        )

    return judge


def demo_9(m: ModuleType) -> Found:
    """Six questions behind one system prompt, twice; the number is the tokens found in the first round."""
    counts = []
    for kind in (None, m.SharingBlockManager):  # None: the product's own, which names at allocation too
        engine = engine_with(blocks=kind)
        expect("is the reader's class in the engine", kind is None or isinstance(engine.blocks, kind), True)
        prompts = [engine.runner.tokenizer.encode_chat(_conversation(question)) for question in QUESTIONS]
        requests = [(prompt, 12) for prompt in prompts]
        for number in range(2):
            before = engine.blocks.stats.hits
            add_all(engine, requests, first=number * len(requests))
            answers = run_to_the_end(engine)
            got = [answers[str(number * len(requests) + i)] for i in range(len(requests))]
            expect(
                f"round {number + 1}: the answers, token for token transformers'", got, transformers_tokens(requests)
            )
            counts.append(engine.blocks.stats.hits - before)
    first, again, own_first, own_again = counts
    total = sum(map(len, prompts))
    said = (
        f"{own_first} of {total} tokens found in the first round ({first} wanted), {own_again} in the second ({again})"
    )
    return min(own_first / first, own_again / again, 1.0), said


def _conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


PARTS = (
    Part("named at allocation", 10, named_at_allocation),
    Part("no slots, no names", 5, nothing_has_changed),
    Part("only what the step computes", 10, only_what_the_step_computes),
    Part("tokens that are still being drawn", 10, tokens_being_drawn),
    Part("names taken back", 10, names_taken_back),
    Part("random lives", 10, random_lives, 120),
    Part("tokens: shared beginnings", 10, judge_tokens()),
    Part("tokens: a small pool and budget", 10, judge_tokens(num_gpu_blocks_override=30, max_num_batched_tokens=32)),
    Part("tokens: the same, seen a step late", 10,
         judge_tokens(num_gpu_blocks_override=30, max_num_batched_tokens=32, async_scheduling=True)),
    Part("tokens found in the first round of demo 9", 15, demo_9),
)  # fmt: skip
