"""What the router counts, under the names of SGLang's gateway (smg_...), for Prometheus: GET /metrics."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ch07_sglang_radix.parallelism.workers import Workers
from ch07_sglang_radix.serving.exposition import E2E_BUCKETS

CB_STATES = ("closed", "open", "half_open")


class RouterMetrics:
    def __init__(self, groups: Sequence[Workers]):
        self._groups, self._registry = groups, CollectorRegistry()

        def make(kind: type, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(f"smg_{name}", text, labels, registry=self._registry, **more)

        self.requests = make(
            Counter, "router_requests_total", "Requests that were sent to a worker or refused.", "endpoint", "status"
        )
        self.retries = make(Counter, "worker_retries_total", "Requests that were sent once more.", "endpoint")
        self.selected = make(Counter, "worker_selection_total", "Which worker was chosen.", "worker", "policy")
        self.errors = make(Counter, "worker_errors_total", "Answers that did not come, or said 5xx.", "worker")
        self.duration = make(
            Histogram, "router_request_duration_seconds", "To the end of the answer.", "endpoint", buckets=E2E_BUCKETS
        )
        self._health = make(Gauge, "worker_health", "1 if its health check passes.", "worker")
        self._active = make(Gauge, "worker_requests_active", "Requests on their way.", "worker")
        self._breaker = make(Gauge, "worker_cb_state", "Circuit breaker: 0 closed, 1 open, 2 half open.", "worker")

    @property
    def registry(self) -> CollectorRegistry:
        """As things stand: gauges of the workers there are, and of no others."""
        for gauge in (self._health, self._active, self._breaker):
            gauge.clear()
        for group in self._groups:
            for url, worker in group.all.items():
                self._health.labels(url).set(worker.well)
                self._active.labels(url).set(group.balancer.loads[url].requests)
                self._breaker.labels(url).set(CB_STATES.index(worker.breaker.state))
        return self._registry
