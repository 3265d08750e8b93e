"""Draws every figure from the CSV beside it.

make figures        # or: python figures/draw.py

loading.svg           <- loading.csv           python ch06_tp_vllm/demo_5_loading.py --published Qwen2.5-0.5B
overlap_gaps.svg      <- bench_gpu_*.csv       make bench-gpu PART=small | large | large-tp2
prefix.svg            <- bench_prefix.csv      python -m ch07_sglang_radix.bench_prefix
control_plane.svg     <- control_plane.csv     torchrun --nproc_per_node=2 ch07_sglang_radix/bench_control_plane.py
                                                   --published Qwen2.5-0.5B
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BLUE, ORANGE, GREY = "#4c72b0", "#dd8452", "#999999"


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "figures"  # the same drawing, the same bytes
    for draw in (loading, overlap_gaps, prefix, control_plane):
        figure = draw()
        path = HERE / f"{draw.__name__}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        print(f"wrote {path.relative_to(HERE.parent)}")


def read(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def loading():
    """Bytes read, and the largest piece held beside the parameters, one rank of R, in both ways."""
    rows = read("loading.csv")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, column, title in zip(
        axes, ("MB read", "MB largest piece"), ("read from disk", "held beside the weights"), strict=True
    ):
        for i, (way, colour) in enumerate((("load, then shard", ORANGE), ("read the shard", BLUE))):
            mine = [row for row in rows if row["way"] == way]
            x = [at + 0.4 * i - 0.2 for at in range(len(mine))]
            bars = axis.bar(x, [float(row[column]) for row in mine], 0.38, color=colour, label=way)
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(mine)), [f"R = {row['R']}" for row in mine])
        axis.set_title(f"MB {title}, one rank", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(1.1, -0.1), ncol=2)
    figure.suptitle(f"{rows[0]['model']}, bfloat16, {rows[0]['date']}", fontsize=10, y=1.02)
    return figure


def overlap_gaps():
    """A decode step of 64 requests: time in which a kernel runs, and time in which none does."""
    rows = [
        row
        for path in sorted(HERE.glob("bench_gpu_*.csv"))
        for row in read(path.name)
        if row["workload"].startswith("64 running")
    ]
    models = list(dict.fromkeys((row["model"], row["ranks"]) for row in rows))
    figure, axis = plt.subplots(figsize=(8, 3.2))
    ticks, names = [], []
    for i, (model, ranks) in enumerate(models):
        for j, how in enumerate(("no overlap", "overlap")):
            value = {
                row["metric"]: float(row["value"]) for row in rows
                if (row["model"], row["ranks"]) == (model, ranks) and row["workload"] == f"64 running {how}"
            }  # fmt: skip
            idle, y = value["us idle per decode step"], 3 * i + j
            axis.barh(y, value["us per decode step"] - idle, color=BLUE)
            axis.barh(y, idle, left=value["us per decode step"] - idle, color=ORANGE)
            ticks.append(y)
            names.append(f"{model}, {ranks} GPU{'s' if ranks != '1' else ''}, {how}")
    axis.set_yticks(ticks, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("us a decode step: a kernel runs (blue), none does (orange)")
    axis.set_title(f"{rows[0]['device']}, {rows[0]['date']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def prefix():
    """Of what could be found in the cache, how much was; and the speed against no cache."""
    rows = [
        row for row in read("bench_prefix.csv") if row["cache"] == "on" and not row["workload"].startswith("unrelated")
    ]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    kinds = list(dict.fromkeys((row["pool"], row["running at most"], row["policy"]) for row in rows))
    colours = [BLUE, "#8aa6d6", ORANGE, "#f0b992", "#55a868", "#c44e52"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
    for i, (pool, most, policy) in enumerate(kinds):
        mine = {
            r["workload"]: r for r in rows if (r["pool"], r["running at most"], r["policy"]) == (pool, most, policy)
        }
        at = [n + 0.8 * i / len(kinds) for n, w in enumerate(workloads) if w in mine]
        label = f"{pool} pool, {policy}" + (f", {most} at once" if int(most) < 64 else "")
        for axis, column in zip(axes, ("of reachable %", "times off"), strict=True):
            values = [float(mine[w][column] or 0) for w in workloads if w in mine]
            axis.barh(at, values, 0.75 / len(kinds), color=colours[i], label=label)
    axes[0].set_yticks([n + 0.35 for n in range(len(workloads))], workloads, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("hits, % of what could be found")
    axes[1].set_xlabel("tokens/s, times those without a cache")
    axes[1].axvline(1, color=GREY, linewidth=0.8)
    axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(1.0, -0.13), ncol=3)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['device']}, {rows[0]['date']}", fontsize=10)
    return figure


def control_plane():
    """Microseconds of a decode step that go into deciding and telling, by phase."""
    rows = read("control_plane.csv")
    figure, axis = plt.subplots(figsize=(7, 3))
    phases = [("build", BLUE), ("encode", "#8aa6d6"), ("broadcast", ORANGE), ("decode", "#f0b992")]
    left = [0.0] * len(rows)
    for phase, colour in phases:
        values = [float(row[phase]) for row in rows]
        axis.barh(range(len(rows)), values, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for y, (row, end) in enumerate(zip(rows, left, strict=True)):
        axis.text(end, y, f" {row['control %']} % of a step", va="center", fontsize=8)
    axis.set_yticks(
        range(len(rows)), [f"{row['running']} running, context {row['context']}" for row in rows], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlabel(
        f"us a decode step ({rows[0]['model']}, {rows[0]['ranks']} ranks, {rows[0]['device']}, {rows[0]['date']})",
        fontsize=8,
    )
    axis.set_xlim(0, 1.25 * max(left))
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
