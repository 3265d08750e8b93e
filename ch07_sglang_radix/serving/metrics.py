"""What the server counts and times, under SGLang's names, for Prometheus: GET /metrics.

    metrics = Metrics.of(manager)     # hears of tokens, of ends, and of the scheduler's steps (step_state.py)
    app.include_router(metrics_router(metrics))

Every number lives in the main process. The scheduler is another one: it sends totals, and this side takes the differences, so
neither shared files (PROMETHEUS_MULTIPROC_DIR, SGLang's way) nor merging is needed. A health probe is no request of a caller,
so the manager tells nobody of it, and it leaves no trace here. With --dp-size what a scheduler says has the label dp_rank, as in
SGLang (observability/metrics_collector.py), and replica_up, which is ours, says whether it lives.
"""

import time
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from ch07_sglang_radix.serving.exposition import E2E_BUCKETS, FAST, SLOW
from ch07_sglang_radix.serving.in_flight import InFlight
from ch07_sglang_radix.serving.step_state import STEP_STATE, ExpertState, StepState
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager

TTFT_BUCKETS = FAST + SLOW
ITL_BUCKETS = (
    0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080, 0.1, 0.2, 0.4, 0.6, 0.8,
    1, 2, 4, 6, 8,
)  # fmt: skip
QUEUE_BUCKETS = (0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 10, 15, 20, 30, 60, 100, 300, 1000, 3000)
RATE_WINDOW_S = 5.0  # gen_throughput is a mean over so long

# name: (what it says, how it is read from the newest StepState)
GAUGES: dict[str, tuple[str, Callable[[StepState], float]]] = {
    "num_running_reqs": ("Requests that hold pages.", attrgetter("running")),
    "num_queue_reqs": ("Requests in the waiting queue.", attrgetter("queue")),
    "max_total_num_tokens": ("Tokens the KV pool holds.", attrgetter("max_total_num_tokens")),
    "num_used_tokens": ("Tokens of the pool that running requests use.", lambda s: s.protected + s.held),
    "token_usage": ("num_used_tokens / max_total_num_tokens.", lambda s: (s.protected + s.held) / s.max_total_num_tokens),
    "kv_available_tokens": ("Free tokens of the pool.", attrgetter("available")),
    "kv_evictable_tokens": ("Tokens that only the radix tree holds.", attrgetter("evictable")),
    "new_token_ratio": ("Share of its worst case that a running request is expected to need.", attrgetter("new_token_ratio")),
}  # fmt: skip
# the same, of an engine with adapters
LORA_GAUGES: dict[str, tuple[str, Callable[[StepState], float]]] = {
    "lora_pool_slots_used": ("Slots in which a LoRA adapter lies.", attrgetter("lora_slots_used")),
    "lora_pool_slots_total": ("Slots for LoRA adapters.", attrgetter("lora_slots")),
    "lora_pool_utilization": (
        "lora_pool_slots_used / lora_pool_slots_total.",
        lambda s: s.lora_slots_used / max(s.lora_slots, 1),
    ),
}
# name: (what it says, the StepState's total)
TOTALS = {
    "num_retracted_requests_total": ("Requests that went back to the queue for want of pages.", "retracted"),
    "evicted_tokens_total": ("Tokens evicted from the radix tree.", "evicted"),
}


class _Rate:
    """How fast a total grows: a second's worth, as a mean over the last RATE_WINDOW_S."""

    def __init__(self, now: float):
        self._seen = deque([(now, 0)])

    def add(self, now: float, total: int) -> None:
        if len(self._seen) > 1 and now - self._seen[-2][0] < RATE_WINDOW_S / 100:  # a hundred points are enough
            self._seen.pop()
        self._seen.append((now, total))
        self._forget(now)

    def read(self, now: float) -> float:
        self._forget(now)
        (first, before), (_, total) = self._seen[0], self._seen[-1]
        span = now - max(first, now - RATE_WINDOW_S)
        return (total - before) / span if span > 0 else 0.0

    def _forget(self, now: float) -> None:
        while len(self._seen) > 1 and self._seen[1][0] <= now - RATE_WINDOW_S:
            self._seen.popleft()


