"""One request from its room to its first token, message by message.

    python ch07_sglang_radix/disaggregation/demo_1_handshake.py

Two engines in this process, a real TCP link between them, the bundled model. First every message, with the state in which each side
is after it; then a decode engine that was started with other pages, and what it is told.
"""

from ch07_sglang_radix.disaggregation.local_pair import Asked, Pair
from ch07_sglang_radix.disaggregation.messages import Metadata, Reserve, Write
from ch07_sglang_radix.disaggregation.rooms import State
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table

PROMPT = list(range(5, 35))  # 30 tokens: 7 pages of 4 and a half
CHUNK, PAGE = 12, 4


def main() -> None:
    both = Pair(prefill={"chunked_prefill_size": CHUNK, "page_size": PAGE}, decode={"page_size": PAGE})
    message_by_message(both)
    both.close()
    who_does_not_fit()


def message_by_message(both: Pair) -> None:
    heading(f"A prompt of {len(PROMPT)} tokens, chunks of {CHUNK}, pages of {PAGE}: room 1001")
    asked = both.ask(PROMPT)
    queues: list[tuple[str, str]] = []
    both.until(lambda: note(both, asked, queues) or asked[1]["decode"] in both.decode.results)
    both.at_rest()
    rows = [told(message) for _, message in both.decode.manager.log]
    table(("from", "message", "what it says"), rows)
    heading("In which queue it stood on each side, step by step (repeats left out)")
    table(("prefill", "decode"), queues)
    answer = both.answer(asked)
    print(f"  the answer: {answer.output_ids}, {answer.cached_tokens} prompt tokens cached on the prefill side")
    kinds = [type(message) for _, message in both.decode.manager.log]
    check("decode reserves before anything is computed for it", kinds[0] is Reserve)
    check("pages come in as many messages as there were chunks", kinds.count(Write) == -(-len(PROMPT) // CHUNK))
    check("the first token comes last", kinds[-1] is Metadata)
    check("decode has computed no prompt", both.decode.scheduler.steps["prefill"] == 0)
    print(
        f"  the states of a room, of which each side is in the least of its ranks': {', '.join(f'{s.name} {s}' for s in State)}"
    )


def note(both: Pair, asked: Asked, queues: list[tuple[str, str]]) -> None:
    """Where the request stands now, if that is new."""
    stands = []
    for half in (both.prefill, both.decode):
        running = any(req.rid == asked[1][half.mode] for req in half.scheduler.running)
        ended = asked[1][half.mode] in half.results
        where = half.stage(asked[0]) or ("running" if running else "over" if ended else "")
        stands.append(where)
    if all(stands) and (not queues or queues[-1] != tuple(stands)):
        queues.append((stands[0], stands[1]))


def told(message: Reserve | Write | Metadata) -> tuple[str, str, str]:
    if isinstance(message, Reserve):
        return (
            "decode",
            "Reserve",
            f"my pages {message.pages}, from the prompt's page {message.first} on; slot {message.slot}",
        )
    if isinstance(message, Write):
        return "prefill", "Write", f"pages {message.pages}, K and V of all layers behind it"
    return (
        "prefill",
        "Metadata",
        f"token {message.token}, {message.cached_tokens} cached; for slot {message.slot}, room {message.room}",
    )


def who_does_not_fit() -> None:
    heading("A decode engine with pages of 8 asks a prefill engine with pages of 4")
    both = Pair(prefill={"page_size": 4}, decode={"page_size": 8})
    answer = both.answer(both.ask(PROMPT, halves=("decode",)))
    said = str(answer.finish_reason["message"])
    print(f"  {said.replace(str(both.prefill.half.bootstrap.port), 'PORT')}")
    check(
        "it is refused with both numbers, before any page is reserved",
        "is 8 here and 4 at" in said and not both.decode.manager.log,
    )
    both.close()


if __name__ == "__main__":
    run_main(main)
