"""The routes of /v1, for the app to include: completions, chat, and the list of models: the base and its adapters."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from ch07_sglang_radix.serving.native import described
from ch07_sglang_radix.serving.openai.answering import adapters_of, no_such_model
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
        return as_json({"object": "list", "data": await cards()})

    @router.get("/models/{model:path}")
    @answers_errors
    async def retrieve_model(request: Request) -> Response:
        name, every = request.path_params["model"], await cards()
        for one in every:
            if name == one["id"]:
                return as_json(one)
        raise no_such_model(name, every[0]["id"])

    async def cards() -> list[dict[str, Any]]:
        """The base model, and its adapters."""
        info = await manager.model_info()
        name, most = info["served_model_name"], info["max_model_len"]
        alike = {"object": "model", "created": created, "owned_by": "sglang", "max_model_len": most}
        base = alike | {"id": name, "root": name, "parent": None}
        adapters = await adapters_of(manager)
        return [base, *(alike | {"id": one, "root": path, "parent": name} for one, path in adapters.items())]

    return router
