"""The same server over gRPC: token ids in, token ids out, one stream an answer. SGLang's name for it is SglangScheduler.

    server = await serve_grpc(manager, host, port)      # on the event loop of the HTTP server
    ...
    await server.stop(grace=5)

What HTTP has as a status is a gRPC code here: 400 INVALID_ARGUMENT, 401 UNAUTHENTICATED, 503 UNAVAILABLE, 500 INTERNAL. A
client that hangs up cancels the call, which closes the iterator, which aborts the request. Keys are those of HTTP, in the metadata
`authorization: Bearer KEY`. Methods are registered by hand: six lines instead of a second generated file.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
import msgspec

from ch07_sglang_radix.serving.grpc import sglang_scheduler_pb2 as pb
from ch07_sglang_radix.serving.io_struct import Answer, GenerateRequest, RequestError
from ch07_sglang_radix.serving.security import Guard, has_key
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager

SERVICE = "sglang.grpc.scheduler.SglangScheduler"
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 503: grpc.StatusCode.UNAVAILABLE,
}  # fmt: skip
# name: (who may call it, its request, its response)
METHODS: dict[str, tuple[Guard, type, type]] = {
    "Generate": ("key", pb.GenerateRequest, pb.GenerateResponse),
    "Abort": ("admin", pb.AbortRequest, pb.AbortResponse),
    "HealthCheck": ("open", pb.HealthCheckRequest, pb.HealthCheckResponse),
    "GetModelInfo": ("key", pb.GetModelInfoRequest, pb.GetModelInfoResponse),
    "GetServerInfo": ("key", pb.GetServerInfoRequest, pb.GetServerInfoResponse),
    "FlushCache": ("admin", pb.FlushCacheRequest, pb.FlushCacheResponse),
}
CONSTRAINTS = {
    "regex": "regex",
    "json_schema": "json_schema",
    "ebnf_grammar": "ebnf",
}  # there: SGLang's name of it in HTTP


class SglangScheduler:
    """One method a call of the service; each gets a request and returns, or yields, responses."""

    def __init__(self, manager: TokenizerManager):
        self.manager = manager

    async def Generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        wanted = GenerateRequest(
            input_ids=list(request.tokenized.input_ids), sampling_params=_params(request.sampling_params),
            rid=request.request_id or None, stream=request.stream,
        )  # fmt: skip
        told: dict[int, int] = {}  # tokens of each answer so far
        async with aclosing(self.manager.generate(wanted)) as answers:
            async for answer in answers:
                index, meta = answer["index"], answer["meta_info"]
                reason = meta["finish_reason"]
                if reason and "status_code" in reason:
                    raise RequestError(reason["status_code"], reason["message"], reason["err_type"])
                new = answer["output_ids"][told.get(index, 0) :]
                told[index] = len(answer["output_ids"])
                if request.stream and new:
                    yield pb.GenerateResponse(request_id=request.request_id, chunk=_chunk(answer, new))
                if reason:
                    yield pb.GenerateResponse(request_id=request.request_id, complete=_complete(answer))

    async def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        ended = await self.manager.abort(request.request_id)
        return pb.AbortResponse(success=bool(ended), message=f"{ended} ended")

    async def HealthCheck(self, request: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(healthy=await self.manager.healthy(), message=self.manager.state)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
        info = await self.manager.model_info()
        return pb.GetModelInfoResponse(
            **{field.name: info[field.name] for field in pb.GetModelInfoResponse.DESCRIPTOR.fields}
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(json=msgspec.json.encode(await self.manager.server_info()).decode())

    async def FlushCache(self, request: pb.FlushCacheRequest) -> pb.FlushCacheResponse:
        done = await self.manager.flush_cache()
        return pb.FlushCacheResponse(success=done, message="" if done else "requests are waiting or running")


def _params(given: pb.SamplingParams) -> dict[str, Any]:
    """SGLang's dictionary.."""
    params: dict[str, Any] = {}
    for field, value in given.ListFields():
        name = CONSTRAINTS.get(field.name, field.name)
        params[name] = list(value) if field.name in ("stop", "stop_token_ids") else value
    if given.logit_bias:
        params["logit_bias"] = dict(given.logit_bias)
    # ListFields leaves zeros out: temperature 0 has to be said, the others are meant as defaults
    return {"temperature": 0.0} | params


def _chunk(answer: Answer, new: list[int]) -> pb.GenerateStreamChunk:
    meta = answer["meta_info"]
    return pb.GenerateStreamChunk(
        token_ids=new, prompt_tokens=meta["prompt_tokens"], completion_tokens=meta["completion_tokens"],
        cached_tokens=meta["cached_tokens"], index=answer["index"],
    )  # fmt: skip


def _complete(answer: Answer) -> pb.GenerateComplete:
    meta, reason = answer["meta_info"], answer["meta_info"]["finish_reason"]
    matched = reason.get("matched")
    stop = {} if matched is None else {"matched_stop_str" if isinstance(matched, str) else "matched_token_id": matched}
    return pb.GenerateComplete(
        output_ids=answer["output_ids"], finish_reason=reason["type"], prompt_tokens=meta["prompt_tokens"],
        completion_tokens=meta["completion_tokens"], cached_tokens=meta["cached_tokens"], index=answer["index"], **stop,
    )  # fmt: skip


async def serve_grpc(manager: TokenizerManager, host: str, port: int) -> tuple[grpc.aio.Server, int]:
    """(a server that runs, its port). Raises ValueError, in one line, if the port is in use."""
    server = grpc.aio.server(
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", manager.args.max_body_bytes)]
    )
    service = SglangScheduler(manager)
    handlers = {}
    for name, (guard, request, response) in METHODS.items():
        call, coders = getattr(service, name), (request.FromString, response.SerializeToString)
        if name == "Generate":
            handlers[name] = grpc.unary_stream_rpc_method_handler(_streaming(call, guard, manager), *coders)
        else:
            handlers[name] = grpc.unary_unary_rpc_method_handler(_single(call, guard, manager), *coders)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        bound = 0
    if not bound:
        raise ValueError(f"{host}:{port} cannot be served over gRPC; another --grpc-port, or 0 for any")
    await server.start()
    return server, bound


def _single(call: Callable, guard: Guard, manager: TokenizerManager) -> Callable:
    async def answered(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            _check_key(context, guard, manager)
            return await call(request)
        except RequestError as error:
            await _refuse(context, error)

    return answered


def _streaming(call: Callable, guard: Guard, manager: TokenizerManager) -> Callable:
    async def answered(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            _check_key(context, guard, manager)
            async with aclosing(call(request)) as responses:
                async for response in responses:
                    yield response
        except RequestError as error:
            await _refuse(context, error)

    return answered


def _check_key(context: grpc.aio.ServicerContext, guard: Guard, manager: TokenizerManager) -> None:
    metadata = dict(context.invocation_metadata() or ())
    if not has_key(guard, str(metadata.get("authorization", "")), manager.args):
        raise RequestError(401, "Unauthorized")


async def _refuse(context: grpc.aio.ServicerContext, error: RequestError) -> None:
    await context.abort(CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message)
