"""Every drafter on the same texts: tokens a verify step, and what becomes of the speed as the batch grows.

    python ch07_sglang_radix/speculative/demo_5_who_guesses.py [--batches 1 4 16 64] [--rounds 3] [--csv figures/speculation.csv]

Speeds are tokens for each second that this process computed, the best of the rounds, the contenders in turn. A draft's own
time is part of it.
"""

import argparse
from pathlib import Path

from ch07_sglang_radix.speculative.contenders import CONTENDERS, PLAIN, WORKLOADS, Run, engines, prompts, run
from common.distributed.launch import run_main
from common.teaching.report import write_csv
from common.teaching.show import check, heading, table

PROMPTS = 16  # of a workload, or as many as the largest batch has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="requests at once")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="write what was measured, for figures/draw.py")
    args = parser.parse_args()
    rows = []
    with engines(list(CONTENDERS)) as contenders:
        tokenizer = contenders[PLAIN].wrapper.tokenizer
        for engine in contenders.values():  # nobody is measured cold
            run(engine, prompts(tokenizer, "new", 1, seed=1), 1)
        for workload, what in WORKLOADS.items():
            heading(f"{workload}: {what}")
            shown = []
            for batch in args.batches:
                ids = prompts(tokenizer, workload, max(PROMPTS, batch))
                best = best_of(args.rounds, contenders, ids, batch, workload)
                check_answers(best, batch)
                shown.append(best)
                rows += [row_of(workload, name, batch, one, best[PLAIN]) for name, one in best.items()]
            table(
                ("", "tokens a step", *(f"tokens/s, batch {batch}" for batch in args.batches)),
                [
                    (name, shown[0][name].a_step, *(_beside(one[name], one[PLAIN]) for one in shown))
                    for name in contenders
                ],
            )
            say(workload, shown[0])
    if args.csv:
        write_csv(rows, args.csv)


def best_of(rounds: int, contenders: dict, ids: list[list[int]], batch: int, workload: str) -> dict[str, Run]:
    """The quickest run of each, in turn; what an n-gram trie has read is forgotten before each, but for texts asked again."""
    best: dict[str, Run] = {}
    if workload == "again":
        for engine in contenders.values():
            run(engine, ids, batch)
    for _ in range(rounds):
        for name, engine in contenders.items():
            one = run(engine, ids, batch, forget=workload != "again")
            if name not in best or one.seconds < best[name].seconds:
                best[name] = one
    return best


def check_answers(best: dict[str, Run], batch: int) -> None:
    for name, one in best.items():
        if one.answers != best[PLAIN].answers:
            raise SystemExit(f"check failed: {name} at batch {batch} says something else than {PLAIN}")


def say(workload: str, best: dict[str, Run]) -> None:
    check("all of them say the same, token for token", len({str(one.answers) for one in best.values()}) == 1)
    if workload == "new":
        check("n-grams find next to nothing in answers that nobody has given yet", best["n-gram trie"].a_step < 1.3)
        check(
            "a model or heads that know the text do",
            min(best[n].a_step for n in ("draft model", "Medusa", "EAGLE")) > 1.5,
        )
    elif workload == "quoted":
        check("what is quoted is looked up", best["prompt lookup"].a_step > 2)
    else:
        check("a trie over all requests has heard it, a request's own text has not",
              best["n-gram trie"].a_step > 2 > best["prompt lookup"].a_step)  # fmt: skip


def _beside(one: Run, plain: Run) -> str:
    speed = one.tokens / one.seconds
    return f"{speed:.0f}" if one is plain else f"{speed:.0f} ({plain.seconds / one.seconds:.2f}x)"


def row_of(workload: str, name: str, batch: int, one: Run, plain: Run) -> dict[str, object]:
    return {
        "workload": workload, "contender": name, "batch": batch, "tokens": one.tokens, "tokens_a_step": f"{one.a_step:.3f}",
        "seconds": f"{one.seconds:.3f}", "tokens_per_s": f"{one.tokens / one.seconds:.1f}",
        "times_plain": f"{plain.seconds / one.seconds:.3f}",
    }  # fmt: skip


if __name__ == "__main__":
    run_main(main)
