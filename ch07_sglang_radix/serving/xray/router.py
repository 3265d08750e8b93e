"""The page of a running server: GET /xray (and /, which leads there), its files, and /xray/events, a stream of the events (SSE).

    feed = Feed(watch)                       # watch(on) reaches Recorder.start and Recorder.stop in the scheduler's process
    app.include_router(xray_router(feed, manager.tokenizer))
    feed.publish(event)                      # with every line that the recorder publishes
    feed.close()                             # when the server goes, or the open streams would keep it

What the page shows are everybody's prompts: where a server has keys, these routes must ask for one.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse

from ch07_sglang_radix.serving.xray.feed import MOST_PAGES, Feed
from ch07_sglang_radix.serving.xray.page import FILES, HEADERS, PAGE
from common.text.tokenizer import Tokenizer
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

SYSTEM, USER, ASSISTANT = "\ue000", "\ue001", "\ue002"  # where the page puts its words; characters that no template has


def xray_router(feed: Feed, tokenizer: Tokenizer | None = None) -> APIRouter:
    """tokenizer: its chat template is told to the page, whose presets are conversations; without one they are plain text."""
    router = APIRouter(include_in_schema=False)
    chat = _chat(tokenizer)

    @router.get("/")
    async def front() -> Response:
        return RedirectResponse("xray")

    @router.get("/xray")
    async def page() -> Response:
        return Response(PAGE.body, media_type=PAGE.content_type, headers=HEADERS)

    @router.get("/xray/source")
    async def source() -> Response:
        return JSONResponse({"kind": "live", "chat": chat, "system": SYSTEM_PROMPT}, headers=HEADERS)

    @router.get("/xray/events")
    async def events() -> Response:
        if feed.full:
            return _refused(503, f"{MOST_PAGES} X-ray pages are open; close one")
        return StreamingResponse(_stream(feed), media_type="text/event-stream", headers=HEADERS)

    @router.get("/xray/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            return _refused(404, "the page has no such file")
        return Response(FILES[name].body, media_type=FILES[name].content_type, headers=HEADERS)

    return router


async def _stream(feed: Feed) -> AsyncIterator[bytes]:
    """The events as SSE; a comment where nothing has happened for long."""
    async with aclosing(feed.subscribe()) as told:
        async for event in told:
            yield b"data: " + event + b"\n\n" if event else b": still here\n\n"


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status, headers=HEADERS)


def _chat(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """{"first": the text of system and user message, "next": what a further turn adds}, with places for their words."""
    if tokenizer is None or not tokenizer.has_chat_template:
        return None
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    more = [*turns, {"role": "assistant", "content": ASSISTANT}, {"role": "user", "content": USER}]
    try:
        first, both = tokenizer.render_chat(turns), tokenizer.render_chat(more)
    except ValueError:  # a template that wants no system message, say
        return None
    return {"first": first, "next": both[len(first) :]} if both.startswith(first) else None