_OF_A_SCHEDULER: dict[str, tuple[type, str, dict[str, Any]]] = {
    "queue_time_seconds": (Histogram, "From the queue to the first step.", {"buckets": QUEUE_BUCKETS}),
    "num_retracted_reqs": (Gauge, "Requests retracted in the newest step.", {}),
    "cache_hit_rate": (Gauge, "Of the newest prefill's prompt tokens.", {}),
    "spec_accept_length": (Gauge, "Tokens of a request in a verify step, mean since the last message.", {}),
    "spec_accept_rate": (Gauge, "Share of the guesses that were right, since the last message.", {}),
    "gen_throughput": (Gauge, f"Tokens a second, over the last {RATE_WINDOW_S:g} s.", {}),
    **{name: (Gauge, text, {}) for name, (text, _) in GAUGES.items()},
    **{name: (Counter, text, {}) for name, (text, _) in TOTALS.items()},
}


# of a mixture whose experts are watched (--expert-balancedness-report-mode prometheus, --enable-eplb). The first two are SGLang's
# names (observability/metrics_collector.py); there the second is a histogram whose buckets are the ranks, here each has a label
_OF_EXPERTS: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "eplb_balancedness": (Summary, "Mean over maximum of the ranks' rows, mean of the layers, each reading.", ()),
    "eplb_gpu_physical_count": (Counter, "Rows that a rank's experts have computed.", ("layer", "gpu")),
    "expert_rows": (Counter, "Rows that have chosen an expert, whichever of its copies.", ("layer", "expert")),
}


class _Experts:
    """What a scheduler says about experts, under its labels."""

    def __init__(self, families: dict[str, Any], labels: tuple[str, ...]):
        self._families, self._labels, self._newest = families, labels, ExpertState([], [], [], [])

    def take(self, state: ExpertState) -> None:
        before, self._newest = self._newest, state
        for one in state.balancedness:
            self._families["eplb_balancedness"].labels(*self._labels).observe(one)
        self._grow("eplb_gpu_physical_count", state.of_rank, before.of_rank)
        self._grow("expert_rows", state.of_expert, before.of_expert)

    def _grow(self, name: str, now: list[list[int]], before: list[list[int]]) -> None:
        for i, layer in enumerate(self._newest.layers):
            for j, total in enumerate(now[i]):
                self._families[name].labels(*self._labels, str(layer), str(j)).inc(
                    total - (before[i][j] if before else 0)
                )


class _Scheduler:
    """The numbers of one scheduler, under its labels."""

    def __init__(
        self, families: dict[str, Any], labels: tuple[str, ...], clock: Callable[[], float], experts: _Experts | None
    ):
        self._of, self._clock = {name: family.labels(*labels) for name, family in families.items()}, clock
        self._experts = experts
        self._newest, self._generated = StepState(), _Rate(clock())
        self._of["gen_throughput"].set_function(lambda: self._generated.read(self._clock()))

    def step_state(self, state: StepState) -> None:
        before, self._newest = self._newest, state
        for name, (_, read) in (GAUGES | LORA_GAUGES).items():
            if name in self._of:
                self._of[name].set(read(state))
        for name, (_, total) in TOTALS.items():
            self._of[name].inc(getattr(state, total) - getattr(before, total))
        self._of["num_retracted_reqs"].set(state.retracted - before.retracted)
        if admitted := state.prompt_tokens - before.prompt_tokens:
            self._of["cache_hit_rate"].set((state.cached_tokens - before.cached_tokens) / admitted)
        if verified := state.verified - before.verified:
            right = state.correct - before.correct
            self._of["spec_accept_length"].set(1 + right / verified)
            self._of["spec_accept_rate"].set(right / max(state.proposed - before.proposed, 1))
        for seconds in state.queue_times:
            self._of["queue_time_seconds"].observe(seconds)
        self._generated.add(self._clock(), state.sampled)
        if state.experts and self._experts:
            self._experts.take(state.experts)


