"""Draws every figure from the CSV beside it.

make figures        # or: python figures/draw.py

toy_split.svg         <- toy_split.csv         python ch06_tp_vllm/demo_1_toy_split.py --csv figures/toy_split.csv
parallel_layers.svg   <- parallel_layers.csv   python ch06_tp_vllm/demo_2_parallel_layers.py --csv figures/parallel_layers.csv
heads.svg             <- heads.csv             python ch06_tp_vllm/demo_3_heads.py --csv figures/heads.csv
two_ways.svg          <- two_ways.csv          torchrun --nproc_per_node=2 ch06_tp_vllm/demo_4_two_ways.py
                                                   --csv figures/two_ways.csv
loading.svg           <- loading.csv           python ch06_tp_vllm/demo_5_loading.py --published Qwen2.5-0.5B
kv_cache.svg          <- kv_cache.csv          python ch06_tp_vllm/demo_6_kv_cache.py --csv figures/kv_cache.csv
blocks.svg            <- blocks.csv            python ch06_tp_vllm/demo_7_block_manager.py --csv figures/blocks.csv
batching.svg          <- batching.csv          python ch06_tp_vllm/demo_8_scheduler.py --csv figures/batching.csv
messages.svg          <- messages.csv          torchrun --nproc_per_node=2 -m ch06_tp_vllm.record_messages figures/messages.csv
overlap_gaps.svg      <- bench_gpu_*.csv       make bench-gpu PART=small | large | large-tp2
prefix.svg            <- bench_prefix.csv      python -m ch07_sglang_radix.benchmarks.bench_prefix
load_balance.svg      <- load_balance.csv      python -m ch07_sglang_radix.benchmarks.bench_load_balance --scale 0.5
control_plane.svg     <- control_plane.csv     torchrun --nproc_per_node=2 ch07_sglang_radix/benchmarks/bench_control_plane.py
                                                   --published Qwen2.5-0.5B
                         control_plane_gpu.csv the same on two GPUs, --out figures/control_plane_gpu.csv
experts_forms.svg     <- experts_forms.csv     python -m ch07_sglang_radix.benchmarks.bench_experts --part forms
                         experts_kernels.csv   the same on a GPU, --part kernels; left out while it is not there
hot_experts.svg       <- hot_experts.csv       python ch07_sglang_radix/experts/demo_5_hot_experts.py --csv figures/hot_experts.csv
cache_bytes.svg       <- cache_bytes.csv       python ch07_sglang_radix/experts/demo_8_cache_bytes.py --csv figures/cache_bytes.csv
world.svg             <- world.csv             python ch07_sglang_radix/parallelism/demo_1_world.py --csv figures/world.csv
pipeline.svg          <- pipeline.csv          torchrun --nproc_per_node=2 ch07_sglang_radix/parallelism/demo_3_pipeline_timeline.py
                                                   --csv figures/pipeline.csv
all_reduce_cpu.svg    <- all_reduce_cpu.csv, all_reduce_decode.csv     python -m common.distributed.bench_all_reduce
links.svg             <- links.csv             python -m common.distributed.measure_links --nproc 2 3 4
disaggregation.svg    <- disaggregation.csv    python -m ch07_sglang_radix.benchmarks.bench_disaggregation --rounds 3
                                                   --prompts 100 400 800 --count 4 --every 0.8 --tokens 1900
                         disaggregation_gpu    the same on two GPUs, --device cuda; left out while the CSV is not there
speculation.svg       <- speculation.csv       python ch07_sglang_radix/speculative/demo_5_who_guesses.py --batches 1 4 16 64
                                                   --rounds 3 --csv figures/speculation.csv
quantization.svg      <- quantization.csv      python ch07_sglang_radix/quantization/demo_4_same_question.py --questions 360
                                                   --csv figures/quantization.csv
quantization_kv.svg   <- quantization_kv.csv   python ch07_sglang_radix/quantization/demo_5_kv_bits.py --questions 360
                                                   --csv figures/quantization_kv.csv
"""

import csv
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Polygon, Rectangle

from common.distributed.cost_model import Link, Sample

HERE = Path(__file__).parent
BLUE, ORANGE, GREY, GREEN, RED = "#4c72b0", "#dd8452", "#999999", "#55a868", "#c44e52"
PALE_BLUE, PALE_ORANGE, PALE_GREY = "#8aa6d6", "#f0b992", "#e4e4e4"
OWNER = {"0": BLUE, "1": ORANGE, "both": PALE_GREY}


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "figures"  # the same drawing, the same bytes
    for draw in FIGURES:
        figure = draw()
        path = HERE / f"{draw.__name__}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        print(f"wrote {path.relative_to(HERE.parent)}")


