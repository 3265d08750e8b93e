"""The routes of /v1, for the app to include: completions, chat, and the list of models, which has one."""

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ch07_sglang_radix.serving.openai.answering import no_such_model
from ch07_sglang_radix.serving.openai.chat import chat
from ch07_sglang_radix.serving.openai.completions import completions
from ch07_sglang_radix.serving.openai.errors import answers_errors
from ch07_sglang_radix.serving.openai.protocol import ChatBody, CompletionBody
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager

_BODIES, SCHEMAS = msgspec.json.schema_components(
    (CompletionBody, ChatBody), ref_template="#/components/schemas/{name}"
)  # SCHEMAS: for the app's OpenAPI description


def openai_router(manager: TokenizerManager) -> APIRouter:
    router, created = APIRouter(prefix="/v1", tags=["openai"]), int(time.time())

    @router.post("/completions", openapi_extra=_takes(_BODIES[0]))
    @answers_errors
    async def create_completion(request: Request) -> Response:
        return await completions(manager, request)

    @router.post("/chat/completions", openapi_extra=_takes(_BODIES[1]))
    @answers_errors
    async def create_chat_completion(request: Request) -> Response:
        return await chat(manager, request)

    @router.get("/models")
    @answers_errors
    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [await card()]})

    @router.get("/models/{model:path}")
    @answers_errors
    async def retrieve_model(request: Request) -> Response:
        name, one = request.path_params["model"], await card()
        if name != one["id"]:
            raise no_such_model(name, one["id"])
        return JSONResponse(one)

    async def card() -> dict[str, Any]:
        info = await manager.model_info()
        name = info["served_model_name"]
        return {
            "id": name, "object": "model", "created": created, "owned_by": "sglang", "root": name, "parent": None,
            "max_model_len": info["max_model_len"],
        }  # fmt: skip

    return router


def _takes(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
