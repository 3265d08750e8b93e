"""What the README shows is what comes out."""

import csv
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_benchmark_table_is_the_csv():
    block = re.search(r"<!-- bench_cpu -->(.*?)<!-- /bench_cpu -->", README, re.DOTALL).group(1)
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()[2:]]
    with (ROOT / "figures" / "bench_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = []
    for workload in "abc":
        mine = {row["contender"]: row for row in rows if row["workload"] == workload}
        peers = [mine[f"transformers {name}"] for name in ("generate", "generate_batch")]
        expected.append([
            workload,
            f"{int(mine['this engine']['tokens_per_second']):,}",
            *(f"{int(peer['tokens_per_second']):,} ({float(peer['engine_is_faster_by']):.1f}x)" for peer in peers),
        ])  # fmt: skip
    assert shown == expected
    assert all(row["date"] in README for row in rows)


def test_the_table_of_real_shapes_is_the_csv():
    block = re.search(r"<!-- bench_cpu_real -->(.*?)<!-- /bench_cpu_real -->", README, re.DOTALL).group(1)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()[2:]]
    rows = rows_of("bench_cpu_real.csv")
    assert [tuple(line[:3]) for line in lines] == list(
        dict.fromkeys((r["model"], r["dtype"], r["cores"]) for r in rows)
    )
    for *where, one, eight, many, mixed in lines:
        for batch, cell in {"1": one, "8": eight, "32": many, "mixed": mixed}.items():
            of = {
                r["contender"]: r for r in rows if [r["model"], r["dtype"], r["cores"], r["batch"]] == [*where, batch]
            }
            if not of:
                assert cell == ""
                continue
            ours, peer = of["this engine"], of["transformers generate"]
            assert cell.startswith(f"{float(ours['tokens_per_second']):,.0f}")
            assert cell.endswith(f", {float(peer['engine_is_faster_by']):.1f}x")
            if batch == "1":
                assert f"({float(ours['memory_allows']):,.0f})" in cell


def test_the_gpu_table_is_the_csvs():
    block = re.search(r"<!-- bench_gpu -->(.*?)<!-- /bench_gpu -->", README, re.DOTALL).group(1)
    rows = []
    for path in sorted((ROOT / "figures").glob("bench_gpu_[ls]*.csv")):
        with path.open() as file:
            rows += list(csv.DictReader(file))
    shown = block.strip().splitlines()[2:]
    assert len(shown) == 10
    for line in shown:
        workload, model, ranks, said = (cell.strip() for cell in line.strip("|").split("|"))
        metrics = ("ms per token",) if "ms" in said else ("tokens/s", "tokens/s run 2")
        (row,) = [
            row for row in rows
            if (row["workload"], row["model"], row["ranks"]) == (workload, model, ranks) and row["metric"] in metrics
        ]  # fmt: skip
        value = float(row["value"])
        assert said == (f"{value:.3f} ms a token" if "ms" in said else f"{value:,.0f} tokens/s")
        assert row["date"] in README


def test_the_first_tokens_of_a_quiet_host_are_the_csv_s():
    text = (ROOT / "ch07_sglang_radix/README.md").read_text(encoding="utf-8")
    with (ROOT / "figures/bench_gpu_first.csv").open() as file:
        of = {(row["model"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    models, late = ("Qwen2.5-0.5B", "Qwen3-0.6B", "Qwen2.5-7B"), []
    for length in (16, 128, 512):
        cells = []
        for model, which in itertools.product(models, ("new", "again")):
            median, tail = (of[model, f"F {length} {which}, {name} ms"] for name in ("median", "p99"))
            cells.append(f"{median:.2f} ({tail:.2f})")
            late += [(model, length, which)] if tail > 1.5 * median else []
        assert f"| {length} | {' | '.join(cells)} |" in text
    assert late == [("Qwen2.5-0.5B", 16, "again")]


def test_every_link_leads_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("c*/README.md"), ROOT / "common/tiny_qwen/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets | {"it"}


CHAPTER_7 = (ROOT / "ch07_sglang_radix" / "README.md").read_text(encoding="utf-8")


def rows_of(name):
    with (ROOT / "figures" / name).open() as file:
        return list(csv.DictReader(file))


def test_the_table_of_claims_is_the_csv():
    rows = rows_of("claims.csv")
    for row in rows:
        line = f"| {row['claim']} | {row['experiment']} | {row['measured']} | {row['true here']} |"
        assert line in CHAPTER_7
        assert row["date"] in CHAPTER_7
    assert len(rows) == 9


def test_the_table_of_prefixes_is_the_csv():
    rows = [row for row in rows_of("bench_prefix.csv") if row["cache"] == "on" and row["running at most"] == "256"]
    workloads = list(dict.fromkeys(r["workload"] for r in rows if not r["workload"].startswith("unrelated")))
    assert len(workloads) == 6
    for workload in workloads:
        of = {(r["pool"], r["policy"]): r for r in rows if r["workload"] == workload}
        large, fcfs, lpm = of["large", "lpm"], of["limited", "fcfs"], of["limited", "lpm"]
        found = " | ".join(f"{float(row['of reachable %']):.1f}" for row in (large, fcfs, lpm))
        line = f"| {workload} | {float(large['reachable %']):.1f} | {found} | {float(large['times off']):.1f}x |"
        assert line in CHAPTER_7, line


def test_the_control_plane_s_share_is_the_csv_s():
    rows = [row for row in rows_of("control_plane.csv") if row["control plane"] == "rank0"]
    worst = max(float(row["control %"]) for row in rows)
    assert f"at most {worst:.2f} % of a step" in CHAPTER_7