def read(name: str | Path) -> list[dict[str, str]]:
    with (HERE / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- chapter 6


def toy_split():
    """X @ W both ways, every number in the colour of the rank that has it."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 3.8))
    signs = {"column": ("@", "="), "row": ("@", "=", "+", "=")}
    titles = {"column": "column-parallel: concat, no message", "row": "row-parallel: sum, one all-reduce"}
    rows = read("toy_split.csv")
    for axis, (cut, between) in zip(axes, signs.items(), strict=True):
        left = 0.0
        mine = [row for row in rows if row["cut"] == cut]
        for place, sign in zip(range(len(between) + 1), (*between, ""), strict=True):
            cells = [row for row in mine if int(row["place"]) == place]
            height, width = (1 + max(int(cell[key]) for cell in cells) for key in ("row", "column"))
            for cell in cells:
                x, y = left + int(cell["column"]), height / 2 - int(cell["row"]) - 1
                axis.add_patch(Rectangle((x, y), 1, 1, facecolor=OWNER[cell["rank"]], edgecolor="white"))
                colour = "black" if cell["rank"] == "both" else "white"
                axis.text(x + 0.5, y + 0.5, cell["value"], ha="center", va="center", fontsize=8, color=colour)
            axis.text(left + width / 2, height / 2 + 0.25, cells[0]["matrix"], ha="center", fontsize=9)
            left += width
            axis.text(left + 0.5, 0, sign, ha="center", va="center", fontsize=12)
            left += 1
        axis.set_xlim(0, 33)
        axis.set_ylim(-2.1, 2.9)
        axis.set_aspect("equal")
        axis.axis("off")
        axis.set_title(titles[cut], fontsize=10, loc="left")
    _owners(figure)
    return figure


def _owners(figure) -> None:
    names = {"rank 0": BLUE, "rank 1": ORANGE, "every rank": PALE_GREY}
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="lower center", ncol=3, fontsize=8, frameon=False)


def parallel_layers():
    """Four layers: the whole matrices on the left, what each of two ranks has of them on the right."""
    rows = read("parallel_layers.csv")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = plt.subplots(1, len(layers), figsize=(12, 3.6))
    for axis, layer in zip(axes, layers, strict=True):
        mine = [row for row in rows if row["layer"] == layer]
        tops, top = {}, 0
        for row in mine:
            if row["part"] not in tops:
                tops[row["part"]], top = top, top + int(row["of rows"]) + 2
        for row in mine:
            at, height, width = int(row["at"]), int(row["rows"]), int(row["columns"])
            whole = (int(row["first column"]), tops[row["part"]] + int(row["first row"]))
            held = (22 + 20 * int(row["rank"]), at)
            for x, y in (whole, held):
                axis.add_patch(Rectangle((x, y), width, height, facecolor=OWNER[row["rank"]], edgecolor="white"))
                if len(tops) > 1:
                    axis.text(
                        x + width / 2, y + height / 2, row["part"], ha="center", va="center", fontsize=7, color="white"
                    )
        for x, name in ((8, "whole"), (30, "rank 0"), (50, "rank 1")):
            axis.text(x, -1.5, name, ha="center", fontsize=8)
        axis.set_xlim(-1, 60)
        axis.set_ylim(52, -6)
        axis.set_aspect("equal")
        axis.axis("off")
        axis.set_title(layer, fontsize=10)
    figure.suptitle("weights as torch stores them: rows are outputs, columns are inputs", fontsize=9, y=0.13)
    return figure


def heads():
    """14 query heads and 2 KV heads over R ranks."""
    rows = read("heads.csv")
    sizes = list(dict.fromkeys(row["R"] for row in rows))
    figure, axes = plt.subplots(len(sizes), 1, figsize=(9, 5.4))
    for axis, size in zip(axes, sizes, strict=True):
        mine = [row for row in rows if row["R"] == size]
        for x, row in enumerate(mine):
            real = row["query head"] != ""
            face = OWNER[row["KV head"]] if real else "white"
            axis.add_patch(Rectangle((x, 0), 0.95, 1, facecolor=face, edgecolor=GREY, hatch=None if real else "///"))
            axis.text(x + 0.47, 0.5, row["query head"], ha="center", va="center", fontsize=7, color="white")
            if x and row["rank"] != mine[x - 1]["rank"]:
                axis.plot([x - 0.025] * 2, [-0.75, 1.15], color="black", linewidth=1.5, clip_on=False)
        copies = list(dict.fromkeys((row["rank"], row["KV place"], row["KV head"]) for row in mine))
        for rank, place, head in copies:
            over = [x for x, row in enumerate(mine) if (row["rank"], row["KV place"]) == (rank, place)]
            width = len(over) - 0.05
            axis.add_patch(Rectangle((over[0], -0.42), width, 0.34, facecolor=OWNER[head], edgecolor=GREY, alpha=0.55))
            axis.text(over[0] + width / 2, -0.26, f"KV {head}", ha="center", va="center", fontsize=7)
        for rank in dict.fromkeys(row["rank"] for row in mine):
            places = [x for x, row in enumerate(mine) if row["rank"] == rank]
            axis.text(sum(places) / len(places) + 0.5, -0.5, f"rank {rank}", ha="center", va="top", fontsize=7)
        axis.set_xlim(-0.1, 18.1)
        axis.set_ylim(-0.8, 1.1)
        axis.set_yticks([0.5], [f"R = {size}"])
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    names = {"query heads of KV head 0": BLUE, "query heads of KV head 1": ORANGE}
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    handles.append(Patch(facecolor="white", edgecolor=GREY, hatch="///", label="a head of zeros"))
    figure.legend(handles=handles, loc="lower center", ncol=3, fontsize=8, frameon=False)
    return figure


def two_ways():
    """Parameters that one of two ranks holds."""
    rows = read("two_ways.csv")
    ways = [key for key in rows[0] if key != "part"]
    names = {"self_attn": "attention", "mlp": "MLP", "embed_tokens": "embedding, and LM head"}
    figure, axis = plt.subplots(figsize=(8, 2.2))
    left = [0.0] * len(ways)
    for row, colour in zip(rows, (BLUE, PALE_BLUE, ORANGE), strict=True):
        values = [int(row[way]) / 1e6 for way in ways]
        axis.barh(ways, values, left=left, color=colour, edgecolor="white", label=names[row["part"]])
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("million parameters that a rank of two holds")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncol=4, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def loading():
    """Bytes read, and the most memory taken, one rank of R, in both ways."""
    rows = read("loading.csv")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, column, title in zip(
        axes, ("MB read", "MB peak"), ("taken out of the files", "of memory at the most"), strict=True
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


def kv_cache():
    """Tokens a second with each kind of cache, and what of the reserved memory holds nothing."""
    rows = read("kv_cache.csv")
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8))
    four = [row for row in rows if row["requests"] == "these four"]
    names = [row["cache"] for row in four]
    bars = axes[0].barh(names, [float(row["tokens/s"]) for row in four], color=BLUE)
    axes[0].bar_label(bars, fmt=" %.0f", fontsize=8)
    axes[0].set_title("tokens/s, four requests", fontsize=10)
    chat = [row for row in rows if row["requests"] == "chat"]
    fits = next(key for key in rows[0] if key.startswith("run at once"))
    waste = [float(row["waste %"]) for row in chat]
    axes[1].barh([row["cache"] for row in chat], waste, color=ORANGE)
    for y, (row, value) in enumerate(zip(chat, waste, strict=True)):
        inside = value > 50
        label = f" {row['waste %']} %, {row[fits]} requests "
        axes[1].text(
            value,
            y,
            label,
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else "black",
        )
    axes[1].set_xlim(0, 100)
    axes[1].set_title(f"wasted slots, and how many requests {fits}", fontsize=10)
    axes[1].set_xticks([0, 50, 100], ["0", "50 %", "100 %"])
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"the bundled model, {rows[0]['device']}, {rows[0]['date']}", fontsize=8, y=-0.02)
    figure.tight_layout()
    return figure


def blocks():
    """Who holds which block, moment by moment."""
    rows = read("blocks.csv")
    moments = list(dict.fromkeys(row["moment"] for row in rows))
    colours = {"a": BLUE, "b": ORANGE, "c": GREEN, "d": RED, "x": "#8172b3", "": "white"}
    figure, axis = plt.subplots(figsize=(9, 3.8))
    for row in rows:
        x, y, held = moments.index(row["moment"]), int(row["block"]), row["held by"]
        free_but_findable = not held and row["findable"] == "1"
        face = "#404040" if len(held) > 1 else colours[held]
        hatch = "///" if free_but_findable else None
        axis.add_patch(Rectangle((x, y), 0.94, 0.9, facecolor=face, edgecolor=GREY, linewidth=0.6, hatch=hatch))
        axis.text(x + 0.47, y + 0.45, " ".join(held), ha="center", va="center", fontsize=8, color="white")
    axis.set_xlim(-0.05, len(moments))
    axis.set_ylim(10.05, -0.1)
    axis.set_xticks([x + 0.47 for x in range(len(moments))], [m.replace(" ", "\n", 1) for m in moments], fontsize=8)
    axis.set_yticks([y + 0.45 for y in range(10)], range(10), fontsize=8)
    axis.set_ylabel("block")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    handles = [
        Patch(color="#404040", label="held by several"),
        Patch(facecolor="white", edgecolor=GREY, hatch="///", label="free, and still to be found by its hash"),
        Patch(facecolor="white", edgecolor=GREY, label="free"),
    ]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.1), ncol=3, fontsize=8, frameon=False)
    return figure


def batching():
    """The same eight requests, static and continuous, from the engine's trace."""
    rows = read("batching.csv")
    kinds = list(dict.fromkeys(row["batching"] for row in rows))
    looks = {
        "P": (BLUE, "prefilled: its prompt, or what was lost"), "d": (PALE_BLUE, "a token of its answer"),
        "-": (ORANGE, "a token that nobody asked for"), ".": (PALE_GREY, "waits"), "x": (RED, "preempted, waits"),
    }  # fmt: skip
    figure, axes = plt.subplots(len(kinds), 1, figsize=(9, 7.6), sharex=True)
    for axis, kind in zip(axes, kinds, strict=True):
        mine = [row for row in rows if row["batching"] == kind]
        for row in mine:
            colour, _ = looks[row["does"]]
            thin = row["does"] in ".x"
            axis.barh(int(row["request"]), 0.92, 0.25 if thin else 0.8, left=int(row["step"]), color=colour)
        steps = 1 + max(int(row["step"]) for row in mine)
        idle = steps - len({row["step"] for row in mine if row["does"] in "Pd-"})
        waited = f", {idle} of them idle" if idle else ""
        axis.set_title(f"{kind}: the last one ends after {steps} steps{waited}", fontsize=9, loc="left")
        axis.set_yticks(range(8), range(8), fontsize=7)
        axis.set_ylabel("request", fontsize=8)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step, counted from 0")
    handles = [Patch(color=colour, label=name) for colour, name in looks.values()]
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncol=5, fontsize=8, frameon=False)
    return figure


