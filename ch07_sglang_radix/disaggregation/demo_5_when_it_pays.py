"""When does it pay to have two engines: a model of it with the times of this machine, and slow wires that are measured beside it.

    python ch07_sglang_radix/disaggregation/demo_5_when_it_pays.py

Measured first, with the bundled model on one rank: a chunk of a prompt, a decode step, and the bytes that travel for a prompt.
From these the model (cost_model.py) says, for a prompt of so many tokens and a wire of so many bytes a second: the longest time
between two tokens of those who run, and what the long prompt pays for it. Then prompts are sent over wires of three speeds, and
their first tokens stand beside what the model has said. The wire is this host's own connection, which is held back for as long as
the bytes would take (local_pair.py): the host itself has one speed.
"""

import random
import time

from ch07_sglang_radix.disaggregation.cost_model import Times
from ch07_sglang_radix.disaggregation.local_pair import Pair
from ch07_sglang_radix.disaggregation.rooms import State
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

CHUNK, RUNNING, REPEATS = 128, 4, 5
PROMPTS = (128, 512, 2048, 8192)
WIRES = (1e9, 1e8, 1e7, 1e6)  # bytes a second
SENT = (
    (256, 1024),
    (1e8, 3e6, 1e6),
)  # prompts and wires that are measured: faster than the computing, about as fast, slower


def main() -> None:
    both = Pair(
        prefill={"pool": 8192, "chunked_prefill_size": CHUNK, "page_size": 16},
        decode={"pool": 8192, "page_size": 16, "reserved": 64},
    )
    for half in both.halves.values():
        half.scheduler.after_step.clear()  # the check of conservation takes its time, too
    draw = random.Random(0)
    times = measure(both, draw)
    sweep(times)
    over_wires(both, times, draw)
    chunk_by_chunk(times)
    both.at_rest()
    both.close()


def measure(both: Pair, draw: random.Random) -> Times:
    heading("Measured here")
    running = [both.ask(_prompt(draw, 8), max_new_tokens=200) for _ in range(RUNNING - 1)]
    both.until(lambda: len(both.decode.scheduler.running) == RUNNING - 1)
    chunks, steps = [], []
    moved = both.decode.manager.pages.bytes_moved
    for _ in range(REPEATS):
        asked = both.ask(_prompt(draw, CHUNK), max_new_tokens=3)
        both.until(lambda asked=asked: _is_reserved(both, asked[0]))  # the next step computes it
        chunks.append(_seconds(both.prefill.step))
        both.until(lambda: len(both.decode.scheduler.running) == RUNNING)  # it has two tokens, and wants the third
        steps.append(_seconds(both.decode.step))
        both.answer(asked)
    bytes_of_one = (both.decode.manager.pages.bytes_moved - moved) / (REPEATS * CHUNK)
    for asked in running:
        both.decode.scheduler.abort(asked[1]["decode"])
    both.at_rest()
    times = Times(CHUNK, min(chunks), min(steps), bytes_of_one)
    rows = [
        (f"a chunk of {CHUNK} tokens", f"{1000 * times.chunk_s:.2f} ms"),
        (f"a decode step of {RUNNING}", f"{1000 * times.step_s:.2f} ms"),
        ("K and V of a token", f"{times.token_bytes:,.0f} bytes"),
    ]
    table(("what", "it takes"), rows)
    return times


def _prompt(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(1000) for _ in range(tokens)]


def _is_reserved(both: Pair, number: int) -> bool:
    rooms = [room for room in both.prefill.manager.rooms() if room.number == number]
    return both.prefill.stage(number) == "bootstrap" and bool(rooms) and rooms[0].state is State.WAITING_FOR_INPUT


def _seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def sweep(times: Times) -> None:
    heading("The model: the longest time between tokens of who runs, and the first token of the long prompt, in ms")
    rows = []
    for prompt in PROMPTS:
        one = times.together(prompt)
        firsts = [one.first_s, *(times.apart(prompt, wire).first_s for wire in WIRES)]
        rows.append((prompt, *(1000 * s for s in (one.gap_s, times.apart(prompt).gap_s, *firsts))))
    wires = [f"apart, {wire:.0e} B/s" for wire in WIRES]
    table(("prompt", "gap, together", "gap, apart", "first, together", *wires), rows)
    together, slow = times.together(PROMPTS[-1]), times.apart(PROMPTS[-1], WIRES[-1])
    check("apart nobody who runs waits for a chunk", slow.gap_s < together.gap_s)
    check("on a slow wire it is the long prompt that pays", slow.first_s > together.first_s)
    even = f"{times.even_wire:,.0f} bytes/s"
    print(f"  a wire of {even} is as fast as this machine computes: from there on only the last chunk's pages are seen")


def over_wires(both: Pair, times: Times, draw: random.Random) -> None:
    heading("Measured: the first token over a wire that is held back")
    rows, early = [], 0
    for prompt in SENT[0]:
        for wire in SENT[1]:
            both.prefill.bytes_per_s = wire
            took = min(_first_token(both, _prompt(draw, prompt)) for _ in range(2))
            travels = prompt * times.token_bytes / wire
            early += took < travels
            said = times.apart(prompt, wire).first_s
            rows.append((prompt, f"{wire:.0e}", 1000 * travels, 1000 * took, 1000 * said))
    table(("prompt", "bytes/s", "its pages alone, ms", "first token, measured", "the model"), rows)
    check("no first token comes before its pages can be there", early == 0)


def _first_token(both: Pair, prompt: list[int]) -> float:
    return _seconds(lambda: both.answer(both.ask(prompt, max_new_tokens=1)))


def chunk_by_chunk(times: Times) -> None:
    heading("And if pages left only when the whole prompt is computed")
    prompt, wire = PROMPTS[2], WIRES[2]
    late = times.chunks(prompt) * times.chunk_s + prompt * times.token_bytes / wire
    first = times.apart(prompt, wire).first_s
    said = f"first token of {prompt} tokens over {wire:.0e} bytes/s, in ms: at the end, chunk by chunk"
    mistake(said, f"{1000 * late:,.0f}", f"{1000 * first:,.0f}")
    check("what travels while the next chunk is computed is not waited for", first < late)


if __name__ == "__main__":
    run_main(main)
