"""The routes of /v1, for the app to include: completions, chat, and the list of models, which has one."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from ch07_sglang_radix.serving.native import described
from ch07_sglang_radix.serving.openai.answering import no_such_model
from ch07_sglang_radix.serving.openai.chat import chat
from ch07_sglang_radix.serving.openai.completions import completions
from ch07_sglang_radix.serving.openai.errors import answers_errors
from ch07_sglang_radix.serving.openai.protocol import ChatBody, CompletionBody
from ch07_sglang_radix.serving.responses import as_json
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager


def openai_router(manager: TokenizerManager) -> APIRouter:
    router, created = APIRouter(prefix="/v1"), int(time.time())

    @router.post("/completions", openapi_extra=described(CompletionBody))
    @answers_errors
    async def create_completion(request: Request) -> Response:
        return await completions(manager, request)

    @router.post("/chat/completions", openapi_extra=described(ChatBody))
    @answers_errors
    async def create_chat_completion(request: Request) -> Response:
        return await chat(manager, request)

    @router.get("/models")
    @answers_errors
    async def list_models(request: Request) -> Response:
        return as_json({"object": "list", "data": [await card()]})

    @router.get("/models/{model:path}")
    @answers_errors
    async def retrieve_model(request: Request) -> Response:
        name, one = request.path_params["model"], await card()
        if name != one["id"]:
            raise no_such_model(name, one["id"])
        return as_json(one)

    async def card() -> dict[str, Any]:
        info = await manager.model_info()
        name = info["served_model_name"]
        return {
            "id": name, "object": "model", "created": created, "owned_by": "sglang", "root": name, "parent": None,
            "max_model_len": info["max_model_len"],
        }  # fmt: skip

    return router
