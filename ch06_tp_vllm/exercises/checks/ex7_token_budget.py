import random
from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for what, running, waiting, budget, want in (
        ("there is room for all", [("a", 1), ("b", 1)], [("c", 10), ("d", 4)], 16, [("a", 1), ("b", 1), ("c", 10), ("d", 4)]),
        ("the last one gets what is left", [("a", 1)], [("c", 10), ("d", 4)], 8, [("a", 1), ("c", 7)]),
        ("in order, even if the first takes all", [("a", 20), ("b", 1)], [("c", 5)], 8, [("a", 8)]),
        ("a chunk of a running prompt goes on before anybody starts", [("a", 6)], [("c", 2)], 7, [("a", 6), ("c", 1)]),
        ("nobody runs", [], [("c", 3)], 3, [("c", 3)]),
        ("nobody comes behind one that fills the budget exactly", [("a", 2)], [("c", 3)], 2, [("a", 2)]),
        ("a long one first: who waits behind it waits", [], [("c", 9), ("d", 2)], 4, [("c", 4)]),
        ("nobody is there", [], [], 5, []),
    ):  # fmt: skip
        given = list(running), list(waiting)
        got = ask(m.give_out, *given, budget)
        expect(f"{what}: running {running}, waiting {waiting}, budget {budget}", got, want)
        expect("running and waiting, which stay as they are", given, (running, waiting))
    rng = random.Random(0)
    for _ in range(50):
        running = [(f"r{i}", rng.choice((1, 1, 9))) for i in range(rng.randint(0, 6))]
        waiting = [(f"w{i}", rng.randint(1, 30)) for i in range(rng.randint(0, 4))]
        budget = rng.randint(1, 40)
        what = f"running {running}, waiting {waiting}, budget {budget}"
        step = ask(m.give_out, list(running), list(waiting), budget)
        lacks = dict(running + waiting)
        expect(
            f"{what}: tokens of the step, none of the budget lost",
            sum(n for _, n in step),
            min(budget, sum(lacks.values())),
        )
        expect(f"{what}: who gets 0 tokens", [name for name, n in step if n < 1], [])
        names = [name for name, _ in step]
        expect(f"{what}: who takes part", names, list(lacks)[: len(names)])
        expect(f"{what}: all but the last get what they lack", step[:-1], list(lacks.items())[: len(step[:-1])])
