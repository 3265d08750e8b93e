"""SGLang's own routes: /generate and the tokenizer's. Control is in control.py, OpenAI's in openai/.

POST /generate    {"text": ..., "sampling_params": {...}, "stream": true}
->                data: {"text": "A radix", "output_ids": [...], "meta_info": {...}}      cumulative: each has all so far
                  data: [DONE]
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from ch07_sglang_radix.serving.io_struct import Answer, GenerateRequest, RequestError
from ch07_sglang_radix.serving.prepare import is_several
from ch07_sglang_radix.serving.responses import DONE, EventStream, as_json, event, read_body, unless_gone
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | list[str]
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int | list[int]]
    model: str | None = None
    skip_special_tokens: bool = True


def native_router(manager: TokenizerManager) -> APIRouter:
    router = APIRouter()

    @router.post("/generate", openapi_extra=described(GenerateRequest))
    @router.put("/generate", include_in_schema=False)
    async def generate(request: Request) -> Response:
        wanted = await read_body(request, GenerateRequest)
        if not wanted.stream:
            return as_json(whole(await unless_gone(request.receive, manager.answer(wanted))))
        answers = manager.generate(wanted)
        first = await unless_gone(request.receive, anext(answers))
        return EventStream(_events(wanted, first, answers))

    @router.post("/tokenize", openapi_extra=described(TokenizeBody))
    @router.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody)
        tokenizer = _tokenizer(manager)
        encode = tokenizer.encode if body.add_special_tokens else tokenizer.encode_bare
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        try:
            ids = [encode(prompt) for prompt in prompts]
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        single = isinstance(body.prompt, str)
        count = [len(one) for one in ids]
        return as_json(
            {
                "tokens": ids[0] if single else ids, "count": count[0] if single else count,
                "max_model_len": manager.facts.get("context_length"),
            }
        )  # fmt: skip

    @router.post("/detokenize", openapi_extra=described(DetokenizeBody))
    @router.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody)
        tokenizer = _tokenizer(manager)
        several = bool(body.tokens) and all(isinstance(one, list) for one in body.tokens)
        lists = body.tokens if several else [body.tokens]
        most = manager.facts.get("vocab_size", 0)
        for one in lists:
            for token in one:
                if isinstance(token, list) or not 0 <= token < most:
                    raise RequestError(400, f"tokens are ids from 0 to {most - 1}, in a list or in lists")
        texts = [tokenizer.decode(one, body.skip_special_tokens) for one in lists]
        return as_json({"text": texts if several else texts[0]})

    return router


def described(kind: type) -> dict[str, Any]:
    """The body, for /openapi.json."""
    _, parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    (schema,) = (parts.pop(name) for name in [kind.__name__])
    schema = schema | {"$id": f"/schemas/{kind.__name__}", "$defs": parts}  # with an $id, #/$defs is its own
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def error_of(answer: Answer) -> RequestError | None:
    """Of an answer that the server itself ended: SGLang's finish_reason says which status that is."""
    reason = answer["meta_info"]["finish_reason"]
    if reason and reason["type"] == "abort" and "status_code" in reason:
        return RequestError(reason["status_code"], reason["message"], reason["err_type"])
    return None


def whole(answers: Any) -> Any:
    """Raises RequestError if one of them is an error."""
    for one in answers if isinstance(answers, list) else [answers]:
        if error := error_of(one):
            raise error
    return answers


async def _events(wanted: GenerateRequest, first: Answer, answers: AsyncIterator[Answer]) -> AsyncIterator[bytes]:
    async with aclosing(answers):
        several = is_several(wanted)
        answer: Answer | None = first
        while answer is not None:
            if error := error_of(answer):
                yield event({"error": {"message": error.message, "type": error.kind, "code": error.status}})
                break
            yield event(answer if several else {key: value for key, value in answer.items() if key != "index"})
            answer = await anext(answers, None)
        yield DONE


def _tokenizer(manager: TokenizerManager) -> Any:
    if manager.tokenizer is None:
        raise RequestError(400, "this server has no tokenizer; send and take token ids")
    return manager.tokenizer
