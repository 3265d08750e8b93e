"""Routes about the server itself: does it live, what is it, and what an operator tells it to do."""

from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from ch07_sglang_radix.serving.native import described
from ch07_sglang_radix.serving.responses import as_json, read_body
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.values import real

MAX_TIMEOUT_S = 30 * 86400.0  # of an idle session


class AbortBody(msgspec.Struct, forbid_unknown_fields=True):
    rid: str | None = None
    abort_all: bool = False


class PauseBody(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class StepBody(msgspec.Struct, forbid_unknown_fields=True):
    steps: int = 1

    def __post_init__(self):
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps={self.steps} must be from 1 to 1000")


class ProfileBody(msgspec.Struct, forbid_unknown_fields=True):
    """Where the traces lie is the server's to say (--profile-dir): no path comes from a request."""

    record_shapes: bool = False
    with_stack: bool = False
    num_steps: int | None = None  # then it ends by itself


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class SessionBody(msgspec.Struct, forbid_unknown_fields=True):
    """capacity_of_str_len: tokens that a prompt of the session may have, 0 is any number. streaming: one turn at a time, and its
    K and V stay. timeout: seconds without a request, after which it is closed; null: never."""

    capacity_of_str_len: int = 0
    session_id: str | None = None
    streaming: bool = False
    timeout: float | None = None

    def __post_init__(self):
        if self.capacity_of_str_len < 0:
            raise ValueError(f"capacity_of_str_len={self.capacity_of_str_len} must be at least 0")
        if self.timeout is not None:
            real("timeout", self.timeout, 0, MAX_TIMEOUT_S, open_below=True)


class CloseBody(msgspec.Struct, forbid_unknown_fields=True):
    session_id: str


class LoadAdapterBody(msgspec.Struct, forbid_unknown_fields=True):
    """lora_path: a folder of the server's, where peft has saved it. pinned: it is never forgotten to make room."""

    lora_name: str
    lora_path: str
    pinned: bool = False


class UnloadAdapterBody(msgspec.Struct, forbid_unknown_fields=True):
    lora_name: str


def control_router(manager: TokenizerManager) -> APIRouter:
    router = APIRouter()

    # --- probes

    @router.get("/health")
    @router.get("/health_generate")
    async def health() -> Response:
        """A token comes back: 200, else 503. It is counted nowhere. With several replicas the body says which have died."""
        status = 200 if await manager.healthy() else 503
        return as_json(told, status) if (told := manager.replicas()) else Response(status_code=status)

    @router.get("/ready")
    async def ready() -> Response:
        """Would a request be taken now? Nothing is computed to find out."""
        status = "asleep" if manager.state == "ready" and manager.away else manager.state
        return as_json({"status": status, **manager.replicas()}, 200 if status == "ready" else 503)

    # --- what it is

    @router.get("/model_info")
    @router.get("/get_model_info", include_in_schema=False)
    async def model_info() -> Response:
        return as_json(await manager.model_info())

    @router.get("/server_info")
    @router.get("/get_server_info", include_in_schema=False)
    async def server_info() -> Response:
        return as_json(await manager.server_info())

    # --- what an operator wants

    @router.post("/flush_cache")
    @router.get("/flush_cache", include_in_schema=False)
    async def flush_cache() -> Response:
        done = await manager.flush_cache()
        said = "Cache flushed." if done else "Nothing flushed: requests are waiting or running."
        return Response(said + "\n", 200 if done else 400, media_type="text/plain")

    @router.post("/abort_request", openapi_extra=described(AbortBody))
    async def abort_request(request: Request) -> Response:
        body = await read_body(request, AbortBody)
        return as_json({"aborted": await manager.abort(body.rid, body.abort_all)})

    @router.post("/pause_generation", openapi_extra=described(PauseBody))
    async def pause_generation(request: Request) -> Response:
        body = await read_body(request, PauseBody)
        return as_json({"status": "paused", "requests": await manager.pause(body.mode)})

    @router.post("/continue_generation")
    async def continue_generation(request: Request) -> Response:
        await read_body(request, Nothing)
        await manager.resume()
        return as_json({"status": "running"})

    @router.post("/step_generation", openapi_extra=described(StepBody))
    async def step_generation(request: Request) -> Response:
        """Ours: while paused, so many steps."""
        return as_json({"requests": await manager.step((await read_body(request, StepBody)).steps)})

    @router.post("/start_profile", openapi_extra=described(ProfileBody))
    async def start_profile(request: Request) -> Response:
        body = await read_body(request, ProfileBody)
        return as_json({"profile": await manager.start_profile(**msgspec.structs.asdict(body))})

    @router.post("/stop_profile")
    async def stop_profile(request: Request) -> Response:
        await read_body(request, Nothing)
        return as_json({"file": await manager.stop_profile()})

    # --- adapters

    @router.post("/load_lora_adapter", openapi_extra=described(LoadAdapterBody))
    async def load_lora_adapter(request: Request) -> Response:
        return await change("load_lora_adapter", await read_body(request, LoadAdapterBody))

    @router.post("/unload_lora_adapter", openapi_extra=described(UnloadAdapterBody))
    async def unload_lora_adapter(request: Request) -> Response:
        """Nobody gets it any more; the answer comes when its last request has ended."""
        return await change("unload_lora_adapter", await read_body(request, UnloadAdapterBody))

    async def change(op: str, body: LoadAdapterBody | UnloadAdapterBody) -> Response:
        said = await manager.control(op, **msgspec.structs.asdict(body))
        if said["success"]:
            return as_json(said)
        return as_json(
            said | {"error": {"message": said["error_message"]}}, 400
        )  # SGLang's words, and those of all routes here

    # --- sessions

    @router.post("/open_session", openapi_extra=described(SessionBody))
    async def open_session(request: Request) -> Response:
        body = await read_body(request, SessionBody)
        name = manager.sessions.open(body.session_id, body.capacity_of_str_len, body.streaming, body.timeout)
        return as_json(name)

    @router.post("/close_session", openapi_extra=described(CloseBody))
    async def close_session(request: Request) -> Response:
        body = await read_body(request, CloseBody)
        closed: Any = manager.sessions.close(body.session_id)
        return as_json(closed)

    return router
