"""Metrics: what was told is what Prometheus reads, and every query of the dashboard finds what it asks for."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

import ch07_sglang_radix.serving.metrics as metrics_module
from ch07_sglang_radix import Engine
from ch07_sglang_radix.serving import step_state
from ch07_sglang_radix.serving.channels import MemoryPipe
from ch07_sglang_radix.serving.exposition import metrics_router
from ch07_sglang_radix.serving.in_flight import InFlight, News
from ch07_sglang_radix.serving.messages import Abort, BatchStr, Control, Event, TokenizedGenerate
from ch07_sglang_radix.serving.metrics import Metrics
from ch07_sglang_radix.serving.scheduler_process import NOTHING, SchedulerProcess
from ch07_sglang_radix.serving.step_state import StepState
from tests.ch07.serving.running import a_server

DASHBOARD = Path(metrics_module.__file__).with_name("grafana.json")
MODEL = {"model_name": "m"}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    return Metrics("m", clock)


def exposition(metrics):
    app = FastAPI()
    app.include_router(metrics_router(metrics))
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"sglang:{name}", MODEL | labels)


def in_flight(clock, ticket=1, streams=True, prompt=10):
    """An answer as the manager holds it, whose request has just come in."""
    call = SimpleNamespace(requests=[SimpleNamespace(ids=[0] * prompt)], logprobs=SimpleNamespace(wanted=False))
    return InFlight(ticket, "r", 0, call, News(), streams, clock.now)


def come(metrics, one, new, cached=4, reason=None):
    """So many tokens come back, as the manager takes them."""
    finished = {"type": reason} if reason else None
    one.take(BatchStr(1, [one.ticket], [""], [[7] * new], [finished], [cached], [NOTHING], [NOTHING]), 0)
    metrics.tokens(one, new)
    if reason:
        metrics.ended(one)


def one_request(metrics, clock, streams=True, reason="stop"):
    """Received at 0, tokens after 0.3, 0.5 and (two at once) 0.9 s, end at 1 s."""
    one = in_flight(clock, streams=streams)
    for seconds, new in ((0.3, 1), (0.2, 1), (0.4, 2)):
        clock.now += seconds
        come(metrics, one, new)
    clock.now += 0.1
    come(metrics, one, 0, reason=reason)


def test_a_request_is_timed_from_its_reception(metrics, clock):
    one_request(metrics, clock)
    streams = {"is_streaming": "true"}
    assert value(metrics, "time_to_first_token_seconds_sum", **streams) == pytest.approx(0.3)
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.6)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.4") == 3, "0.2, and 0.4 shared by two tokens"
    assert value(metrics, "e2e_request_latency_seconds_sum", **streams) == pytest.approx(1.0)


def test_ended_requests_are_counted_with_their_tokens_and_reasons(metrics, clock):
    one_request(metrics, clock)
    one_request(metrics, clock, streams=False)
    come(metrics, in_flight(clock, prompt=7), 5, cached=0, reason="length")
    assert value(metrics, "num_requests_total", is_streaming="true", finish_reason="stop") == 1
    assert value(metrics, "num_requests_total", is_streaming="true", finish_reason="length") == 1
    assert value(metrics, "num_requests_total", is_streaming="false", finish_reason="stop") == 1
    assert value(metrics, "prompt_tokens_total", is_streaming="true") == 17
    assert value(metrics, "generation_tokens_total", is_streaming="true") == 9
    assert value(metrics, "cached_tokens_total", cache_source="device") == 8
    assert value(metrics, "num_aborted_requests_total") == 0


@pytest.mark.parametrize("told", [True, False])
def test_an_aborted_request_has_counts_and_no_latency(metrics, clock, told):
    """Told: the scheduler says abort. Else the caller has gone, and nobody waits to hear it."""
    one = in_flight(clock)
    come(metrics, one, 2, reason="abort" if told else None)
    if not told:
        metrics.ended(one)
    assert value(metrics, "num_aborted_requests_total") == 1
    assert value(metrics, "num_requests_total", is_streaming="true", finish_reason="abort") == 1
    assert value(metrics, "generation_tokens_total", is_streaming="true") == 2
    assert not value(metrics, "e2e_request_latency_seconds_count", is_streaming="true")


def test_nothing_is_kept_of_a_request_that_has_ended(metrics, clock):
    for _ in range(10):
        one_request(metrics, clock)
        one = in_flight(clock, 2)
        come(metrics, one, 1)
        metrics.ended(one)
    assert not metrics._newest_token


def test_totals_become_counters_and_a_skipped_message_loses_nothing(metrics):
    all_told, skipped = metrics, Metrics("m")
    states = [StepState(retracted=i, evicted=10 * i, max_total_num_tokens=64) for i in (1, 3, 3, 4)]
    for state in states:
        all_told.step_state(state)
    skipped.step_state(states[-1])
    for one in (all_told, skipped):
        assert value(one, "num_retracted_requests_total") == 4
        assert value(one, "evicted_tokens_total") == 40
    assert value(all_told, "num_retracted_reqs") == 1, "of the newest step"


def test_the_hit_rate_is_that_of_the_newest_prefill(metrics):
    for prompt, cached, expected in ((100, 0, 0.0), (200, 75, 0.75), (200, 75, 0.75), (250, 75, 0.0)):
        metrics.step_state(StepState(prompt_tokens=prompt, cached_tokens=cached, max_total_num_tokens=64))
        assert value(metrics, "cache_hit_rate") == expected


def test_the_throughput_is_that_of_the_last_seconds(metrics, clock):
    for i in range(1, 1001):  # 100 tokens a second, for ten seconds
        clock.now += 0.01
        metrics.step_state(StepState(sampled=i, max_total_num_tokens=64))
    assert value(metrics, "gen_throughput") == pytest.approx(100, rel=0.03)
    assert len(metrics._schedulers[None]._generated._seen) <= 202
    clock.now += metrics_module.RATE_WINDOW_S / 2
    assert value(metrics, "gen_throughput") == pytest.approx(50, rel=0.05)
    clock.now += metrics_module.RATE_WINDOW_S
    assert value(metrics, "gen_throughput") == 0


class Pipe:
    """Both ends of a pipe, and all that was sent."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


