"""Sleep and wake: an engine gives its memory back while a trainer needs it, and answers the same afterwards.

    python ch07_sglang_radix/adapters/demo_5_sleep_and_wake.py [--ranks 2]

What the operating system says each rank holds, in MiB, and what the engine itself counts as weights and pages. Asleep, a rank of an
engine is a Python process with torch in it, and its weights are files. It wakes in two steps, as a training loop wants it: first
the weights, which get new numbers at once; the pages only then, so that both never lie beside the trainer's memory.
"""

import argparse

import psutil

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table
from common.tiny_qwen import TINY_QWEN_PATH

QUESTIONS = ("What is a radix cache?", "What is a page?")
TOKENS = 200_000  # of the pool: with the bundled model 1 KiB each
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks")
    ranks = parser.parse_args().ranks
    with Engine(device="cpu", tp_size=ranks, max_total_tokens=TOKENS) as engine:
        asleep_and_awake(engine)


def asleep_and_awake(engine: Engine) -> None:
    heading("Before, asleep, and awake again")
    before, rows = answers(engine), []
    rows.append(("awake", *memory(engine), cached(engine)))
    engine.release_memory_occupation()
    rows.append(("asleep", *memory(engine), "-"))
    held = rows[-1][1:3]
    try:
        answers(engine)
    except ValueError as error:
        refused = str(error)
    engine.resume_memory_occupation(["weights"])
    engine.update_weights_from_disk(str(TINY_QWEN_PATH), weight_version="from the trainer")
    rows.append(("weights are back", *memory(engine), "-"))
    engine.resume_memory_occupation(["kv_cache", "cuda_graph"])
    rows.append(("awake again", *memory(engine), cached(engine)))
    each = [f"rank {rank}" for rank in range(len(processes(engine)))]
    table(("", "weights", "pages", *each, "tokens in the tree"), rows)
    print(f"  asked meanwhile: {refused}")
    check("asleep it has neither weights nor pages", held == (0, 0))
    check("nothing that was cached is left, the pages are new", rows[-1][-1] == 0)
    check("it answers the same", answers(engine) == before)


def answers(engine: Engine) -> list[str]:
    return [one["text"] for one in engine.generate(list(QUESTIONS), {"max_new_tokens": 30})]


def memory(engine: Engine) -> tuple[int, ...]:
    """MiB of rank 0's weights and pages, as it counts them; and of each rank's process, as the operating system does."""
    weights = sum(p.numel() * p.element_size() for p in engine.wrapper.model.parameters())
    pages = engine.wrapper.kv_cache.kv.untyped_storage().nbytes()
    resident = [psutil.Process(pid).memory_info().rss for pid in processes(engine)]
    return tuple(n // MIB for n in (weights, pages, *resident))


def processes(engine: Engine) -> list[int]:
    return [pid for _, pid in engine.scheduler.replica.peers] or [psutil.Process().pid]


def cached(engine: Engine) -> int:
    return engine.get_server_info()["evictable_tokens"]


if __name__ == "__main__":
    run_main(main)
