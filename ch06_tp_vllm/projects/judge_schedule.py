"""The parts of the project `schedule`."""

import random
import time
from types import ModuleType

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.projects.oracle import add_all, engine_with, judge_answers, random_ids
from ch06_tp_vllm.projects.play import Play
from ch06_tp_vllm.scheduler import Scheduler, SchedulerOutput
from common.teaching.expect import expect
from common.teaching.grading import Found, Part

WANTED = 0.9  # of what the reference does
ROUNDS = 3  # of the measurement; the best counts

Workload = list[tuple[list[int], int]]  # (prompt, tokens to put out)


def play(m: ModuleType, *, num_blocks: int = 64, block_size: int = 4, **options) -> Play:
    return Play(m.MyScheduler, BlockManager(num_blocks, block_size), **options)


def taken(output: SchedulerOutput) -> list[tuple[str, int]]:
    return [(s.request.group, s.num_new) for s in output.scheduled]


def one_request(m: ModuleType) -> Found:
    p = play(m)
    request = p.add(list(range(10)), 4)
    steps = [taken(p.step()) for _ in range(4)]
    expect(
        "(request, tokens) of four steps, a prompt of 10 and 4 tokens to put out",
        steps,
        [[("r0", 10)], *[[("r0", 1)]] * 3],
    )
    expect("has it finished", request.status.finished, True)
    expect("free blocks afterwards, of 64", p.blocks.num_free_blocks, 64)
    expect("an idle scheduler has nothing to schedule", taken(p.scheduler.schedule()), [])
    return "prefill, then a token a step, and everything is given back"


def one_budget(m: ModuleType) -> Found:
    p = play(m, budget=16)
    p.add([1] * 10, 9), p.add([2] * 30, 9)
    expect("budget 16, prompts of 10 and 30; step 1", taken(p.step()), [("r0", 10), ("r1", 6)])
    p.add([3] * 8, 9)
    expect("step 2: who runs comes first, and a prompt in chunks goes on", taken(p.step()), [("r0", 1), ("r1", 15)])
    expect("step 3: the rest of it, and then a waiting request", taken(p.step()), [("r0", 1), ("r1", 9), ("r2", 6)])
    expect("step 4", taken(p.step()), [("r0", 1), ("r1", 1), ("r2", 2)])
    return "running requests first, then waiting ones, the last gets what is left"


def without_chunks(m: ModuleType) -> Found:
    p = play(m, budget=16, chunked=False)
    p.add([1] * 10, 3), p.add([2] * 12, 3), p.add([3] * 2, 3)
    expect("budget 16, prompts of 10, 12 and 2, no chunks: nobody overtakes; step 1", taken(p.step()), [("r0", 10)])
    expect("step 2", taken(p.step()), [("r0", 1), ("r1", 12), ("r2", 2)])
    return "a prompt that does not fit waits, and so do those behind it"


def rows(m: ModuleType) -> Found:
    p = play(m, rows=2)
    for i in range(5):
        p.add([10 * i + 1, 10 * i + 2], 2 + i % 2)
    who = []
    while p.busy:
        who.append("".join(name[1:] for name, _ in taken(p.step())))
    expect("two rows, five requests; who takes part in each step", who, ["01", "01", "12", "23", "34", "34"])
    return "a row for each, in the order in which they came"


def cached_prefixes(m: ModuleType) -> Found:
    p = play(m)
    p.add(list(range(12)), 2)
    p.run()
    again, longer = p.add(list(range(12)), 2), p.add([*range(8), 99, 98], 2)
    expect(
        "blocks of 4; the same prompt of 12 again, and one that shares 8 of 10", taken(p.step()), [("r1", 4), ("r2", 2)]
    )
    expect("num_cached_tokens of both", (again.num_cached_tokens, longer.num_cached_tokens), (8, 8))
    p.run()
    return "a request starts behind the blocks that are there"


def gate(m: ModuleType) -> Found:
    """A pool in which the next chunk of a waiting request always fits, and all of it does not."""
    p = play(m, num_blocks=6, budget=16)
    p.add([1] * 8, 4), p.add([2] * 20, 2)
    steps = [taken(p.step()) for _ in range(5)]
    what = "6 blocks of 4, budget 16; r0 has 8 tokens and puts out 4, r1 has 20 and needs 5 blocks, of which 4 are free, then 3"
    expect(f"{what}; five steps", steps, [[("r0", 8)], *[[("r0", 1)]] * 3, [("r1", 16)]])
    p.run()
    p = play(m, num_blocks=6)
    p.add([*range(16), 50], 3), p.add([*range(16), 51], 3)
    what = "6 blocks of 4; r0 has 5, and r1 shares 4 of them and needs 1 more"
    steps = [p.step(), p.step()]
    expect(f"{what}; is r1 in step 1 or 2", any("r1" in dict(taken(step)) for step in steps), True)
    p.run()
    p = Play(m.MyScheduler, BlockManager(8, 4, enable_prefix_caching=False), budget=8)
    p.add([1] * 8, 14), p.add([2] * 8, 14)
    while p.requests[1].num_preemptions == 0:
        p.step()
    what = "8 blocks, two requests of 8 that put out 14; r1 was sent back with 15 tokens (7 of its answer), 3 blocks are free"
    expect(f"{what}; the next step", taken(p.step()), [("r0", 1)])
    p.run()
    return "a request starts when all its tokens fit, and takes blocks for those of this step"