def test_the_pool_in_the_metrics_is_the_scheduler_s(monkeypatch, clock):
    """Steps of a real scheduler under pressure: every state adds up, and the sums of all are what the engine says."""
    monkeypatch.setattr(step_state, "TELL_EVERY_S", 0.0)
    with Engine(device="cpu", page_size=4, max_total_tokens=160, max_running_requests=4, check=True) as engine:
        main, metrics = Pipe(), Metrics("m", clock)
        process = SchedulerProcess(engine, MemoryPipe(), main)
        assert process.obey(Control(0, "tell_steps")).error is None
        for i in range(10):
            ids = [5, 6, 7, 8, *range(10 + 3 * (i % 3), 40 + 3 * (i % 3))]
            process.take(TokenizedGenerate(i, str(i), ids, {"max_new_tokens": 24, "ignore_eos": True}, {}))
        process.take(TokenizedGenerate(10, "aborted", [9] * 40, {"max_new_tokens": 8}, {}))
        process.take(Abort(10))
        process.take(TokenizedGenerate(11, "probe", [0], {"max_new_tokens": 1}, {}, probe=True))
        while process.turn():
            pass
        info = engine.get_server_info()
        states = [message.value for message in main.sent if isinstance(message, Event)]
        for s in states:
            assert s.available + s.evictable + s.protected + s.held == s.max_total_num_tokens == 160
            metrics.step_state(s)
    assert max(s.held for s in states) > 0
    assert max(s.queue for s in states) > 0
    assert value(metrics, "num_retracted_requests_total") == info["retractions"] > 0
    assert value(metrics, "evicted_tokens_total") == info["evicted_tokens"] > 0
    assert value(metrics, "num_used_tokens") == value(metrics, "num_running_reqs") == 0, "nobody is left"
    assert value(metrics, "kv_evictable_tokens") == info["evictable_tokens"]
    assert value(metrics, "queue_time_seconds_count") == 10, (
        "once each, retracted or not; neither the aborted one nor the probe"
    )
    assert states[-1].sampled == 240, "the probe's token is not among them"


