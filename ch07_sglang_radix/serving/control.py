"""Routes about the server itself: does it live, what is it, and what an operator tells it to do."""

from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from ch07_sglang_radix.serving.native import described
from ch07_sglang_radix.serving.responses import as_json, read_body
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager


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
    """capacity_of_str_len: tokens that a prompt of the session may have, 0 is any number. The others of SGLang's are refused."""

    capacity_of_str_len: int = 0
    session_id: str | None = None
    streaming: bool = False
    timeout: float | None = None

    def __post_init__(self):
        if self.capacity_of_str_len < 0:
            raise ValueError(f"capacity_of_str_len={self.capacity_of_str_len} must be at least 0")
        if self.streaming:
            raise ValueError(
                "streaming=true: a session's prompt comes whole here; leave it out, and send a request a turn"
            )
        if self.timeout is not None:
            raise ValueError("timeout: a session stays open here until /close_session; leave it out")


class CloseBody(msgspec.Struct, forbid_unknown_fields=True):
    session_id: str


def control_router(manager: TokenizerManager) -> APIRouter:
    router = APIRouter()

    # --- probes

    @router.get("/health")
    @router.get("/health_generate")
    async def health() -> Response:
        """A token comes back: 200, else 503. It is counted nowhere."""
        return Response(status_code=200 if await manager.healthy() else 503)

    @router.get("/ready")
    async def ready() -> Response:
        """Would a request be taken now? Nothing is computed to find out."""
        return as_json({"status": manager.state}, 200 if manager.state == "ready" else 503)

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

    # --- sessions

    @router.post("/open_session", openapi_extra=described(SessionBody))
    async def open_session(request: Request) -> Response:
        body = await read_body(request, SessionBody)
        return as_json(manager.sessions.open(body.session_id, body.capacity_of_str_len))

    @router.post("/close_session", openapi_extra=described(CloseBody))
    async def close_session(request: Request) -> Response:
        body = await read_body(request, CloseBody)
        closed: Any = manager.sessions.close(body.session_id)
        return as_json(closed)

    return router
