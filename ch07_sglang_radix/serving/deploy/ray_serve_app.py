"""Replicas of the engine under Ray Serve, each over as many Ray nodes as its ranks need.

    serve run ch07_sglang_radix.serving.deploy.ray_serve_app:build_app tp_size=2 max_replicas=4
    curl http://127.0.0.1:8000/generate -d '{"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 20}}'

    a replica   one placement group of tp_size bundles, PACK: on one Ray node if it has the room, else on few
      bundle 0    the replica itself: node 0 of the engine (common/distributed/nodes.py), which answers
      bundle i    an actor Follower: node i

Serve starts as many replicas as the requests in flight ask for, asks each whether it is well (check_health), replaces one that is
not, and lets what runs end before it stops one. A rank that dies ends its engine, so Serve replaces the replica as a whole.
Ray is an extra: requirements-deploy.txt.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ch07_sglang_radix import Engine
from common.distributed.spawn import lost_node
from common.values import real, whole

DRAIN_S = 60.0  # that running requests have before Serve kills a replica
HEALTH_EVERY_S = 5.0
api = FastAPI()


# above the classes: Ray sends those to its workers with what stands here when they are made


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    async for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


def _resources(arguments: dict[str, Any]) -> dict[str, int]:
    """Of a rank: a GPU, or what a CPU rank takes."""
    return {"num_cpus": 1, "num_gpus": 0 if arguments.get("device") == "cpu" else 1}


def _free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


@ray.remote(max_restarts=0)
class Follower:
    """Node i of an engine: computes what node 0 says, until that leaves."""

    def follow(self, arguments: dict[str, Any]) -> None:
        with Engine(**arguments) as engine:
            engine.follow()

    def where(self) -> str:
        return ray.get_runtime_context().get_node_id()


@serve.deployment
@serve.ingress(api)
class Replica:
    """One engine, and the actors of its other nodes."""

    def __init__(self, arguments: dict[str, Any]):
        nodes = arguments.get("tp_size", 1)
        self.where = [ray.get_runtime_context().get_node_id()]
        self.followers: list[Any] = []
        if nodes > 1:
            meet = {"nnodes": nodes, "dist_init_addr": f"{ray.util.get_node_ip_address()}:{_free_port()}"}
            for i in range(1, nodes):
                bundle = PlacementGroupSchedulingStrategy(
                    ray.util.get_current_placement_group(), placement_group_bundle_index=i
                )
                follower = Follower.options(scheduling_strategy=bundle, **_resources(arguments)).remote()
                self.where.append(ray.get(follower.where.remote()))
                follower.follow.remote(arguments | meet | {"node_rank": i})
                self.followers.append(follower)
            arguments = arguments | meet
        self.engine = Engine(**arguments)

    def check_health(self) -> None:
        """Serve asks from time to time; what is raised here ends this replica, and another one is started."""
        what = next(filter(None, lost_node()), None)
        if what:
            raise RuntimeError(what)

    @api.post("/generate")
    async def generate(self, request: Request) -> Response:
        """The body of launch_server's /generate: text or input_ids, sampling_params, stream."""
        try:
            body = json.loads(await request.body())
            stream = body.pop("stream", False)
            prompt, ids = body.pop("text", None), body.pop("input_ids", None)
            answer = await self.engine.async_generate(prompt, input_ids=ids, stream=stream, **body)
        except (ValueError, TypeError, AttributeError) as error:
            return JSONResponse({"error": {"message": str(error).partition("\n")[0]}}, 400)
        return StreamingResponse(_events(answer), media_type="text/event-stream") if stream else JSONResponse(answer)

    @api.get("/server_info")
    async def server_info(self) -> Response:
        info = await asyncio.to_thread(self.engine.get_server_info)
        pids = [pid for _, pid in self.engine.scheduler.tp.peers] or [os.getpid()]
        return JSONResponse(info | {"ray_nodes": self.where, "pids": pids})

    def __del__(self):
        """Serve has drained this replica."""
        if engine := getattr(self, "engine", None):
            engine.shutdown()


def build_app(args: dict[str, Any]) -> serve.Application:
    """args: those of Engine; besides cpus_per_rank (1), min_replicas (1), max_replicas (1), target_ongoing_requests (8).

    Raises ValueError for values that cannot be. From `serve run ... name=value` they come as texts.
    """
    args = {name: _value(value) for name, value in args.items()}
    cpus = real("cpus_per_rank", args.pop("cpus_per_rank", 1), 0, 4096, open_below=True)
    least = whole("min_replicas", args.pop("min_replicas", 1), 1)
    most = whole("max_replicas", args.pop("max_replicas", least), least)
    target = real("target_ongoing_requests", args.pop("target_ongoing_requests", 8), 0, 1 << 20, open_below=True)
    ranks = whole("tp_size", args.get("tp_size", 1), 1)
    resources = _resources(args)
    bundle = {"CPU": float(cpus)} | ({"GPU": 1.0} if resources["num_gpus"] else {})
    return Replica.options(
        ray_actor_options=resources, placement_group_bundles=[bundle] * ranks, placement_group_strategy="PACK",
        autoscaling_config={
            "min_replicas": least, "max_replicas": most, "target_ongoing_requests": target,
            "upscale_delay_s": 5, "downscale_delay_s": 60,
        },
        max_ongoing_requests=max(1, round(4 * target)), health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=2 * HEALTH_EVERY_S, graceful_shutdown_timeout_s=DRAIN_S, graceful_shutdown_wait_loop_s=1.0,
    ).bind(args)  # fmt: skip


def _value(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
