from types import ModuleType

from ch07_sglang_radix.exercises.checks.engines import an_engine, answers, nothing_held, same, some_prompts
from ch07_sglang_radix.exercises.checks.trees import a_req
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.retraction import RETRACT_DECODE_STEPS
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    def req(rid: int, prompt: int, output: int) -> Req:
        return a_req(rid, [1] * prompt, 40, output_ids=[2] * output)

    reqs = [req(0, 9, 8), req(1, 3, 2), req(2, 6, 5), req(3, 8, 2), req(4, 4, 9)]
    for some, enough, want, why in (
        (reqs, 0, [], "there is room: nobody goes"),
        (reqs, 5, [3], "5 tokens are needed: 3 and 1 have the fewest outputs, 3 the longer prompt; then there is room"),
        (reqs, 11, [3, 1], "11 tokens are needed: 1 goes after 3, it has as few outputs and the shorter prompt"),
        (
            reqs,
            17,
            [3, 1, 2],
            "17 tokens are needed: 2 goes after 3 and 1, it has the fewest outputs of those that are left",
        ),
        (reqs, 999, [3, 1, 2, 0], "there is never room: the last one stays in any case"),
        (reqs[:1], 999, [], "one alone stays in any case"),
        (reqs[:2], 999, [1], "of two one stays"),
    ):
        _play(m, some, enough, want, why)

    def make_room():
        room = engine.retraction
        if room.lacks_room(1):
            engine._settle()
        if room.lacks_room(1):
            gone = m.retract(engine.running, lambda: room.lacks_room(RETRACT_DECODE_STEPS), engine.memory.release)
            engine.retractions += len(gone)
            engine.waiting = sorted(gone, key=lambda req: req.rid) + engine.waiting
            engine.new_token_ratio = 1.0

    prompts = some_prompts(5, 4)
    want = answers(an_engine(), prompts, 30)
    engine = an_engine(pool=72)
    engine.retraction.make_room = make_room
    engine.new_token_ratio = 0.1  # admit too many
    same(answers(engine, prompts, 30), want)
    expect("the pool is too small: did somebody go back to the queue", engine.retractions > 0, True)
    nothing_held(engine)


def _play(m: ModuleType, reqs: list[Req], enough: int, want: list[int], why: str) -> None:
    """Room is there once `enough` tokens have been given back."""
    running, freed = list(reqs), []

    def lacks_room() -> bool:
        return sum(r.seq_len for r in freed) < enough

    gone = ask(m.retract, running, lacks_room, freed.append, why=f"{want} go: {why}")
    expect(f"{why}: requests released", [r.rid for r in freed], want)
    expect(f"{why}: requests returned, those that were released in this order", [r.rid for r in gone or []], want)
    stay = [r.rid for r in reqs if r.rid not in want]
    expect(f"{why}: requests left in `running`, in their order", [r.rid for r in running], stay)