def messages():
    """What a prefill step and a decode step send, message by message."""
    rows = read("messages.csv")
    colours = {"all_reduce": BLUE, "gather": ORANGE, "broadcast": GREEN}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for axis, step in zip(axes, ("prefill", "decode"), strict=True):
        mine = [row for row in rows if row["step"] == step]
        bars = axis.barh(
            range(len(mine)), [int(row["bytes"]) for row in mine], color=[colours[row["op"]] for row in mine]
        )
        axis.bar_label(bars, [f" {int(row['bytes']):,}  {row['shape']}" for row in mine], fontsize=7)
        axis.set_yticks(range(len(mine)), [row["layer"] for row in mine], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 75_000)
        axis.set_xlabel("bytes of the tensor, as one rank hands it over", fontsize=8)
        total = sum(int(row["bytes"]) for row in mine)
        axis.set_title(f"{step}: {len(mine)} messages, {total:,} bytes", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    handles = [Patch(color=colour, label=op) for op, colour in colours.items()]
    figure.legend(handles=handles, loc="lower center", ncol=3, fontsize=8, frameon=False)
    return figure


# --- chapter 7


def overlap_gaps():
    """A decode step of 64 requests: time in which a kernel runs, and time in which none does."""
    rows = [
        row
        for path in sorted(HERE.glob("bench_gpu_[ls]*.csv"))
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
    axis.set_title(f"{rows[0]['device']}, {' and '.join(sorted({row['date'] for row in rows}))}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def prefix():
    """Of what could be found in the cache, how much was; and the speed against no cache."""
    rows = [
        row for row in read("bench_prefix.csv") if row["cache"] == "on" and not row["workload"].startswith("unrelated")
    ]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    kinds = list(dict.fromkeys((row["pool"], row["running at most"], row["policy"]) for row in rows))
    colours = [BLUE, PALE_BLUE, ORANGE, PALE_ORANGE, GREEN, RED]
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


def load_balance():
    """What each policy finds in the replicas' trees, and how much of the work the fullest replica gets."""
    rows = read("load_balance.csv")
    workloads, policies = (list(dict.fromkeys(row[name] for row in rows)) for name in ("workload", "policy"))
    colours = dict(zip(policies, (GREY, PALE_GREY, BLUE, PALE_BLUE, PALE_ORANGE, GREEN, ORANGE), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    for n, workload in enumerate(workloads):
        mine = [row for row in rows if row["workload"] == workload]
        best = float(mine[0]["one tree %"])
        axes[0].plot([best, best], [n - 0.05, n + 0.8], color=RED, linewidth=1, label="one tree" if n == 0 else None)
        for i, row in enumerate(mine):
            at = n + 0.8 * i / len(policies)
            for axis, column in zip(axes, ("hit %", "imbalance"), strict=True):
                label = row["policy"] if n == 0 else None
                axis.barh(at, float(row[column]), 0.75 / len(policies), color=colours[row["policy"]], label=label)
    axes[0].set_yticks([n + 0.35 for n in range(len(workloads))], workloads, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("prompt tokens found, %")
    axes[1].set_xlabel(f"work of the fullest of {rows[0]['replicas']} replicas, in even shares")
    axes[1].axvline(1, color=GREY, linewidth=0.8)
    axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(1.0, -0.13), ncol=4)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{rows[0]['replicas']} replicas of the bundled model, {rows[0]['device']}, {rows[0]['date']}", fontsize=10
    )
    return figure


def control_plane():
    """Microseconds of a decode step that go into deciding and telling, by phase, in both designs, on a CPU and on GPUs."""
    tables = [read("control_plane.csv"), read("control_plane_gpu.csv")]
    heights = [len(rows) for rows in tables]
    figure, axes = plt.subplots(
        2, figsize=(7.5, 0.22 * sum(heights) + 2), gridspec_kw={"height_ratios": heights}, layout="constrained"
    )
    for axis, rows in zip(axes, tables, strict=True):
        _control_plane_of(axis, rows)
    axes[0].legend(fontsize=7)
    figure.supxlabel("us a decode step; broadcast holds the wait for a rank that is behind", fontsize=8)
    return figure


def _control_plane_of(axis, rows):
    phases = [("build", BLUE), ("encode", PALE_BLUE), ("broadcast", ORANGE), ("decode", PALE_ORANGE)]
    left = [0.0] * len(rows)
    for phase, colour in phases:
        values = [float(row[phase]) for row in rows]
        axis.barh(range(len(rows)), values, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    most = min(max(left), 4 * statistics.median(left))  # one step that waited long would make all the others invisible
    for y, (row, end) in enumerate(zip(rows, left, strict=True)):
        said = f" {row['control %']} % of {float(row['step']) / 1e3:,.1f} ms"
        cut = f" ... {end:,.0f} us:" if end > most else ""
        axis.text(min(end, most), y, cut + said, va="center", fontsize=7)
    design = {"rank0": "rank 0 decides", "replicated": "every rank decides"}
    names = [
        f"{row['running']} running, context {int(row['context']):,}: {design[row['control plane']]}" for row in rows
    ]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(f"{rows[0]['model']}, {rows[0]['ranks']} ranks, {rows[0]['device']}, {rows[0]['date']}", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlim(0, most)
    axis.spines[["top", "right"]].set_visible(False)


def all_reduce_cpu():
    """A message of each size through gloo and through shared memory; and a decode step that sends 2L + 1 small ones."""
    rows, steps = read("all_reduce_cpu.csv"), read("all_reduce_decode.csv")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for way, colour in (("gloo", ORANGE), ("shm", BLUE)):
        mine = [row for row in rows if row["way"] == way]
        sizes, low, middle, high = ([float(row[key]) for row in mine] for key in ("bytes", "lowest", "us", "highest"))
        axes[0].fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        axes[0].plot(sizes, middle, color=colour, marker=".", label=way)
        here = [row for row in steps if row["way"] == way]
        y = [i + (0.2 if way == "shm" else -0.2) for i in range(len(here))]
        values = [float(row["ms"]) for row in here]
        ends = [[v - float(r["lowest"]) for v, r in zip(values, here, strict=True)],
                [float(r["highest"]) - v for v, r in zip(values, here, strict=True)]]  # fmt: skip
        axes[1].barh(y, values, 0.38, color=colour, xerr=ends, error_kw={"elinewidth": 0.8})
    axes[0].set(xscale="log", yscale="log", xlabel="bytes of the message", ylabel="us")
    axes[0].legend(fontsize=8)
    names = list(dict.fromkeys(f"{row['step']},\n{row['sums a step']} sums" for row in steps))
    axes[1].set_yticks(range(len(names)), names, fontsize=8)
    axes[1].invert_yaxis()
    axes[1].set_xscale("log")
    axes[1].set_xlabel("ms a decode step: median, lowest and highest round")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['ranks']} ranks on one host, {rows[0]['device']}, {rows[0]['date']}", fontsize=10)
    return figure


# --- experts


def experts_forms():
    """A layer's three forms: how many times as fast as a loop over the experts, by tokens a step. And what has been claimed."""
    panels = {}
    for row in read("experts_forms.csv"):
        shape = f"{row['layer']}\n{row['device']}, {row['threads']} thread, {row['date']}"
        panels.setdefault(shape, {}).setdefault(row["form"], {})[row["tokens"]] = float(row["ms"])
    if (HERE / "experts_kernels.csv").exists():
        for row in read("experts_kernels.csv"):
            forms = panels.setdefault(f"{row['layer']}\n{row['device']}, {row['date']}", {})
            for form in ("loop", "grouped", "triton"):
                forms.setdefault(form, {})[row["tokens"]] = float(row[f"{form} us"])
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.2), squeeze=False, layout="constrained")
    colours = {"loop": GREY, "grouped": BLUE, "triton": GREEN}
    for axis, (shape, forms) in zip(axes[0], panels.items(), strict=True):
        loop = forms["loop"]
        for n, (form, times) in enumerate(forms.items()):
            at = [i + 0.8 * n / len(forms) for i in range(len(loop))]
            axis.bar(
                at, [loop[t] / times[t] for t in loop], 0.75 / len(forms), align="edge", color=colours[form], label=form
            )
        for said, factor in (("claimed: packed", 2.5), ("claimed: fused", 4.0)):
            axis.axhline(factor, color=RED, linewidth=0.8, linestyle="--")
            if axis is axes[0][0]:  # where no bar is as high
                axis.text(len(loop), factor, said, fontsize=7, color=RED, va="bottom", ha="right")
        axis.set_xticks([i + 0.4 for i in range(len(loop))], loop)
        axis.set_yscale("log")
        axis.set_yticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
        axis.minorticks_off()
        axis.set_ylim(0.7, 120)
        axis.set_xlabel("tokens a step")
        axis.set_title(shape, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("times as fast as the loop")
    axes[0][-1].legend(fontsize=7, loc="upper right")
    return figure


def hot_experts():
    """Rows of four ranks in each layer: experts in order of their numbers, and placed by load; without copies and with."""
    rows = read("hot_experts.csv")
    cases = list(dict.fromkeys((row["copies"], row["placement"]) for row in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(11, 2.9), sharey=True, layout="constrained")
    for axis, (copies, placement) in zip(axes, cases, strict=True):
        mine = [row for row in rows if (row["copies"], row["placement"]) == (copies, placement)]
        layers = list(dict.fromkeys(row["layer"] for row in mine))
        even = []
        for n, layer in enumerate(layers):
            loads = [int(row["rows"]) for row in mine if row["layer"] == layer]
            waits = [BLUE if load < max(loads) else RED for load in loads]
            axis.bar([n + 0.21 * (rank - 1.5) for rank in range(len(loads))], loads, 0.19, color=waits)
            even.append(statistics.mean(loads) / max(loads))
        axis.axhline(statistics.mean(int(row["rows"]) for row in mine), color="black", linewidth=0.8, linestyle="--")
        slots = "no copies" if copies == "0" else f"{copies} copies"
        axis.set_title(f"{slots}, placed {placement}\nmean / max {statistics.mean(even):.2f}", fontsize=9)
        axis.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8)
        axis.tick_params(axis="x", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rows that a rank computes")
    handles = [Patch(color=RED, label="the rank that all wait for"), Patch(color=BLUE, label="the others")]
    figure.legend(handles=handles, loc="outside lower center", ncol=2, fontsize=8, frameon=False)
    return figure


def cache_bytes():
    """Bytes of a token in the cache, by model; and how many times the ranks that cut the heads hold it together."""
    rows = read("cache_bytes.csv")
    colours = {"MHA": GREY, "GQA": BLUE, "MLA": ORANGE}
    alone = [row for row in rows if row["ranks"] == "1"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(3, 2), layout="constrained")
    bars = left.barh(
        [row["model"] for row in alone],
        [int(row["on a rank"]) for row in alone],
        color=[colours[row["kind"]] for row in alone],
    )
    left.bar_label(bars, [f"{int(row['on a rank']):,}" for row in alone], fontsize=7, padding=2)
    left.set_xscale("log")
    left.set_xlim(200, 2e6)
    left.set_xticks([1e3, 1e4, 1e5, 1e6], ["1,000", "10,000", "100,000", "1,000,000"])
    left.invert_yaxis()
    left.set_xlabel("bytes of a token in all layers, bfloat16")
    ranks = [int(row["ranks"]) for row in rows if row["model"] == alone[0]["model"]]
    for name, shift in (("DeepSeek-V3", 1.03), ("Qwen3-30B-A3B", 1), ("Llama-3.1-70B", 0.97)):
        mine = [row for row in rows if row["model"] == name]
        copies = [
            shift * int(row["on all"]) / int(mine[0]["on all"]) for row in mine
        ]  # shifted: one would hide the other
        right.plot(ranks, copies, "o-", markersize=4, color=colours[mine[0]["kind"]])
        right.text(ranks[-1] * 1.08, copies[-1], name, fontsize=8, va="center")
    for scale in (right.set_xscale, right.set_yscale):
        scale("log", base=2)
    right.set_xticks(ranks, ranks)
    right.set_yticks(ranks, ranks)
    right.set_xlim(0.9, 26)
    right.set_xlabel("ranks that cut the heads")
    right.set_ylabel("copies of a token on all of them")
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(
        handles=[Patch(color=c, label=kind) for kind, c in colours.items()],
        fontsize=8,
        frameon=False,
        loc="lower right",
    )
    return figure


# --- what messages cost


def links():
    """Operations by size, measured, and the cost model's line through them: a link an operation and number of ranks."""
    rows = read("links.csv")
    sizes = list(dict.fromkeys(row["ranks"] for row in rows))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    colours = dict(zip(ops, (BLUE, ORANGE, GREEN, RED, GREY, PALE_BLUE, PALE_ORANGE, "black"), strict=True))
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(3.6 * len(sizes) + 1, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, ranks in zip(axes[0], sizes, strict=True):
        errors = []
        for op in ops:
            samples = [
                Sample(op, int(ranks), int(row["bytes"]), float(row["us"]))
                for row in rows
                if (row["op"], row["ranks"]) == (op, ranks)
            ]
            link, nbytes = Link.fit(samples), [sample.nbytes for sample in samples]
            errors.append(link.error(samples))
            axis.plot(nbytes, [s.seconds for s in samples], "o", color=colours[op], markersize=4)
            axis.plot(
                nbytes, [link.seconds(op, n, int(ranks)) for n in nbytes], color=colours[op], linewidth=1, label=op
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([2**k for k in (8, 12, 16, 20)], ["256 B", "4 KiB", "64 KiB", "1 MiB"], fontsize=8)
        axis.set_title(
            f"R = {ranks}: the model is off by {100 * min(errors):.0f} to {100 * max(errors):.0f} %", fontsize=9
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("us, measured (dots) and modelled (lines)", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel(
        f"bytes of a rank's tensor; {rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['date']}", fontsize=8
    )
    return figure


def world():
    """tp x pp x dp is a box: a rank is a corner, a group an edge in its kind's direction, and a replica a face."""
    rows = read("world.csv")
    at = {row["rank"]: (4.4 * int(row["tp"]) + 2 * int(row["replica"]), int(row["replica"]) - 2.6 * int(row["stage"]))
          for row in rows}  # fmt: skip
    kinds = {
        "tp": (BLUE, "-", "tp group: two sums a layer"), "pp": (ORANGE, "-", "pp group: one message a step"),
        "dp": (GREEN, (0, (2, 1.5)), "dp group: no message"),
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(7, 4.4))
    for replica, colour in (("1", "#ededed"), ("0", "#f8f8f8")):  # the one behind first
        stages = [[at[r["rank"]] for r in rows if (r["replica"], r["stage"]) == (replica, stage)] for stage in "01"]
        face = [*stages[0], *reversed(stages[1])]
        axis.add_patch(Polygon(face, facecolor=colour, edgecolor="none", alpha=0.75))
        for kind, (edge, style, _) in kinds.items():
            for group in dict.fromkeys(row[f"{kind} group"] for row in rows if row["replica"] == replica):
                axis.plot(*zip(*(at[rank] for rank in group.split()), strict=True), color=edge, ls=style, lw=3)
    for row in rows:
        x, y = at[row["rank"]]
        axis.text(x, y, row["rank"], ha="center", va="center", fontsize=12, color="white", weight="bold", zorder=3,
                  bbox={"boxstyle": "circle,pad=0.35", "facecolor": "#404040", "edgecolor": "white"})  # fmt: skip
    for replica, rank, above in (("0", "2", False), ("1", "4", True)):
        (members,) = {row["replica group"] for row in rows if row["replica"] == replica}
        x, y = at[rank]
        said = f"replica {replica}: ranks {members}"
        axis.text(
            x + 2.2, y + (0.3 if above else -0.3), said, ha="center", va="bottom" if above else "top", fontsize=10
        )
    for stage, rank in (("0", "0"), ("1", "2")):
        x, y = at[rank]
        axis.text(x - 0.5, y, f"stage {stage}", ha="right", va="center", fontsize=10)
    lines = [plt.Line2D([], [], color=colour, ls=style, lw=3, label=said) for colour, style, said in kinds.values()]
    figure.legend(handles=lines, loc="lower center", ncols=3, fontsize=9, frameon=False)
    axis.set_aspect("equal")
    axis.axis("off")
    return figure


def pipeline():
    """When each stage computes which micro-batch: measured, and the schedules of training, computed."""
    rows = read("pipeline.csv")
    panels = list(dict.fromkeys((row["kind"], row["micro-batches"]) for row in rows))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 1.35 * len(panels)), layout="constrained")
    colours = (BLUE, ORANGE, GREEN, RED)
    for axis, (kind, m) in zip(axes, panels, strict=True):
        mine = [row for row in rows if (row["kind"], row["micro-batches"]) == (kind, m)]
        stages, end = 1 + max(int(row["stage"]) for row in mine), max(float(row["end"]) for row in mine)
        busy = 0.0
        for row in mine:
            start, length = float(row["start"]), float(row["end"]) - float(row["start"])
            busy += length
            hatch = "//" if row["what"] == "backward" else None
            face = colours[int(row["micro_batch"])]
            axis.barh(-int(row["stage"]), length, left=start, height=0.85, color=face, edgecolor="white", hatch=hatch)
            if length > end / 40:
                axis.text(
                    start + length / 2, -int(row["stage"]), row["micro_batch"], ha="center", va="center", color="white"
                )
        axis.set_yticks([-stage for stage in range(stages)], [f"stage {stage}" for stage in range(stages)], fontsize=8)
        axis.set_xlim(0, end)
        axis.tick_params(axis="x", labelsize=7)
        measured = kind == "measured"
        bubble, formula = 1 - busy / (stages * end), (stages - 1) / (int(m) + stages - 1)
        said = f"{kind}, {m} micro-batch(es): {bubble:.0%} bubble"
        axis.set_title(f"{said}, (N-1)/(m+N-1) = {formula:.0%}; ms" if measured else f"{said}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    kinds = [Patch(facecolor=BLUE, hatch=hatch, edgecolor="white", label=what) for what, hatch in (
        ("forward (its number: the micro-batch)", None), ("backward, which training has and serving has not", "//"),
    )]  # fmt: skip
    figure.legend(handles=kinds, loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    return figure


# --- two engines, or one


def disaggregation():
    return two_engines(HERE / "disaggregation.csv")


def disaggregation_gpu():
    return two_engines(HERE / "disaggregation_gpu.csv")


def two_engines(path: Path):
    """What those who run feel of long prompts, and what the prompts pay: one engine, two of them, two that share the work.

    A line of pictures for each rate at which prompts come, each with a scale of its own.
    """
    rows = read(path.resolve())
    names = list(dict.fromkeys(row["contender"] for row in rows))
    prompts = list(dict.fromkeys(row["prompt_tokens"] for row in rows))
    rates = list(dict.fromkeys(row["every_s"] for row in rows))
    figure, grid = plt.subplots(
        len(rates), 2, figsize=(9, 0.9 + 2.3 * len(rates)), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, rate in zip(grid, rates, strict=True):
        for i, (name, colour) in enumerate(zip(names, (ORANGE, GREY, BLUE), strict=False)):
            mine = [row for row in rows if (row["contender"], row["every_s"]) == (name, rate)]
            x = [prompts.index(row["prompt_tokens"]) + 0.27 * (i - (len(names) - 1) / 2) for row in mine]
            low, middle, high, first = ([float(row[key]) for row in mine] for key in
                                        ("itl_p99_lowest_ms", "itl_p99_ms", "itl_p99_highest_ms", "ttft_median_ms"))  # fmt: skip
            ends = [
                [max(m - a, 0) for m, a in zip(middle, low, strict=True)],
                [max(b - m, 0) for m, b in zip(middle, high, strict=True)],
            ]
            axes[0].bar(x, middle, 0.25, color=colour, yerr=ends, error_kw={"elinewidth": 0.8})
            axes[1].bar(x, first, 0.25, color=colour, label=name)
            if "ttft_model_ms" in rows[0]:
                said = {"marker": "_", "s": 90, "linewidths": 2, "color": "black", "zorder": 3}
                axes[0].scatter(x, [float(row["itl_p99_model_ms"]) for row in mine], **said)
                axes[1].scatter(
                    x, [float(row["ttft_model_ms"]) for row in mine], **said, label="" if i else "the model"
                )
        axes[0].set_ylabel(f"a prompt every {rate} s", fontsize=9)
        for axis in axes:
            axis.set_xticks(range(len(prompts)), prompts)
            axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_title("ms between tokens of who runs, p99 (line: lowest and highest round)", fontsize=9)
    grid[0][1].set_title("ms to the first token of the prompts that come, median", fontsize=9)
    grid[0][1].legend(fontsize=8, loc="upper left")
    for axis in grid[-1]:
        axis.set_xlabel("tokens of the prompts that come in")
    one = rows[0]
    load = f"{one['streams']} answers, chunks of {one['chunk']}"
    figure.suptitle(f"{one.get('model', 'bundled model')}, {load}; {one['device']}, {one['date']}", fontsize=10)
    return figure


def speculation():
    """Each drafter's speed against plain decoding as the batch grows, on three kinds of text."""
    rows = read("speculation.csv")
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))[1:]
    figure, axes = plt.subplots(1, len(workloads), figsize=(10, 3.2), sharey=True, layout="constrained")
    titles = {"new": "new questions", "quoted": "the answer was said before", "again": "others have asked it"}
    for axis, workload in zip(axes, workloads, strict=True):
        for name, colour in zip(names, (GREY, GREEN, ORANGE, RED, BLUE), strict=False):
            mine = [row for row in rows if (row["workload"], row["contender"]) == (workload, name)]
            x = [int(row["batch"]) for row in mine]
            axis.plot(
                x, [float(row["times_plain"]) for row in mine], marker="o", markersize=4, color=colour, label=name
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, x)
        axis.set_xlabel("requests at once")
        axis.set_title(titles[workload], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("times the speed of plain decoding")
    axes[0].legend(fontsize=8, loc="upper right")
    figure.suptitle(f"bundled model on one CPU core, computing time, {rows[0]['date']}", fontsize=10)
    return figure


def quantization_kv():
    """What each dtype of the pages holds in the same memory, and how far it moves the model's distributions."""
    rows = read("quantization_kv.csv")
    names = [row["kv_cache_dtype"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
    held = axes[0].barh(names, [int(row["tokens_in_1_MiB"]) for row in rows], color=BLUE)
    axes[0].bar_label(held, fmt=" {:,.0f}", fontsize=8)
    axes[0].set_xlim(0, 1.15 * max(int(row["tokens_in_1_MiB"]) for row in rows))
    axes[0].set_title("tokens in 1 MiB of pages", fontsize=10)
    off = [row for row in rows if float(row["kl_mean"]) > 0]
    axes[1].barh([row["kv_cache_dtype"] for row in off], [float(row["kl_mean"]) for row in off], color=ORANGE)
    for y, row in enumerate(off):
        said = f" {float(row['kl_mean']):.1e}, {row['exact']} of {row['asked']} answers exact"
        axes[1].text(float(row["kl_mean"]), y, said, va="center", fontsize=8)
    axes[1].set_xscale("log")
    axes[1].set_xlim(min(float(row["kl_mean"]) for row in off) / 3, 1e3 * max(float(row["kl_mean"]) for row in off))
    axes[1].set_title("KL(float32 || this), nats a token of the answers", fontsize=10)
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"the bundled model, weights in float32, {rows[0]['device']}, {rows[0]['date']}", fontsize=8)
    return figure


def quantization():
    """What the files of the bundled model weigh in each format, and how far its distributions and answers move."""
    rows = [row for row in read("quantization.csv") if row["name"] != "float32"]
    names = [row["name"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    sizes = [int(row["file_bytes"]) / 1e6 for row in rows]
    axes[0].bar_label(axes[0].barh(names, sizes, color=BLUE), fmt=" {:.2f}", fontsize=8)
    axes[0].set_xlim(0, 1.15 * max(sizes))
    axes[0].set_title("MB of files; 1.6 of them are the embedding", fontsize=10)
    off = [float(row["kl_mean"]) for row in rows]
    axes[1].barh(names, off, color=ORANGE)
    for y, (row, far) in enumerate(zip(rows, off, strict=True)):
        axes[1].text(far, y, f" {far:.1e}, {row['exact']} of {row['asked']} answers exact", va="center", fontsize=8)
    axes[1].set_xscale("log")
    axes[1].set_xlim(min(off) / 3, 1e3 * max(off))
    axes[1].set_yticks([])
    axes[1].set_title("KL(float32 || this), nats a token of the answers", fontsize=10)
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"the bundled model, {rows[0]['device']}, {rows[0]['date']}", fontsize=8)
    return figure


FIGURES: tuple[Callable, ...] = (
    toy_split, parallel_layers, heads, two_ways, loading, kv_cache, blocks, batching, messages,
    overlap_gaps, prefix, load_balance, control_plane, all_reduce_cpu, experts_forms, hot_experts, cache_bytes, links, pipeline,
    world, disaggregation, speculation, quantization, quantization_kv,
    *((disaggregation_gpu,) if (HERE / "disaggregation_gpu.csv").exists() else ()),
)  # fmt: skip

if __name__ == "__main__":
    main()
