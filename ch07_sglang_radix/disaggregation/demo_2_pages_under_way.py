"""Pages on their way: which, when, how many bytes, and how many of them while the prompt is still being computed.

    python ch07_sglang_radix/disaggregation/demo_2_pages_under_way.py

The same two engines. First a long prompt in chunks, step by step; then the same again in one piece, where nothing can leave before
all is computed; then a prompt of which one side, the other or both have the beginning in their trees.
"""

from ch07_sglang_radix.disaggregation.local_pair import Pair
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

PAGE, TOKENS, CHUNK = 4, 160, 32


def main() -> None:
    both = make(CHUNK)
    early = step_by_step(both)
    both.close()
    whole = make(-1)
    late = early_pages(whole)[0]
    whole.close()
    mistake("pages that left while the prompt was still being computed: no chunks, chunks of 32", late, early)
    who_has_the_beginning()


def make(chunk: int) -> Pair:
    return Pair(prefill={"chunked_prefill_size": chunk, "page_size": PAGE}, decode={"page_size": PAGE})


def step_by_step(both: Pair) -> int:
    heading(
        f"A prompt of {TOKENS} tokens, {TOKENS // PAGE} pages, chunks of {CHUNK}: after each step of the prefill engine"
    )
    early, rows = early_pages(both)
    table(("computed", "whole pages", "told to leave"), rows)
    moved = both.decode.manager.pages.bytes_moved
    print(f"  {moved:,} bytes came: {TOKENS // PAGE} pages of {moved * PAGE // TOKENS:,}")
    check(
        "all but the last chunk's were on their way before the last chunk was done", early == (TOKENS - CHUNK) // PAGE
    )
    return early


def early_pages(both: Pair) -> tuple[int, list[tuple[int, int, int]]]:
    """(pages that left before the prompt was computed, what happened)."""
    asked = both.ask(range(5, 5 + TOKENS))
    rows: list[tuple[int, int, int]] = []
    early = 0
    while not (rows and asked[1]["decode"] in both.decode.results):
        both.step()
        one = both.prefill.side.passages.get(asked[0])
        computed = one.req.kv_len if one else TOKENS
        if one and computed and one.stage in ("waiting", "inflight"):
            early = early if one.told else both.sent(asked[0])
            if not rows or rows[-1][0] < computed or rows[-1][2] < both.sent(asked[0]):
                rows.append((computed, computed // PAGE, both.sent(asked[0])))
    both.at_rest()
    return early, rows


def who_has_the_beginning() -> None:
    heading("64 tokens of which 48 were asked before: who has them in its tree, and what travels")
    rows = []
    for prefill, decode in ((False, False), (True, False), (False, True), (True, True)):
        both = make(CHUNK)
        both.answer(both.ask(range(5, 53)))
        both.at_rest()
        for half, keeps in ((both.prefill, prefill), (both.decode, decode)):
            if not keeps:
                half.scheduler.memory.flush()
        moved, computed = both.decode.manager.pages.bytes_moved, both.prefill.scheduler.work["inputs"]
        answer = both.answer(both.ask(range(5, 69)))
        both.at_rest()
        pages = (both.decode.manager.pages.bytes_moved - moved) * 12 // moved
        rows.append(
            (_yes(prefill), _yes(decode), answer.cached_tokens, both.prefill.scheduler.work["inputs"] - computed, pages)
        )
        both.close()
    table(("prefill has it", "decode has it", "cached_tokens", "tokens computed", "pages that travel"), rows)
    check(
        "what prefill has is not computed, what decode has does not travel",
        [row[3:] for row in rows] == [(64, 16), (16, 16), (64, 4), (16, 4)],
    )


def _yes(it: bool) -> str:
    return "yes" if it else "no"


if __name__ == "__main__":
    run_main(main)