def scraped(server):
    """{(name, its labels but the model's): value}."""
    status, text = server.raw("/metrics")
    assert status == 200
    return {
        (sample.name, *sorted(set(sample.labels.items()) - {("model_name", "tiny-qwen")})): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_server_of_several_processes_counts_each_request_once_and_no_probe():
    with a_server("--enable-metrics") as server:
        before = scraped(server)
        for _ in range(3):
            assert server.raw("/health")[0] == 200
        assert scraped(server) == before, "a probe leaves no trace"
        body = {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}}
        metas = [server.generate(**body)["meta_info"] for _ in range(3)]
        metas.append(server.stream(**body)[-1]["meta_info"])
        info, found = server.at_rest(), scraped(server)
    whole, stream = ("is_streaming", "false"), ("is_streaming", "true")
    assert found["sglang:num_requests_total", ("finish_reason", "length"), whole] == 3
    assert found["sglang:num_requests_total", ("finish_reason", "length"), stream] == 1
    assert found["sglang:generation_tokens_total", whole] == 27
    assert found["sglang:prompt_tokens_total", whole] == sum(meta["prompt_tokens"] for meta in metas[:3])
    cached = found["sglang:cached_tokens_total", ("cache_source", "device")]
    assert cached == sum(meta["cached_tokens"] for meta in metas) > 0
    assert found["sglang:time_to_first_token_seconds_count", stream] == 1
    assert found["sglang:inter_token_latency_seconds_count",] == 32, "nine tokens have eight times between them"
    assert found["sglang:queue_time_seconds_count",] == 4
    assert found["sglang:kv_evictable_tokens",] == info["evictable_tokens"]
    assert found["sglang:kv_available_tokens",] == info["free_tokens"]
    assert found["sglang:num_running_reqs",] == 0


# --- the dashboard

FUNCTIONS = {"sum", "rate", "histogram_quantile", "by", "label_values"}


def expressions():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]


def unresolved(expr, series):
    """What an expression of the dashboard asks for and the exposition does not have: [names, labels, words]."""
    missing = []
    found = re.findall(r"(sglang:\w+)(?:\{([^}]*)\})?", expr)
    assert found, f"no metric in {expr}"
    labels = set()
    for name, selector in found:
        if name not in series:
            missing.append(name)
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector):
            labels.add(label)
    for inside in re.findall(r"by \(([^)]*)\)", expr):
        labels |= {label.strip() for label in inside.split(",")}
    if "label_values" in expr:
        labels.add(re.search(r",\s*(\w+)\s*\)", expr).group(1))
    known = set().union(*(series.get(name, set()) for name, _ in found))
    missing += sorted(labels - known)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|sglang:\w+", "", expr)
    missing += sorted(set(re.findall(r"[A-Za-z_]\w*", bare)) - FUNCTIONS - labels)
    if bare.count("(") != bare.count(")"):
        missing.append("a bracket")
    return missing


@pytest.fixture(scope="module")
def series():
    """{sample name: its labels} of a server that has done everything once."""
    clock = Clock()
    metrics = Metrics("m", clock)
    one_request(metrics, clock)
    metrics.step_state(StepState(step=1, max_total_num_tokens=64, queue_times=[0.1], prompt_tokens=5))
    found = {}
    for family in text_string_to_metric_families(exposition(metrics)):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize(("panel", "expr"), list(expressions()))
def test_every_query_of_the_dashboard_finds_what_it_asks_for(panel, expr, series):
    assert not unresolved(expr, series), f"{panel}: {expr}"


@pytest.mark.parametrize(
    ("expr", "lacks"),
    [
        ("sum(rate(sglang:num_requests[5m]))", ["sglang:num_requests"]),
        ("sum by (colour) (sglang:token_usage)", ["colour"]),
        ('sglang:token_usage{tp_rank="0"}', ["tp_rank"]),
        ("rat(sglang:token_usage)", ["rat"]), ("sum(sglang:token_usage", ["a bracket"]),
    ],
)  # fmt: skip
def test_a_query_that_finds_nothing_is_noticed(expr, lacks, series):
    assert unresolved(expr, series) == lacks


def test_the_dashboard_shows_every_metric(series):
    shown = " ".join(expr for _, expr in expressions())
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in series}
    assert not [name for name in families if name not in shown]
