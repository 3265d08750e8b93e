"""GET /metrics: a registry as Prometheus reads it, for the server (metrics.py) and for the router in front of several."""

from collections.abc import Iterable
from typing import Protocol

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder

# SGLang's bounds; those below 0.1 s are ours: a small model's first token comes in milliseconds
FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
SLOW = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
E2E_BUCKETS = (*FAST, *SLOW, 600, 1200, 1800, 2400)


class Counted(Protocol):
    registry: CollectorRegistry


class Collects(Protocol):
    def collect(self) -> Iterable[Metric]: ...


def metrics_router(metrics: Counted) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def exposition(request: Request) -> Response:
        return exposed(metrics.registry, request)

    return router


def exposed(registry: Collects, request: Request) -> Response:
    """In the format that the Accept header asks for: plain text or OpenMetrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"Content-Type": content_type})
