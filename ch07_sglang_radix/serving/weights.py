"""Routes about weights and memory, under SGLang's names: an operator's or a trainer's, with the admin key.

    POST /pause_generation {"mode": "retract"}                        control.py
    POST /update_weights_from_disk {"model_path": folder}       ->    {"success": true, "message": ..., "num_paused_requests": 3}
    POST /continue_generation

What cannot be done is status 400 with success false, and the old weights answer. A path is read by the server, on each of its
hosts: who has the admin key says which. SGLang 0.5.23's update_weights_from_tensor takes pickles, in base64, one a rank; here it is
one safetensors file of whole tensors, in base64.
"""

import asyncio
import base64
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.native import described
from ch07_sglang_radix.serving.responses import as_json, read_body
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from ch07_sglang_radix.weight_calls import group_to_join

# a trainer's group counts ranks, and each replica counts its own
OF_ONE_WILL = ("update_weights_from_distributed", "init_weights_update_group", "destroy_weights_update_group")


class FromDisk(msgspec.Struct, forbid_unknown_fields=True):
    model_path: str
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class FromTensor(msgspec.Struct, forbid_unknown_fields=True):
    """serialized_named_tensors: one text, base64 of a safetensors file."""

    serialized_named_tensors: list[str]
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class FromDistributed(msgspec.Struct, forbid_unknown_fields=True):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class InitGroup(msgspec.Struct, forbid_unknown_fields=True):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "gloo"


class DestroyGroup(msgspec.Struct, forbid_unknown_fields=True):
    group_name: str = "weight_update_group"


class Version(msgspec.Struct, forbid_unknown_fields=True):
    new_version: str
    abort_all_requests: bool = True


class ByName(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    truncate_size: int = 100


class Check(msgspec.Struct, forbid_unknown_fields=True):
    action: str = "checksum"


class Tags(msgspec.Struct, forbid_unknown_fields=True):
    tags: list[str] | None = None


# op, which is also the route -> its body
BODIES: dict[str, type] = {
    "update_weights_from_disk": FromDisk, "update_weights_from_distributed": FromDistributed,
    "init_weights_update_group": InitGroup, "destroy_weights_update_group": DestroyGroup, "update_weight_version": Version,
    "weights_checker": Check, "release_memory_occupation": Tags, "resume_memory_occupation": Tags,
}  # fmt: skip


def weights_router(manager: TokenizerManager) -> APIRouter:
    router = APIRouter()
    for op, body in BODIES.items():
        router.add_api_route(
            f"/{op}", _does(manager, op, body), methods=["POST"], name=op, openapi_extra=described(body)
        )

    @router.post("/update_weights_from_tensor", openapi_extra=described(FromTensor))
    async def update_weights_from_tensor(request: Request) -> Response:
        given = msgspec.structs.asdict(await read_body(request, FromTensor))
        texts = given.pop("serialized_named_tensors")
        if len(texts) != 1:
            return _failed(
                f"serialized_named_tensors has {len(texts)} items; give one, of whole tensors: each rank takes its part"
            )
        try:
            data = base64.b64decode(texts[0], validate=True)
        except ValueError as error:  # binascii.Error is one, and so is a letter beyond ASCII
            return _failed(f"serialized_named_tensors: {error}; give a safetensors file in base64")
        return await _told(manager, "update_weights_from_tensor", named_tensors=data, **given)

    @router.post("/get_weights_by_name", openapi_extra=described(ByName))
    @router.get("/get_weights_by_name", include_in_schema=False)
    async def get_weights_by_name(request: Request) -> Response:
        """Rows of a tensor, and `null` never: what there is not is 400."""
        body = await read_body(request, ByName)
        return as_json(await exchange(manager, "get_weights_by_name", **msgspec.structs.asdict(body)))

    @router.get("/get_weight_version")
    @router.get("/weight_version", include_in_schema=False)
    async def get_weight_version() -> Response:
        return as_json({"weight_version": (await manager.control("server_info"))["weight_version"]})

    return router


async def exchange(manager: TokenizerManager, op: str, **arguments: Any) -> Any:
    """Have the engine do it (weight_calls.py), and remember what is away: requests are refused meanwhile. Raises RequestError."""
    size = manager.args.engine.dp_size
    if size > 1 and op in OF_ONE_WILL:
        raise RequestError(
            400, f"{op} with dp_size={size}: a trainer's group would have {size} ranks of each number; use "
            f"update_weights_from_disk or update_weights_from_tensor, or start {size} servers behind the router",
        )  # fmt: skip
    if op == "init_weights_update_group":  # here, where others are answered meanwhile
        try:
            arguments = await asyncio.to_thread(group_to_join, **arguments, ranks=manager.args.engine.ranks)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
    before = manager.away
    if op == "release_memory_occupation":
        manager.away = ["memory"]  # from now on, and not from when the reply comes
    try:
        told = await manager.control(op, **arguments)
    except RequestError:  # but whoever is cancelled does not know what has become of it, and stays away
        if op == "release_memory_occupation" and size > 1 and not before:
            with suppress(RequestError):  # a replica was busy: the others have done it, and must not be asked asleep
                await manager.control("resume_memory_occupation", **arguments)
        manager.away = before
        raise
    if op.endswith("memory_occupation"):
        manager.away = told["away"]
    return told


def _does(manager: TokenizerManager, op: str, body: type) -> Any:
    async def route(request: Request) -> Response:
        return await _told(manager, op, **msgspec.structs.asdict(await read_body(request, body)))

    return route


async def _told(manager: TokenizerManager, op: str, **arguments: Any) -> Response:
    try:
        return as_json(await exchange(manager, op, **arguments))
    except RequestError as error:
        if error.status != 400:
            raise
        return _failed(error.message)


def _failed(message: str) -> Response:
    """SGLang's two words, and where all other routes here say what is wrong."""
    return as_json({"success": False, "message": message, "error": {"message": message}}, 400)