def preemption(m: ModuleType) -> Found:
    p = play(m, num_blocks=6)
    old, new = p.add([1] * 8, 12), p.add([2] * 8, 12)
    steps = [p.step()]
    late = p.add([3] * 2, 2)
    while new.num_preemptions == 0:
        steps.append(p.step())
        expect("is the oldest request sent back", old.num_preemptions > 0, False)
        expect(
            "does r2 start before r1 goes on, which came earlier",
            late.num_cached_tokens is not None and p.steps > 2,
            False,
        )
    expect(
        "6 blocks of 4, two requests of 8: (request, tokens) of the step that sends the newest back",
        taken(steps[-1]),
        [("r0", 1)],
    )
    expect("num_preempted of that step", steps[-1].num_preempted, 1)
    expect("waiting: it is at the head of the queue", [r.group for r in p.scheduler.waiting], ["r1", "r2"])
    expect("its output is kept", len(new.output_token_ids) > 0, True)
    expect("num_preemptions of the scheduler", p.scheduler.num_preemptions, sum(r.num_preemptions for r in p.requests))
    p.run()
    return f"the newest goes back to the head of the queue, and everybody ends, in {p.steps} steps"


def tokens_not_yet_known(m: ModuleType) -> Found:
    p = play(m, late=True)
    p.add([1] * 5, 3)
    steps = [taken(p.step()) for _ in range(4)]
    expect("tokens are seen a step late, 3 to put out: steps", steps, [[("r0", 5)], [("r0", 1)], [("r0", 1)], []])
    what = "4 blocks of 4; r1 needs a third one when r0's last token has been drawn, and settle makes it known: "
    p = play(m, num_blocks=4, late=True)
    p.add([1] * 7, 2), p.add([2] * 7, 4)
    p.run()
    expect(f"{what}requests sent back", p.scheduler.num_preemptions, 0)
    p = play(m, num_blocks=4, late=True)
    p.add([1] * 5, 9, stops=frozenset({10})), p.add([2] * 7, 4)  # r0 draws 5, and then 10
    p.step(), p.step()
    expect(
        f"{what}it was a stop token, and r0 a part of the step already; (request, tokens)", taken(p.step()), [("r1", 1)]
    )
    p.run()
    for num_blocks in range(5, 9):
        p = play(m, num_blocks=num_blocks, late=True)
        requests = [p.add([i] * (3 + i), 9) for i in range(4)]
        p.run()
        early = play(m, num_blocks=64)
        same = [early.add([i] * (3 + i), 9) for i in range(4)]
        early.run()
        expect(f"{num_blocks} blocks, tokens seen a step late: the tokens of all requests",
               [r.output_token_ids for r in requests], [r.output_token_ids for r in same])  # fmt: skip
    return "nobody decodes behind its end, and nobody goes back without its tokens"


