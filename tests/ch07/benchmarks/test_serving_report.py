"""From records to numbers: counted by hand."""

import pytest

from ch07_sglang_radix.benchmarks.serving_report import Record, draw, measures, table

RECORDS = [
    Record(0.0, ttft=0.1, e2e=0.5, gaps=[0.2, 0.2], prompt_tokens=100, completion_tokens=3, cached_tokens=60),
    Record(0.0, ttft=0.3, e2e=1.1, gaps=[0.1, 0.7], prompt_tokens=100, completion_tokens=3, cached_tokens=0),
    Record(0.5, ttft=0.2, e2e=0.2, prompt_tokens=50, completion_tokens=1, cached_tokens=40),
    Record(0.6, error="503: full", prompt_tokens=999),
]  # fmt: skip


def test_measures():
    row = measures(RECORDS, 2.0)
    assert (row["completed"], row["failed"]) == (3, 1)
    assert (row["input_tokens"], row["output_tokens"]) == (250, 7)
    assert (row["requests_per_s"], row["output_tokens_per_s"], row["total_tokens_per_s"]) == (1.5, 3.5, 128.5)
    assert row["cache_hit_rate"] == 0.4
    assert row["concurrency"] == 0.9, "1.8 seconds of requests in 2 seconds"
    assert row["mean_ttft_ms"] == pytest.approx(200)
    assert row["p50_ttft_ms"] == pytest.approx(200)
    assert row["p50_itl_ms"] == pytest.approx(200)
    assert row["p99_itl_ms"] == pytest.approx(685)
    assert row["mean_tpot_ms"] == pytest.approx((200 + 400) / 2), "who has one token has no time between tokens"
    assert row["p90_e2e_ms"] == pytest.approx(980)


def test_what_was_not_measured_is_empty_and_not_nought():
    row = measures([Record(0.0, error="refused")], 1.0)
    assert row["completed"] == 0
    assert row["cache_hit_rate"] is None
    assert {
        row[f"{point}_{name}_ms"] for point in ("mean", "p50", "p90", "p99") for name in ("ttft", "itl", "e2e")
    } == {None}
    assert "not told by the server" in table(row)


def test_the_table_has_every_percentile():
    text = table(measures(RECORDS, 2.0))
    assert "3 requests in 2.00 s, 1 failed" in text
    assert "hit rate 0.400" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["TTFT"] == ["200.00", "200.00", "280.00", "298.00"]
    assert len(lines["ITL"]) == len(lines["E2E"]) == len(lines["TPOT"]) == 4


@pytest.mark.parametrize("over", ["max_concurrency", "request_rate"])
def test_the_figure_has_a_line_for_each_backend_and_percentile(over):
    rows = []
    for backend, load in (("sglang", 1), ("sglang", 4), ("vllm", 1), ("vllm", 4)):
        rows.append(
            {"backend": backend, "max_concurrency": None, "request_rate": "inf"}
            | {over: load}
            | measures(RECORDS, load)
        )
    figure = draw([{key: "" if value is None else str(value) for key, value in row.items()} for row in rows])
    throughput, ttft, itl = figure.axes
    assert [list(line.get_ydata()) for line in throughput.lines] == [[7.0, 1.8], [7.0, 1.8]]
    assert {line.get_label() for line in ttft.lines} == {"p50", "p90", "p99"}
    assert len(itl.lines) == 6
    assert ("sent a second" in itl.get_xlabel()) == (over == "request_rate")
