"""Who may do what: keys, pages of other sites, borrowed names, and bodies without an end.

    python ch07_sglang_radix/serving/demo_8_keys.py

The application of the server with nothing behind it: who is let in hears that it is starting (503), who is not, hears why.
No socket is opened; the requests are handed to it as uvicorn would (ASGI).
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from fastapi import FastAPI

from ch07_sglang_radix.serving.channels import MemoryPipe
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.http_server import make_app
from ch07_sglang_radix.serving.security import ROUTES
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

KEY, ADMIN = "sesame", "open-sesame"
HOST, ELSEWHERE = "127.0.0.1:30000", "https://other.example"
BIGGEST = 1024  # bytes of a body, here


def main() -> None:
    app = an_app(api_key=KEY, admin_api_key=ADMIN)
    heading("Three kinds of routes, three kinds of callers")
    callers = {"nobody's": {}, "the key": bearer(KEY), "the admin key": bearer(ADMIN), "half the key": bearer(KEY[:3])}
    examples = {"open": ("GET", "/ready"), "key": ("POST", "/generate"), "admin": ("POST", "/flush_cache")}
    answers = {guard: [ask(app, *route, headers) for headers in callers.values()] for guard, route in examples.items()}
    rows = [
        (guard, " ".join(examples[guard]), sum(g == guard for g in ROUTES.values()), *map(said, answers[guard]))
        for guard in examples
    ]
    table(("kind", "such as", "routes", *callers), rows)
    check(
        "the admin routes take the admin key alone, the others the key",
        [in_of(answers[g]) for g in ("key", "admin")] == [[1], [2]],
    )
    check("probes need none", in_of(answers["open"]) == [0, 1, 2, 3])

    heading("A page of another site, in a browser on the same machine")
    open_server, friendly = an_app(), an_app(cors_allow_origins=(ELSEWHERE,))
    cases = {
        "a program: no Origin": ask(open_server, "POST", "/generate", {}),
        "a page of this server": ask(open_server, "POST", "/generate", {"origin": f"http://{HOST}"}),
        f"a page of {ELSEWHERE}": ask(open_server, "POST", "/generate", {"origin": ELSEWHERE}),
        "the same, --cors-allow-origins names it": ask(friendly, "POST", "/generate", {"origin": ELSEWHERE}),
        "/xray under a name that leads here": ask(open_server, "GET", "/xray", {"host": "other.example"}),
        "/xray under this server's own": ask(open_server, "GET", "/xray", {}),
    }
    table(("who asks a server without a key", "answer"), [(who, said(answer)) for who, answer in cases.items()])
    let_in = in_of(list(cases.values()))
    check("a page of another site is refused before anything is done", let_in == [0, 1, 3, 5])

    heading(f"A body of more than {BIGGEST} bytes")
    small = an_app(max_body_bytes=BIGGEST)
    big = [b"x" * 512] * 4
    rows = [
        ("says so: Content-Length", said(ask(small, "POST", "/generate", {"content-length": "2048"}, big))),
        ("says nothing, and sends pieces", said(ask(small, "POST", "/generate", {}, big))),
        ("never ends", said(ask(small, "POST", "/generate", {}, endless()))),
    ]
    table(("the client", "answer"), rows)
    check("each is refused, the last one while it still comes", all(answer.startswith("413") for _, answer in rows))

    heading("The key itself: bytes looked at until it is known to be wrong")
    tries = [KEY[:n].ljust(len(KEY), "?") for n in (0, 3, 5)]
    mistake(
        f"{', '.join(tries)} against {KEY}",
        wrong=" ".join(str(early_exit(one, KEY)) for one in tries)
        + ", with ==: who has a clock finds it letter by letter",
        right=" ".join(str(len(KEY)) for _ in tries) + ", with hmac.compare_digest",
    )


def an_app(**args) -> FastAPI:
    return make_app(TokenizerManager(HttpArgs(**args), None, MemoryPipe(), MemoryPipe()))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(
    app: FastAPI, method: str, path: str, headers: dict[str, str], body: Sequence[bytes] | Iterator[bytes] = ()
) -> tuple[int, str]:
    return asyncio.run(_ask(app, method, path, headers, iter(body)))


async def _ask(app: FastAPI, method: str, path: str, headers: dict[str, str], body: Iterator[bytes]) -> tuple[int, str]:
    """(status, the answer's body)."""
    sent: list[dict] = []
    told: list[bool] = []

    async def receive() -> dict:
        if told:  # the body is whole, and the client stays
            await asyncio.Event().wait()
        piece = next(body, None)
        told.extend([True] * (piece is None))
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def send(message: dict) -> None:
        sent.append(message)

    named = [(name.encode(), value.encode()) for name, value in ({"host": HOST} | headers).items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "headers": named, "scheme": "http", "root_path": "",
        "server": ("127.0.0.1", 30000), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def said(answer: tuple[int, str]) -> str:
    """The status, and of a refusal why."""
    status, body = answer
    if status in (401, 403, 413):
        error = json.loads(body)["error"]
        return f"{status} {error if isinstance(error, str) else error['message']}"
    return f"{status} let in"


def in_of(answers: list[tuple[int, str]]) -> list[int]:
    return [i for i, (status, _) in enumerate(answers) if status not in (401, 403, 413)]


def endless() -> Iterator[bytes]:
    while True:
        yield b"x" * 100


def early_exit(given: str, wanted: str) -> int:
    """How many letters == has to compare."""
    return next((n + 1 for n, (a, b) in enumerate(zip_longest(given, wanted)) if a != b), len(wanted))


if __name__ == "__main__":
    run_main(main)
