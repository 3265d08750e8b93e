"""What the README shows is what comes out."""

import csv
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


def test_the_gpu_table_is_the_csvs():
    block = re.search(r"<!-- bench_gpu -->(.*?)<!-- /bench_gpu -->", README, re.DOTALL).group(1)
    rows = []
    for path in sorted((ROOT / "figures").glob("bench_gpu_*.csv")):
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


def test_every_link_leads_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("c*/README.md"), ROOT / "common/tiny_qwen/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets | {"it"}
