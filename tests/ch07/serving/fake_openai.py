"""A server that speaks OpenAI's API and /generate, says what it is told, when it is told, and remembers what it was asked."""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

WORDS = (" one", " two", " three", " four", " five", " six")


@dataclass
class FakeServer:
    """first_s, gap_s: before the first token and between tokens. words: what an answer is made of, one token each.

    refuse: (status, body) instead of an answer. break_after: so many tokens, then an error event. cached: tokens, or None if
    the server does not tell. tear: events are cut into pieces of so many bytes, wherever that is.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    words: tuple[str, ...] = WORDS
    cached: int | None = None
    refuse: tuple[int, Any] | None = None
    break_after: int | None = None
    tear: int = 1 << 16
    keep_alive: bool = True
    asked: list[tuple[str, dict]] = field(default_factory=list)  # (path, body)
    connections: int = 0
    gone: int = 0  # clients that left in the middle of an answer
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc):
        self._server.close()

    async def _connection(self, reader, writer):
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            going = True
            while going:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.asked.append((path, json.loads(body) if body else {}))
                await self._answer(method, path, self.asked[-1][1], writer)
                going = self.keep_alive
        writer.close()

    async def _answer(self, method, path, body, writer):
        if self.refuse:
            return self._whole(writer, *self.refuse)
        if path == "/v1/models":
            return self._whole(writer, 200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
        if method != "POST" or path not in EVENTS:
            return self._whole(writer, 404, {"detail": "Not Found"})
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            async for event in self._events(path, body):
                raw = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
                for at in range(0, len(raw), self.tear):
                    piece = raw[at : at + self.tear]
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    await writer.drain()
            writer.write(b"0\r\n\r\n")
        except ConnectionError:
            self.gone += 1
            raise
        finally:
            self.at_once -= 1

    async def _events(self, path, body):
        make = EVENTS[path]
        most = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
        words = (self.words * most)[:most]
        for i in range(len(words)):
            if i == self.break_after:
                yield {"error": {"message": "out of luck", "code": 500}}
                break
            await asyncio.sleep(self.gap_s if i else self.first_s)
            yield make(self, body, words[: i + 1], i + 1 == len(words))
        else:
            if path != "/generate":
                yield {"choices": [], "usage": self.usage(body, len(words))}
        yield "[DONE]"

    def usage(self, body, new):
        usage = {"prompt_tokens": prompt_tokens(body), "completion_tokens": new}
        return usage if self.cached is None else usage | {"prompt_tokens_details": {"cached_tokens": self.cached}}

    def _whole(self, writer, status, value):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d Word\r\nContent-Length: %d\r\n\r\n%b" % (status, len(raw), raw))


def prompt_tokens(body):
    """Ids are counted; texts have no tokenizer here, and count a token a word."""
    if "messages" in body:
        return sum(len(message["content"].split()) for message in body["messages"])
    prompt = next(body[name] for name in ("prompt", "input_ids", "text") if name in body)
    return len(prompt.split() if isinstance(prompt, str) else prompt)


def generated(server, body, words, last):
    meta = server.usage(body, len(words)) | {
        "id": "x",
        "finish_reason": {"type": "length", "length": 9} if last else None,
    }
    if server.cached is not None:
        meta["cached_tokens"] = server.cached
    return {"text": "".join(words), "output_ids": list(range(len(words))), "meta_info": meta}


def completed(server, body, words, last):
    return {"choices": [{"index": 0, "text": words[-1], "finish_reason": "length" if last else None}], "usage": None}


def chatted(server, body, words, last):
    delta = {"content": words[-1]} if len(words) > 1 else {"role": "assistant", "content": words[-1]}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": "length" if last else None}]}


EVENTS = {"/generate": generated, "/v1/completions": completed, "/v1/chat/completions": chatted}
