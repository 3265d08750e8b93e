"""What a serving benchmark measured: records of requests -> a row of numbers -> a table, a figure.

TTFT: from sending a request to its first token. ITL: from token to token; tokens that come together share the time since the
last ones. TPOT: a request's mean ITL. E2E: from sending to the last token. These are SGLang's and vLLM's definitions
(sglang/benchmark/metrics.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

POINTS = {"mean": np.mean, **{f"p{q}": (lambda values, q=q: np.percentile(values, q)) for q in (50, 90, 99)}}
TIMES = ("ttft", "tpot", "itl", "e2e")
COLOURS = {"p50": "#4c72b0", "p90": "#dd8452", "p99": "#c44e52"}


@dataclass
class Record:
    """One request. Times in seconds; sent: from the start of the run. error: one line, or None if all went well."""

    sent: float
    ttft: float = 0.0
    e2e: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None


def measures(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """One row, milliseconds in it; None where nothing was measured. Failed requests count as failed and nowhere else."""
    good = [record for record in records if record.error is None]
    prompt, new = (sum(getattr(r, name) for r in good) for name in ("prompt_tokens", "completion_tokens"))
    told = [r for r in good if r.cached_tokens is not None]
    from_tree, of = sum(r.cached_tokens for r in told), sum(r.prompt_tokens for r in told)
    row = {
        "completed": len(good), "failed": len(records) - len(good), "duration_s": round(seconds, 3), "input_tokens": prompt,
        "output_tokens": new, "cache_hit_rate": round(from_tree / of, 4) if of else None,
        "concurrency": round(sum(r.e2e for r in good) / seconds, 2), "requests_per_s": round(len(good) / seconds, 3),
        "input_tokens_per_s": round(prompt / seconds, 1), "output_tokens_per_s": round(new / seconds, 1),
        "total_tokens_per_s": round((prompt + new) / seconds, 1),
    }  # fmt: skip
    values = {
        "ttft": [r.ttft for r in good if r.ttft],
        "tpot": [(r.e2e - r.ttft) / (r.completion_tokens - 1) for r in good if r.completion_tokens > 1],
        "itl": [gap for r in good for gap in r.gaps], "e2e": [r.e2e for r in good],
    }  # fmt: skip
    for name in TIMES:
        for point, of_all in POINTS.items():
            row[f"{point}_{name}_ms"] = round(float(of_all(values[name])) * 1000, 3) if values[name] else None
    return row


def table(row: dict[str, Any]) -> str:
    """A row for a terminal."""
    hit_rate = row["cache_hit_rate"]
    lines = [
        f"{row['completed']} requests in {row['duration_s']:.2f} s, {row['failed']} failed; {row['concurrency']:.1f} at a time",
        f"  {row['requests_per_s']:.2f} requests/s   {row['input_tokens_per_s']:,.0f} prompt tokens/s"
        f"   {row['output_tokens_per_s']:,.0f} new tokens/s",
        "  hit rate " + ("not told by the server" if hit_rate is None else f"{hit_rate:.3f}"),
        "  ms      " + "".join(f"{point:>11}" for point in POINTS),
    ]
    for name in TIMES:
        cells = (row[f"{point}_{name}_ms"] for point in POINTS)
        lines.append(f"  {name.upper():8s}" + "".join(f"{'-' if c is None else f'{c:,.2f}':>11}" for c in cells))
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Throughput, TTFT and ITL over the load, a line a percentile. The values may be texts, from a CSV."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    throughput, *latencies = figure.subplots(1, 3)
    by_rate = len({row["request_rate"] for row in rows}) > 1
    load, label = (
        ("request_rate", "requests sent a second") if by_rate else ("max_concurrency", "requests at once, at most")
    )
    for name in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == name]
        where = [str(row[load]) for row in mine]
        throughput.plot(where, [float(row["output_tokens_per_s"]) for row in mine], "o-", label=name)
        for axis, what in zip(latencies, ("ttft", "itl"), strict=True):
            for point, colour in COLOURS.items():
                heights = [float(row[f"{point}_{what}_ms"] or "nan") for row in mine]
                axis.plot(where, heights, "o-", color=colour, label=point)
            axis.set_title(f"{what.upper()}, ms", fontsize=10, loc="left")
    throughput.set_title("new tokens a second", fontsize=10, loc="left")
    for axis in (throughput, *latencies):
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    return figure
