"""Draws every figure from the CSV beside it.

make figures        # or: python figures/draw.py

loading.svg           <- loading.csv           python ch06_tp_vllm/demo_5_loading.py --published Qwen2.5-0.5B
overlap_gaps.svg      <- bench_gpu_*.csv       make bench-gpu PART=small | large | large-tp2
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
    for draw in (loading, overlap_gaps):
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


if __name__ == "__main__":
    main()
