"""Each death, and who hears of it: what the client is told, and that both sides have all their pages back.

    python ch07_sglang_radix/disaggregation/demo_4_deaths.py

An engine "dies" by closing every link at once, as the system does for a killed process. Conservation is checked after every step of
both engines, and over both pools at the end.
"""

from collections.abc import Callable
from typing import Any

from ch07_sglang_radix.disaggregation.local_pair import Asked, Half, Pair
from ch07_sglang_radix.disaggregation.messages import Metadata
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table

PROMPT = list(range(5, 35))


def main() -> None:
    heading("What breaks, when, and what becomes of the request")
    rows = [outcome(*case) for case in CASES]
    table(("what happens", "the client gets", "prefill's pages", "decode's pages"), rows)
    check("every request ended, with an answer or with a reason", all(row[1] for row in rows))
    check(
        "and nobody holds a page any more",
        all(row[2] in ("back", "dead") and row[3] in ("back", "dead") for row in rows),
    )


def outcome(
    said: str, options: dict[str, Any], breaks: Callable[[Pair, Asked], Half | None]
) -> tuple[str, str, str, str]:
    both = Pair(**options)
    both.gate.clear()
    asked = both.ask(PROMPT)
    dead = breaks(both, asked)
    both.gate.set()
    reports = both.prefill if dead is both.decode else both.decode
    both.until(lambda: asked[1][reports.mode] in reports.results)
    living = [half for half in both.halves.values() if half is not dead]
    both.until(lambda: not any(half.busy for half in living))
    answer = both.ended(asked, reports.mode)
    reason = answer.finish_reason.get("message", answer.finish_reason["type"])
    got = f"{len(answer.output_ids)} tokens" if answer.finish_reason["type"] == "length" else reason
    if dead is both.decode:
        got = "the balancer's 503: decode does not answer"
    pages = ["dead" if half is dead else "back" if half.at_rest() else "" for half in (both.prefill, both.decode)]
    both.close()
    return said, got, pages[0], pages[1]


def computing(both: Pair, asked: Asked) -> None:
    both.until(lambda: both.sent(asked[0]) > 0)


def prefill_dies_computing(both: Pair, asked: Asked) -> Half:
    computing(both, asked)
    return dies(both.prefill)


def prefill_dies_sending(both: Pair, asked: Asked) -> Half:
    both.in_transfer(asked)
    return dies(both.prefill)


def prefill_dies_afterwards(both: Pair, asked: Asked) -> Half:
    both.gate.set()
    both.until(lambda: both.decode.scheduler.running)
    return dies(both.prefill)


def decode_dies_computing(both: Pair, asked: Asked) -> Half:
    computing(both, asked)
    return dies(both.decode)


def decode_dies_waiting(both: Pair, asked: Asked) -> Half:
    both.in_transfer(asked)
    return dies(both.decode)


def dies(half: Half) -> Half:
    half.half.close()
    return half


def another_room_s_token(both: Pair, asked: Asked) -> None:
    both.in_transfer(asked)
    slot = both.decode.manager.rooms()[0].slot
    both.prefill.manager._links[asked[0], 0].send(Metadata(slot, 5, 13, 0, 0))


def prefill_aborts(both: Pair, asked: Asked) -> None:
    computing(both, asked)
    both.prefill.scheduler.abort(asked[1]["prefill"])


def decode_aborts(both: Pair, asked: Asked) -> None:
    both.in_transfer(asked)
    both.decode.scheduler.abort(asked[1]["decode"])


def time_is_up(both: Pair, asked: Asked) -> None:
    both.in_transfer(asked)
    both.until(lambda: asked[1]["decode"] in both.decode.results)


CHUNKS = {"prefill": {"chunked_prefill_size": 8}}
CASES: list[tuple[str, dict[str, Any], Callable[[Pair, Asked], Half | None]]] = [
    ("nothing", CHUNKS, lambda both, asked: None),
    ("prefill dies while it computes", CHUNKS, prefill_dies_computing),
    ("prefill dies while pages travel", {}, prefill_dies_sending),
    ("prefill dies when all has come", {}, prefill_dies_afterwards),
    ("decode dies while prefill computes", CHUNKS, decode_dies_computing),
    ("decode dies while pages travel", {}, decode_dies_waiting),
    ("metadata of another room", {}, another_room_s_token),
    ("an abort on the prefill side", CHUNKS, prefill_aborts),
    ("an abort on the decode side", {}, decode_aborts),
    ("pages that never come", {"decode": {"timeout": 0.3}}, time_is_up),
]


if __name__ == "__main__":
    run_main(main)
