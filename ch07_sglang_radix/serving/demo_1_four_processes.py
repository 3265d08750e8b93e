"""One request through four processes: each message with its bytes, and the moment at which it passed.

    python ch07_sglang_radix/serving/demo_1_four_processes.py

A client, the main process (HTTP, TokenizerManager), the scheduler of rank 0, and the detokenizer. Between them sits a tap
(wiretap.py) that hands every message on and keeps a copy. A streamed request, the same one whole, eight at once, an order
of the operator's, and bytes that are no message.
"""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import msgspec

from ch07_sglang_radix.serving.messages import BatchStr, BatchTokenIDs, Hello, decode, encode
from ch07_sglang_radix.serving.wiretap import Seen, TappedServer, since, tapped
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

PROMPT, NEW = "What is a radix cache?", 4
PARAMS = {"max_new_tokens": NEW, "ignore_eos": True}
CLIENT = "import os, sys, urllib.request as u; u.urlopen(sys.argv[1], sys.argv[2].encode()).read(); print(os.getpid())"
SHOWN = 58  # characters of a message


def main() -> None:
    with tapped() as server:
        heading("Ready: two children say Hello")
        hellos = [one for one in server.clear() if one.name == "Hello"]
        show(hellos)
        check("they speak one version", len({one.message.version for one in hellos}) == 1)

        heading(f"One request, streamed, {NEW} tokens")
        client = post(server, "/generate", {"text": PROMPT, "sampling_params": PARAMS, "stream": True, "rid": "demo"})
        seen = server.clear()
        show(seen)
        hops = Counter((one.sender, one.receiver) for one in seen)
        check("four processes took part", len({client, *server.pids.values()}) == 4)
        check("one message a step to the detokenizer", hops["scheduler", "detokenizer"] == NEW)
        check("and one from it", hops["detokenizer", "main"] == NEW)
        sizes = [one.size for one in seen if one.name == "BatchTokenIDs"]
        check("behind the first message only what is new travels", max(sizes[1:]) < sizes[0] / 2)
        events = [one.size for one in seen if one.name == "event"][:-1]
        check("to the client goes all there is, longer each time", events == sorted(set(events)))

        heading("The same, not streamed: told when it begins and when it has ended")
        post(server, "/generate", {"text": PROMPT, "sampling_params": PARAMS, "rid": "demo"})
        seen = server.clear()
        show(seen)
        check("two messages for four tokens", sum(one.name == "BatchTokenIDs" for one in seen) == 2)

        heading("Eight requests of one call, streamed")
        body = {"input_ids": [[7 + i, 8, 9] for i in range(8)], "sampling_params": PARAMS, "stream": True}
        post(server, "/generate", body)
        seen = server.clear()
        show([one for one in seen if one.name in ("BatchTokenizedGenerate", "BatchTokenIDs")])
        batches = [one.message for one in seen if isinstance(one.message, BatchTokenIDs)]
        rows = sum(len(batch.tickets) for batch in batches)
        check("they entered together, and so each step is about all of them", rows == 8 * len(batches))
        mistake(
            "messages to the detokenizer, for eight answers of four tokens",
            wrong=f"{rows}, one a request and step",
            right=f"{len(batches)}, one a step",
        )

        heading("An order: it goes past the detokenizer, and is done between two steps")
        post(server, "/flush_cache", {})
        seen = server.clear()
        show(seen)
        check(
            "the scheduler answers main itself", [one.receiver for one in seen][-3:] == ["scheduler", "main", "client"]
        )

    heading("Bytes that are no message")
    row = encode(BatchStr(1, [0], ["text"], [[5]], [None], [0], [], []))
    bad = {
        "a pickle that would run a command": b"cposix\nsystem\n(S'echo gotcha'\ntR.",
        "a struct that nobody knows": msgspec.msgpack.encode(["Order", 1]),
        "a text where a number belongs": row.replace(b"\x01", b"\xa1x", 1),
        "half a message": row[: len(row) // 2],
    }
    table(("what came", "bytes", "decode says"), [(what, len(raw), refusal(raw)) for what, raw in bad.items()])
    check("each is refused, and nothing of it was done", all(refusal(raw) for raw in bad.values()))


def post(server: TappedServer, path: str, body: dict[str, Any]) -> int:
    """By a client that is a process of its own; returns its pid."""
    command = [sys.executable, "-c", CLIENT, server.url + path, json.dumps(body)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


def show(seen: list[Seen]) -> None:
    rows = [
        (f"{one.at:.1f}", f"{one.sender} -> {one.receiver}", one.name, one.size, said(one))
        for one in since(seen, seen[0].at)
    ]
    table(("ms", "from -> to", "message", "bytes", "in it"), rows)


def said(one: Seen) -> str:
    """What is in a message, shortened."""
    message = one.message
    if isinstance(message, bytes):
        words = message.decode().strip().replace("\n\n", " ").removeprefix("data: ")
    elif isinstance(message, Hello):
        words = f"{message.who}, version {message.version}" + (f", {len(message.facts)} facts" if message.facts else "")
    elif isinstance(message, BatchTokenIDs):
        ids = message.new_ids[0] if len(message.tickets) == 1 else message.new_ids
        words = f"step {message.step}: {ids}" + (f" {message.finished[0]}" if message.finished[0] else "")
    elif isinstance(message, BatchStr):
        texts = message.new_text[0] if len(message.tickets) == 1 else message.new_text
        words = f"step {message.step}: {texts!r}" + (f" {message.finished[0]}" if message.finished[0] else "")
    elif hasattr(message, "requests"):
        words = f"{len(message.requests)} requests"
    else:
        words = ", ".join(f"{name}={value!r}" for name, value in msgspec.structs.asdict(message).items() if value)
    return words if len(words) <= SHOWN else words[: SHOWN - 3] + "..."


def refusal(raw: bytes) -> str:
    try:
        decode(raw)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    run_main(main)
