"""One request -> one HTTP response, whole or as server-sent events: what a completion and a chat have in common.

The first answer is awaited before the status is sent, so that what is refused is an HTTP error even in a stream; later
errors can only be an event.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request, Response

from ch07_sglang_radix.serving.io_struct import Answer, GenerateRequest, RequestError, SessionParams
from ch07_sglang_radix.serving.openai.errors import APIError, of_abort, of_request_error
from ch07_sglang_radix.serving.openai.protocol import DEFAULT_MODEL, Sampled
from ch07_sglang_radix.serving.responses import DONE, EventStream, as_json, event, unless_gone
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.text.detokenizer import REPLACEMENT
from common.text.tokenizer import Tokenizer

Choice = dict[str, Any]


class Reply(Protocol):
    """What an answer looks like. head: id, object, created, model; n: answers a prompt; renamed: of parameters, for errors."""

    head: dict[str, Any]
    n: int
    renamed: Mapping[str, str]

    def whole(self, answer: Answer) -> Choice: ...

    def chunks(self, answer: Answer) -> list[Choice]:
        """What a stream adds to this choice when its answer has become this one."""
        ...


async def respond(
    manager: TokenizerManager, request: GenerateRequest, body: Sampled, reply: Reply, http: Request
) -> Response:
    answers = manager.generate(request)
    try:
        if not request.stream:
            return as_json(_whole(await unless_gone(http.receive, _collected(answers)), reply))
        first = await unless_gone(http.receive, anext(answers))
    except RequestError as error:
        raise of_request_error(error, body.__struct_fields__, reply.renamed) from None
    if error := of_abort(first):
        await answers.aclose()
        raise error
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return EventStream(_events(answers, first, reply, with_usage))


async def _collected(answers: AsyncIterator[Answer]) -> dict[int, Answer]:
    """{index: the answer}. Raises APIError if one of them ends in an error; the others are aborted then."""
    found = {}
    async with aclosing(answers):
        async for answer in answers:
            if error := of_abort(answer):
                raise error
            found[answer["index"]] = answer
    return found


def _whole(answers: dict[int, Answer], reply: Reply) -> dict[str, Any]:
    choices = [reply.whole(answers[i]) for i in sorted(answers)]
    metas = {i: answer["meta_info"] for i, answer in answers.items()}
    return reply.head | {"choices": choices, "usage": usage(metas, reply.n)}


async def _events(
    answers: AsyncIterator[Answer], first: Answer, reply: Reply, with_usage: bool
) -> AsyncIterator[bytes]:
    no_usage = {"usage": None} if with_usage else {}
    metas = {}
    async with aclosing(answers):
        answer: Answer | None = first
        while answer is not None:
            if error := of_abort(answer):
                yield event(error.body) + DONE
                return
            metas[answer["index"]] = answer["meta_info"]
            chunks = [event(reply.head | {"choices": [choice]} | no_usage) for choice in reply.chunks(answer)]
            if chunks:
                yield b"".join(chunks)
            answer = await anext(answers, None)
    last = event(reply.head | {"choices": [], "usage": usage(metas, reply.n)}) if with_usage else b""
    yield last + DONE


def usage(metas: Mapping[int, Mapping[str, Any]], n: int) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once for its n answers, and so does what was cached of it.

    SGLang tells cached tokens only with --enable-cache-report, and reasoning_tokens beside the sums.
    """
    prompts = {i // n: metas[i] for i in sorted(metas, reverse=True)}.values()  # of its answers the first
    prompt, completion = _sum(prompts, "prompt_tokens"), _sum(metas.values(), "completion_tokens")
    counted: dict[str, Any] = {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": _sum(prompts, "cached_tokens")},
    }  # fmt: skip
    if any("reasoning_tokens" in meta for meta in metas.values()):
        counted["completion_tokens_details"] = {"reasoning_tokens": _sum(metas.values(), "reasoning_tokens")}
    return counted


def _sum(metas: Iterable[Mapping[str, Any]], key: str) -> int:
    return sum(meta.get(key, 0) for meta in metas)


# --- before the request


async def check_model(manager: TokenizerManager, body: Sampled) -> tuple[str, str | list[str | None] | None]:
    """The name of the model that answers, and its adapter's: what the body says, unless the model is one, base:name or the name
    alone, as /v1/models lists it. Raises APIError, 404, for any other.
    """
    served = (await manager.model_info())["served_model_name"]
    if body.model in (served, DEFAULT_MODEL):
        return served, body.lora_path
    adapter = body.model.removeprefix(f"{served}:")
    if adapter not in await adapters_of(manager):
        raise no_such_model(body.model, served)
    return f"{served}:{adapter}", adapter


async def adapters_of(manager: TokenizerManager) -> dict[str, str]:
    """{name: folder} of those that are loaded."""
    if not manager.args.engine.enable_lora:
        return {}
    try:
        return await manager.control("lora_adapters")
    except RequestError as error:
        raise of_request_error(error, (), {}) from None


def no_such_model(name: str, served: str) -> APIError:
    message = f"the model {name!r} does not exist; {served!r} is served here"
    return APIError(message, "model", status=404, code="model_not_found")


def tokenizer_of(manager: TokenizerManager) -> Tokenizer:
    if manager.tokenizer is None:
        if manager.state == "starting":
            raise APIError("the server is starting", status=503, kind="service_unavailable")
        raise APIError("this server has no tokenizer, so no text; use /generate with input_ids")
    return manager.tokenizer


def room_for(manager: TokenizerManager, ids: Sequence[int], session: SessionParams | None) -> int:
    """The most tokens that can follow, for an answer that is as long as it likes."""
    try:
        return manager.room_for(ids, session)
    except RequestError as error:
        raise of_request_error(error, (), {}) from None


def head(rid: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": rid, "object": kind, "created": int(time.time()), "model": model}


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


# --- of both


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; half a character as OpenAI writes it, bytes:\\xe9, so that different tokens have different names."""
    text = tokenizer.token_text(token)
    if REPLACEMENT not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))


def ending(finish_reason: Mapping[str, Any], called: bool = False) -> dict[str, Any]:
    """finish_reason and matched_stop of a choice."""
    kind = finish_reason["type"]
    return {
        "finish_reason": "tool_calls" if called and kind == "stop" else kind,
        "matched_stop": finish_reason.get("matched"),
    }
