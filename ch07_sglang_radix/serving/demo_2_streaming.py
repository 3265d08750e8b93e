"""Cumulative against delta: what a streamed answer of n tokens costs on the wire, and how each is read wrong.

    python ch07_sglang_radix/serving/demo_2_streaming.py

/generate streams as SGLang's does: each event has the whole text so far. OpenAI's routes stream what is new. Both come from
the same messages inside, which carry what is new; the same answers, asked of one server in both ways.
"""

import json
import urllib.request
from itertools import pairwise
from typing import Any, NamedTuple

from ch07_sglang_radix.serving.served import served
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

PROMPT = "What is a radix cache?"
LENGTHS = (8, 32, 128, 512)
SHOWN = 112  # characters of an event


class Stream(NamedTuple):
    """The events of an answer, [DONE] left out; bytes of all of them, and how the first and the last look."""

    events: list[dict[str, Any]]
    sizes: list[int]

    @property
    def size(self) -> int:
        return sum(self.sizes)


def main() -> None:
    with served("--single-process") as (url, _):
        heading("Three tokens in both forms: the bodies as they come")
        for path, body in asked(3).items():
            print(f"  POST {path}")
            for line in raw(url, path, body).decode().split("\n\n")[:-1]:
                print(f"    {line if len(line) <= SHOWN else line[:24] + ' ... ' + line[29 - SHOWN :]}")

        heading("Bytes of an answer of n tokens")
        streams = {n: [ask(url, path, body) for path, body in asked(n).items()] for n in LENGTHS}
        rows = [
            (
                n,
                one.size,
                one.sizes[0],
                one.sizes[-1],
                other.size,
                other.sizes[0],
                other.sizes[-2],
                one.size / other.size,
            )
            for n, (one, other) in streams.items()
        ]
        table(("n", "cumulative", "first event", "last", "delta", "first event", "last", "times"), rows)
        texts = {n: (one.events[-1]["text"], joined(other)) for n, (one, other) in streams.items()}
        check("both say the same", all(whole == parts for whole, parts in texts.values()))
        cumulative, delta = streams[LENGTHS[-1]]
        check(
            "each cumulative text begins with the one before",
            all(b.startswith(a) for a, b in pairwise(texts_of(cumulative))),
        )
        check("a delta's size does not depend on what came before", max(delta.sizes) < 2 * min(delta.sizes))
        check("a cumulative event's does", cumulative.sizes[-1] > 10 * cumulative.sizes[0])

        heading("Each read as if it were the other")
        first = streams[LENGTHS[0]]
        mistake(
            "cumulative events added up",
            wrong=shortened("".join(texts_of(first[0]))),
            right=shortened(texts[LENGTHS[0]][0]),
        )
        last = first[1].events[-2]["choices"][0]["text"]
        mistake("the last delta taken for the answer", wrong=repr(last), right=shortened(texts[LENGTHS[0]][1]))


def asked(n: int) -> dict[str, dict[str, Any]]:
    """{path: body}: the same answer of n tokens."""
    return {
        "/generate": {"text": PROMPT, "sampling_params": {"max_new_tokens": n, "ignore_eos": True}, "stream": True},
        "/v1/completions": {"prompt": PROMPT, "max_tokens": n, "ignore_eos": True, "temperature": 0, "stream": True},
    }  # fmt: skip


def raw(url: str, path: str, body: dict[str, Any]) -> bytes:
    with urllib.request.urlopen(url + path, json.dumps(body).encode(), timeout=60) as answer:
        return answer.read()


def ask(url: str, path: str, body: dict[str, Any]) -> Stream:
    events = [event + b"\n\n" for event in raw(url, path, body).split(b"\n\n") if event]
    *events, done = events
    check_done(done)
    return Stream([json.loads(event.removeprefix(b"data: ")) for event in events], [len(event) for event in events])


def check_done(event: bytes) -> None:
    if event != b"data: [DONE]\n\n":
        raise SystemExit(f"check failed: the stream ended with {event!r}")


def texts_of(stream: Stream) -> list[str]:
    return [event["text"] for event in stream.events]


def joined(stream: Stream) -> str:
    return "".join(event["choices"][0]["text"] for event in stream.events)


def shortened(text: str) -> str:
    return repr(text if len(text) <= 70 else text[:67] + "...")


if __name__ == "__main__":
    run_main(main)