def random_lives(m: ModuleType) -> Found:
    rng, steps, preempted = random.Random(0), 0, 0
    for _ in range(150):
        size = rng.choice((1, 2, 4))
        longest = rng.choice((12, 40))
        p = play(
            m, num_blocks=-(-(longest + 12) // size) + rng.randint(0, 6), block_size=size, budget=rng.choice((3, 8, 64)),
            rows=rng.randint(1, 6), late=rng.random() < 0.5,
        )  # fmt: skip
        heads = [random_ids(rng.randint(0, longest - 3), rng) for _ in range(2)]
        arrivals = sorted(rng.randint(0, 25) for _ in range(rng.randint(1, 9)))
        while arrivals or p.busy:
            while arrivals and (arrivals[0] <= p.steps or not p.busy):
                arrivals.pop(0)
                stops = frozenset(range(0, 997, rng.choice((4, 9, 997))))
                p.add(rng.choice(heads) + random_ids(rng.randint(1, 3), rng), rng.randint(1, 12), stops=stops)
            p.step()
            assert p.steps < 3000, f"got no end after 3000 steps, wanted {len(p.requests)} answers"
        expect("blocks that are still held at the end", len(p.blocks.blocks) - p.blocks.num_free_blocks, 0)
        steps, preempted = steps + p.steps, preempted + p.scheduler.num_preemptions
    return f"150 random lives, {steps} steps, {preempted} preemptions: every step could be executed"


def mixed(rng: random.Random) -> Workload:
    return [(random_ids(rng.randint(1, 60), rng), rng.randint(1, 24)) for _ in range(10)]


def alike(rng: random.Random) -> Workload:
    heads = [random_ids(40, rng) for _ in range(2)]
    return [(rng.choice(heads) + random_ids(rng.randint(1, 20), rng), rng.randint(4, 20)) for _ in range(10)]


def judge_tokens(workload, **options):
    def judge(m: ModuleType) -> Found:
        return judge_answers(engine_with(scheduler=m.MyScheduler, block_size=4, **options), workload(random.Random(1)))

    return judge


def _simulated() -> list[tuple[str, dict, Workload]]:
    """(name, options of a Play, requests): nobody computes anything, so they may be large."""
    rng = random.Random(2)
    chat = [(random_ids(rng.randint(5, 40), rng), rng.randint(20, 60)) for _ in range(60)]
    documents = [(random_ids(rng.randint(50, 300), rng), rng.randint(4, 20)) for _ in range(30)]
    questions = [(random_ids(rng.randint(5, 15), rng), rng.randint(1, 4)) for _ in range(80)]
    heads = [random_ids(64, rng) for _ in range(3)]
    shared = [(rng.choice(heads) + random_ids(rng.randint(1, 30), rng), rng.randint(4, 30)) for _ in range(60)]
    return [
        ("chat", {"num_blocks": 2000, "rows": 16}, chat),
        ("questions", {"num_blocks": 2000, "rows": 16}, questions),
        ("documents", {"num_blocks": 2000, "rows": 16, "budget": 96}, documents),
        ("shared beginnings", {"num_blocks": 400, "rows": 16}, shared),
        ("a small pool", {"num_blocks": 100, "rows": 16}, documents + chat),
    ]


def work(m: ModuleType) -> Found:
    """Steps and padded tokens against the reference's: numbers that no machine changes."""
    lowest, lines = 1.0, []
    for name, options, requests in _simulated():
        counts = []
        for scheduler in (Scheduler, m.MyScheduler):
            blocks = BlockManager(options["num_blocks"], 4)
            p = Play(scheduler, blocks, **{key: value for key, value in options.items() if key != "num_blocks"})
            for prompt, count in requests:
                p.add(prompt, count)
            p.run()
            counts.append((p.steps, p.padded_tokens))
        (steps, padded), (own_steps, own_padded) = counts
        lowest = min(lowest, steps / own_steps, padded / own_padded)
        lines.append(f"{name} {own_steps} steps, {own_padded:,} padded tokens (reference {steps}, {padded:,})")
    return min(1.0, lowest / WANTED), f"{lowest:.2f} of the reference at worst, {WANTED} wanted: {'; '.join(lines)}"


def speed(m: ModuleType) -> Found:
    """Tokens a second against the reference's: both engines in one process, step by step in turn."""
    rng = random.Random(3)
    requests, best = [(random_ids(rng.randint(5, 60), rng), rng.randint(8, 40)) for _ in range(32)], 0.0
    for _ in range(ROUNDS):
        engines = [
            engine_with(scheduler=kind, check=False, enable_prefix_caching=False) for kind in (None, m.MyScheduler)
        ]
        seconds = [0.0, 0.0]
        for engine in engines:
            add_all(engine, requests)
        while any(engine.has_unfinished_requests() for engine in engines):
            for i, engine in enumerate(engines):
                if engine.has_unfinished_requests():
                    began = time.perf_counter()
                    engine.step()
                    seconds[i] += time.perf_counter() - began
        best = max(best, seconds[0] / seconds[1])
        if best >= 1:
            break
    return (1.0 if best >= WANTED else 0.0), f"{best:.2f} of the reference's tokens/s, {WANTED} wanted"


PARTS = (
    Part("one request", 5, one_request),
    Part("one budget for all", 5, one_budget),
    Part("without chunked prefill", 5, without_chunks),
    Part("rows", 5, rows),
    Part("cached prefixes", 5, cached_prefixes),
    Part("the gate", 5, gate),
    Part("out of blocks", 5, preemption),
    Part("tokens that nobody has seen yet", 5, tokens_not_yet_known),
    Part("random lives", 5, random_lives, 120),
    Part("tokens: mixed lengths", 10, judge_tokens(mixed), 120),
    Part("tokens: shared beginnings, a small budget", 10, judge_tokens(alike, max_num_batched_tokens=24)),
    Part("tokens: a pool that is too small", 10, judge_tokens(mixed, num_gpu_blocks_override=26, max_num_batched_tokens=32)),
    Part("tokens: the same, seen a step late", 10,
         judge_tokens(mixed, num_gpu_blocks_override=26, max_num_batched_tokens=32, async_scheduling=True)),
    Part("steps and padded tokens", 15, work, 120),
    Part("speed", 0, speed, 180),
)  # fmt: skip
