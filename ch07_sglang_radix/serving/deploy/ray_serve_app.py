"""Replicas of the engine under Ray Serve, each over as many Ray nodes as its ranks need.

    serve run ch07_sglang_radix.serving.deploy.ray_serve_app:build_app tp_size=2 max_replicas=4
    curl http://127.0.0.1:8000/generate -d '{"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 20}}'

    a replica   one placement group of tp_size bundles, PACK: on one Ray node if it has the room, else on few
      bundle 0    the replica itself: node 0 of the engine (common/distributed/nodes.py), which answers
      bundle i    an actor Follower: node i

Serve starts as many replicas as the requests in flight ask for, asks each whether it is well (check_health), replaces one that is
not, and lets what runs end before it stops one. A rank that dies ends its engine, so Serve replaces the replica as a whole.
A replica answers what launch_server answers, /ready, /health and /metrics included: it is the same application
(replica_server.py). Ray is an extra: requirements-deploy.txt.
"""

import json
import socket
from typing import Any

import ray
from fastapi import FastAPI, Response
from prometheus_client import Metric
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ch07_sglang_radix import Engine
from ch07_sglang_radix.serving.deploy.replica_server import ReplicaServer
from ch07_sglang_radix.serving.probe import PROBE_S
from ch07_sglang_radix.serving.responses import as_json
from common.values import real, whole

DRAIN_S = 60.0  # that running requests have before Serve kills a replica
HEALTH_EVERY_S = 5.0
METRICS_S = 5.0  # that all replicas have to tell their numbers; a scraper waits 10 s


# above the classes: Ray sends those to its workers with what stands here when they are made


def _resources(arguments: dict[str, Any]) -> dict[str, int]:
    """Of a rank: a GPU, or what a CPU rank takes."""
    return {"num_cpus": 1, "num_gpus": 0 if arguments.get("device") == "cpu" else 1}


def _name() -> str:
    return serve.get_replica_context().replica_tag


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
@serve.ingress()  # the application is made with the replica
class Replica:
    """One server, and the actors of its engine's other nodes."""

    async def __init__(self, arguments: dict[str, Any]):
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
                self.where.append(await follower.where.remote())
                follower.follow.remote(arguments | meet | {"node_rank": i})
                self.followers.append(follower)
            arguments = arguments | meet
        self.server = ReplicaServer(arguments, _name(), self._families_of_all, DRAIN_S)
        await self.server.ready()

    def __serve_build_asgi_app__(self) -> FastAPI:
        self.server.app.add_api_route("/ray_nodes", self.ray_nodes)
        return self.server.app

    async def check_health(self) -> None:
        """Serve asks from time to time; what is raised here ends this replica, and another one is started."""
        await self.server.check()

    def families(self) -> list[Metric]:
        """What each replica is asked for by the one that has got GET /metrics."""
        return self.server.families()

    async def _families_of_all(self) -> list[list[Metric]]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        told = await handle.broadcast("families").results_async(timeout_s=METRICS_S, return_exceptions=True)
        return [one for one in told if not isinstance(one, Exception)]  # who has just died has no numbers

    async def ray_nodes(self) -> Response:
        """Who has answered: this replica, the processes of its ranks, and the Ray nodes they are on."""
        return as_json({"replica": _name(), "pids": self.server.manager.facts["pids"], "ray_nodes": self.where})

    async def __del__(self):
        """Serve has drained this replica."""
        if server := getattr(self, "server", None):
            await server.end()


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
    if whole("dp_size", args.pop("dp_size", 1), 1) > 1:
        raise ValueError("dp_size: here Serve starts the replicas; use min_replicas and max_replicas")
    resources = _resources(args)
    bundle = {"CPU": float(cpus)} | ({"GPU": 1.0} if resources["num_gpus"] else {})
    return Replica.options(
        ray_actor_options=resources, placement_group_bundles=[bundle] * ranks, placement_group_strategy="PACK",
        autoscaling_config={
            "min_replicas": least, "max_replicas": most, "target_ongoing_requests": target,
            "upscale_delay_s": 5, "downscale_delay_s": 60,
        },
        max_ongoing_requests=max(1, round(4 * target)), health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=PROBE_S + HEALTH_EVERY_S, graceful_shutdown_timeout_s=DRAIN_S, graceful_shutdown_wait_loop_s=1.0,
    ).bind(args)  # fmt: skip


def _value(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