class Metrics:
    """One server's numbers, in a registry of their own. All calls come from one thread, the event loop's."""

    def __init__(
        self,
        model_name: str,
        clock: Callable[[], float] = time.monotonic,
        dp_size: int = 1,
        experts: bool = False,
        lora: bool = False,
    ):
        self.registry, self._clock, self.dp_size = CollectorRegistry(), clock, dp_size
        self._model = model_name
        self._newest_token: dict[int, float] = {}  # ticket: when its newest tokens came
        # what requests did
        self._requests = self._make(
            Counter, "num_requests_total", "Requests that have ended.", "is_streaming", "finish_reason"
        )
        self._aborted = self._make(Counter, "num_aborted_requests_total", "Requests that were aborted.").labels(
            model_name
        )
        self._prompt = self._make(Counter, "prompt_tokens_total", "Prompt tokens of ended requests.", "is_streaming")
        self._new = self._make(Counter, "generation_tokens_total", "Tokens given to ended requests.", "is_streaming")
        self._cached = self._make(Counter, "cached_tokens_total", "Prompt tokens found in the tree.", "cache_source")
        self._ttft = self._make(
            Histogram, "time_to_first_token_seconds", "From reception to the first token.", "is_streaming",
            buckets=TTFT_BUCKETS,
        )  # fmt: skip
        self._itl = self._make(
            Histogram, "inter_token_latency_seconds", "From token to token.", buckets=ITL_BUCKETS
        ).labels(model_name)
        self._e2e = self._make(
            Histogram, "e2e_request_latency_seconds", "From reception to the last token.", "is_streaming",
            buckets=E2E_BUCKETS,
        )  # fmt: skip
        # what the schedulers say
        replica = ("dp_rank",) if dp_size > 1 else ()
        of_schedulers = {
            name: self._make(kind, name, text, *replica, **more) for name, (kind, text, more) in _OF_A_SCHEDULER.items()
        }
        of_schedulers |= {
            name: self._make(Gauge, name, text, *replica) for name, (text, _) in LORA_GAUGES.items() if lora
        }
        of_experts = {
            name: self._make(kind, name, text, *replica, *labels)
            for name, (kind, text, labels) in _OF_EXPERTS.items()
            if experts
        }
        self._schedulers = {}
        for rank in range(dp_size) if dp_size > 1 else (None,):
            labels = (model_name, *([] if rank is None else [str(rank)]))
            self._schedulers[rank] = _Scheduler(
                of_schedulers, labels, clock, _Experts(of_experts, labels) if experts else None
            )

    def _make(self, kind: type, name: str, text: str, *labels: str, **more: Any) -> Any:
        return kind(f"sglang:{name}", text, ("model_name", *labels), registry=self.registry, **more)

    @classmethod
    def of(cls, manager: TokenizerManager) -> "Metrics":
        """The numbers of this server, connected."""
        engine = manager.args.engine
        lora = engine.enable_lora
        metrics = cls(manager.args.served_model_name, dp_size=engine.dp_size, experts=engine.watches_experts, lora=lora)
        metrics.connect(manager)
        return metrics

    def connect(self, manager: TokenizerManager) -> None:
        manager.on_tokens.append(self.tokens)
        manager.on_end.append(self.ended)
        manager.at_start.append("tell_steps")
        manager.on_event[STEP_STATE] = lambda value, rank: self.step_state(msgspec.convert(value, StepState), rank)
        if self.dp_size > 1:
            up = self._make(Gauge, "replica_up", "1 while the replica lives.", "dp_rank")
            for rank in self._schedulers:
                up.labels(self._model, str(rank)).set_function(lambda rank=rank: float(rank not in manager.lost))

    # --- a request's life

    def tokens(self, one: InFlight, new: int) -> None:
        """`new` tokens of it have come back; several that come together share the time since the last ones."""
        if not new:
            return
        now, before = self._clock(), self._newest_token.get(one.ticket)
        if before is None:
            self._ttft.labels(self._model, _streams(one)).observe(now - one.started)
        else:
            for _ in range(new):
                self._itl.observe((now - before) / new)
        self._newest_token[one.ticket] = now

    def ended(self, one: InFlight) -> None:
        """Its last answer has come, or its caller has gone and none is waited for."""
        self._newest_token.pop(one.ticket, None)
        reason = one.finish_reason["type"] if one.finish_reason else "abort"
        streams = _streams(one)
        self._requests.labels(self._model, streams, reason).inc()
        self._prompt.labels(self._model, streams).inc(len(one.call.requests[one.index].ids))
        self._new.labels(self._model, streams).inc(len(one.output_ids))
        for tier, tokens in (one.cached_details or {"device": one.cached_tokens}).items():
            self._cached.labels(self._model, tier).inc(tokens)
        if reason == "abort":
            self._aborted.inc()
        else:
            self._e2e.labels(self._model, streams).observe(self._clock() - one.started)

    # --- a scheduler's steps

    def step_state(self, state: StepState, dp_rank: int | None = None) -> None:
        self._schedulers[dp_rank].step_state(state)


def _streams(one: InFlight) -> str:
    return "true" if one.streams else "false"
