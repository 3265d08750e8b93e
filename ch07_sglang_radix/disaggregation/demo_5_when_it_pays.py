"""When does it pay to have two engines: a model of it, with the times of this machine.

    python ch07_sglang_radix/disaggregation/demo_5_when_it_pays.py

Measured here, with the bundled model on one rank: a chunk of a prompt, a decode step, and the bytes that travel for a prompt.
From these the model says, for a prompt of so many tokens and a wire of so many bytes a second: the longest time between two
tokens of those who run, and what the long prompt pays for it. Behind its last chunk it waits for that chunk's pages only: the
others travelled while the next was computed, if the wire is as fast as the computing; else they queue.
"""

import random
import time
from dataclasses import dataclass

from ch07_sglang_radix.disaggregation.local_pair import Pair
from ch07_sglang_radix.disaggregation.rooms import State
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

CHUNK, RUNNING, REPEATS = 128, 4, 5
PROMPTS = (128, 512, 2048, 8192)
WIRES = (1e9, 1e8, 1e7, 1e6)  # bytes a second


@dataclass(frozen=True)
class Times:
    """chunk_s, step_s: seconds of CHUNK prompt tokens, and of a decode step of RUNNING answers. token_bytes: K and V of a token."""

    chunk_s: float
    step_s: float
    token_bytes: float

    def together(self, prompt: int) -> tuple[float, float]:
        """One engine with chunks: (longest time between tokens, first token of the prompt). A decode step follows each chunk."""
        chunks = -(-prompt // CHUNK)
        return self.chunk_s + self.step_s, chunks * self.chunk_s + (chunks - 1) * self.step_s

    def apart(self, prompt: int, wire: float) -> tuple[float, float]:
        """Two engines: nobody waits for a chunk. The prompt's pages leave chunk by chunk, in line."""
        chunks, travel = -(-prompt // CHUNK), CHUNK * self.token_bytes / wire
        computed = left = 0.0
        for _ in range(chunks):
            computed += self.chunk_s
            left = max(left, computed) + travel
        return self.step_s, left


def main() -> None:
    times = measure()
    sweep(times)
    chunk_by_chunk(times)


def measure() -> Times:
    heading("Measured here")
    draw = random.Random(0)
    both = Pair(
        prefill={"pool": 8192, "chunked_prefill_size": CHUNK, "page_size": 16},
        decode={"pool": 8192, "page_size": 16, "reserved": 64},
    )
    for half in both.halves.values():
        half.scheduler.after_step.clear()  # the check of conservation takes its time, too
    prompt = lambda n: [draw.randrange(1000) for _ in range(n)]  # noqa: E731
    running = [both.ask(prompt(8), max_new_tokens=200) for _ in range(RUNNING - 1)]
    both.until(lambda: len(both.decode.scheduler.running) == RUNNING - 1)
    chunks, steps = [], []
    moved = both.decode.manager.pages.bytes_moved
    for _ in range(REPEATS):
        asked = both.ask(prompt(CHUNK), max_new_tokens=2)
        both.until(lambda asked=asked: _is_reserved(both, asked[0]))  # the next step computes it
        chunks.append(_seconds(both.prefill.step))
        both.answer(asked)
        steps.append(_seconds(both.decode.step))
    bytes_of_one = (both.decode.manager.pages.bytes_moved - moved) / (REPEATS * CHUNK)
    for asked in running:
        both.decode.scheduler.abort(asked[1]["decode"])
    both.at_rest()
    both.close()
    times = Times(min(chunks), min(steps), bytes_of_one)
    rows = [
        (f"a chunk of {CHUNK} tokens", f"{1000 * times.chunk_s:.2f} ms"),
        (f"a decode step of {RUNNING}", f"{1000 * times.step_s:.2f} ms"),
        ("K and V of a token", f"{times.token_bytes:,.0f} bytes"),
    ]
    table(("what", "it takes"), rows)
    return times


def _is_reserved(both: Pair, number: int) -> bool:
    rooms = [room for room in both.prefill.manager.rooms() if room.number == number]
    return both.prefill.stage(number) == "bootstrap" and bool(rooms) and rooms[0].state is State.WAITING_FOR_INPUT


def _seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def sweep(times: Times) -> None:
    heading("The longest time between tokens of who runs, and the first token of the long prompt, in ms")
    rows = []
    for prompt in PROMPTS:
        gap, first = times.together(prompt)
        own = times.apart(prompt, WIRES[0])[0]
        rows.append(
            (prompt, 1000 * gap, 1000 * own, 1000 * first, *(1000 * times.apart(prompt, wire)[1] for wire in WIRES))
        )
    wires = [f"apart, {wire:.0e} B/s" for wire in WIRES]
    table(("prompt", "gap, together", "gap, apart", "first, together", *wires), rows)
    gap, _ = times.together(PROMPTS[-1])
    check("apart nobody who runs waits for a chunk", times.apart(PROMPTS[-1], WIRES[0])[0] < gap)
    slow = times.apart(PROMPTS[-1], WIRES[-1])[1]
    check("on a slow wire it is the long prompt that pays", slow > times.together(PROMPTS[-1])[1])
    even = times.token_bytes * CHUNK / times.chunk_s
    print(
        f"  a wire of {even:,.0f} bytes/s is as fast as this machine computes: from there on only the last chunk's pages are seen"
    )


def chunk_by_chunk(times: Times) -> None:
    heading("And if pages left only when the whole prompt is computed")
    prompt, wire = PROMPTS[2], WIRES[2]
    late = -(-prompt // CHUNK) * times.chunk_s + prompt * times.token_bytes / wire
    said = f"first token of {prompt} tokens over {wire:.0e} bytes/s, in ms: at the end, chunk by chunk"
    mistake(said, f"{1000 * late:,.0f}", f"{1000 * times.apart(prompt, wire)[1]:,.0f}")
    check("what travels while the next chunk is computed is not waited for", times.apart(prompt, wire)[1] < late)


if __name__ == "__main__":
    run_main(main)
